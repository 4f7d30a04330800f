package volume

import (
	"bytes"
	"context"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/keystore"
)

// maxGap is the largest gap that is sealed as zeros; a larger one is a hole.
const maxGap = 1 << 20

var zeroBlock [blockcrypt.BlockSize]byte

// DiskKey is the key of a context value of type func(): a read calls it when it is about to
// wait for the disk, so that who handles requests can let somebody else go on with the next
// one.
type DiskKey struct{}

// BehindKey is the key of a context value of type func(): a call calls it when it waits for
// another one of the same file. How long it then takes says nothing about the disk.
type BehindKey struct{}

func behind(ctx context.Context) {
	if told, _ := ctx.Value(BehindKey{}).(func()); told != nil {
		told()
	}
}

// rlock takes mu for reading, and tells if it waits for another call.
func (f *file) rlock(ctx context.Context) {
	if !f.mu.TryRLock() {
		behind(ctx)
		f.mu.RLock()
	}
}

// Read fills b from offset off; less is read only at the end of the file.
func (h *Handle) Read(ctx context.Context, b []byte, off int64) (int, error) {
	f := h.f
	for {
		if err := f.ready(ctx, false); err != nil {
			return 0, err
		}
		f.rlock(ctx)
		if f.FD >= 0 && !f.keyless() && f.refuses(false) == nil {
			break
		}
		f.mu.RUnlock() // just now
	}
	defer f.mu.RUnlock()
	var n int
	var err error
	if f.n.lostIn(off, off+int64(len(b))) != nil {
		keystore.Waits(ctx)
		n, err = f.readAround(b, off)
	} else {
		waits, _ := ctx.Value(DiskKey{}).(func())
		n, err = f.Read(waits, b, off)
	}
	return n, f.failed("read", err)
}

// readBlock returns the plaintext of block k, in dst unless it is remembered.
func (f *file) readBlock(k int64, dst []byte) ([]byte, error) {
	size := f.BlockLen(k)
	if k == f.tailK && len(f.tail) == size {
		return f.tail, nil
	}
	page := cfile.Scratches.Get().(*[blockcrypt.PageSize]byte)
	defer cfile.Scratches.Put(page)
	raw, err := f.Pages(nil, page[:], k, k)
	if err != nil {
		return nil, err
	}
	err = f.OpenBlock(dst[:0], k, cfile.PageOf(raw, 0, f.v.geo.Lead(k)), size)
	return dst[:size], err
}

// Write writes b at offset off. On an error the file keeps its content, but for
// whole pages of an overwrite.
func (h *Handle) Write(ctx context.Context, b []byte, off int64) (int, error) {
	return h.put(ctx, b, off, writeCopied)
}

// WriteThrough is Write of a program past the kernel's cache, which keeps the time of its own
// writes only.
func (h *Handle) WriteThrough(ctx context.Context, b []byte, off int64) (int, error) {
	return h.put(ctx, b, off, writeThrough)
}

// writeHow says how content comes to the file.
type writeHow int

const (
	writeCopied  writeHow = iota // within the daemon
	writeThrough                 // from a program
	writeDelayed                 // from the kernel's cache
)

func (h *Handle) put(ctx context.Context, b []byte, off int64, how writeHow) (int, error) {
	if !h.write {
		return 0, unix.EBADF
	}
	if len(b) == 0 {
		return 0, nil
	}
	f := h.f
	unlock, err := f.lockForContent(ctx, how == writeDelayed)
	if err != nil {
		return 0, err
	}
	defer unlock()
	if how == writeDelayed && f.Header == nil && off == 0 && len(b) <= mostWritten {
		err = f.writeAll(b)
	} else {
		err = f.write(b, off, int64(len(b)))
	}
	if err != nil {
		return 0, f.failed("write", err)
	}
	if how == writeThrough {
		unix.ClockGettime(unix.CLOCK_REALTIME, &f.mtime)
		f.moveTime()
	}
	return len(b), nil
}

