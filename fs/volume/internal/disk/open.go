//go:build linux && !portable

package disk

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Backing files are opened with these flags and O_RDONLY or O_RDWR, nothing
// else: O_APPEND would move every pwrite to the end.
const FileFlags = unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC

func (d *Disk) Open(dir int, name string, flags int, mode uint32) (fd int, err error) {
	fd = -1
	err = d.take(Call{Op: "openat", FD: dir, Name: name, Mode: uint32(flags)}, func() error {
		return d.opens(func() error {
			fd, err = unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
			return err
		})
	})
	return fd, err
}

// Reopen opens the very object of a descriptor again.
func (d *Disk) Reopen(old, flags int) (fd int, err error) {
	d.sees("open")
	err = d.opens(func() error {
		fd, err = unix.Open(procFD(old), flags&^unix.O_NOFOLLOW, 0)
		if err == unix.ELOOP { // a symlink itself cannot be opened a second time
			fd, err = unix.FcntlInt(uintptr(old), unix.F_DUPFD_CLOEXEC, 0)
		}
		return err
	})
	return fd, err
}

// OpenRoot opens the root of a tree by its path, which may lead over symlinks.
func (d *Disk) OpenRoot(path string) (int, error) {
	return d.OpenPath(path, unix.O_RDONLY|unix.O_DIRECTORY)
}

// OpenPath opens an object by a path that the user gave.
func (d *Disk) OpenPath(path string, flags int) (fd int, err error) {
	fd = -1
	err = d.do(Call{Op: "open", FD: unix.AT_FDCWD, Name: path, Mode: uint32(flags)}, func() error {
		return d.opens(func() error {
			fd, err = unix.Open(path, flags|unix.O_CLOEXEC, 0)
			return err
		})
	})
	return fd, err
}

// mostPath is how long a path may be for one call; PATH_MAX is 4,096 with the final zero.
const mostPath = 4000

// OpenBelow opens the object with a path below a directory; no part of the path may be a
// symlink.
func (d *Disk) OpenBelow(dir int, path string, flags int) (fd int, err error) {
	for len(path) > mostPath { // by way of a directory on the path
		cut := strings.LastIndexByte(path[:mostPath], '/')
		if cut < 0 {
			return -1, unix.ENAMETOOLONG
		}
		if dir, err = d.openBelow(dir, path[:cut], unix.O_PATH|unix.O_DIRECTORY); err != nil {
			return -1, err
		}
		defer d.Close(dir)
		path = path[cut+1:]
	}
	return d.openBelow(dir, path, flags)
}

func (d *Disk) openBelow(dir int, path string, flags int) (fd int, err error) {
	if path == "" {
		path = "."
	}
	fd = -1
	how := unix.OpenHow{Flags: uint64(flags | FileFlags),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS}
	if flags&unix.O_PATH != 0 {
		how.Flags &^= unix.O_NONBLOCK // openat2 does not take both
	}
	err = d.do(Call{Op: "openat2", FD: dir, Name: path, Mode: uint32(flags)}, func() error {
		return d.opens(func() error {
			fd, err = unix.Openat2(dir, path, &how)
			return err
		})
	})
	return fd, err
}

func (d *Disk) Close(fd int) error {
	d.fds.Add(-1)
	return unix.Close(fd)
}

// procFD names the very object of a descriptor, of one opened with O_PATH too.
func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }
