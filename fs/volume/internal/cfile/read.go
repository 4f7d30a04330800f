package cfile

import (
	"sync"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// RunPages is how many pages are read or written at once.
const RunPages = 264

// Runs are buffers of RunPages pages of ciphertext. Allocations of this size begin at a page.
var Runs = sync.Pool{New: func() any { b := make([]byte, RunPages*blockcrypt.PageSize); return &b }}

// Scratches are buffers of a page, for parts of blocks: a buffer that is passed to a cipher would
// else be allocated each time.
var Scratches = sync.Pool{New: func() any { return new([blockcrypt.PageSize]byte) }}

// Read fills b from offset off; it reads less only at the end of the file. It calls waits, if
// that is not nil, before it waits for the disk.
func (c *Content) Read(waits func(), b []byte, off int64) (int, error) {
	if off >= c.Size || len(b) == 0 {
		return 0, nil
	}
	b = b[:min(int64(len(b)), c.Size-off)]
	buf := Runs.Get().(*[]byte)
	defer Runs.Put(buf)
	for done := 0; done < len(b); {
		n, err := c.readRun(waits, *buf, b[done:], off+int64(done))
		if err != nil {
			return 0, err
		}
		done += n
	}
	return len(b), nil
}

// readRun opens what one read of buf's size holds.
func (c *Content) readRun(waits func(), buf, b []byte, off int64) (done int, err error) {
	g := c.Geo
	first, last := g.Block(off), g.Block(off+int64(len(b))-1)
	last = min(last, first+RunPages-1)
	raw, err := c.Pages(waits, buf, first, last)
	if err != nil {
		return 0, err
	}
	for k := first; k <= last; k++ {
		start, size := g.Start(k), c.BlockLen(k)
		at := int(off + int64(done) - start)
		page := PageOf(raw, int(k-first), g.Lead(k))
		if at == 0 && len(b)-done >= size {
			if err = c.OpenBlock(b[done:done], k, page, size); err != nil {
				return 0, err
			}
			done += size
			continue
		}
		tmp := Scratches.Get().(*[blockcrypt.PageSize]byte)
		if err = c.OpenBlock(tmp[:0], k, page, size); err == nil {
			done += copy(b[done:], tmp[at:size])
		}
		Scratches.Put(tmp)
		if err != nil {
			return 0, err
		}
	}
	return done, nil
}

// Pages reads the pages of blocks first to last, as far as the file has them, into buf.
func (c *Content) Pages(waits func(), buf []byte, first, last int64) ([]byte, error) {
	g := c.Geo
	at := g.PageOff(first)
	buf = buf[:g.PageOff(last+1)-at]
	if !c.Partial {
		buf = buf[:max(0, min(int64(len(buf)), c.Length(c.Size)-at))]
	}
	n := 0
	if ahead := c.Ahead.Load(); ahead != nil && at < int64(len(*ahead)) &&
		(c.AheadUntil.IsZero() || time.Now().Before(c.AheadUntil)) {
		if n = copy(buf, (*ahead)[at:]); first == 0 {
			c.Ahead.Store(nil) // from here on the kernel has it
		}
	}
	if n == len(buf) {
		return buf, nil
	}
	m, err := c.Disk.PreadOr(waits, c.FD, buf[n:], at+int64(n))
	return buf[:n+m], err
}

// PageOf returns page i of raw from the block's first byte on; less, or nothing,
// if the file ends earlier.
func PageOf(raw []byte, i, lead int) []byte {
	from := min(len(raw), i*blockcrypt.PageSize+lead)
	return raw[from:min(len(raw), (i+1)*blockcrypt.PageSize)]
}

// BlockLen returns how many bytes block k has in a file of this size.
func (c *Content) BlockLen(k int64) int {
	return int(min(c.Size, c.Geo.Start(k+1)) - c.Geo.Start(k))
}

// OpenBlock opens block k, which must have size bytes, into dst, whose capacity
// is enough. A hole is zeros.
func (c *Content) OpenBlock(dst []byte, k int64, page []byte, size int) error {
	if c.IsHole(k, page) {
		clear(dst[:size])
		return nil
	}
	if n := blockcrypt.BlockLen(page); n != size && c.Partial {
		// A file that is being written can end within a block, and have short ones in the middle:
		// the rest of such a block reads as zeros.
		out, err := c.Keys.Open(nil, k, page, c.Geo.Capacity(k))
		clear(dst[copy(dst[:size], out):size])
		return err
	}
	out, err := c.Keys.Open(dst, k, page, c.Geo.Capacity(k))
	if err != nil {
		return err
	}
	if len(out) != size {
		return &blockcrypt.DamageError{Class: blockcrypt.BadBlock, Pos: c.Geo.PageOff(k),
			Detail: "a block of another length"}
	}
	return nil
}

func (c *Content) IsHole(k int64, page []byte) bool {
	return c.Flags()&blockcrypt.Sparse != 0 && k > 0 && (k < c.Geo.Block(c.Size-1) || c.Partial) &&
		len(page) > 0 && page[0] == 0 && page[1] == 0 && blockcrypt.IsHole(page)
}

// Length returns how long the ciphertext file is at this size.
func (c *Content) Length(size int64) int64 {
	if c.Whole {
		return c.Geo.Whole(size)
	}
	return c.Geo.Exact(size)
}

// Extent returns whether the byte at off, which is before the end, lies in a hole, and how
// many bytes from there on do, or do not.
func (c *Content) Extent(off int64) (hole bool, n int64, err error) {
	g, rest := c.Geo, c.Size-off
	k, last := g.Block(off), g.Block(c.Size-1)
	if c.Flags()&blockcrypt.Sparse == 0 || k == last {
		return false, rest, nil
	}
	if k > 0 { // block 0 is never a hole
		data, err := c.dataFrom(k)
		if err != nil {
			return false, 0, err
		}
		if data = min(data, last); data > k {
			return true, g.Start(data) - off, nil
		}
	}
	at, err := c.Disk.NextHole(c.FD, g.PageOff(k+1)-1)
	if err != nil {
		return false, 0, err
	}
	if next := max(k+1, g.BlockAt(at+blockcrypt.PageSize-1)); next < last {
		rest = g.Start(next) - off
	}
	return false, rest, nil
}

// dataFrom returns the first block from k on in whose page the backing file has
// data; a large number where there is none.
func (c *Content) dataFrom(k int64) (int64, error) {
	at, err := c.Disk.NextData(c.FD, c.Geo.PageOff(k))
	if err != nil || at == disk.End {
		return disk.End, err
	}
	return c.Geo.BlockAt(at), nil
}

// SealedLen returns how many bytes of plaintext block k has. No key is needed: they are counted
// at its beginning.
func SealedLen(d *disk.Disk, g blockcrypt.Geometry, fd int, k int64) (int, error) {
	var b [2]byte
	if _, err := d.Pread(fd, b[:], g.PageOff(k)+int64(g.Lead(k))); err != nil {
		return 0, err
	}
	return blockcrypt.BlockLen(b[:]), nil
}
