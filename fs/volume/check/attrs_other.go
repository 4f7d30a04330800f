//go:build !linux || portable

package check

import "kmsfs/fs/volume/internal/disk"

// hasWriter reports whether a mount is writing to the volume now: nothing is mounted here.
func (c *checker) hasWriter() bool { return false }

// checkAttrs checks nothing: extended attributes are Linux's.
func (c *checker) checkAttrs(int, disk.Dirent, checkJob) {}
