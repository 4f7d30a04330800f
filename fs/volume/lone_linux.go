//go:build !portable

package volume

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
)

// SetRecipients gives the file other recipients. It must have been opened by a path that can be
// written. Length, mode and time of modification stay; it is durable when it returns.
func (l *Lone) SetRecipients(rs []blockcrypt.Recipient) error {
	fd, err := l.disk.Reopen(l.fd, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC)
	if err != nil {
		return err
	}
	defer l.disk.Close(fd)
	raw := make([]byte, l.Header.Geometry.Header())
	if _, err := l.disk.Pread(fd, raw, 0); err != nil {
		return err
	}
	head := cfile.Head{Disk: l.disk, FD: fd, Raw: raw, Header: l.Header}
	if _, err := head.SetRecipients(rs); err != nil {
		return err
	}
	l.Header.Recipients = rs
	return l.disk.Fsync(fd)
}

// skipHole moves r, if it is a file, over the whole blocks of a hole at its position, and
// returns how many they are: 0 for a hole of less than a MiB. The last block of a file is
// never skipped.
func skipHole(r io.Reader) (blocks int64, err error) {
	f, ok := r.(io.Seeker)
	if !ok {
		return 0, nil
	}
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, nil // a pipe
	}
	end, err := f.Seek(0, io.SeekEnd)
	if err == nil {
		var data int64
		if data, err = f.Seek(at, unix.SEEK_DATA); err == nil {
			end = min(data, end)
		} else if !errors.Is(err, unix.ENXIO) { // no holes are told there
			end = at
		}
		if blocks = (end - at - 1) / blockcrypt.BlockSize; blocks*blockcrypt.BlockSize <= cfile.MaxGap {
			blocks = 0
		}
		_, err = f.Seek(at+blocks*blockcrypt.BlockSize, io.SeekStart)
	}
	return blocks, err
}
