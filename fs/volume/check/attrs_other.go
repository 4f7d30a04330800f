//go:build !linux || portable

package check

import (
	"context"

	"kmsfs/fs/volume/internal/disk"
)

// hasWriter reports whether a mount is writing to the volume now: nothing is mounted here.
func (c *checker) hasWriter() bool { return false }

// checkAttrs checks nothing: extended attributes are Linux's.
func (c *checker) checkAttrs(int, disk.Dirent, checkJob) {}

// leaseToRead reports that no lock is to be had here.
func (c *checker) leaseToRead(context.Context, int) bool { return false }
