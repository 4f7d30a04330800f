//go:build linux && !portable

package disk

import (
	"errors"
	"io/fs"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Reading is what every system has of this package: see portable.go.

// Info is what is known of an object.
type Info struct {
	Mode    fs.FileMode // type and permissions
	Size    int64
	Stored  int64 // bytes that the disk has for it
	Links   uint64
	ModTime time.Time
}

// OpenFile opens the entry of a directory for reading; it is no symlink.
func (d *Disk) OpenFile(dir int, name string) (int, error) {
	return d.Open(dir, name, unix.O_RDONLY|FileFlags, 0)
}

// OpenDir opens the directory with a path below another one; no part of the path may be a symlink.
func (d *Disk) OpenDir(dir int, path string) (int, error) {
	return d.OpenBelow(dir, path, unix.O_RDONLY|unix.O_DIRECTORY)
}

// OpenFileBelow opens the file with a path below a directory for reading; no part of the path may be a
// symlink.
func (d *Disk) OpenFileBelow(dir int, path string) (int, error) {
	return d.OpenBelow(dir, path, unix.O_RDONLY)
}

// OpenFilePath opens a file for reading by a path that the user gave.
func (d *Disk) OpenFilePath(path string) (int, error) {
	return d.OpenPath(path, unix.O_RDONLY|unix.O_NONBLOCK)
}

// Info returns what is known of an open object.
func (d *Disk) Info(fd int) (Info, error) {
	var st unix.Stat_t
	err := d.Fstat(fd, &st)
	return infoOf(&st), err
}

// InfoAt returns what is known of an entry of a directory. It does not follow a symlink.
func (d *Disk) InfoAt(dir int, name string) (Info, error) {
	var st unix.Stat_t
	err := d.Stat(dir, name, &st)
	return infoOf(&st), err
}

// Has reports whether a directory has an entry, as far as this host knows the directory.
func (d *Disk) Has(dir int, name string) bool {
	d.sees("statx")
	const flags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_STATX_DONT_SYNC
	var x unix.Statx_t
	return again(func() error { return unix.Statx(dir, name, flags, 0, &x) }) == nil
}

// infoOf gives a mode the form of package os.
func infoOf(st *unix.Stat_t) Info {
	mode := fs.FileMode(st.Mode & 0o777)
	if st.Mode&unix.S_ISUID != 0 {
		mode |= fs.ModeSetuid
	}
	if st.Mode&unix.S_ISGID != 0 {
		mode |= fs.ModeSetgid
	}
	if st.Mode&unix.S_ISVTX != 0 {
		mode |= fs.ModeSticky
	}
	mode |= typeModes[st.Mode&unix.S_IFMT]
	return Info{mode, st.Size, st.Blocks * 512, uint64(st.Nlink), time.Unix(st.Mtim.Unix())}
}

var typeModes = map[uint32]fs.FileMode{unix.S_IFDIR: fs.ModeDir, unix.S_IFLNK: fs.ModeSymlink, unix.S_IFIFO: fs.ModeNamedPipe,
	unix.S_IFSOCK: fs.ModeSocket, unix.S_IFBLK: fs.ModeDevice, unix.S_IFCHR: fs.ModeDevice | fs.ModeCharDevice}

// NextData returns where the next data of a file begins, at off or behind it; [End] if there is
// none.
func (d *Disk) NextData(fd int, off int64) (int64, error) {
	at, err := d.Seek(fd, off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return End, nil
	}
	return at, err
}

// NextHole returns where the next hole of a file begins, at off or behind it.
func (d *Disk) NextHole(fd int, off int64) (int64, error) { return d.Seek(fd, off, unix.SEEK_HOLE) }

// TypeOf returns the type of an entry, 0 if it cannot be told.
func (d *Disk) TypeOf(dir int, e Dirent) uint32 {
	if e.Type != 0 {
		return e.Type
	}
	var st unix.Stat_t
	if d.Stat(dir, e.Name, &st) != nil {
		return 0
	}
	return st.Mode & unix.S_IFMT
}

// NotSymlink reports whether Readlink has failed since the entry is no symlink.
func NotSymlink(err error) bool { return errors.Is(err, syscall.EINVAL) }
