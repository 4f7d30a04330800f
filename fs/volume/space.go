package volume

import (
	"context"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/disk"
)

// Fallocate is fallocate(2) with one of these modes: 0, KEEP_SIZE (both reserve
// space), PUNCH_HOLE|KEEP_SIZE, ZERO_RANGE with or without KEEP_SIZE. Others are
// EOPNOTSUPP. On an error the file keeps its content, but for parts of the range
// that are zeros already.
func (h *Handle) Fallocate(ctx context.Context, mode uint32, off, n int64) error {
	if !h.write {
		return unix.EBADF
	}
	if off < 0 || n <= 0 {
		return unix.EINVAL
	}
	if n > blockcrypt.MaxPlain-off {
		return unix.EFBIG
	}
	f := h.f
	unlock, err := f.lockForContent(ctx, false)
	if err != nil {
		return err
	}
	defer unlock()
	const keep = unix.FALLOC_FL_KEEP_SIZE
	size := f.Size
	switch mode {
	case 0, keep:
		err = f.Reserve(off, n, mode == 0)
	case unix.FALLOC_FL_PUNCH_HOLE | keep:
		err = f.zero(off, n, 0)
	case unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | keep:
		if err = f.zero(off, n, cfile.MaxGap); err == nil {
			err = f.Reserve(off, n, mode&keep == 0)
		}
	default:
		return unix.EOPNOTSUPP
	}
	if f.Size > size {
		f.n.lost.found(size, f.Size)
	}
	return f.failed("fallocate", err)
}

// zero makes the part of [off, off+n) that the file has read as zeros, see [cfile.File.Zero].
func (f *file) zero(off, n, least int64) error {
	err := f.Zero(off, n, least)
	if err == nil {
		f.n.lost.found(off, min(off+n, f.Size))
	}
	return err
}

// Seek is lseek(2) with SEEK_DATA or SEEK_HOLE: the next byte at or behind off
// that lies in a block, or in a hole. The end of the file is a hole. Reserved
// space counts as data where the backing filesystem says so.
func (h *Handle) Seek(off int64, whence int) (int64, error) {
	f := h.f
	unlock, err := f.awake()
	if err != nil {
		return 0, err
	}
	defer unlock()
	if off < 0 || off >= f.Size {
		return 0, unix.ENXIO
	}
	if f.n.lost.any.Load() { // bytes that were lost are no hole
		if whence == unix.SEEK_HOLE {
			return f.Size, nil
		}
		return off, nil
	}
	for off < f.Size {
		hole, n, err := f.Extent(off)
		if err != nil || hole == (whence == unix.SEEK_HOLE) {
			return off, err
		}
		off += n
	}
	return f.Size, nil
}

// The limit of space. The kernel answers write(2) before it asks for the space,
// so near the limit programs had better write without its cache; and there the
// daemon, run by root, must not use what is reserved for root.

const (
	nearFull   = 128 << 20 // bytes left: as much as the kernel lets wait for writing, on most machines
	lookAgain  = nearFull / 4
	tightAfter = time.Minute // an error of space
	spaceGood  = 100 * time.Millisecond
)

// space is how much is left on the backing filesystem, as far as it was looked.
type space struct {
	d    *disk.Disk
	root int

	tight  atomic.Bool  // little is left
	unseen atomic.Int64 // bytes that may be written before it is looked again
	seen   atomic.Pointer[time.Time]
	failed atomic.Int64 // when it was last found wanting, in seconds; 0: never
}

// nearFull reports whether so little is left that a delayed write might fail.
func (s *space) nearFull() bool {
	if at := s.seen.Load(); at == nil || time.Since(*at) > spaceGood {
		s.look()
	}
	return s.tight.Load()
}

// look looks how much is left.
func (s *space) look() {
	s.unseen.Store(lookAgain)
	now := time.Now()
	s.seen.Store(&now)
	fs, err := s.d.Statfs(s.root)
	if err != nil {
		return
	}
	failed := s.failed.Load()
	s.tight.Store(int64(fs.Bavail)*int64(fs.Frsize) < nearFull ||
		failed != 0 && now.Unix()-failed < int64(tightAfter/time.Second))
}

// takes is called before n bytes are written.
func (s *space) takes(n int64) {
	if s.unseen.Add(-n) < 0 {
		s.look()
	}
}

// took is called with the outcome of a write: a quota shows in no other way.
func (s *space) took(err error) {
	if disk.NoSpace(err) {
		s.failed.Store(time.Now().Unix())
		s.tight.Store(true)
	}
}

// NearFull reports whether so little space is left that a delayed write might
// fail.
func (v *Volume) NearFull() bool { return v.space.nearFull() }
