package volume

import (
	"errors"
	"os"
	"strconv"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix" // the syscalls that package os hides: *at, xattrs, sync_file_range
)

// A Call is a syscall on the ciphertext tree that changes something or moves
// data, as [Options.Hook] and [Options.Done] see it.
type Call struct {
	Op   string // the syscall's name
	FD   int    // of the file, or of the directory
	Name string // of the entry, for calls on directories
	Off  int64
	Len  int64

	ToFD int    // of rename and link: the directory
	To   string // of rename, link and symlink: the new name, or the target
	Mode uint32 // flags or mode
	Data []byte // of pwrite
}

// disk makes every syscall on the ciphertext tree. Where a test sets them, hook
// sees each call before it is made and can fail it, and done afterwards.
type disk struct {
	hook func(Call) error
	done func(Call, error)
	seen func(op string) // told of each syscall but close, of those that only look too

	// What has lost its last name, and the kernel still knows: how many there are, and
	// when the last one was removed. Their space comes back when the kernel has closed
	// and forgotten them, which it says after it was answered.
	leaving atomic.Int32
	removed atomic.Pointer[time.Time]

	blind atomic.Bool // the filesystem knows no RWF_NOWAIT

	fds  atomic.Int64 // descriptors that are open
	idle func() bool  // closes some that are not in use, if there are any; it may be nil
}

// opens makes a call that opens a descriptor, a second time if there was none left and some
// could be closed.
func (d *disk) opens(f func() error) error {
	err := again(f)
	if noDescriptor(err) && d.idle != nil && d.idle() {
		err = again(f)
	}
	if err == nil {
		d.fds.Add(1)
	}
	return err
}

const (
	freedWithin = 500 * time.Millisecond // a removal, and a call that waits for space
	freedPause  = 32 * time.Millisecond  // between two looks at most
)

// ErrSkip is what a hook returns for a call that is not to be made, and to succeed.
var ErrSkip = errors.New("skip this call")

// sees notes a syscall.
func (d *disk) sees(op string) {
	if d.seen != nil {
		d.seen(op)
	}
}

// do makes a call.
func (d *disk) do(c Call, f func() error) error {
	d.sees(c.Op)
	if d.hook != nil {
		if err := d.hook(c); err == ErrSkip {
			return nil
		} else if err != nil {
			return err
		}
	}
	err := f()
	if d.done != nil {
		d.done(c, err)
	}
	return err
}

// take makes a call that takes space. One that finds none is made again where some is
// about to come back: who removes a file from a full disk can write at once. Calls
// that sync must not be: the kernel tells once that it could not write.
func (d *disk) take(c Call, f func() error) error {
	return d.do(c, func() error {
		waits := d.leaving.Load() > 0
		err := f()
		if t := d.removed.Load(); !noSpace(err) || t == nil || time.Since(*t) > freedWithin {
			return err
		}
		end := time.Now().Add(freedWithin)
		for pause := time.Millisecond; noSpace(err) && waits && time.Now().Before(end); pause = min(2*pause, freedPause) {
			if waits = d.leaving.Load() > 0; waits {
				time.Sleep(pause)
			}
			err = f()
		}
		return err
	})
}

