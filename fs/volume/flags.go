//go:build linux && !portable

package volume

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Inode flags, of FS_IOC_GETFLAGS (linux/fs.h).
const (
	flagImmutable = 0x10
	flagAppend    = 0x20
	flagNoDump    = 0x40
	flagNoAtime   = 0x80
	flagCasefold  = 0x40000000
)

// Flags and attributes of an inode, as chattr(1) and xfs_io(1) have them: those of
// the ciphertext file or directory.

// FSXAttr is struct fsxattr of linux/fs.h.
type FSXAttr struct {
	XFlags, ExtSize, NExtents, ProjID, CowExtSize uint32
	_                                             [8]byte
}

// FS_XFLAG_IMMUTABLE and FS_XFLAG_APPEND.
const (
	xflagImmutable = 0x8
	xflagAppend    = 0x10
)

// Flags returns the inode's flags; ENOTTY where the backing filesystem has none.
func (a *attributes) Flags() (flags uint32, err error) {
	err = a.withReal(func(fd int) error {
		return a.v.disk.Ioctl(fd, unix.FS_IOC_GETFLAGS,
			unsafe.Pointer(&flags))
	})
	return flags, err
}

// SetFlags sets them. Append-only is EOPNOTSUPP, since ciphertext is written in
// whole pages; so is casefold, which encoded names do not survive.
func (a *attributes) SetFlags(flags uint32) error {
	old, err := a.Flags()
	if err != nil {
		return err
	}
	if (flags^old)&(flagAppend|flagCasefold) != 0 {
		return unix.EOPNOTSUPP
	}
	return a.setFlags(old&flagImmutable != 0, flags&flagImmutable != 0,
		func(fd int) error { return a.v.disk.Ioctl(fd, unix.FS_IOC_SETFLAGS, unsafe.Pointer(&flags)) })
}

// FSXAttr returns the inode's attributes by FS_IOC_FSGETXATTR.
func (a *attributes) FSXAttr() (x FSXAttr, err error) {
	err = a.withReal(func(fd int) error { return a.v.disk.Ioctl(fd, FSGetXAttr, unsafe.Pointer(&x)) })
	return x, err
}

// SetFSXAttr sets them; see [Node.SetFlags].
func (a *attributes) SetFSXAttr(x FSXAttr) error {
	old, err := a.FSXAttr()
	if err != nil {
		return err
	}
	if (x.XFlags^old.XFlags)&xflagAppend != 0 {
		return unix.EOPNOTSUPP
	}
	return a.setFlags(old.XFlags&xflagImmutable != 0, x.XFlags&xflagImmutable != 0,
		func(fd int) error { return a.v.disk.Ioctl(fd, FSSetXAttr, unsafe.Pointer(&x)) })
}

// FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR of linux/fs.h.
const (
	FSGetXAttr = 0x801c581f
	FSSetXAttr = 0x401c5820
)

// setFlags settles a file first that is to become immutable: then it cannot be
// settled, nor, by a descriptor that is open already, be written any more.
func (a *attributes) setFlags(was, is bool, f func(fd int) error) error {
	if a.v.o.ReadOnly {
		return unix.EROFS
	}
	if o := a.n.file.Load(); o != nil && !was {
		if err := o.settleNow(); err != nil {
			return err
		}
	}
	a.steady.RLock()
	defer a.steady.RUnlock()
	defer a.change()
	err := a.withReal(f)
	if err == nil {
		a.n.immutable.Store(is)
	}
	return err
}

// withReal calls f with a descriptor that is open for reading.
func (a *attributes) withReal(f func(fd int) error) error {
	if o := a.n.file.Load(); o != nil {
		if done, err := o.borrow(f); done {
			return err
		}
	}
	if a.n.typ != unix.S_IFREG && !a.n.IsDir() {
		return unix.ENOTTY
	}
	return a.n.withFD(func(p int) error {
		fd, err := a.v.disk.Reopen(p, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC)
		if err != nil {
			return err
		}
		defer a.v.disk.Close(fd)
		return f(fd)
	})
}
