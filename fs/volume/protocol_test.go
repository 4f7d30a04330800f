//go:build linux && !portable

package volume_test

import (
	"fmt"
	"strings"
	"testing"
)

// A model of FORMAT.md, section 6: two hosts and one file. All orders of their steps are tried, with
// deaths, with locks that the filesystem takes away, and with hosts that are stopped and go on. The page
// of the file is a set of writes: a host that writes it puts there the writes that it remembers, and one of its own.

// protocol is which rules are kept; without one of most of them the search must find a loss.
type protocol struct {
	rereads bool // with the lease the header is read again
	proves  bool // nothing is written without a proof
	waits   bool // a repair waits until the last proof of the host has ended
	fences  bool // a repair fences the host first
	locks   bool // a repair needs that the host's own lock is gone
	backing bool // the filesystem refuses writes of a lost lock
	timely  bool // the filesystem takes a host's locks away only when its proofs have ended
	splits  bool // a host can be stopped between its look at the clock and its write
}

const modelWrites = 2 // of each host

// modelState is one state; it is comparable.
type modelState struct {
	page      uint8 // the writes that the file has
	dirty     int8  // whose state is unfinished; -1: none
	confirmed uint8 // writes that were given back, and so promised
	lease     int8  // the host that has the lock of the file; -1: none
	host      [2]modelHost
}

type modelHost struct {
	dead     bool
	session  bool  // its lock on its host file is there
	fenced   bool  // its host file says so
	proof    bool  // its last proof holds yet
	believes bool  // that it has the lease
	known    uint8 // the writes of the page that it remembers
	writes   int8  // begun so far
	changed  bool  // since it was at rest
	checked  bool  // it has looked at the clock, and not written yet
	locked   bool  // it has the other's host file locked, to repair
}

type modelStep struct {
	name string
	next modelState
}

// steps returns all that can happen next.
func (p protocol) steps(s modelState) (out []modelStep) {
	for i := range int8(2) {
		add := func(name string, f func(s *modelState, h, other *modelHost)) {
			n := s
			f(&n, &n.host[i], &n.host[1-i])
			out = append(out, modelStep{fmt.Sprintf("%c %s", 'A'+i, name), n})
		}
		h, other := s.host[i], s.host[1-i]
		if h.dead {
			if h.session || s.lease == i {
				add("its locks fall", func(s *modelState, h, _ *modelHost) {
					h.session = false
					if s.lease == i {
						s.lease = -1
					}
				})
			}
			continue
		}
		mayWrite := h.proof || !p.proves
		add("dies", func(s *modelState, h, _ *modelHost) {
			*h = modelHost{dead: true, session: h.session, fenced: h.fenced, writes: h.writes}
		})
		if h.session && !(p.timely && h.proof) {
			add("its locks are taken away", func(s *modelState, h, _ *modelHost) {
				h.session = false
				if s.lease == i {
					s.lease = -1
				}
			})
		}
		if h.proof {
			add("its proof ends", func(_ *modelState, h, _ *modelHost) { h.proof = false })
		}
		if !h.proof && h.session && !h.fenced {
			add("proves again", func(s *modelState, h, _ *modelHost) {
				h.proof = true
				if h.believes { // a late proof: the file goes on if it is as this host left it
					if s.lease == -1 {
						s.lease = i
					}
					if s.lease != i || s.page != h.known || s.dirty != -1 && s.dirty != i {
						h.believes, h.changed = false, false
					}
				}
			})
		}
		if !h.believes && s.lease == -1 && mayWrite {
			add("takes the lease", func(s *modelState, h, _ *modelHost) {
				s.lease, h.believes = i, true
				if p.rereads {
					h.known = s.page
				}
			})
		}
		unfinished := s.dirty == 1-i
		if h.believes && !unfinished && h.writes < modelWrites && !h.checked && mayWrite {
			add("looks at the clock, to write", func(_ *modelState, h, _ *modelHost) { h.checked = true })
		}
		if h.checked && (mayWrite || p.splits) {
			add("writes", func(s *modelState, h, _ *modelHost) {
				h.checked = false
				if p.backing && s.lease != i {
					h.believes, h.changed = false, false // EIO
					return
				}
				h.known |= 1 << (uint8(i)*modelWrites + uint8(h.writes))
				h.writes++
				h.changed = true
				s.page, s.dirty = h.known, i
			})
		}
		if h.believes && h.changed && !h.checked && mayWrite {
			add("comes to rest, and gives the lease back", func(s *modelState, h, _ *modelHost) {
				if p.backing && s.lease != i {
					h.believes, h.changed = false, false
					return
				}
				s.page, s.dirty = h.known, -1
				s.confirmed |= h.known
				h.believes, h.changed = false, false
				if s.lease == i {
					s.lease = -1
				}
			})
		}
		if h.believes && !h.changed && !h.checked && !unfinished {
			add("gives the lease back", func(s *modelState, h, _ *modelHost) {
				h.believes = false
				if s.lease == i {
					s.lease = -1
				}
			})
		}
		if !h.locked && mayWrite && (!other.session || !p.locks) {
			add("takes the other for dead", func(_ *modelState, h, other *modelHost) {
				h.locked = true
				other.fenced = other.fenced || p.fences
			})
		}
		waited := other.dead || !other.proof || !p.waits
		if h.locked && unfinished && h.believes && waited && mayWrite {
			add("repairs the file", func(s *modelState, h, _ *modelHost) {
				if p.backing && s.lease != i {
					h.believes = false
					return
				}
				s.dirty = -1
				s.confirmed |= s.page // a host that reads it now relies on it
				h.known = s.page
			})
		}
	}
	return out
}

