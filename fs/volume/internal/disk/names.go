//go:build linux && !portable

package disk

import (
	"errors"

	"golang.org/x/sys/unix"
)

func (d *Disk) Mkdir(dir int, name string, mode uint32) error {
	return d.take(Call{Op: "mkdirat", FD: dir, Name: name}, func() error {
		return unix.Mkdirat(dir, name, mode)
	})
}

func (d *Disk) Mknod(dir int, name string, mode uint32, dev int) error {
	return d.take(Call{Op: "mknodat", FD: dir, Name: name, Mode: mode}, func() error {
		return unix.Mknodat(dir, name, mode, dev)
	})
}

func (d *Disk) Symlink(target string, dir int, name string) error {
	return d.take(Call{Op: "symlinkat", FD: dir, Name: name, To: target}, func() error {
		return unix.Symlinkat(target, dir, name)
	})
}

func (d *Disk) Readlink(dir int, name string) (string, error) {
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

func (d *Disk) Unlink(dir int, name string, flags int) error {
	return d.do(Call{Op: "unlinkat", FD: dir, Name: name, Mode: uint32(flags)}, func() error {
		return unix.Unlinkat(dir, name, flags)
	})
}

func (d *Disk) Rename(od int, oname string, nd int, nname string, flags uint32) error {
	return d.do(Call{Op: "renameat2", FD: od, Name: oname, ToFD: nd, To: nname, Mode: flags}, func() error {
		return unix.Renameat2(od, oname, nd, nname, uint(flags))
	})
}

// LinkFD gives another name to an object that is open, by O_PATH perhaps.
func (d *Disk) LinkFD(fd, nd int, nname string) error {
	return d.take(Call{Op: "linkat", FD: fd, ToFD: nd, To: nname}, func() error {
		return unix.Linkat(unix.AT_FDCWD, procFD(fd), nd, nname, unix.AT_SYMLINK_FOLLOW)
	})
}

// Replace puts a file in the place of another, durably: write-new, fsync,
// rename, fsync of the directory.
func (d *Disk) Replace(dir int, name string, b []byte) (err error) {
	tmp := name + ".new"
	fd, err := d.Open(dir, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	err = d.Pwrite(fd, b, 0)
	if err == nil {
		err = d.Fsync(fd)
	}
	err = errors.Join(err, d.Close(fd))
	if err == nil {
		err = d.Rename(dir, tmp, dir, name, 0)
	}
	if err != nil {
		d.Unlink(dir, tmp, 0)
		return err
	}
	return d.Fsync(dir)
}