// mostWritten is up to how many bytes a first write from the kernel's cache is taken for the
// only one: the kernel writes up to 1 MiB at once, so that less is mostly all there is. While
// it goes on, a copy of the ciphertext file shows as damaged, so it must be short.
const mostWritten = 64 << 10

// writeAll writes b to an empty file, as all of it: a file that is not written again needs no
// second write for its state. mu is held.
func (f *file) writeAll(b []byte) error {
	n := int64(len(b))
	if err := f.trim(); err != nil {
		return err
	}
	if err := f.begin(0, n); err != nil {
		return err
	}
	return f.written(b, 0, n, false, f.abandon)
}

// CopyFrom copies n bytes of another handle's file, or of the same, as one copy
// in the daemon: less only at the end of in, after an error, or when ctx ends.
func (h *Handle) CopyFrom(ctx context.Context, in *Handle, inOff, outOff, n int64) (done int64, err error) {
	buf := cfile.Runs.Get().(*[]byte)
	defer cfile.Runs.Put(buf)
	for done < n && ctx.Err() == nil {
		hole, m := in.extent(inOff + done)
		if m = min(m, n-done); hole && m > maxGap {
			err = h.zero(ctx, outOff+done, m)
		} else {
			if m == 0 { // behind the end, where bytes can be lost
				m = n - done
			}
			m, err = h.copyChunk(ctx, in, (*buf)[:min(m, copyChunk)], inOff+done, outOff+done)
		}
		if err != nil {
			m = 0
		}
		if done += m; err != nil || m == 0 {
			if done > 0 {
				err = nil // the next call meets it again
			}
			return done, err
		}
	}
	if done == 0 && n > 0 {
		err = unix.EINTR
	}
	return done, err
}

const copyChunk = 1 << 20

// copyChunk copies as much as b holds.
func (h *Handle) copyChunk(ctx context.Context, in *Handle, b []byte, inOff, outOff int64) (int64, error) {
	n, err := in.Read(ctx, b, inOff)
	if err == nil && n > 0 {
		n, err = h.Write(ctx, b[:n], outOff)
	}
	return int64(n), err
}

// extent is [file.extent]; data of no length behind the end. All is data if the backing
// filesystem fails to tell, or if bytes were lost, which must not be taken for a hole.
func (h *Handle) extent(off int64) (hole bool, n int64) {
	f := h.f
	unlock, err := f.awake()
	if err != nil {
		return false, 0
	}
	defer unlock()
	if off < 0 || off >= f.Size {
		return false, 0
	}
	if hole, n, err = f.Extent(off); err != nil || f.n.anyLost.Load() {
		return false, f.Size - off
	}
	return hole, n
}

// zero makes n bytes from off on zeros, as holes where they are many, and the file as long.
func (h *Handle) zero(ctx context.Context, off, n int64) error {
	if !h.write {
		return unix.EBADF
	}
	f := h.f
	unlock, err := f.lockForContent(ctx, false)
	if err != nil {
		return err
	}
	defer unlock()
	if off < f.Size {
		err = f.zero(off, n, maxGap)
	}
	if end := off + n; err == nil && end > f.Size {
		err = f.write(nil, end-1, 1)
	}
	return f.failed("write", err)
}

// lockForContent takes mu with a data key at hand, if the file is empty.
func (f *file) lockForContent(ctx context.Context, delayedWrite bool) (unlock func(), err error) {
	for {
		if err := f.ready(ctx, delayedWrite); err != nil {
			return nil, err
		}
		if !f.mu.TryLock() {
			behind(ctx)
			f.mu.Lock()
		}
		if f.broken {
			f.unlock()
			return nil, unix.EIO
		}
		if f.FD < 0 || f.keyless() || f.refuses(delayedWrite) != nil { // just now
			f.unlock()
			continue
		}
		if !f.rw { // it was immutable when its descriptor was opened again
			f.unlock()
			if err := f.needWrite(); err != nil {
				return nil, err
			}
			continue
		}
		if f.Size > 0 || f.next != nil {
			return f.unlock, nil
		}
		f.unlock()
		if err := f.takeKey(ctx); err != nil {
			return nil, err
		}
	}
}