func noSpace(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// again repeats what a signal interrupted: Go's own preempt a thread at any time.
func again(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// Backing files are opened with these flags and O_RDONLY or O_RDWR, nothing
// else: O_APPEND would move every pwrite to the end.
const fileFlags = unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC

func (d *disk) open(dir int, name string, flags int, mode uint32) (fd int, err error) {
	fd = -1
	err = d.take(Call{Op: "openat", FD: dir, Name: name, Mode: uint32(flags)}, func() error {
		return d.opens(func() error {
			fd, err = unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
			return err
		})
	})
	return fd, err
}

// reopen opens the very object of a descriptor anew.
func (d *disk) reopen(old, flags int) (fd int, err error) {
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

// openRoot opens the root of a tree by its path, which may lead over symlinks.
func (d *disk) openRoot(path string) (int, error) {
	return d.openPath(path, unix.O_RDONLY|unix.O_DIRECTORY)
}

// openPath opens an object by a path that the user gave.
func (d *disk) openPath(path string, flags int) (fd int, err error) {
	fd = -1
	err = d.do(Call{Op: "open", FD: unix.AT_FDCWD, Name: path, Mode: uint32(flags)}, func() error {
		return d.opens(func() error {
			fd, err = unix.Open(path, flags|unix.O_CLOEXEC, 0)
			return err
		})
	})
	return fd, err
}

// openBelow opens the object with a path below a directory; no part of the path may be a
// symlink.
func (d *disk) openBelow(dir int, path string, flags int) (fd int, err error) {
	if path == "" {
		path = "."
	}
	fd = -1
	how := unix.OpenHow{Flags: uint64(flags | fileFlags), Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS}
	err = d.do(Call{Op: "openat2", FD: dir, Name: path, Mode: uint32(flags)}, func() error {
		return d.opens(func() error {
			fd, err = unix.Openat2(dir, path, &how)
			return err
		})
	})
	return fd, err
}

func (d *disk) close(fd int) error {
	d.fds.Add(-1)
	return unix.Close(fd)
}

// flock takes a lock on an open file description, by flock(2): how is LOCK_SH, LOCK_EX or
// LOCK_UN, and LOCK_NB. Some network filesystems keep it on this host (NFSv4.2 and
// GlusterFS do for directories).
func (d *disk) flock(fd, how int) error {
	return d.do(Call{Op: "flock", FD: fd, Mode: uint32(how)}, func() error {
		return again(func() error { return unix.Flock(fd, how) })
	})
}

// ofdLock locks one byte of a file for writing, by F_OFD_SETLK: the lock is of the open
// file description, and other hosts see it where the filesystem can tell them. An error
// for which lockBusy is true says that another has it.
func (d *disk) ofdLock(fd int, at int64) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: at, Len: 1}
	return d.do(Call{Op: "fcntl", FD: fd, Off: at, Len: 1}, func() error {
		return again(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l) })
	})
}

// ofdLocked reports whether another open file description has locked the byte.
func (d *disk) ofdLocked(fd int, at int64) (bool, error) {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: at, Len: 1}
	err := d.do(Call{Op: "fcntl", FD: fd, Off: at, Len: 1}, func() error {
		return again(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l) })
	})
	return lockBusy(err) || err == nil && l.Type != unix.F_UNLCK, ignoreBusy(err)
}

// lockBusy reports whether an error of a lock says that another has it. SMB says EACCES.
func lockBusy(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES)
}

func ignoreBusy(err error) error {
	if lockBusy(err) {
		return nil
	}
	return err
}

func (d *disk) statfs(fd int) (s unix.Statfs_t, err error) {
	d.sees("fstatfs")
	err = again(func() error { return unix.Fstatfs(fd, &s) })
	return s, err
}

// access is access(2) by the daemon's real user, of an object that is open.
func (d *disk) access(fd int, mask uint32) error {
	d.sees("access")
	return again(func() error { return unix.Access(procFD(fd), mask) })
}

func (d *disk) stat(dir int, name string, st *unix.Stat_t) error {
	d.sees("fstatat")
	return again(func() error { return unix.Fstatat(dir, name, st, unix.AT_SYMLINK_NOFOLLOW) })
}

func (d *disk) fstat(fd int, st *unix.Stat_t) error {
	d.sees("fstat")
	return again(func() error { return unix.Fstat(fd, st) })
}

// pread reads until b is full or the file ends. To see the end costs a call, so b should
// not reach beyond it.
func (d *disk) pread(fd int, b []byte, off int64) (n int, err error) {
	return d.preadOr(nil, fd, b, off)
}

// preadOr is pread that calls waits, if it is not nil, before it waits for the disk.
// A filesystem that cannot tell what it has in the page cache is waited for without a word.
func (d *disk) preadOr(waits func(), fd int, b []byte, off int64) (n int, err error) {
	err = d.do(Call{Op: "pread", FD: fd, Off: off, Len: int64(len(b))}, func() error {
		if waits != nil && len(b) > 0 && !d.blind.Load() {
			m, err := unix.Preadv2(fd, [][]byte{b}, off, unix.RWF_NOWAIT)
			switch {
			case err == nil && (m == 0 || m == len(b)):
				n = m
				return nil
			case err == unix.EOPNOTSUPP, err == unix.ENOSYS:
				d.blind.Store(true)
			default: // EAGAIN, or a part is there; another error comes again
				n = max(m, 0)
				waits()
			}
		}
		for n < len(b) {
			m := 0
			err := again(func() (err error) { m, err = unix.Pread(fd, b[n:], off+int64(n)); return err })
			if err != nil || m == 0 {
				return err
			}
			n += m
		}
		return nil
	})
	return n, err
}

// pwrite writes all of b, in one call where the kernel lets it.
func (d *disk) pwrite(fd int, b []byte, off int64) error {
	return d.take(Call{Op: "pwrite", FD: fd, Off: off, Len: int64(len(b)), Data: b}, func() error {
		for len(b) > 0 {
			n := 0
			err := again(func() (err error) { n, err = unix.Pwrite(fd, b, off); return err })
			if err != nil {
				return err
			}
			if n == 0 {
				return unix.EIO
			}
			b, off = b[n:], off+int64(n)
		}
		return nil
	})
}

