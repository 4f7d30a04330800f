//go:build linux && !portable

package disk

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Flock takes a lock on an open file description, by flock(2): how is LOCK_SH, LOCK_EX or
// LOCK_UN, and LOCK_NB. Some network filesystems keep it on this host (NFSv4.2 and
// GlusterFS do for directories).
func (d *Disk) Flock(fd, how int) error {
	return d.do(Call{Op: "flock", FD: fd, Mode: uint32(how)}, func() error {
		return again(func() error { return unix.Flock(fd, how) })
	})
}

// OFDLock locks one byte of a file for writing, by F_OFD_SETLK: the lock is of the open
// file description, and other hosts see it where the filesystem can tell them. An error
// for which lockBusy is true says that another has it.
func (d *Disk) OFDLock(fd int, at int64) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: at, Len: 1}
	return d.do(Call{Op: "fcntl", FD: fd, Off: at, Len: 1}, func() error {
		return again(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l) })
	})
}

// OFDLocked reports whether another open file description has locked the byte.
func (d *Disk) OFDLocked(fd int, at int64) (bool, error) {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: at, Len: 1}
	err := d.do(Call{Op: "fcntl", FD: fd, Off: at, Len: 1}, func() error {
		return again(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l) })
	})
	return LockBusy(err) || err == nil && l.Type != unix.F_UNLCK, ignoreBusy(err)
}

// LockBusy reports whether an error of a lock says that another has it. SMB says EACCES.
func LockBusy(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES)
}

func ignoreBusy(err error) error {
	if LockBusy(err) {
		return nil
	}
	return err
}