// write puts n bytes at off: b, or zeros where b is nil. mu is held.
func (f *file) write(b []byte, off, n int64) error {
	end := off + n
	if off < 0 || end < 0 || end > blockcrypt.MaxPlain {
		return unix.EFBIG
	}
	old := f.Size
	sparse := uint32(0)
	if off-old > maxGap {
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
		var err error
		if undo, err = f.tailKeeper(); err != nil {
			return err
		}
	}
	return f.written(b, off, end, sparse != 0, undo)
}

// written writes the blocks, after all that has to come before; undo follows a failure.
func (f *file) written(b []byte, off, end int64, sparse bool, undo func()) error {
	f.touch()
	if err := f.writeRuns(b, off, end, sparse); err != nil {
		f.tailK = -1
		undo()
		return err
	}
	f.found(off, end)
	return nil
}

// growOld ends the time in which nothing of the file counts as confirmed: when the file is
// old enough, or when its state is of an earlier session, which may leave the marker at any
// time. mu is held.
func (f *file) growOld() {
	if f.conf == 0 && f.Size > 0 && (time.Since(f.born) > freshFor || f.Header.State.Session != f.v.sessions.now.Load()) {
		f.conf = f.Size
	}
}

// writeRuns seals the blocks that [off, end) touches, with the old last block
// if the file grows over a gap.
func (f *file) writeRuns(b []byte, off, end int64, sparse bool) error {
	g, old := f.v.geo, f.Size
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
			if err := f.put(tail, tail, g.Start(tail+1), nil, old, old); err != nil {
				return err
			}
			f.setHoles(f.holes.with(tail+1, first-1))
		}
	}
	size := max(old, end)
	if err := f.put(first, last, size, b, off, end); err != nil {
		return err
	}
	f.Size = size
	f.holes = f.holes.without(first, last)
	return nil
}

// tailKeeper returns what puts the old end of the file back after a growth
// that failed. mu is held.
func (f *file) tailKeeper() (undo func(), err error) {
	size, k := f.Size, f.v.geo.Block(f.Size-1)
	var tail []byte
	if f.BlockLen(k) < f.v.geo.Capacity(k) {
		t, err := f.readBlock(k, make([]byte, blockcrypt.BlockSize))
		if err != nil {
			return nil, err
		}
		tail = append(tail, t...)
	}
	return func() {
		var err error
		if tail != nil && !f.holds(k, tail) { // on a full disk even putting it back may fail
			err = f.put(k, k, size, tail, f.v.geo.Start(k), size)
			if err != nil && f.keepGrowth(k) {
				err = nil
			}
		}
		f.holes = f.holes.without(f.v.geo.Block(f.Size-1)+1, 1<<62)
		if err == nil {
			f.overlong = true
			f.failed("cutting the ciphertext's length", f.trim()) // or before the next change
		}
		if err != nil {
			f.failed("putting the end of the file back", err)
			f.breaks()
		}
	}, nil
}

// keepGrowth lets the file end behind what a growth that failed has written from block
// k on: whole blocks. It is for where the old end cannot be put back, on a full
// filesystem that writes nothing in place.
func (f *file) keepGrowth(k int64) bool {
	g, size := f.v.geo, f.Size
	var page [blockcrypt.PageSize]byte
	text := make([]byte, 0, blockcrypt.BlockSize)
	for ; ; k++ {
		n, err := f.v.disk.Pread(f.FD, page[:], g.PageOff(k))
		if err != nil {
			break
		}
		out, err := f.Keys.Open(text, k, cfile.PageOf(page[:n], 0, g.Lead(k)), g.Capacity(k))
		if err != nil || len(out) < g.Capacity(k) {
			break
		}
		size = g.Start(k + 1)
	}
	grown := size > f.Size
	f.Size = size
	return grown
}