func (d *disk) truncate(fd int, size int64) error {
	return d.do(Call{Op: "ftruncate", FD: fd, Off: size}, func() error {
		return again(func() error { return unix.Ftruncate(fd, size) })
	})
}

// allocate is fallocate: it reserves space, or makes a hole.
func (d *disk) allocate(fd int, mode uint32, off, n int64) error {
	return d.take(Call{Op: "fallocate", FD: fd, Off: off, Len: n, Mode: mode}, func() error {
		return again(func() error { return unix.Fallocate(fd, mode, off, n) })
	})
}

// seek is lseek: with SEEK_DATA or SEEK_HOLE in a file, whose position nothing else uses,
// or with SEEK_SET in a directory that is listed.
func (d *disk) seek(fd int, off int64, whence int) (at int64, err error) {
	d.sees("lseek")
	err = again(func() error { at, err = unix.Seek(fd, off, whence); return err })
	return at, err
}

func (d *disk) datasync(fd int) error {
	return d.do(Call{Op: "fdatasync", FD: fd}, func() error {
		return again(func() error { return unix.Fdatasync(fd) })
	})
}

func (d *disk) fsync(fd int) error {
	return d.do(Call{Op: "fsync", FD: fd}, func() error {
		return again(func() error { return unix.Fsync(fd) })
	})
}

func (d *disk) syncfs(fd int) error {
	return d.do(Call{Op: "syncfs", FD: fd}, func() error {
		return again(func() error { return unix.Syncfs(fd) })
	})
}

// settlePages is S of FORMAT.md: it waits until these pages are on the disk and
// not being written, so that a rewrite cannot tear them.
func (d *disk) settlePages(fd int, off, n int64) error {
	const how = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	return d.do(Call{Op: "sync_file_range", FD: fd, Off: off, Len: n, Mode: how}, func() error {
		return again(func() error { return unix.SyncFileRange(fd, off, n, how) })
	})
}

// sendPages makes the kernel begin to write these pages, and waits for nothing.
func (d *disk) sendPages(fd int, off, n int64) error {
	return d.do(Call{Op: "sync_file_range", FD: fd, Off: off, Len: n, Mode: unix.SYNC_FILE_RANGE_WRITE}, func() error {
		return again(func() error { return unix.SyncFileRange(fd, off, n, unix.SYNC_FILE_RANGE_WRITE) })
	})
}

// waitPages waits until these pages are not being written.
func (d *disk) waitPages(fd int, off, n int64) error {
	return d.do(Call{Op: "sync_file_range", FD: fd, Off: off, Len: n, Mode: unix.SYNC_FILE_RANGE_WAIT_BEFORE}, func() error {
		return again(func() error { return unix.SyncFileRange(fd, off, n, unix.SYNC_FILE_RANGE_WAIT_BEFORE) })
	})
}

// forgetPages makes the kernel read these bytes of a file from the disk again, as far as they
// are clean; n = 0 means up to its end.
func (d *disk) forgetPages(fd int, off, n int64) {
	d.do(Call{Op: "fadvise", FD: fd, Off: off, Len: n}, func() error {
		return unix.Fadvise(fd, off, n, unix.FADV_DONTNEED)
	})
}

func (d *disk) mkdir(dir int, name string, mode uint32) error {
	return d.take(Call{Op: "mkdirat", FD: dir, Name: name}, func() error {
		return unix.Mkdirat(dir, name, mode)
	})
}

func (d *disk) mknod(dir int, name string, mode uint32, dev int) error {
	return d.take(Call{Op: "mknodat", FD: dir, Name: name, Mode: mode}, func() error {
		return unix.Mknodat(dir, name, mode, dev)
	})
}

func (d *disk) symlink(target string, dir int, name string) error {
	return d.take(Call{Op: "symlinkat", FD: dir, Name: name, To: target}, func() error {
		return unix.Symlinkat(target, dir, name)
	})
}

func (d *disk) readlink(dir int, name string) (string, error) {
	d.sees("readlinkat")
	for n := 512; ; n *= 4 {
		b := make([]byte, n)
		m, err := unix.Readlinkat(dir, name, b)
		if err != nil {
			return "", err
		}
		if m < n {
			return string(b[:m]), nil
		}
	}
}

