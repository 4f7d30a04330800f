//go:build linux && !portable

package cfile

import (
	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/ranges"
)

// holes are the blocks of a file that are holes, if that is known.
type holes struct {
	set   ranges.Set
	known bool
}

// mostHoles is how many ranges of holes a file remembers. If they are more, the flag stays.
const mostHoles = 4096

// add notes that blocks first to last are holes.
func (h *holes) add(first, last int64) {
	if h.set = h.set.With(first, last); len(h.set) > mostHoles {
		*h = holes{}
	}
}

// fill notes that blocks first to last are none.
func (h *holes) fill(first, last int64) { h.set = h.set.Without(first, last) }

// none reports whether it is known that the file has none.
func (h *holes) none() bool { return h.known && len(h.set) == 0 }

// Reserve makes sure that [off, off+n) can be written; grow also makes it part
// of the file.
func (f *File) Reserve(off, n int64, grow bool) error {
	g, end := f.Geo, off+n
	from := g.PageOff(g.Block(off))
	if from == g.PageOff(0) {
		from = 0 // with the header
	}
	to := g.PageOff(g.Block(end-1) + 1)
	if err := f.host.TakeSpace(n,
		func() error {
			return f.Disk.Allocate(f.FD, unix.FALLOC_FL_KEEP_SIZE, from,
				to-from)
		}); err != nil {
		return err
	}
	f.reserved = max(f.reserved, to)
	if grow && end > f.Size {
		return f.Write(nil, end-1, 1)
	}
	return nil
}

// Reserved notes that the file has this many bytes of space on the disk, some behind its end.
func (f *File) Reserved(bytes int64) {
	if f.Whole {
		f.reserved = bytes
	}
}

// reservedBeyond reports whether blocks are reserved behind the end, which cutting the
// length would free.
func (f *File) reservedBeyond() bool { return f.reserved > f.Geo.Whole(f.Size) }

// Zero makes the part of [off, off+n) that the file has read as zeros: whole
// blocks become holes, if there are at least least bytes of them. Block 0 and the last
// one are never holes.
func (f *File) Zero(off, n, least int64) error {
	g, end := f.Geo, min(off+n, f.Size)
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
		return f.Write(nil, off, end-off)
	}
	if from := g.Start(first); off < from {
		if err := f.Write(nil, off, from-off); err != nil {
			return err
		}
	}
	if to := g.Start(last + 1); to < end {
		if err := f.Write(nil, to, end-to); err != nil {
			return err
		}
	}
	return f.punch(first, last)
}

// punch makes blocks first to last holes. Their lost bytes are
// announced before: the flags, and a floor that says that what lies behind is
// confirmed.
func (f *File) punch(first, last int64) error {
	g, now := f.Geo, f.Flags()
	f.growOld()
	if now&blockcrypt.Sparse == 0 {
		f.holes = holes{known: true} // there was none before
	}
	flags := now | blockcrypt.Dirty | blockcrypt.Sparse
	confirmed := f.confirmed > 0
	lower := confirmed && f.Header.State.Floor < min(f.durable, g.Start(last+1))
	if flags != now || lower {
		if err := f.writeState(flags); err != nil {
			return err
		}
		if confirmed {
			if err := f.datasync(); err != nil {
				return err
			}
		}
	}
	f.touch()
	from, to := g.PageOff(first), g.PageOff(last+1)
	if err := f.Disk.Allocate(f.FD, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from,
		to-from); err != nil {
		return err
	}
	if first <= f.tail.k && f.tail.k <= last {
		f.tail.k = -1
	}
	f.holes.add(first, last)
	return nil
}
