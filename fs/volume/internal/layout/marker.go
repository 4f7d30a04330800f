package layout

import (
	"errors"
	"io/fs"

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
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case vk == nil:
		return blockcrypt.ParseMarker(target)
	}
	return vk.OpenMarker(target)
}
