//go:build linux && !portable

package layout

import (
	"errors"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// NewDirID gives an ID to a directory that has none.
func NewDirID(d *disk.Disk, fd int) (id blockcrypt.ID, err error) {
	id = blockcrypt.NewID()
	if err := d.Symlink(id.String(), fd, DirLink); err != nil {
		return id, err // EEXIST: it has one by now
	}
	return id, nameDirID(d, fd, id)
}

// MendDirID makes the place of a directory's ID that is lost.
func MendDirID(d *disk.Disk, fd int, id blockcrypt.ID) error {
	if err := disk.Ignore(d.Symlink(id.String(), fd, DirLink), unix.EEXIST); err != nil {
		return err
	}
	return nameDirID(d, fd, id)
}

// nameDirID makes the second place of an ID, unless it exists. If the daemon is root's, both get
// the owner of the directory: the next mount can be that user's.
func nameDirID(d *disk.Disk, fd int, id blockcrypt.ID) error {
	name := DirLink + "." + id.String()
	err := disk.Ignore(d.Mknod(fd, name, unix.S_IFREG|0o444, 0), unix.EEXIST)
	if err != nil || unix.Geteuid() != 0 {
		return err
	}
	var st unix.Stat_t
	if err := d.Fstat(fd, &st); err != nil || st.Uid == 0 {
		return err
	}
	return errors.Join(
		d.ChownAt(fd, DirLink, int(st.Uid), int(st.Gid)),
		d.ChownAt(fd, name, int(st.Uid), int(st.Gid)))
}
