package keystore

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"
)

// standing is what is known of a store: when it last proved that its key may be
// used, and whether it can be used now. The ring's mutex guards it.
//
// Any successful call proves the key for all files under it. Without traffic a
// real unwrapping proves it, twice in the time that a proof is good for.
type standing struct {
	Store
	immediate bool // it waits for nobody, and is always good

	proven  time.Duration // by the ring's clock
	bad     *Error        // the verdict on the key: revoked, denied
	down    *Error        // it cannot be asked: an outage, no credentials
	next    time.Duration // when it is asked again
	pause   time.Duration // between askings while it is bad or down
	probing bool
	suspect bool // a call was denied: the key, or only that file?

	samples []sample // what a probe unwraps, in turn
	turn    int
}

type sample struct {
	b Binding
	w Wrapped
}

const (
	maxSamples  = 64
	firstRetry  = time.Second
	longRetry   = 30 * time.Second
	probeAtMost = 20 * time.Second
	watchEvery  = time.Second
)

// now is CLOCK_BOOTTIME, which goes on while the machine sleeps.
func now() time.Duration {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &t)
	return time.Duration(t.Nano())
}

// wrong returns why the store is not asked now, nil if it can be. mu is held.
func (s *standing) wrong() *Error {
	if s.bad != nil {
		return s.bad
	}
	return s.down
}

// lost returns why keys that this store has unwrapped may not be used any more,
// nil if they may. mu is held.
func (s *standing) lost(now, grace time.Duration) *Error {
	if s.bad != nil {
		return s.bad
	}
	if s.down != nil && now-s.proven > grace {
		return s.down
	}
	return nil
}

// stale reports whether the last proof is too old, as after a long sleep: what is
// cached waits for the next one. mu is held.
func (s *standing) stale(now, maxAge time.Duration) bool {
	return !s.immediate && s.down == nil && now-s.proven > maxAge
}

// learn keeps a wrapped key for probes to unwrap. mu is held.
func (s *standing) learn(b Binding, w Wrapped) {
	if s.immediate {
		return
	}
	if len(s.samples) < maxSamples {
		s.samples = append(s.samples, sample{b, w})
		return
	}
	s.samples[1+rand.IntN(maxSamples-1)] = sample{b, w} // the first, the volume's own key, stays
}

// note draws the conclusions from the outcome of a call: op is "generate" or
// "unwrap", probe says that it was made to see. mu is held.
func (r *Ring) note(s *standing, op string, probe bool, err error) {
	t := r.o.Now()
	e, _ := errors.AsType[*Error](err)
	switch {
	case s.immediate || err != nil && e == nil:
		return
	case err == nil && op != "wrap":
		s.proven = t
		if s.bad == nil || probe || op == "unwrap" {
			s.bad, s.down, s.suspect, s.pause = nil, nil, false, 0
		}
		return
	case err == nil:
		return
	}
	switch e.Kind {
	case Revoked:
		s.bad, s.down = e, nil
	case Denied:
		if !probe {
			// Perhaps this file alone, or new keys alone, are not allowed.
			s.suspect = s.suspect || op == "unwrap"
			return
		}
		s.bad, s.down = e, nil
	case Outage, Credentials:
		s.down = e
	default:
		return
	}
	if s.pause = min(max(2*s.pause, firstRetry), longRetry); !probe {
		s.pause = firstRetry
	}
	s.next = t + s.pause/2 + rand.N(s.pause)
}

// watch probes the stores that are due, and tells of changes, until the ring closes.
func (r *Ring) watch() {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-t.C:
		case <-r.wake:
		}
		r.mu.Lock()
		for _, s := range r.stores {
			if r.due(s) {
				s.probing = true
				r.wg.Go(func() { r.probe(s) })
			}
		}
		r.refill()
		r.mu.Unlock()
		r.tellChange()
	}
}

// due reports whether a store is to be probed. mu is held.
func (r *Ring) due(s *standing) bool {
	if s.immediate || s.probing || r.locked != nil || len(s.samples) == 0 {
		return false
	}
	t := r.o.Now()
	switch {
	case s.suspect:
		return true
	case s.wrong() != nil:
		return t >= s.next
	}
	if half := r.o.MaxAge / 2; t-s.proven < half-half/5 {
		s.next = s.proven + half - rand.N(half/5+1) // not all volumes at once
		return false
	}
	return t >= s.next
}

