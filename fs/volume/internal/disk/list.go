//go:build linux && !portable

package disk

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Dirent is one entry of a directory, off the position behind it.
type Dirent struct {
	Name string
	Ino  uint64
	Type uint32 // S_IFMT bits, 0 if the filesystem does not say
	Off  int64
}

// Dirents reads the next entries of an open directory into buf, none at its end.
func (d *Disk) Dirents(fd int, buf []byte) (out []Dirent, err error) {
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

// parseDirent reads one struct linux_dirent64; size is its length.
func parseDirent(b []byte) (e Dirent, size int) {
	const nameOff = int(unsafe.Offsetof(unix.Dirent{}.Name))
	size = int(binary.NativeEndian.Uint16(b[unsafe.Offsetof(unix.Dirent{}.Reclen):]))
	name := b[nameOff:size]
	if i := bytes.IndexByte(name, 0); i >= 0 {
		name = name[:i]
	}
	return Dirent{
		Name: string(name),
		Ino:  binary.NativeEndian.Uint64(b),
		Off:  int64(binary.NativeEndian.Uint64(b[8:])),
		Type: uint32(b[unsafe.Offsetof(unix.Dirent{}.Type)]) << 12,
	}, size
}

// Scan calls f for every entry of a directory but . and .., until f fails. With io.EOF f ends
// it without an error.
func (d *Disk) Scan(dir int, f func(Dirent) error) error {
	fd, err := d.Open(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.Close(fd)
	buf := make([]byte, 32<<10)
	for {
		es, err := d.Dirents(fd, buf)
		if err != nil || len(es) == 0 {
			return err
		}
		for _, e := range es {
			if e.Name == "." || e.Name == ".." {
				continue
			}
			if err := f(e); err != nil {
				if err == io.EOF {
					return nil
				}
				return err
			}
		}
	}
}
