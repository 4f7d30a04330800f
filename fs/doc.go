// Package fs serves a volume by FUSE: it reads the kernel's requests from the
// device, and translates them into calls of package volume and their errors into
// errnos. It also mounts and unmounts, and counts requests.
//
// go-fuse decodes and encodes (its raw interface, since the node API hides the
// umask and the flags by which the kernel asks to drop setuid bits); the loop
// that reads is our own, for its speed.
package fs
