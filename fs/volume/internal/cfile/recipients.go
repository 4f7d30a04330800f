//go:build linux && !portable

package cfile

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// ErrNoRoom says that more recipients do not fit in the header of a file.
var ErrNoRoom = errors.New("the header is too small for these recipients")

// capabilityName is the attribute that the kernel removes when a file is written to.
const capabilityName = "security.capability"

// SyncError is the failure of a sync, which the kernel tells once.
type SyncError struct{ error }

// SyncFailure makes the error of a sync one.
func SyncFailure(err error) error { return SyncError{err} }

// Unwrap returns the error itself.
func (e SyncError) Unwrap() error { return e.error }

// Head is the header of a file as it is on the disk.
type Head struct {
	Disk   *disk.Disk
	FD     int
	Raw    []byte             // its bytes
	Header *blockcrypt.Header // their meaning
	Calm   bool               // see [Rules]
}

// SetRecipients writes other recipients into a header, of a file that nothing else writes to. It
// returns the header's bytes then, which are Raw if nothing was written. The bytes [192, H) of the
// first page are written under the page rule by one pwrite: after a power cut the file has the old
// recipients or the new ones. Mode, time of modification and capabilities stay.
func (h Head) SetRecipients(rs []blockcrypt.Recipient) ([]byte, error) {
	d, fd, raw, hdr := h.Disk, h.FD, h.Raw, h.Header
	next := *hdr
	next.Recipients = rs
	b, err := next.Encode()
	switch n := blockcrypt.RecipientsFit(rs); {
	case n == 0 || n > hdr.Geometry.Header():
		return raw, fmt.Errorf("%w: it has %d bytes", ErrNoRoom, hdr.Geometry.Header())
	case err != nil:
		return raw, err
	case len(b) > blockcrypt.PageSize: // two pages can be of two times
		return raw, fmt.Errorf("%w in one page", ErrNoRoom)
	case !bytes.Equal(b[:blockcrypt.RecipientsOffset], raw[:blockcrypt.RecipientsOffset]):
		return raw, errors.New("internal error: the rest of the header would change")
	case hdr.NoWrite != 0:
		return raw, unix.EROFS
	}
	var st unix.Stat_t
	if err := d.Fstat(fd, &st); err != nil {
		return raw, err
	}
	capability, err := d.Getxattr(fd, capabilityName)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		capability, err = nil, nil
	}
	if err != nil {
		return raw, err
	}
	if !h.Calm {
		if err := d.SettlePages(fd, 0, blockcrypt.PageSize); err != nil {
			return raw, SyncError{err}
		}
	}
	if err := d.Pwrite(fd, b[blockcrypt.RecipientsOffset:], blockcrypt.RecipientsOffset); err != nil {
		return raw, err
	}
	if capability != nil {
		err = d.Setxattr(fd, capabilityName, capability, 0)
	}
	if st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
		err = errors.Join(err, d.Chmod(fd, st.Mode&0o7777))
	}
	return b, errors.Join(err, d.Utimens(fd, unix.Timespec{Nsec: unix.UTIME_OMIT}, st.Mtim))
}

// SetRecipients is [Head.SetRecipients] of an open file, whose key need not be at hand.
func (p *pages) SetRecipients(rs []blockcrypt.Recipient) error {
	if p.phase == Broken {
		return unix.EIO
	}
	raw, err := Head{p.Disk, p.FD, p.head, p.Header, p.rules.Calm}.SetRecipients(rs)
	if _, ok := errors.AsType[SyncError](err); ok {
		p.SyncFailed(err)
	}
	if &raw[0] != &p.head[0] { // they were written
		p.wrote++
		p.Ahead.Store(nil)
		h := *p.Header // calls that wait for the key read the old one without the lock
		h.Recipients = slices.Clone(rs)
		p.head, p.Header = raw, &h
		p.times.Moves++
	}
	return err
}
