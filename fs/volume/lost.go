//go:build linux && !portable

package volume

import (
	"bytes"
	"sync"
	"sync/atomic"

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

// wipe forgets the pages. Their lost bytes are errors from then on, as the others are.
func (l *lost) wipe() {
	if !l.any.Load() {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range l.pages {
		clear(b)
	}
	l.pages = nil
}

// prune forgets the pages of which nothing is lost any more.
func (l *lost) prune() {
	for page := range l.pages {
		if !l.bytes.Touches(page*kernelPage, (page+1)*kernelPage-1) {
			delete(l.pages, page)
		}
	}
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
