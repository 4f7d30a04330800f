// Package fs serves a volume by FUSE: it translates go-fuse's raw requests into
// calls of package volume and their errors into errnos, and nothing else.
//
// It uses the raw interface, since go-fuse's node API hides the umask and the
// flags by which the kernel asks to drop setuid bits.
package fs
