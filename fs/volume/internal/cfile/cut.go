//go:build linux && !portable

package cfile

import (
	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
)

// Clear truncates the file to nothing. No key is needed. It reports whether anything changed.
func (f *File) Clear() (changed bool, err error) {
	if f.Header == nil {
		var st unix.Stat_t
		if f.Disk.Fstat(f.FD, &st) == nil && st.Size == 0 {
			return false, nil
		}
	}
	if err := f.Disk.Truncate(f.FD, 0); err != nil {
		return false, err
	}
	f.becomeEmpty()
	f.touch()
	return true, nil
}

// Truncate changes the size of a file that has bytes to one that is not 0. A larger one is
// filled with zeros.
func (f *File) Truncate(size int64) error {
	switch {
	case size > f.Size:
		return f.Write(nil, size-1, 1)
	case size < f.Size:
		f.growOld()
		f.touch()
		return newCut(f).shrink(size)
	}
	return nil
}

// trim cuts off pages behind the end that an earlier truncation has left: they
// would come back when the file grows.
func (f *File) trim() error {
	if !f.overlong {
		return nil
	}
	length := f.Length(f.Size)
	var st unix.Stat_t
	if err := f.Disk.Fstat(f.FD, &st); err != nil {
		return err
	}
	if st.Size != length { // on a full filesystem even that can fail
		if err := f.Disk.Truncate(f.FD, length); err != nil {
			return err
		}
	}
	f.overlong, f.reserved = false, 0
	return nil
}

// cut is a truncation under way: what the file was before.
type cut struct {
	f       *File
	flags   uint32
	durable int64
}

func newCut(f *File) cut { return cut{f, f.Flags(), f.durable} }

// shrink truncates to a size between 1 and the present one.
func (c cut) shrink(size int64) error {
	f, g := c.f, c.f.Geo
	k := g.Block(size - 1)
	reseal, text, err := c.reseals(k, size)
	if err != nil {
		return err
	}
	if size < f.confirmed {
		if err := c.announce(size, reseal); err != nil {
			return err
		}
	}
	if f.Flags()&blockcrypt.Dirty == 0 { // fresh, and closed before
		if err := f.writeState(f.Flags() | blockcrypt.Dirty); err != nil {
			return err
		}
	}
	if reseal {
		// To the end of its page: nothing of the old block may stay behind it.
		whole := f.Whole
		f.Whole = true
		err := f.put(k, k, change{size, text, g.Start(k), size})
		f.Whole = whole
		if err != nil {
			c.takeBack(c.flags|blockcrypt.Dirty, c.durable)
			return err
		}
	}
	f.cuts++
	f.tail.k = -1
	f.holes.fill(k, 1<<62)
	f.Size = size
	f.confirmed, f.durable = min(f.confirmed, size), min(f.durable, size)
	f.overlong = true
	// The content is cut. What cannot be cut off the ciphertext now is cut off
	// before anything else is written; the callers of fsync are told.
	f.host.Failed("cutting the ciphertext's length", f.trim())
	return nil
}

// reseals reports whether a truncation to size changes a page: within a block,
// or where a hole would come last. text is what block k then holds.
func (c cut) reseals(k, size int64) (bool, []byte, error) {
	f := c.f
	buf := make([]byte, blockcrypt.BlockSize)
	if f.Geo.Block(size) != k {
		if f.Flags()&blockcrypt.Sparse == 0 || k == f.Geo.Block(f.Size-1) {
			return false, nil, nil
		}
		var page [blockcrypt.PageSize]byte
		n, err := f.Disk.Pread(f.FD, page[:], f.Geo.PageOff(k))
		if err != nil || !f.IsHole(k, PageOf(page[:n], 0, f.Geo.Lead(k))) {
			return false, nil, err
		}
		return true, buf[:size-f.Geo.Start(k)], nil
	}
	old, err := f.block(k, buf)
	if err != nil {
		return false, nil, err
	}
	return true, append([]byte(nil), old[:size-f.Geo.Start(k)]...), nil
}

// announce makes durable that confirmed bytes are to go: dirty, a lower
// floor, and cut where a page is sealed again.
func (c cut) announce(size int64, reseal bool) error {
	f := c.f
	flags := f.Flags() | blockcrypt.Dirty
	if reseal {
		flags |= blockcrypt.Cut
	}
	lower := f.Header.State.Floor > size
	if !reseal && !lower && flags == f.Flags() && f.Whole {
		return nil
	}
	if f.durable < size {
		// A floor below size would cut off more than is to go.
		if err := f.datasync(); err != nil {
			return err
		}
		f.durable = f.Size
	}
	old := f.durable
	f.durable = min(f.durable, size)
	if err := f.writeState(flags); err != nil {
		f.durable = old
		return err
	}
	f.cuts++ // an fsync under way must not raise durable again
	err := f.makeWhole()
	if err == nil {
		err = f.datasync()
	}
	if err != nil {
		c.takeBack(f.Flags()&^blockcrypt.Cut, old)
		return err
	}
	if f.phase == Dirty {
		f.enter(Growing)
	}
	return nil
}

// takeBack undoes announce after the truncation failed.
func (c cut) takeBack(flags uint32, durable int64) {
	f := c.f
	f.durable = durable
	err := f.datasync()
	if err == nil {
		err = f.writeState(flags)
	}
	if err != nil {
		f.host.Failed("taking a truncation back", err)
		f.enter(Broken)
	}
}
