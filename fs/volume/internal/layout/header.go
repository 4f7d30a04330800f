package layout

import (
	"errors"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// ErrUnwritten says that a file begins with zeros, as far as its first page was read: the power
// failed before that page was written, and nothing in the file was confirmed.
var ErrUnwritten = errors.New("the file was never written before the power failed")

// unwritten is the damage of such a file, which a mount after the power failure repairs.
type unwritten struct{ error }

func (u unwritten) Unwrap() error      { return u.error }
func (unwritten) Is(target error) bool { return target == ErrUnwritten }

// ReadHeader reads the first n bytes of a file, and its header from them. It returns all that it
// has read.
func ReadHeader(d *disk.Disk, fd, n int) (*blockcrypt.Header, []byte, error) {
	b := make([]byte, n)
	m, err := d.Pread(fd, b, 0)
	if err != nil {
		return nil, nil, err
	}
	b = b[:m]
	hdr, err := blockcrypt.ParseHeader(b)
	if err != nil && m > 0 && blockcrypt.IsHole(b[:min(m, blockcrypt.PageSize)]) {
		err = unwritten{err}
	}
	return hdr, b, err
}

// CheckHeader checks that a file belongs to a volume: the header's length, the volume's ID and,
// if vk is not nil, that the file was made in it.
func CheckHeader(hdr *blockcrypt.Header, g blockcrypt.Geometry, volume blockcrypt.ID,
	vk *blockcrypt.VolumeKeys) error {
	if hdr.Geometry != g {
		return &blockcrypt.DamageError{Class: blockcrypt.BadHeader, Pos: 8,
			Detail: "the header has another size than the volume's"}
	}
	if hdr.Volume != volume {
		return &blockcrypt.DamageError{Class: blockcrypt.BadVolume, Pos: 16,
			Detail: "the file is of another volume"}
	}
	if vk != nil {
		return vk.CheckOrigin(hdr)
	}
	return nil
}
