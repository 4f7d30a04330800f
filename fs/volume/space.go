//go:build linux && !portable

package volume

import (
	"sync/atomic"
	"time"

	"kmsfs/fs/volume/internal/disk"
)

// The limit of space. The kernel answers write(2) before it asks for the space,
// so near the limit programs had better write without its cache; and there the
// daemon, run by root, must not use what is reserved for root.

const (
	nearFull   = 128 << 20 // bytes left: as much as the kernel lets wait for writing, on most machines
	lookAgain  = nearFull / 4
	tightAfter = time.Minute // an error of space
	spaceGood  = 100 * time.Millisecond
)

// space is how much is left on the backing filesystem, as far as it was looked.
type space struct {
	d    *disk.Disk
	root int

	tight  atomic.Bool  // little is left
	unseen atomic.Int64 // bytes that may be written before it is looked again
	seen   atomic.Pointer[time.Time]
	failed atomic.Int64 // when it was last found wanting, in seconds; 0: never
}

// nearFull reports whether so little is left that a delayed write might fail.
func (s *space) nearFull() bool {
	if at := s.seen.Load(); at == nil || time.Since(*at) > spaceGood {
		s.look()
	}
	return s.tight.Load()
}

// look looks how much is left.
func (s *space) look() {
	s.unseen.Store(lookAgain)
	now := time.Now()
	s.seen.Store(&now)
	fs, err := s.d.Statfs(s.root)
	if err != nil {
		return
	}
	failed := s.failed.Load()
	s.tight.Store(int64(fs.Bavail)*int64(fs.Frsize) < nearFull ||
		failed != 0 && now.Unix()-failed < int64(tightAfter/time.Second))
}

// takes is called before n bytes are written.
func (s *space) takes(n int64) {
	if s.unseen.Add(-n) < 0 {
		s.look()
	}
}

// took is called with the outcome of a write: a quota shows in no other way.
func (s *space) took(err error) {
	if disk.NoSpace(err) {
		s.failed.Store(time.Now().Unix())
		s.tight.Store(true)
	}
}

// NearFull reports whether so little space is left that a delayed write might
// fail.
func (v *Volume) NearFull() bool { return v.space.nearFull() }