// holds reports whether block k of the ciphertext file has this content.
func (f *file) holds(k int64, text []byte) bool {
	got, err := f.readBlock(k, make([]byte, blockcrypt.BlockSize))
	return err == nil && bytes.Equal(got, text)
}

// put seals blocks first to last of a file of size bytes and writes them: the
// bytes [off, end) are b, or zeros where b is nil, the others those that the
// file has now, or zeros. One S and one pwrite for each run; header and block 0
// go together. mu is held.
func (f *file) put(first, last, size int64, b []byte, off, end int64) error {
	if f.sealed > blockcrypt.EpochBlocks || !f.inked {
		f.epoch, f.sealed, f.inked = blockcrypt.NewEpoch(), 0, true
	}
	buf := cfile.Runs.Get().(*[]byte)
	defer cfile.Runs.Put(buf)
	for first <= last {
		final := min(last, first+cfile.RunPages-1-f.v.geo.PageOff(0)/blockcrypt.PageSize) // with the header's own pages
		if err := f.putRun(*buf, first, final, size, b, off, end); err != nil {
			return err
		}
		first = final + 1
	}
	return nil
}

func (f *file) putRun(buf []byte, first, last, size int64, b []byte, off, end int64) error {
	g := f.v.geo
	at, used := g.PageOff(first), 0
	if first == 0 {
		at = 0
		used = copy(buf, f.head)
	}
	scratch := cfile.Scratches.Get().(*[blockcrypt.PageSize]byte)
	defer cfile.Scratches.Put(scratch)
	var text []byte
	for k := first; k <= last; k++ {
		var err error
		if text, err = f.blockAfter(scratch[:blockcrypt.BlockSize], k, size, b, off, end); err != nil {
			return err
		}
		f.Keys.Seal(buf[used:], k, f.epoch, text)
		used += blockcrypt.SealedSize(len(text))
		next := int(g.PageOff(k+1) - at)
		clear(buf[used:next])
		used = next
	}
	f.sealed += last - first + 1
	if last == g.Block(size-1) && !f.Whole {
		used = int(g.Exact(size) - at)
	}
	if err := f.guard(at, first, last); err != nil {
		return err
	}
	f.v.sessions.wrote.Store(true)
	f.tailK = -1
	err := f.takeSpace(int64(used), func() error { return f.v.disk.Pwrite(f.FD, buf[:used], at) })
	if err == nil { // the next write mostly goes on there
		f.tailK, f.tail = last, append(f.tail[:0], text...)
	}
	return err
}

// blockAfter returns the plaintext of block k of the file after the change.
func (f *file) blockAfter(scratch []byte, k, size int64, b []byte, off, end int64) ([]byte, error) {
	start := f.v.geo.Start(k)
	stop := min(f.v.geo.Start(k+1), size)
	if off <= start && stop <= end {
		if b == nil {
			return zeroBlock[:stop-start], nil
		}
		return b[start-off : stop-off], nil
	}
	text := scratch[:stop-start]
	n := 0
	if start < f.Size {
		old, err := f.readBlock(k, scratch)
		if err != nil {
			return nil, err
		}
		n = copy(text, old)
	}
	clear(text[n:])
	if from, to := max(start, off), min(stop, end); from < to {
		if b == nil {
			clear(text[from-start : to-start])
		} else {
			copy(text[from-start:to-start], b[from-off:to-off])
		}
	}
	return text, nil
}

// guard is S over those of the blocks that may hold confirmed bytes, whose run
// begins at byte at.
func (f *file) guard(at, first, last int64) error {
	if f.conf == 0 || f.v.calm {
		return nil
	}
	last = min(last, f.v.geo.Block(f.conf-1))
	if first > last {
		return nil
	}
	return f.waited(f.v.disk.SettlePages(f.FD, at, f.v.geo.PageOff(last+1)-at))
}
