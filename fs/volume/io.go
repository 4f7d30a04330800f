//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/ranges"
)

// Read fills b from offset off; less is read only at the end of the file.
func (h *Handle) Read(ctx context.Context, b []byte, off int64) (int, error) {
	if h.f.lease.stale.Load() {
		return 0, h.f.failed("read", errStale)
	}
	if err := h.doubtHoles(ctx); err != nil {
		return 0, err
	}
	n, err := h.read(ctx, b, off)
	if blockcrypt.ClassOf(err) != "" && h.f.v.Shared() {
		// Another host may have been writing. Under the lease it is known.
		if err := h.f.lease.freshen(ctx); err != nil {
			return 0, err
		}
		n, err = h.read(ctx, b, off)
	}
	return n, h.f.failed("read", err)
}

// doubtHoles takes the lease of a file of a shared volume that may have holes: pages that another host
// has not written yet look like them.
func (h *Handle) doubtHoles(ctx context.Context) error {
	f := h.f
	if !f.v.Shared() {
		return nil
	}
	f.mu.RLock()
	doubt := f.Flags()&blockcrypt.Sparse != 0 && !f.lease.held
	f.mu.RUnlock()
	if !doubt {
		return nil
	}
	return f.lease.freshen(ctx)
}

func (h *Handle) read(ctx context.Context, b []byte, off int64) (int, error) {
	f := h.f
	for {
		if err := f.ready(ctx, false); err != nil {
			return 0, err
		}
		f.rlock(ctx)
		if f.FD >= 0 && !f.Keyless() && f.refuses(false) == nil {
			break
		}
		closed := f.closed
		f.mu.RUnlock() // just now
		if closed {
			return 0, errClosed
		}
	}
	defer f.mu.RUnlock()
	var n int
	var err error
	if f.n.lost.in(off, off+int64(len(b))) {
		waitsOf(ctx).ForKey()
		n, err = f.readAround(b, off)
	} else {
		var waits func()
		if w, ok := ctx.Value(WaitsKey{}).(Waits); ok {
			waits = w.ForDisk
		}
		n, err = f.Read(waits, b, off)
	}
	return n, err
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

// Append is WriteThrough at the end of the file, wherever that is by now. It returns the offset.
func (h *Handle) Append(ctx context.Context, b []byte) (off int64, n int, err error) {
	n, err = h.putAt(ctx, b, func() int64 { off = h.f.Size; return off }, writeThrough)
	return off, n, err
}

// writeHow says how content comes to the file.
type writeHow int

const (
	writeCopied  writeHow = iota // within the daemon
	writeThrough                 // from a program
	writeDelayed                 // from the kernel's cache
)

func (h *Handle) put(ctx context.Context, b []byte, off int64, how writeHow) (int, error) {
	return h.putAt(ctx, b, func() int64 { return off }, how)
}

// putAt is put at the offset that at returns while the file's lock is held.
func (h *Handle) putAt(ctx context.Context, b []byte, at func() int64, how writeHow) (int, error) {
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
	off := at()
	if how == writeDelayed && f.Header == nil && off == 0 && len(b) <= mostWritten {
		err = f.WriteFirst(b)
	} else {
		err = f.Write(b, off, int64(len(b)))
	}
	if err != nil {
		return 0, f.failed("write", err)
	}
	f.n.lost.found(off, off+int64(len(b)))
	if how == writeThrough {
		f.Times().TouchNow()
	}
	return len(b), nil
}

// mostWritten is up to how many bytes a first write from the kernel's cache is taken for the
// only one: the kernel writes up to 1 MiB at once, so that less is mostly all there is. While
// it goes on, a copy of the ciphertext file shows as damaged, so it must be short.
const mostWritten = 64 << 10

// CopyFrom copies n bytes of another handle's file, or of the same, as one copy
// in the daemon: less only at the end of in, after an error, or when ctx ends.
func (h *Handle) CopyFrom(ctx context.Context, in *Handle, inOff, outOff, n int64) (done int64, err error) {
	buf := cfile.Runs.Get().(*[]byte)
	defer cfile.Runs.Put(buf)
	for done < n && ctx.Err() == nil {
		hole, m := in.extent(inOff + done)
		if m = min(m, n-done); hole && m > cfile.MaxGap {
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
	if hole, n, err = f.Extent(off); err != nil || f.n.lost.any.Load() {
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
	end := off + n
	if off < f.Size {
		err = f.zero(off, n, cfile.MaxGap)
	}
	if err == nil && end > f.Size {
		if err = f.Write(nil, end-1, 1); err == nil {
			f.n.lost.found(off, end)
		}
	}
	return f.failed("write", err)
}

// lockForContent takes mu with a data key at hand, if the file is empty.
func (f *file) lockForContent(ctx context.Context, delayedWrite bool) (unlock func(), err error) {
	var kept *freshKey // goes on to be used, since no newer one can be had
	var pause time.Duration
	for {
		if err := f.ready(ctx, delayedWrite); err != nil {
			return nil, err
		}
		if !f.mu.TryLock() {
			waitsOf(ctx).Behind()
			f.mu.Lock()
		}
		if f.Broken() {
			f.unlock()
			return nil, unix.EIO
		}
		if f.closed {
			f.unlock()
			return nil, errClosed
		}
		if f.FD < 0 || f.Keyless() || f.refuses(delayedWrite) != nil { // just now
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
		if ok, err := f.lease.has(); !ok {
			f.unlock()
			if err := f.lease.wait(ctx, err, &pause); err != nil {
				return nil, err
			}
			continue
		}
		stale := f.Size == 0 && f.next != nil && !f.next.current(f) &&
			!(f.next == kept && kept.domain.ring.Opens(kept.Wrapped))
		if !stale && (f.Size > 0 || f.next != nil) {
			return f.unlock, nil
		}
		old := f.next
		if err := f.lease.giveBack(); err != nil { // nobody is to wait for a key service
			f.unlock()
			return nil, f.failed("giving its lease back", err)
		}
		f.unlock()
		if stale { // others are the recipients by now
			if kept, err = f.renewKey(ctx, old); err != nil {
				return nil, err
			}
			continue
		}
		if _, err := f.renewKey(ctx, nil); err != nil {
			return nil, err
		}
	}
}

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

// readAround reads b at off from a file some of whose bytes there are lost: pages that are
// kept come from memory. It fails if others are lost. mu is held.
func (f *file) readAround(b []byte, off int64) (n int, err error) {
	l := &f.n.lost
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(b) > 0 {
		page := off / kernelPage
		part := b[:min(int64(len(b)), (page+1)*kernelPage-off)]
		m := 0
		if kept := l.pages[page]; kept != nil {
			m = copy(part, kept[min(int64(len(kept)), off-page*kernelPage):])
		} else if l.bytes.Touches(off, off+int64(len(part))-1) {
			return 0, unix.EIO // the log said why when they were lost
		} else if m, err = f.Read(nil, part, off); err != nil {
			return 0, err
		}
		n, off, b = n+m, off+int64(m), b[m:]
		if m < len(part) {
			break
		}
	}
	return n, nil
}

// WriteDelayed is Write of data that the kernel's cache accepted before. If it fails, the
// bytes that the file does not have are EIO for readers, and an error at each flush and
// fsync, until they are written again or the file is cut.
func (h *Handle) WriteDelayed(ctx context.Context, b []byte, off int64) error {
	_, err := h.put(ctx, b, off, writeDelayed)
	if err != nil {
		h.f.lose(b, off, err)
	}
	return err
}

// lose notes that b could not be written at off. The kernel writes whole pages: what the
// file has already, as around a few bytes that changed, is not lost.
func (f *file) lose(b []byte, off int64, err error) {
	n := f.n
	f.wake() // if it fails, all of b counts as lost
	f.mu.RLock()
	lost := lacks(f.File, b, off, errors.Is(err, unix.EPERM) && n.immutable.Load())
	f.mu.RUnlock()
	if len(lost) > 0 {
		n.lost.add(lost, b, off, err)
	}
}

// leastEqual is how many bytes in the middle of a write must be those of the file to count
// as not lost: random content has equal bytes by chance.
const leastEqual = 64

// lacks returns the bytes of the file at which it differs from b at off, or ends before.
// A file that is immutable keeps its bytes: only bytes behind its end are lacking. mu is
// held.
func lacks(f *cfile.File, b []byte, off int64, immutable bool) (out ranges.Set) {
	end := off + int64(len(b))
	has := b[:min(int64(len(b)), max(0, f.Size-off))]
	if len(has) < len(b) {
		out = out.With(off+int64(len(has)), end-1)
	}
	if immutable || len(has) == 0 {
		return out
	}
	old := make([]byte, blockcrypt.BlockSize)
	for at := 0; at < len(has); {
		m := min(len(has)-at, len(old))
		part := has[at : at+m]
		if f.Keyless() || f.Broken() {
			out = out.With(off+int64(at), off+int64(at+m)-1)
		} else if _, err := f.Read(nil, old[:m], off+int64(at)); err != nil {
			out = out.With(off+int64(at), off+int64(at+m)-1)
		} else {
			for i := range part {
				if part[i] != old[i] {
					out = out.With(off+int64(at+i), off+int64(at+i))
				}
			}
		}
		at += m
	}
	return out.Joined(leastEqual)
}
