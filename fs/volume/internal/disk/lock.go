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

// A Lock is a range of bytes that is locked, by the open file description that asks for it: other
// hosts see it where the filesystem can tell them.
type Lock struct {
	Kind  LockKind
	At, N int64 // the first byte and how many
}

// LockKind is unix.F_RDLCK (shared), F_WRLCK (alone) or F_UNLCK (none).
type LockKind int16

// Kinds of locks.
const (
	Shared LockKind = unix.F_RDLCK
	Alone  LockKind = unix.F_WRLCK
	None   LockKind = unix.F_UNLCK
)

func (l Lock) flock() *unix.Flock_t {
	return &unix.Flock_t{Type: int16(l.Kind), Whence: unix.SEEK_SET, Start: l.At, Len: l.N}
}

func (l Lock) call(fd int) Call {
	return Call{Op: "fcntl", FD: fd, Off: l.At, Len: l.N, Mode: uint32(l.Kind)}
}

// OFDLock takes or changes a lock, by F_OFD_SETLK. An error for which [LockBusy] is true says that
// another open file description has one in the way.
func (d *Disk) OFDLock(fd int, l Lock) error {
	return d.do(l.call(fd), func() error {
		return again(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, l.flock()) })
	})
}

// OFDLocked returns a lock of another open file description that is in the way of this one; one of
// the kind None if there is none.
func (d *Disk) OFDLocked(fd int, l Lock) (Lock, error) {
	x := l.flock()
	err := d.do(l.call(fd), func() error {
		return again(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, x) })
	})
	if LockBusy(err) { // SMB does not say which
		return l, nil
	}
	return Lock{LockKind(x.Type), x.Start, x.Len}, err
}

// LockBusy reports whether an error of a lock says that another has it. SMB says EACCES.
func LockBusy(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES)
}
