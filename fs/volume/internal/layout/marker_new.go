//go:build linux && !portable

package layout

import (
	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// ReplaceMarker makes durable that the marker names these sessions; without any there is none.
func ReplaceMarker(d *disk.Disk, root int, vk *blockcrypt.VolumeKeys, sessions []uint64) error {
	if len(sessions) == 0 {
		if err := disk.Ignore(d.Unlink(root, MarkerName, 0), unix.ENOENT); err != nil {
			return err
		}
		return d.Fsync(root)
	}
	const tmp = MarkerName + ".new"
	if err := disk.Ignore(d.Unlink(root, tmp, 0), unix.ENOENT); err != nil {
		return err
	}
	if err := d.Symlink(vk.SealMarker(sessions), root, tmp); err != nil {
		return err
	}
	if err := d.Rename(root, tmp, root, MarkerName, 0); err != nil {
		return err
	}
	return d.Fsync(root)
}
