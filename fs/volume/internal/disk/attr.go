//go:build linux && !portable

package disk

import (
	"hash/fnv"
	"unsafe"

	"golang.org/x/sys/unix"
)

func (d *Disk) Statfs(fd int) (s unix.Statfs_t, err error) {
	d.sees("fstatfs")
	err = again(func() error { return unix.Fstatfs(fd, &s) })
	return s, err
}

// Access is access(2) by the daemon's real user, of an object that is open.
func (d *Disk) Access(fd int, mask uint32) error {
	d.sees("access")
	return again(func() error { return unix.Access(procFD(fd), mask) })
}

func (d *Disk) Stat(dir int, name string, st *unix.Stat_t) error {
	if d.Fresh {
		return d.statx(dir, name, st)
	}
	return d.StatKnown(dir, name, st)
}

// StatKnown is Stat that believes what this host knows.
func (d *Disk) StatKnown(dir int, name string, st *unix.Stat_t) error {
	d.sees("fstatat")
	return again(func() error { return unix.Fstatat(dir, name, st, unix.AT_SYMLINK_NOFOLLOW) })
}

func (d *Disk) Fstat(fd int, st *unix.Stat_t) error {
	d.sees("fstat")
	return again(func() error { return unix.Fstat(fd, st) })
}

// FstatFresh is Fstat that asks the filesystem itself, and not its cache on this host.
func (d *Disk) FstatFresh(fd int, st *unix.Stat_t) error { return d.statx(fd, "", st) }

// StatFresh is Stat that asks the filesystem itself, and not its cache on this host.
func (d *Disk) StatFresh(dir int, name string, st *unix.Stat_t) error { return d.statx(dir, name, st) }

// Handle returns a number for the object at an entry, or of the descriptor itself if name is "", which another object with the same inode number
// does not have: of its file handle. It is 0 where the filesystem has none.
func (d *Disk) Handle(dir int, name string) uint64 {
	d.sees("name_to_handle_at")
	h, _, err := unix.NameToHandleAt(dir, name, unix.AT_EMPTY_PATH)
	if err != nil {
		return 0
	}
	sum := fnv.New64a()
	sum.Write(h.Bytes())
	return sum.Sum64()
}

// statx is stat of an entry of a directory, or of the object of a descriptor, as the filesystem itself
// has it.
func (d *Disk) statx(dir int, name string, st *unix.Stat_t) error {
	d.sees("statx")
	const flags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_EMPTY_PATH | unix.AT_STATX_FORCE_SYNC
	var x unix.Statx_t
	err := again(func() error { return unix.Statx(dir, name, flags, unix.STATX_BASIC_STATS, &x) })
	if err != nil {
		return err
	}
	spec := func(t unix.StatxTimestamp) unix.Timespec { return unix.Timespec{Sec: t.Sec, Nsec: int64(t.Nsec)} }
	*st = unix.Stat_t{
		Dev: unix.Mkdev(x.Dev_major, x.Dev_minor), Ino: x.Ino, Mode: uint32(x.Mode), Uid: x.Uid, Gid: x.Gid,
		Rdev: unix.Mkdev(x.Rdev_major, x.Rdev_minor), Size: int64(x.Size), Blocks: int64(x.Blocks),
		Atim: spec(x.Atime), Mtim: spec(x.Mtime), Ctim: spec(x.Ctime),
	}
	setWidths(st, &x)
	return nil
}

func (d *Disk) Chmod(fd int, mode uint32) error {
	return d.do(Call{Op: "fchmod", FD: fd, Mode: mode}, func() error {
		return unix.Chmod(procFD(fd), mode)
	})
}

func (d *Disk) Chown(fd, uid, gid int) error {
	return d.do(Call{Op: "fchown", FD: fd}, func() error {
		return unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH)
	})
}

// ChownAt changes the owner of an entry that was just made; a symlink is not followed.
func (d *Disk) ChownAt(dir int, name string, uid, gid int) error {
	return d.do(Call{Op: "fchownat", FD: dir, Name: name}, func() error {
		return unix.Fchownat(dir, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
	})
}

// ChmodAt changes the mode of an entry that was just made; a symlink is not followed.
func (d *Disk) ChmodAt(dir int, name string, mode uint32) error {
	return d.do(Call{Op: "fchmodat", FD: dir, Name: name, Mode: mode}, func() error {
		err := unix.Fchmodat(dir, name, mode, unix.AT_SYMLINK_NOFOLLOW)
		if err != unix.EOPNOTSUPP {
			return err
		}
		// Before Linux 6.6 the system call has no flags.
		fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Chmod(procFD(fd), mode)
	})
}

func (d *Disk) Ioctl(fd int, cmd uint, arg unsafe.Pointer) error {
	return d.do(Call{Op: "ioctl", FD: fd}, func() error {
		return again(func() error {
			if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(cmd), uintptr(arg)); e != 0 {
				return e
			}
			return nil
		})
	})
}

// Birth returns when the object was made, by statx: ok is false where the
// filesystem does not say.
func (d *Disk) Birth(fd int) (t unix.StatxTimestamp, ok bool, err error) {
	d.sees("statx")
	var sx unix.Statx_t
	err = again(func() error { return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BTIME, &sx) })
	return sx.Btime, sx.Mask&unix.STATX_BTIME != 0, err
}

func (d *Disk) Utimens(fd int, atime, mtime unix.Timespec) error {
	return d.do(Call{Op: "utimensat", FD: fd}, func() error {
		return unix.UtimesNanoAt(fd, "", []unix.Timespec{atime, mtime}, unix.AT_EMPTY_PATH)
	})
}

func (d *Disk) Getxattr(fd int, name string) ([]byte, error) {
	d.sees("getxattr")
	for n := 512; ; {
		b := make([]byte, n)
		m, err := unix.Getxattr(procFD(fd), name, b)
		if err == unix.ERANGE {
			if n, err = unix.Getxattr(procFD(fd), name, nil); err == nil {
				continue
			}
		}
		if err != nil {
			return nil, err
		}
		return b[:m], nil
	}
}

// Hasxattr reports whether the object has the attribute.
func (d *Disk) Hasxattr(fd int, name string) bool {
	d.sees("getxattr")
	_, err := unix.Getxattr(procFD(fd), name, nil)
	return err == nil
}

func (d *Disk) Setxattr(fd int, name string, value []byte, flags int) error {
	return d.take(Call{Op: "setxattr", FD: fd, Name: name, Len: int64(len(value))}, func() error {
		return unix.Setxattr(procFD(fd), name, value, flags)
	})
}

func (d *Disk) Removexattr(fd int, name string) error {
	return d.do(Call{Op: "removexattr", FD: fd, Name: name}, func() error {
		return unix.Removexattr(procFD(fd), name)
	})
}

func (d *Disk) Listxattr(fd int) ([]byte, error) {
	d.sees("listxattr")
	for {
		n, err := unix.Listxattr(procFD(fd), nil)
		if err != nil || n == 0 {
			return nil, err
		}
		b := make([]byte, n)
		n, err = unix.Listxattr(procFD(fd), b)
		if err != unix.ERANGE {
			return b[:max(n, 0)], err
		}
	}
}

// setWidths sets the fields whose types differ between processors.
func setWidths(st *unix.Stat_t, x *unix.Statx_t) {
	widen(&st.Nlink, x.Nlink)
	widen(&st.Blksize, x.Blksize)
}

func widen[T ~uint64 | ~uint32 | ~int64 | ~int32](to *T, x uint32) { *to = T(x) }
