//go:build !linux || portable

package layout

import "kmsfs/fs/volume/internal/disk"

// refresh does nothing: no other host writes.
func refresh(*disk.Disk, int) {}

// hostLocked reports nothing: no lock is seen here.
func hostLocked(*disk.Disk, int) bool { return false }