// lost says what is wrong with a state; "" if nothing is.
func (s modelState) lost() string {
	if s.confirmed&^s.page != 0 {
		return "a confirmed write is gone"
	}
	return ""
}

// search tries all orders, and returns the steps to a loss.
func (p protocol) search() (steps []string, states int) {
	first := modelState{dirty: -1, lease: -1}
	for i := range first.host {
		first.host[i] = modelHost{session: true, proof: true}
	}
	type from struct {
		state modelState
		step  string
	}
	seen := map[modelState]from{first: {}}
	queue := []modelState{first}
	for len(queue) > 0 {
		s := queue[0]
		queue = queue[1:]
		if s.lost() != "" {
			for s != first {
				steps = append([]string{seen[s].step}, steps...)
				s = seen[s].state
			}
			return steps, len(seen)
		}
		for _, x := range p.steps(s) {
			if _, known := seen[x.next]; !known {
				seen[x.next] = from{s, x.name}
				queue = append(queue, x.next)
			}
		}
	}
	return nil, len(seen)
}

func TestProtocol(t *testing.T) {
	whole := protocol{rereads: true, proves: true, waits: true, fences: true, locks: true, backing: true, splits: true}
	for _, x := range []struct {
		name string
		lack func(*protocol)
		safe bool
	}{
		{"all rules, on a filesystem that fences", func(*protocol) {}, true},
		{"a filesystem that fences needs no proofs for the file", func(p *protocol) { p.proves, p.waits = false, false }, true},
		{"the header is not read again", func(p *protocol) { p.rereads = false }, false},
		{"no fencing at all", func(p *protocol) { p.backing, p.proves, p.waits = false, false, false }, false},
		{"a filesystem that does not fence, but takes locks away late, and nobody is stopped between clock and write",
			func(p *protocol) { p.backing, p.timely, p.splits = false, true, false }, true},
		{"the same without proofs", func(p *protocol) { p.backing, p.timely, p.splits, p.proves = false, true, false, false }, false},
		{"the same, and somebody is stopped", func(p *protocol) { p.backing, p.timely = false, true }, false},
		{"a filesystem that does not fence, and takes locks away at once", func(p *protocol) { p.backing, p.splits = false, false }, false},
	} {
		p := whole
		x.lack(&p)
		steps, states := p.search()
		if (steps == nil) != x.safe {
			t.Errorf("%s: safe %v after %d states: %s", x.name, steps == nil, states, strings.Join(steps, "; "))
		}
		t.Logf("%s: %d states; %s", x.name, states, strings.Join(steps, "; "))
	}
}
