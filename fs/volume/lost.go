package volume

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/ranges"
)

// lost is data that write(2) accepted and that then could not be written. It is remembered as long
// as the kernel knows the node, since the kernel goes on believing that the file has that size.
type lost struct {
	any atomic.Bool // there is something; most files have nothing

	mu    sync.Mutex // guards the fields below
	bytes ranges.Set // of the file
	err   error      // why; nil if nothing is lost and everything was told
	told  bool       // a flush or an fsync has returned err

	// pages are those at the ends of lost ranges that are lost in part, as the kernel had
	// them. The kernel reads such a page before a program can write to a part of it again.
	pages map[int64][]byte
}

// forget ends it. mu is held.
func (l *lost) forget() {
	l.bytes, l.err, l.told, l.pages = nil, nil, false, nil
	l.any.Store(false)
}

// add notes that these bytes are lost, for err; b at off is what was to be written.
func (l *lost) add(s ranges.Set, b []byte, off int64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range s {
		l.bytes = l.bytes.With(r.First, r.Last)
	}
	l.keepEnds(s, b, off)
	l.err, l.told = err, false
	l.any.Store(true)
}

const (
	kernelPage = 4096
	mostPages  = 1024 // of one file; the others are errors as all lost bytes are
)

// keepEnds keeps the pages in which a range of b, which was to be written at off, begins and
// ends. The kernel writes from the beginning of a page.
func (l *lost) keepEnds(r ranges.Set, b []byte, off int64) {
	for _, x := range r {
		for _, at := range []int64{x.First, x.Last + 1} {
			page := at / kernelPage
			from := page*kernelPage - off
			if at%kernelPage == 0 || from < 0 || from >= int64(len(b)) || len(l.pages) >= mostPages {
				continue
			}
			if l.pages == nil {
				l.pages = map[int64][]byte{}
			}
			l.pages[page] = bytes.Clone(b[from:min(from+kernelPage, int64(len(b)))])
		}
	}
}

// prune forgets the pages of which nothing is lost any more.
func (l *lost) prune() {
	for page := range l.pages {
		if !l.bytes.Touches(page*kernelPage, (page+1)*kernelPage-1) {
			delete(l.pages, page)
		}
	}
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

// found notes that the file has the right bytes in [off, end) again.
func (l *lost) found(off, end int64) {
	if !l.any.Load() || off >= end {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bytes = l.bytes.Without(off, end-1); len(l.bytes) == 0 {
		l.forget()
	}
	l.prune()
}

// cut is called when a program has cut the file to size: a program that rolls back
// does. The file then is what the disk has of it. Bytes that were lost below size read as
// the file has them, as on ext4; if their error was not told yet, it is told once.
func (l *lost) cut(size int64) {
	if !l.any.Load() {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if k := len(l.bytes); k == 0 || size > l.bytes[k-1].Last {
		return // the kernel believes in no greater size: the file grows
	}
	below := l.bytes.Touches(0, size-1)
	if l.bytes, l.pages = nil, nil; l.told || !below {
		l.forget()
	}
}

// in reports whether a part of [off, end) could not be written.
func (l *lost) in(off, end int64) bool {
	if !l.any.Load() {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bytes.Touches(off, end-1)
}

// tell returns why something of the file could not be written, or nil. It is for
// flush and fsync: it tells the program.
func (l *lost) tell() error {
	if !l.any.Load() {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.err
	if l.told = true; len(l.bytes) == 0 {
		l.forget()
	}
	return err
}
