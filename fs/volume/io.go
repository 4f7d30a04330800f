package volume

import (
	"context"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/keystore"
)

// Waits is told when a call is about to wait, so that who handles requests can let somebody else
// go on with the next one.
type Waits interface {
	ForKey()  // for a key service
	ForDisk() // perhaps for the disk: a read of data that is not in the page cache
	Behind()  // for another call of the same file: how long it takes says nothing about the disk
}

// WaitsKey is the key of a context value of type [Waits].
type WaitsKey struct{}

// waitsOf returns the Waits of a context, which may have none.
func waitsOf(ctx context.Context) Waits {
	if w, ok := ctx.Value(WaitsKey{}).(Waits); ok {
		return w
	}
	return nobody{}
}

type nobody struct{}

func (nobody) ForKey()  {}
func (nobody) ForDisk() {}
func (nobody) Behind()  {}

// rlock takes mu for reading, and tells if it waits for another call.
func (f *file) rlock(ctx context.Context) {
	if !f.mu.TryRLock() {
		waitsOf(ctx).Behind()
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
		if f.FD >= 0 && !f.Keyless() && f.refuses(false) == nil {
			break
		}
		f.mu.RUnlock() // just now
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
	return n, f.failed("read", err)
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
	var kept *keystore.DataKey // goes on to be used, since no newer one can be had
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
		stale := f.Size == 0 && f.next != nil && f.next != kept && !f.v.ring.Current(f.next)
		if !stale && (f.Size > 0 || f.next != nil) {
			return f.unlock, nil
		}
		old := f.next
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
