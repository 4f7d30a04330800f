//go:build linux && !portable

package disk

import (
	"time"

	"golang.org/x/sys/unix"
)

// Pread reads until b is full or the file ends. To see the end costs a call, so b should
// not reach beyond it.
func (d *Disk) Pread(fd int, b []byte, off int64) (n int, err error) {
	return d.PreadOr(nil, fd, b, off)
}

// PreadOr is Pread that calls waits, if it is not nil, before it waits for the disk.
// A filesystem that cannot tell what it has in the page cache is waited for without a word.
func (d *Disk) PreadOr(waits func(), fd int, b []byte, off int64) (n int, err error) {
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
				if d.Took != nil {
					defer func(begun time.Time) { d.Took("pread", time.Since(begun)) }(time.Now())
				}
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

// Pwrite writes all of b, in one call where the kernel lets it.
func (d *Disk) Pwrite(fd int, b []byte, off int64) error {
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

func (d *Disk) Truncate(fd int, size int64) error {
	return d.do(Call{Op: "ftruncate", FD: fd, Off: size}, func() error {
		return again(func() error { return unix.Ftruncate(fd, size) })
	})
}

// Allocate is fallocate: it reserves space, or makes a hole.
func (d *Disk) Allocate(fd int, mode uint32, off, n int64) error {
	return d.take(Call{Op: "fallocate", FD: fd, Off: off, Len: n, Mode: mode}, func() error {
		return again(func() error { return unix.Fallocate(fd, mode, off, n) })
	})
}

// Seek is lseek: with SEEK_DATA or SEEK_HOLE in a file, whose position nothing else uses,
// or with SEEK_SET in a directory that is listed.
func (d *Disk) Seek(fd int, off int64, whence int) (at int64, err error) {
	d.sees("lseek")
	err = again(func() error { at, err = unix.Seek(fd, off, whence); return err })
	return at, err
}

func (d *Disk) Datasync(fd int) error {
	return d.timed(Call{Op: "fdatasync", FD: fd}, func() error {
		return again(func() error { return unix.Fdatasync(fd) })
	})
}

func (d *Disk) Fsync(fd int) error {
	return d.timed(Call{Op: "fsync", FD: fd}, func() error {
		return again(func() error { return unix.Fsync(fd) })
	})
}

func (d *Disk) Syncfs(fd int) error {
	return d.timed(Call{Op: "syncfs", FD: fd}, func() error {
		return again(func() error { return unix.Syncfs(fd) })
	})
}

// SettlePages is S of FORMAT.md: it waits until these pages are on the disk and
// not being written, so that a rewrite cannot tear them.
func (d *Disk) SettlePages(fd int, off, n int64) error {
	if d.Remote {
		return d.Datasync(fd)
	}
	const how = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	return d.timed(Call{Op: "sync_file_range", FD: fd, Off: off, Len: n, Mode: how}, func() error {
		return again(func() error { return unix.SyncFileRange(fd, off, n, how) })
	})
}

// SendPages makes the kernel begin to write these pages, and waits for nothing.
func (d *Disk) SendPages(fd int, off, n int64) error {
	return d.do(Call{Op: "sync_file_range", FD: fd, Off: off, Len: n,
		Mode: unix.SYNC_FILE_RANGE_WRITE}, func() error {
		return again(func() error { return unix.SyncFileRange(fd, off, n, unix.SYNC_FILE_RANGE_WRITE) })
	})
}

// WaitPages waits until these pages are not being written.
func (d *Disk) WaitPages(fd int, off, n int64) error {
	return d.do(Call{Op: "sync_file_range", FD: fd, Off: off, Len: n,
		Mode: unix.SYNC_FILE_RANGE_WAIT_BEFORE}, func() error {
		return again(func() error {
			return unix.SyncFileRange(fd, off, n,
				unix.SYNC_FILE_RANGE_WAIT_BEFORE)
		})
	})
}

// ForgetPages makes the kernel read these bytes of a file from the disk again, as far as they
// are clean; n = 0 means up to its end.
func (d *Disk) ForgetPages(fd int, off, n int64) {
	d.do(Call{Op: "fadvise", FD: fd, Off: off, Len: n}, func() error {
		return unix.Fadvise(fd, off, n, unix.FADV_DONTNEED)
	})
}
