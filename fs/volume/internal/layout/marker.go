package layout

import (
	"errors"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// MarkerName is a symlink in the root. Its target names the sessions that are not known to have
// ended well.
const MarkerName = "kmsfs.mounted"

// ReadMarker returns the sessions that the marker names, none if there is no marker. Without vk
// they are not authenticated. An error that has a class of damage says that the marker is damaged.
func ReadMarker(d *disk.Disk, root int, vk *blockcrypt.VolumeKeys) ([]uint64, error) {
	target, err := d.Readlink(root, MarkerName)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, nil
	case err != nil:
		return nil, err
	case vk == nil:
		return blockcrypt.ParseMarker(target)
	}
	return vk.OpenMarker(target)
}

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
