//go:build !linux || portable

package layout

import "kmsfs/fs/volume/internal/disk"

// refresh does nothing: no other host writes.
func refresh(*disk.Disk, int) {}
