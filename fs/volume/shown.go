//go:build linux && !portable

package volume

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// shown is what stat says of an open file besides what the backing file says.
type shown struct {
	size    int64
	mtime   unix.Timespec
	touched bool // mtime is not the backing file's
	closed  bool
}

func (s shown) fill(st *Attr) {
	if st.Size = s.size; s.touched {
		st.Mtim = s.mtime
	}
}

// showing is what is shown of an open file at the moment.
//
// In a shared volume the time of a change is the filesystem's own, as on a host that mounts it without
// kmsfs, since the clocks of hosts differ. To bring the file to rest moves that time once more: it is put
// back if a program knows it, else nothing has to be done for it.
type showing struct {
	mu  sync.Mutex // nothing is done under it
	now shown
}

// change replaces the attributes. If known is set, a time that a program knows stays.
func (s *showing) change(now shown, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if known && s.now.touched {
		now.mtime, now.touched = s.now.mtime, true
	}
	s.now = now
}

// fill puts size and time into st; false where the file was closed.
func (s *showing) fill(st *Attr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now.closed {
		return false
	}
	s.now.fill(st)
	return true
}

// tell is fill in a shared volume, for the attributes of a file that does not change meanwhile: its time is
// the one that programs know from now on.
func (s *showing) tell(st *Attr, size int64, rests bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.Size = size; s.now.touched {
		st.Mtim = s.now.mtime
	} else if !rests {
		s.now.mtime, s.now.touched = st.Mtim, true
	}
}

// set shows a time that a program has set, while a file of a shared volume is not at rest.
func (s *showing) set(t unix.Timespec) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now.mtime, s.now.touched = t, true
}

// known returns the time that programs know of a file of a shared volume; nil if they know none since its
// content was changed.
func (s *showing) known() *unix.Timespec {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.now.touched {
		return nil
	}
	t := s.now.mtime
	return &t
}

// rests is called when the time on the disk is the one that programs know.
func (s *showing) rests() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now.touched = false
}

// sight is the bootTime at which something of a shared volume was as the filesystem has it.
type sight struct{ atomic.Int64 }

// recent reports whether that was in the last 0.1 s (leaseSeen). Other hosts are promised to see a change
// within a second; the kernel caches attributes for the other 0.9 s.
func (s *sight) recent() bool { return bootTime()-s.Load() < int64(leaseSeen) }
