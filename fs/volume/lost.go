package volume

import (
	"context"
	"errors"
	"slices"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
)

// lost is data that write(2) accepted and that then could not be written. Node.lostMu
// guards it. It is remembered as long as the kernel knows the node, since the kernel goes
// on believing that the file has that size.
type lost struct {
	bytes ranges // of the file
	err   error  // why; nil if nothing is lost and everything was told
	told  bool   // a flush or an fsync has returned err
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
	lost := f.lacks(b, off, errors.Is(err, unix.EPERM) && n.immutable.Load())
	f.mu.RUnlock()
	if len(lost) == 0 {
		return
	}
	n.lostMu.Lock()
	defer n.lostMu.Unlock()
	for _, r := range lost {
		n.lost.bytes = n.lost.bytes.with(r.first, r.last)
	}
	n.lost.err, n.lost.told = err, false
	n.anyLost.Store(true)
}

// loseEnd notes that the bytes from the file's end to believed are lost: the kernel goes on to
// believe in a file of that size, and would show zeros.
func (f *file) loseEnd(believed int64) {
	n := f.n
	n.lostMu.Lock()
	defer n.lostMu.Unlock()
	n.lost.bytes = n.lost.bytes.with(f.size, believed-1)
	n.lost.err, n.lost.told = unix.EIO, false
	n.anyLost.Store(true)
}

// leastEqual is how many bytes in the middle of a write must be those of the file to count
// as not lost: random content has equal bytes by chance.
const leastEqual = 64

// lacks returns the bytes of the file at which it differs from b at off, or ends before.
// A file that is immutable keeps its bytes: only bytes behind its end are lacking. mu is
// held.
func (f *file) lacks(b []byte, off int64, immutable bool) (out ranges) {
	end := off + int64(len(b))
	has := b[:min(int64(len(b)), max(0, f.size-off))]
	if len(has) < len(b) {
		out = out.with(off+int64(len(has)), end-1)
	}
	if immutable || len(has) == 0 {
		return out
	}
	old := make([]byte, blockcrypt.BlockSize)
	for at := 0; at < len(has); {
		m := min(len(has)-at, len(old))
		part := has[at : at+m]
		if f.keyless() || f.broken {
			out = out.with(off+int64(at), off+int64(at+m)-1)
		} else if _, err := f.read(old[:m], off+int64(at)); err != nil {
			out = out.with(off+int64(at), off+int64(at+m)-1)
		} else {
			for i := range part {
				if part[i] != old[i] {
					out = out.with(off+int64(at+i), off+int64(at+i))
				}
			}
		}
		at += m
	}
	return out.joined(leastEqual)
}

// joined returns the set with gaps of fewer than n numbers filled.
func (r ranges) joined(n int64) ranges {
	out := slices.Clone(r[:min(1, len(r))])
	for _, x := range r[len(out):] {
		if last := &out[len(out)-1]; x.first-last.last <= n {
			last.last = x.last
		} else {
			out = append(out, x)
		}
	}
	return out
}

// found notes that the file has the right bytes in [off, end) again.
func (f *file) found(off, end int64) {
	n := f.n
	if !n.anyLost.Load() || off >= end {
		return
	}
	n.lostMu.Lock()
	defer n.lostMu.Unlock()
	if n.lost.bytes = n.lost.bytes.without(off, end-1); len(n.lost.bytes) == 0 {
		n.lost = lost{}
		n.anyLost.Store(false)
	}
}

// cutLost is called when a program has cut the file to size: a program that rolls back
// does. The file then is what the disk has of it. Bytes that were lost below size read as
// the file has them, as on ext4; if their error was not told yet, it is told once.
func (n *Node) cutLost(size int64) {
	if !n.anyLost.Load() {
		return
	}
	n.lostMu.Lock()
	defer n.lostMu.Unlock()
	if k := len(n.lost.bytes); k == 0 || size > n.lost.bytes[k-1].last {
		return // the kernel believes in no greater size: the file grows
	}
	below := n.lost.bytes.touch(0, size-1)
	n.lost.bytes = nil
	if n.lost.told || !below {
		n.lost = lost{}
		n.anyLost.Store(false)
	}
}

// lostIn returns why a part of [off, end) could not be written, or nil.
func (n *Node) lostIn(off, end int64) error {
	if !n.anyLost.Load() {
		return nil
	}
	n.lostMu.Lock()
	defer n.lostMu.Unlock()
	if n.lost.bytes.touch(off, end-1) {
		return n.lost.err
	}
	return nil
}

// anyLostErr returns why something of the file could not be written, or nil. It is for
// flush and fsync: it tells the program.
func (n *Node) anyLostErr() error {
	if !n.anyLost.Load() {
		return nil
	}
	n.lostMu.Lock()
	defer n.lostMu.Unlock()
	err := n.lost.err
	if n.lost.told = true; len(n.lost.bytes) == 0 {
		n.lost = lost{}
		n.anyLost.Store(false)
	}
	return err
}