// probe unwraps one key, to see whether that is still allowed.
func (r *Ring) probe(s *standing) {
	r.mu.Lock()
	s.turn++
	x := s.samples[s.turn%len(s.samples)]
	r.mu.Unlock()
	ctx, cancel := context.WithTimeout(WithPurpose(r.ctx, ForLease), probeAtMost)
	defer cancel()
	key, err := s.Unwrap(ctx, x.b, x.w)
	clear(key)
	if KindOf(err) == Denied {
		// A policy may forbid this file alone: what counts is another, the volume's own
		// key where it is known.
		r.mu.Lock()
		other := s.samples[0]
		if s.turn%len(s.samples) == 0 {
			other = s.samples[len(s.samples)-1]
		}
		r.mu.Unlock()
		key, err = s.Unwrap(ctx, other.b, other.w)
		clear(key)
	}
	if KindOf(err) == Canceled && r.ctx.Err() == nil {
		err = &Error{Kind: Outage, URI: s.URI(), Op: "unwrap", Err: context.DeadlineExceeded}
	}
	r.mu.Lock()
	s.probing, s.suspect = false, false
	r.note(s, "unwrap", true, err)
	r.mu.Unlock()
	r.kick()
}

// kick lets watch look at once.
func (r *Ring) kick() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// verdict returns why nothing can be unwrapped any more: every store is lost. mu
// is held.
func (r *Ring) verdict() *Error {
	if r.locked != nil {
		return r.locked
	}
	var first *Error
	for _, s := range r.stores {
		e := s.lost(r.o.Now(), r.o.Grace)
		if e == nil {
			return nil
		}
		if first == nil {
			first = e
		}
	}
	return first
}

// tellChange calls Changed when the verdict is another than at the last call.
func (r *Ring) tellChange() {
	r.tellMu.Lock()
	defer r.tellMu.Unlock()
	r.mu.Lock()
	v := r.verdict()
	changed := (v == nil) != (r.told == nil)
	r.told = v
	r.mu.Unlock()
	if !changed {
		return
	}
	if v == nil {
		r.o.Changed(nil)
		return
	}
	r.o.Changed(v)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.verdict() != nil {
		r.wipe()
	}
}

// Lock makes every use of a key fail with err until Unlock, and wipes what the
// ring holds, after Changed has returned.
func (r *Ring) Lock(err *Error) {
	r.mu.Lock()
	r.locked = err
	r.mu.Unlock()
	r.tellChange()
}

// Unlock ends Lock.
func (r *Ring) Unlock() {
	r.mu.Lock()
	r.locked = nil
	for _, s := range r.stores {
		s.next = 0
	}
	r.mu.Unlock()
	r.tellChange()
	r.kick()
}

// Retry asks stores at once that could not be asked.
func (r *Ring) Retry() {
	r.mu.Lock()
	for _, s := range r.stores {
		s.next = 0
	}
	r.pool.failing = false
	r.mu.Unlock()
	r.kick()
}

// wipe wipes pool and cache. mu is held.
func (r *Ring) wipe() {
	for _, k := range r.pool.keys {
		r.waste(k)
	}
	r.pool.keys = nil
	r.cache.wipe()
	for _, s := range r.stores {
		if f, ok := s.Store.(Forgetter); ok {
			f.Forget()
		}
	}
}

// creates returns why no new key can be made, nil if one can. mu is held.
func (r *Ring) creates() error {
	if r.locked != nil {
		return r.locked
	}
	var first error
	for _, s := range r.stores {
		e := s.wrong()
		if e == nil {
			return nil
		}
		if first == nil {
			first = e
		}
	}
	return first
}

// refuses returns why a store is not asked now, nil if it can be.
func (r *Ring) refuses(s *standing) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.locked != nil {
		return r.locked
	}
	if e := s.wrong(); e != nil {
		return e
	}
	return nil
}

// watched is a store whose calls are noted.
type watched struct {
	r *Ring
	s *standing
}

func (w watched) URI() string { return w.s.URI() }

func (w watched) noted(op string, err error) {
	w.r.mu.Lock()
	w.r.note(w.s, op, false, err)
	w.r.mu.Unlock()
	if err != nil {
		w.r.kick()
	}
}

func (w watched) Wrap(ctx context.Context, b Binding, key []byte) (Wrapped, error) {
	out, err := w.s.Wrap(ctx, b, key)
	w.noted("wrap", err)
	return out, err
}

func (w watched) Unwrap(ctx context.Context, b Binding, x Wrapped) ([]byte, error) {
	call, asked := ctx, len(x.Branch) == 0
	if !asked { // a store can know the branch's key, which proves nothing
		call = context.WithValue(ctx, WaitsKey{}, func() { asked = true; Waits(ctx) })
	}
	out, err := w.s.Unwrap(call, b, x)
	if asked || err != nil {
		w.noted("unwrap", err)
	}
	return out, err
}

func (w watched) Generate(ctx context.Context, b Binding) ([]byte, Wrapped, error) {
	key, out, err := w.s.Store.(Generator).Generate(ctx, b)
	w.noted("generate", err)
	return key, out, err
}

// generates reports whether a store makes keys itself.
func generates(s Store) bool {
	if w, ok := s.(watched); ok {
		s = w.s.Store
	}
	_, ok := s.(Generator)
	return ok
}
