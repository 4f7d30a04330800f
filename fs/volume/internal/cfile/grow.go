//go:build linux && !portable

package cfile

import (
	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
)

// MaxGap is the largest gap in bytes that is sealed as zeros; a larger one is a hole.
const MaxGap = 1 << 20

// WriteFirst writes b to an empty file, as all of it: a file that is not written again needs no
// second write for its state.
func (f *File) WriteFirst(b []byte) error {
	n := int64(len(b))
	if err := f.trim(); err != nil {
		return err
	}
	if err := f.begin(0, n); err != nil {
		return err
	}
	return f.written(b, 0, n, false, f.abandon)
}

// Write puts n bytes at off: b, or zeros where b is nil. A file that is empty gets a header. On an
// error the file keeps its content, but for whole pages of an overwrite.
func (f *File) Write(b []byte, off, n int64) error {
	end := off + n
	if off < 0 || end < 0 || end > blockcrypt.MaxPlain {
		return unix.EFBIG
	}
	old := f.Size
	sparse := uint32(0)
	if off-old > MaxGap {
		sparse = blockcrypt.Sparse
	}
	if err := f.trim(); err != nil {
		return err
	}
	f.growOld()
	undo := func() {}
	switch {
	case old == 0:
		if err := f.begin(blockcrypt.Dirty|sparse, 0); err != nil {
			return err
		}
		undo = f.abandon
	case end > old:
		if err := f.beforeGrowth(blockcrypt.Dirty | sparse); err != nil {
			return err
		}
		g, err := newGrowth(f)
		if err != nil {
			return err
		}
		undo = g.undo
	}
	return f.written(b, off, end, sparse != 0, undo)
}

// written writes the blocks, after all that has to come before; undo follows a failure.
func (f *File) written(b []byte, off, end int64, sparse bool, undo func()) error {
	f.touch()
	if err := f.writeRuns(b, off, end, sparse); err != nil {
		f.tail.k = -1
		undo()
		return err
	}
	return nil
}

// writeRuns seals the blocks that [off, end) touches, with the old last block
// if the file grows over a gap.
func (f *File) writeRuns(b []byte, off, end int64, sparse bool) error {
	g, old := f.Geo, f.Size
	first, last := g.Block(off), g.Block(end-1)
	if off > old {
		tail := int64(0)
		if old > 0 {
			tail = g.Block(old - 1)
		}
		switch {
		case !sparse:
			first = min(first, tail)
		case tail < first:
			// The old last block is sealed full; the blocks between are holes.
			if err := f.put(tail, tail, change{g.Start(tail + 1), nil, old, old}); err != nil {
				return err
			}
			f.holes.add(tail+1, first-1)
		}
	}
	size := max(old, end)
	if err := f.put(first, last, change{size, b, off, end}); err != nil {
		return err
	}
	f.Size = size
	f.holes.fill(first, last)
	return nil
}

// beforeGrowth is the tail rule and the flags that must be durable before the
// length changes: once until the file settles.
func (f *File) beforeGrowth(flags uint32) error {
	now := f.Flags()
	if flags&blockcrypt.Sparse&^now != 0 {
		f.holes = holes{known: true} // there was none before
	}
	if f.phase == Fresh {
		if flags&^now != 0 {
			return f.writeState(now | flags)
		}
		return nil
	}
	if f.phase == Cutting {
		// A file that is cut ends at its floor: what grows now would be lost.
		if err := f.datasync(); err != nil {
			return err
		}
		now &^= blockcrypt.Cut
		if err := f.writeState(now | flags); err != nil {
			return err
		}
	}
	if f.phase == Growing {
		if flags&^now == 0 {
			return nil
		}
		f.enter(Dirty)
	}
	if err := f.writeState(now | flags); err != nil {
		return err
	}
	if err := f.makeWhole(); err != nil {
		return err
	}
	if err := f.datasync(); err != nil {
		return err
	}
	f.enter(Growing)
	return nil
}

// growth is one under way: what the file had at its end before.
type growth struct {
	f    *File
	size int64
	k    int64  // the last block
	text []byte // its plaintext; nil if it is full, and stays as it is
}

// newGrowth remembers the present end of the file.
func newGrowth(f *File) (*growth, error) {
	g := &growth{f: f, size: f.Size, k: f.Geo.Block(f.Size - 1)}
	if f.BlockLen(g.k) < f.Geo.Capacity(g.k) {
		text, err := f.block(g.k, make([]byte, blockcrypt.BlockSize))
		if err != nil {
			return nil, err
		}
		g.text = append(g.text, text...)
	}
	return g, nil
}

// undo puts the old end of the file back after the growth failed.
func (g *growth) undo() {
	f := g.f
	var err error
	if g.text != nil && !f.holds(g.k, g.text) { // on a full disk even putting it back may fail
		err = f.put(g.k, g.k, change{g.size, g.text, f.Geo.Start(g.k), g.size})
		if err != nil && g.keep() {
			err = nil
		}
	}
	f.holes.fill(f.Geo.Block(f.Size-1)+1, 1<<62)
	if err != nil {
		f.host.Failed("putting the end of the file back", err)
		f.enter(Broken)
		return
	}
	f.overlong = true
	f.host.Failed("cutting the ciphertext's length", f.trim()) // or before the next change
}

// keep lets the file end behind what the growth has written from its old last block
// on: whole blocks. It is for where the old end cannot be put back, on a full
// filesystem that writes nothing in place.
func (g *growth) keep() bool {
	f, geo, size := g.f, g.f.Geo, g.f.Size
	var page [blockcrypt.PageSize]byte
	text := make([]byte, 0, blockcrypt.BlockSize)
	for k := g.k; ; k++ {
		n, err := f.Disk.Pread(f.FD, page[:], geo.PageOff(k))
		if err != nil {
			break
		}
		out, err := f.Keys.Open(text, k, PageOf(page[:n], 0, geo.Lead(k)), geo.Capacity(k))
		if err != nil || len(out) < geo.Capacity(k) {
			break
		}
		size = geo.Start(k + 1)
	}
	grown := size > f.Size
	f.Size = size
	return grown
}
