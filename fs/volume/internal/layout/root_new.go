//go:build linux && !portable

package layout

import (
	"golang.org/x/sys/unix"

	"kmsfs/fs/volume/internal/disk"
)

// MakeRootEntries makes kmsfs.lock and kmsfs.links in a volume that has no kmsfs.lock: a new
// one, or one of an earlier version.
func MakeRootEntries(d *disk.Disk, root int) error {
	if err := makeLock(d, root); err != nil {
		return err
	}
	return disk.Ignore(d.Symlink(LinksTarget, root, LinksName), unix.EEXIST)
}
