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

// refresh makes this host see the entries that the root has now, where another host made them.
func refresh(d *disk.Disk, root int) {
	var st unix.Stat_t
	d.FstatFresh(root, &st)
}