func (d *disk) unlink(dir int, name string, flags int) error {
	return d.do(Call{Op: "unlinkat", FD: dir, Name: name, Mode: uint32(flags)}, func() error {
		return unix.Unlinkat(dir, name, flags)
	})
}

func (d *disk) rename(od int, oname string, nd int, nname string, flags uint32) error {
	return d.do(Call{Op: "renameat2", FD: od, Name: oname, ToFD: nd, To: nname, Mode: flags}, func() error {
		return unix.Renameat2(od, oname, nd, nname, uint(flags))
	})
}

// linkFD gives another name to an object that is open, by O_PATH perhaps.
func (d *disk) linkFD(fd, nd int, nname string) error {
	return d.take(Call{Op: "linkat", FD: fd, ToFD: nd, To: nname}, func() error {
		return unix.Linkat(unix.AT_FDCWD, procFD(fd), nd, nname, unix.AT_SYMLINK_FOLLOW)
	})
}

func (d *disk) chmod(fd int, mode uint32) error {
	return d.do(Call{Op: "fchmod", FD: fd, Mode: mode}, func() error {
		return unix.Chmod(procFD(fd), mode)
	})
}

func (d *disk) chown(fd, uid, gid int) error {
	return d.do(Call{Op: "fchown", FD: fd}, func() error {
		return unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH)
	})
}

// chownAt changes the owner of an entry that was just made; a symlink is not followed.
func (d *disk) chownAt(dir int, name string, uid, gid int) error {
	return d.do(Call{Op: "fchownat", FD: dir, Name: name}, func() error {
		return unix.Fchownat(dir, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
	})
}

// chmodAt changes the mode of an entry that was just made; a symlink is not followed.
func (d *disk) chmodAt(dir int, name string, mode uint32) error {
	return d.do(Call{Op: "fchmodat", FD: dir, Name: name, Mode: mode}, func() error {
		return unix.Fchmodat(dir, name, mode, unix.AT_SYMLINK_NOFOLLOW)
	})
}

func (d *disk) ioctl(fd int, cmd uint, arg unsafe.Pointer) error {
	return d.do(Call{Op: "ioctl", FD: fd}, func() error {
		return again(func() error {
			if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(cmd), uintptr(arg)); e != 0 {
				return e
			}
			return nil
		})
	})
}

// birth returns when the object was made, by statx: ok is false where the
// filesystem does not say.
func (d *disk) birth(fd int) (t unix.StatxTimestamp, ok bool, err error) {
	d.sees("statx")
	var sx unix.Statx_t
	err = again(func() error { return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BTIME, &sx) })
	return sx.Btime, sx.Mask&unix.STATX_BTIME != 0, err
}

func (d *disk) utimens(fd int, atime, mtime unix.Timespec) error {
	return d.do(Call{Op: "utimensat", FD: fd}, func() error {
		return unix.UtimesNanoAt(fd, "", []unix.Timespec{atime, mtime}, unix.AT_EMPTY_PATH)
	})
}

func (d *disk) getxattr(fd int, name string) ([]byte, error) {
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

// hasxattr reports whether the object has the attribute.
func (d *disk) hasxattr(fd int, name string) bool {
	d.sees("getxattr")
	_, err := unix.Getxattr(procFD(fd), name, nil)
	return err == nil
}

func (d *disk) setxattr(fd int, name string, value []byte, flags int) error {
	return d.take(Call{Op: "setxattr", FD: fd, Name: name, Len: int64(len(value))}, func() error {
		return unix.Setxattr(procFD(fd), name, value, flags)
	})
}

func (d *disk) removexattr(fd int, name string) error {
	return d.do(Call{Op: "removexattr", FD: fd, Name: name}, func() error {
		return unix.Removexattr(procFD(fd), name)
	})
}

func (d *disk) listxattr(fd int) ([]byte, error) {
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

// procFD names the very object of a descriptor, of one opened with O_PATH too.
func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// dirent is one entry of a directory, off the position behind it.
type dirent struct {
	name string
	ino  uint64
	typ  uint32 // S_IFMT bits, 0 if the filesystem does not say
	off  int64
}

// dirents reads the next entries of an open directory into buf, none at its end.
func (d *disk) dirents(fd int, buf []byte) (out []dirent, err error) {
	d.sees("getdents64")
	n := 0
	err = again(func() error { n, err = unix.Getdents(fd, buf); return err })
	if err != nil {
		return nil, os.NewSyscallError("getdents64", err)
	}
	for b := buf[:n]; len(b) > 0; {
		e, size := parseDirent(b)
		out, b = append(out, e), b[size:]
	}
	return out, nil
}
