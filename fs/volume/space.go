package volume

import (
	"context"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
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
	switch mode {
	case 0, keep:
		err = f.reserve(off, n, mode == 0)
	case unix.FALLOC_FL_PUNCH_HOLE | keep:
		err = f.zero(off, n, 0)
	case unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | keep:
		if err = f.zero(off, n, maxGap); err == nil {
			err = f.reserve(off, n, mode&keep == 0)
		}
	default:
		return unix.EOPNOTSUPP
	}
	return f.failed("fallocate", err)
}

// reserve makes sure that [off, off+n) can be written; grow also makes it part
// of the file. mu is held.
func (f *file) reserve(off, n int64, grow bool) error {
	g, end := f.v.geo, off+n
	from := g.PageOff(g.Block(off))
	if from == g.PageOff(0) {
		from = 0 // with the header
	}
	to := g.PageOff(g.Block(end-1) + 1)
	if err := f.takeSpace(n, func() error { return f.v.disk.Allocate(f.FD, unix.FALLOC_FL_KEEP_SIZE, from, to-from) }); err != nil {
		return err
	}
	f.reserved = max(f.reserved, to)
	if grow && end > f.Size {
		return f.write(nil, end-1, 1)
	}
	return nil
}

// reservedBeyond reports whether blocks are reserved behind the end, which cutting the
// length would free. mu is held.
func (f *file) reservedBeyond() bool { return f.reserved > f.v.geo.Whole(f.Size) }

// zero makes the part of [off, off+n) that the file has read as zeros: whole
// blocks become holes, if there are at least least bytes of them. Block 0 and the last
// one are never holes. mu is held.
func (f *file) zero(off, n, least int64) error {
	g, end := f.v.geo, min(off+n, f.Size)
	if off >= end {
		return nil
	}
	first := max(1, g.Block(off))
	if g.Start(first) < off {
		first++
	}
	last := g.Block(end) - 1 // Start(last+1) ≤ end
	if last >= g.Block(f.Size-1) {
		last = g.Block(f.Size-1) - 1
	}
	if first > last || g.Start(last+1)-g.Start(first) < least {
		return f.write(nil, off, end-off)
	}
	if from := g.Start(first); off < from {
		if err := f.write(nil, off, from-off); err != nil {
			return err
		}
	}
	if to := g.Start(last + 1); to < end {
		if err := f.write(nil, to, end-to); err != nil {
			return err
		}
	}
	return f.punch(first, last)
}

// punch makes blocks first to last holes. Their lost bytes are
// announced before: the flags, and a floor that says that what lies behind is
// confirmed. mu is held.
func (f *file) punch(first, last int64) error {
	g, now := f.v.geo, f.Flags()
	f.growOld()
	if now&blockcrypt.Sparse == 0 {
		f.holes, f.known = nil, true // there was none before
	}
	flags := now | blockcrypt.Dirty | blockcrypt.Sparse
	lower := f.conf > 0 && f.Header.State.Floor < min(f.durable, g.Start(last+1))
	if flags != now || lower {
		if err := f.writeState(flags); err != nil {
			return err
		}
		if f.conf > 0 {
			if err := f.datasync(); err != nil {
				return err
			}
		}
	}
	f.touch()
	from, to := g.PageOff(first), g.PageOff(last+1)
	if err := f.v.disk.Allocate(f.FD, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, to-from); err != nil {
		return err
	}
	if first <= f.tailK && f.tailK <= last {
		f.tailK = -1
	}
	f.setHoles(f.holes.with(first, last))
	f.found(g.Start(first), g.Start(last+1))
	return nil
}

// setHoles remembers the holes, unless they are too many: then the flag stays.
func (f *file) setHoles(r ranges) {
	if f.holes = r; len(r) > maxRanges {
		f.holes, f.known = nil, false
	}
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
	if f.n.anyLost.Load() { // bytes that were lost are no hole
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
	s.tight.Store(int64(fs.Bavail)*int64(fs.Frsize) < nearFull || failed != 0 && now.Unix()-failed < int64(tightAfter/time.Second))
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

// takeSpace calls g, which takes n bytes of space for the file.
func (f *file) takeSpace(n int64, g func() error) error {
	f.v.space.takes(n)
	err := f.asOwner(g)
	f.v.space.took(err)
	return err
}

// asOwner calls g, which takes space for the file, with the rights of who owns
// it, if the daemon is root's and little space is left: the reserve of the
// filesystem is root's own.
func (f *file) asOwner(g func() error) error {
	if !f.v.space.tight.Load() || !f.v.super {
		return g()
	}
	var st unix.Stat_t
	if err := f.v.disk.Fstat(f.FD, &st); err != nil {
		return err
	}
	if st.Uid == 0 {
		return g()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setfsuid(int(st.Uid)); err != nil {
		return err
	}
	defer unix.Setfsuid(0)
	return g()
}
