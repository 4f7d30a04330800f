//go:build linux && !portable

package volume

import (
	"sync"
	"sync/atomic"
	"time"

	"kmsfs/fs/volume/internal/cfile"
)

const (
	settleAfter  = 3 * time.Second // the last close
	settleTick   = time.Second
	settleMost   = 512 // files that wait, at most
	sessionEvery = 5 * time.Minute
)

// settler settles closed files in the background, many with one syncfs, and
// begins a new session every few minutes while there are changes.
type settler struct {
	v *Volume

	mu    sync.Mutex
	files map[*file]time.Time // when each was closed last
	full  chan struct{}

	wg    sync.WaitGroup
	since time.Time // of the session
}

func (s *settler) start(v *Volume) {
	s.v, s.files, s.full, s.since = v, map[*file]time.Time{}, make(chan struct{}, 1), time.Now()
	s.wg.Go(s.loop)
}

func (s *settler) stop() { s.wg.Wait() } // Volume.quit ends the loop

// add hands a closed file over.
func (s *settler) add(f *file) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[f] = time.Now()
	if len(s.files) > s.v.descriptors.closed {
		select {
		case s.full <- struct{}{}:
		default:
		}
	}
}

func (s *settler) loop() {
	t := time.NewTicker(settleTick)
	defer t.Stop()
	for {
		age := settleAfter
		select {
		case <-s.v.quit:
			return
		case <-s.full:
			age = 0
		case <-t.C:
		}
		s.settle(s.due(age))
		if time.Since(s.since) > sessionEvery && s.v.sessions.wrote.Swap(false) {
			s.since = time.Now()
			if err := s.v.nextSession(); err != nil {
				s.v.report("session", "a new session could not begin", err)
			}
		}
	}
}

// due takes the files out that were closed for age.
func (s *settler) due(age time.Duration) (out []*file) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for f, t := range s.files {
		if time.Since(t) >= age {
			out = append(out, f)
			delete(s.files, f)
		}
	}
	return out
}

// settle settles these files after one sync, and lets them go.
func (s *settler) settle(files []*file) {
	if len(files) == 0 {
		return
	}
	changes := make([]uint64, len(files))
	for i, f := range files {
		f.mu.RLock()
		changes[i] = f.Changes()
		f.mu.RUnlock()
	}
	err := s.v.syncAll()
	if err != nil {
		s.v.report(".", "syncing failed", err)
	}
	sideBySide(files, func(i int, f *file) {
		if err == nil {
			f.mu.Lock()
			switch {
			case f.v.Shared():
				f.failed("settling", f.lease.giveBack())
			case f.writers == 0 && !f.closed:
				f.failed("settling", f.Settle(changes[i]))
			}
			f.unlock()
		}
		f.n.openMu.Lock()
		f.dropIfIdle() // or it comes back here
		f.n.openMu.Unlock()
	})
}

// atOnce is how many files are brought into order at the same time: a disk with latency takes
// as long for one as for many.
const atOnce = 32

// sideBySide calls do for each item, for several at the same time.
func sideBySide[T any](items []T, do func(i int, x T)) {
	var wg sync.WaitGroup
	var next atomic.Int64
	for range min(len(items), atOnce) {
		wg.Go(func() {
			for i := next.Add(1) - 1; int(i) < len(items); i = next.Add(1) - 1 {
				do(int(i), items[i])
			}
		})
	}
	wg.Wait()
}

// settleNow settles one file at once.
func (f *file) settleNow() error {
	f.mu.Lock()
	defer f.unlock()
	if f.closed || !f.rw {
		return nil
	}
	if f.v.Shared() {
		return f.lease.giveBack()
	}
	return f.SettleNow()
}

// nextSession begins a new session: the states of open files are written again, and all is
// synced.
func (v *Volume) nextSession() error {
	return v.sessions.next(func() error {
		for _, f := range v.nodes.files() {
			f.mu.Lock()
			err := error(nil)
			if f.rw && !f.closed && (f.lease.held || !v.Shared()) {
				err = f.Restamp()
			}
			f.unlock()
			if err != nil {
				return f.failed("beginning a session", err)
			}
		}
		return v.syncAll()
	})
}

// release takes a handle back.
func (f *file) release(write bool) {
	f.n.openMu.Lock()
	defer f.n.openMu.Unlock()
	f.mu.Lock()
	f.handles--
	if write {
		f.writers--
	}
	if f.writers == 0 && f.next != nil {
		f.next.putBack()
		f.next = nil
	}
	f.unlock()
	f.dropIfIdle()
}

// dropIfIdle closes the file where nothing has it open, or hands it to the
// settler. openMu is held.
func (f *file) dropIfIdle() {
	f.mu.Lock()
	defer f.unlock()
	f.dropIfIdleLocked()
}

// dropIfIdleLocked is dropIfIdle; mu is held too.
func (f *file) dropIfIdleLocked() {
	if f.handles > 0 || f.closed {
		return
	}
	if f.lease.held {
		f.failed("close", f.lease.giveBack())
	}
	if f.lease.held || f.rw && !f.n.Gone() && f.Unsettled() && !f.v.Shared() {
		f.v.settler.add(f)
		return
	}
	if f.v.Shared() {
		f.n.lastHead, f.n.lastSeen = cfile.HeadOf(f.File), f.lease.version
	} else if f.rw && f.FD >= 0 && !f.Broken() && !f.n.Gone() { // the kernel wrote a time back after the last close
		f.failed("close", f.PutMtime())
	}
	f.n.past = f.Past()
	if f.Broken() {
		f.n.believed = f.Size
	}
	f.closed = true
	f.closeFDs()
	f.n.file.Store(nil)
	f.n.release()
}

// dropIfGone closes the file of a node that has lost its last name, if no program has it
// open: a removed file needs no settling, and no repair. It waits for no lock of the file: if
// one is held, the settler drops the file later.
func (n *Node) dropIfGone() {
	if n == nil {
		return
	}
	n.v.doubts.removed(n)
	if !n.openMu.TryLock() {
		return
	}
	defer n.openMu.Unlock()
	if f := n.file.Load(); f != nil && f.mu.TryLock() {
		defer f.unlock()
		f.dropIfIdleLocked()
	}
}
