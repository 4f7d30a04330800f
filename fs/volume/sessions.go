//go:build linux && !portable

package volume

import (
	"encoding/binary"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

// sessions are those of this mount, and those before it that ended badly. The marker names all
// that are not known to have ended well. Every state of a file names the session that wrote it.
type sessions struct {
	d    *disk.Disk
	root int
	vk   *blockcrypt.VolumeKeys

	shared bool

	now    atomic.Uint64 // the one that states name; 0 in a read-only mount
	wrote  atomic.Bool   // something was written since the last one began
	deaths atomic.Uint64 // how often bad ones were added
	stuck  atomic.Bool   // for good: files could not be brought into order
	doubts *doubts       // the files of which that is known one by one

	// put makes durable that these are the sessions not known to have ended well: in the marker, or in
	// the file of this host.
	put func(sessions []uint64) error

	// markerMu is held while the marker is replaced, across its syscalls.
	markerMu sync.Mutex

	// mu guards the fields below. No other lock is taken under it, and no syscall is made.
	mu   sync.Mutex
	bad  map[uint64]bool // not known to have ended well before this mount
	mine []uint64        // of this mount, as the marker names them
}

// isStuck reports whether a file could not be brought into order: the marker stays, so that the next mount
// repairs it.
func (s *sessions) isStuck() bool { return s.stuck.Load() || s.doubts.disorders.Load() > 0 }

var errStuck = errors.New("a file could not be brought into order after an error")

func newSession() uint64 {
	for {
		id := blockcrypt.NewID()
		if s := binary.BigEndian.Uint64(id[:]); s != 0 {
			return s
		}
	}
}

// begin begins the first session, and returns how many ended badly before.
func (s *sessions) begin() (bad int, err error) {
	old, err := layout.ReadMarker(s.d, s.root, s.vk)
	if err != nil {
		return 0, err
	}
	if len(old) > 0 {
		s.mu.Lock()
		s.bad = map[uint64]bool{}
		for _, id := range old {
			s.bad[id] = true
		}
		s.mu.Unlock()
		// Data that only the page cache has must be on the disk before a repair believes it.
		if err := s.d.Syncfs(s.root); err != nil {
			return len(old), err
		}
	}
	s.now.Store(newSession())
	s.markerMu.Lock()
	defer s.markerMu.Unlock()
	return len(old), s.replace(s.now.Load())
}

// beginShared begins the first session of a host in a shared volume; peers.begin makes it durable.
func (s *sessions) beginShared() (mine []uint64) {
	s.shared = true
	s.now.Store(newSession())
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mine = []uint64{s.now.Load()}
	return s.mine
}

// addBad adds sessions of a host that died.
func (s *sessions) addBad(ids []uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bad == nil {
		s.bad = map[uint64]bool{}
	}
	for _, id := range ids {
		s.bad[id] = true
	}
	s.deaths.Add(1)
}

// replace makes durable that these are this mount's sessions; without any, and without bad
// ones, there is no marker. markerMu is held.
func (s *sessions) replace(mine ...uint64) error {
	s.mu.Lock()
	all := slices.Clone(mine)
	for id := range s.bad {
		if !s.shared { // else they stand in the files of their hosts
			all = append(all, id)
		}
	}
	s.mu.Unlock()
	if err := s.put(all); err != nil {
		return err
	}
	s.mu.Lock()
	s.mine = mine
	s.mu.Unlock()
	return nil
}

// next begins a new session while the volume stays mounted, so that earlier data counts as
// confirmed. confirm makes all durable, with states that name the new session; until it
// succeeds the old ones stay in the marker.
func (s *sessions) next(confirm func() error) error {
	if s.isStuck() {
		return nil
	}
	s.markerMu.Lock()
	defer s.markerMu.Unlock()
	s.mu.Lock()
	old := s.mine
	s.mu.Unlock()
	now := newSession()
	if err := s.replace(append([]uint64{now}, old...)...); err != nil {
		return err
	}
	s.now.Store(now)
	if err := confirm(); err != nil || s.isStuck() {
		return err
	}
	return s.replace(now)
}

// end ends this mount's sessions well: everything is durable.
func (s *sessions) end() error {
	s.markerMu.Lock()
	defer s.markerMu.Unlock()
	if s.shared {
		return nil // its host file goes
	}
	return s.replace()
}

// sound is what a node remembers that was looked at after the last death of a host: another number
// after the next one, and not 0.
func (s *sessions) sound() uint64 { return s.deaths.Load() + 1 }

// cleaned forgets these bad ones: every file of theirs is repaired, and that is durable.
func (s *sessions) cleaned(bad map[uint64]bool) error {
	s.markerMu.Lock()
	defer s.markerMu.Unlock()
	if s.isStuck() { // a sync failed: a repair may not be on the disk
		return errStuck
	}
	s.mu.Lock()
	maps.DeleteFunc(s.bad, func(id uint64, _ bool) bool { return bad[id] })
	mine := s.mine
	s.mu.Unlock()
	if s.shared {
		return nil
	}
	return s.replace(mine...)
}

// badOnes returns the sessions that ended badly.
func (s *sessions) badOnes() map[uint64]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.bad)
}

// isBad reports whether a session is not known to have ended well: an earlier one, or one of
// this mount.
func (s *sessions) isBad(id uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bad[id] || slices.Contains(s.mine, id)
}

// wasBad reports whether a session before this mount is not known to have ended well.
func (s *sessions) wasBad(id uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bad[id]
}

// anyBad reports whether files of earlier sessions may need repair.
func (s *sessions) anyBad() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.bad) > 0
}

// repairs reports whether files of earlier sessions may need repair, by this mount.
func (v *Volume) repairs() bool { return !v.o.ReadOnly && v.sessions.anyBad() }

// ending returns errEnding while the volume is being closed.
func (v *Volume) ending() error {
	select {
	case <-v.quit:
		return errEnding
	default:
		return nil
	}
}

func (v *Volume) beginSession() error {
	v.sessions.put = func(all []uint64) error { return layout.ReplaceMarker(&v.disk, v.rootD, v.vk, all) }
	if v.cfg.Shared {
		v.sessions.put = v.peers.setSessions
		return v.peers.begin(v, v.sessions.beginShared())
	}
	bad, err := v.sessions.begin()
	if bad > 0 {
		v.log.Warn("the last mount did not end well; files that it was writing are repaired when they are looked up", "sessions", bad)
	}
	return err
}

// unwritten reports whether reading a header failed since a session that did not end well never wrote
// it whole.
func (s *sessions) unwritten(err error) bool {
	u, ok := errors.AsType[layout.Unwritten](err)
	return ok && (u.Session == 0 || s.wasBad(u.Session))
}
