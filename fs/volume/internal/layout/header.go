package layout

import (
	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// Unwritten is the damage of a file of whose header a page is zeros: the power failed before that page
// was written, and nothing in the file was confirmed. A mount after the power failure repairs it.
type Unwritten struct {
	error
	Session uint64 // that was writing it; 0 if that is not known, since it is the first page
}

// Unwrap returns the damage.
func (u Unwritten) Unwrap() error { return u.error }

// unwritten reports whether a part of the header's recipients beyond its first page was never written;
// ended says that the file ends with b.
func unwritten(b []byte, ended bool) (session uint64, ok bool) {
	h, err := blockcrypt.HeaderSize(b)
	if err != nil || h <= blockcrypt.PageSize || len(b) < blockcrypt.PageSize {
		return 0, false
	}
	floor, session := blockcrypt.WrittenBy(b)
	end := min(h, blockcrypt.RecipientsEnd(b))
	if floor != 0 || session == 0 || end <= blockcrypt.PageSize {
		return 0, false
	}
	if len(b) < end {
		return session, ended
	}
	for at := blockcrypt.PageSize; at < end; at += blockcrypt.PageSize {
		if blockcrypt.IsHole(b[at:min(at+blockcrypt.PageSize, end)]) {
			return session, true
		}
	}
	return 0, false
}

// ReadHeader reads the first n bytes of a file, and its header from them. It returns all that it
// has read. ended says that the file is known to have no more: to read on would cost a call.
func ReadHeader(d *disk.Disk, fd, n int, ended bool) (*blockcrypt.Header, []byte, error) {
	b := make([]byte, n)
	m, err := d.Pread(fd, b, 0)
	if err != nil {
		return nil, nil, err
	}
	b = b[:m]
	hdr, err := blockcrypt.ParseHeader(b)
	if err != nil && m > 0 && blockcrypt.IsHole(b[:min(m, blockcrypt.PageSize)]) {
		err = Unwritten{err, 0}
	} else if session, ok := unwritten(b, ended || m < n); err != nil && ok {
		err = Unwritten{err, session}
	}
	return hdr, b, err
}

// Sizes are those that the headers of a volume's files have.
type Sizes struct {
	New    blockcrypt.Geometry // of files that are made now
	Former blockcrypt.Geometry // of files that were not given other headers yet; zero: there are none
}

// SizesOf returns the sizes that a kmsfs.json says.
func SizesOf(c *blockcrypt.Config) (s Sizes, err error) {
	if s.New, err = blockcrypt.NewGeometry(c.Header); err == nil && c.Former != 0 {
		s.Former, err = blockcrypt.NewGeometry(c.Former)
	}
	return s, err
}

// Mixed reports whether files may have headers of two sizes.
func (s Sizes) Mixed() bool { return s.Former != blockcrypt.Geometry{} }

// Most returns the size of the largest header, in bytes.
func (s Sizes) Most() int { return max(s.New.Header(), s.Former.Header()) }

// Read returns how many bytes at the start of a file hold its header and its first block.
func (s Sizes) Read() int64 {
	if !s.Mixed() {
		return s.New.PageOff(1)
	}
	return max(s.New.PageOff(1), s.Former.PageOff(1))
}

// Of returns the geometry of a file from the first bytes of its header. Without a header that this
// volume can have, it is that of new files.
func (s Sizes) Of(d *disk.Disk, fd int) (blockcrypt.Geometry, error) {
	if !s.Mixed() {
		return s.New, nil
	}
	b := make([]byte, 12)
	n, err := d.Pread(fd, b, 0)
	if err != nil {
		return s.New, err
	}
	if h, err := blockcrypt.HeaderSize(b[:n]); err == nil && h == s.Former.Header() {
		return s.Former, nil
	}
	return s.New, nil
}

// CheckHeader checks that a file belongs to a volume: the header's length, the volume's ID and,
// if vk is not nil, that the file was made in it.
func CheckHeader(hdr *blockcrypt.Header, s Sizes, volume blockcrypt.ID,
	vk *blockcrypt.VolumeKeys) error {
	if hdr.Geometry != s.New && (!s.Mixed() || hdr.Geometry != s.Former) {
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
