package keystore

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"kmsfs/blockcrypt"
)

// lease says whether keys may be used: as long as a service has proven so not too long ago, or is
// away for not longer than the grace. It proves it again before that ends.
type lease struct {
	r    *Ring
	wake chan struct{} // of watch

	watching sync.Once // watch

	tellMu sync.Mutex // held while Changed runs; it comes before Ring.mu

	// Guarded by Ring.mu.
	stores        []*standing   // that can unwrap
	suspended     *Error        // by Suspend
	told          *Error        // to Changed
	toldSuspended bool          // told is that of Suspend
	proof         chan struct{} // closed, and replaced, whenever the state of a store may have changed
}

// standing is a store with all that the ring knows of it. The ring's mutex guards it.
type standing struct {
	Store
	health
	immediate bool // it waits for nobody, and is always good

	away    bool // as Reach was told
	probing bool

	samples []sample // what a probe unwraps, in turn
	turn    int

	retiring bool   // no new key is wrapped for it
	branch   branch // under which new keys are wrapped, if the ring does that

	mayNot *Error        // why new keys are not wrapped by it
	again  time.Duration // when that is tried again

	calls  context.Context // of calls; ends when their answers cannot be used any more
	giveUp context.CancelCauseFunc
}

// Matches implements [Matcher].
func (s *standing) Matches(uri string) bool { return Serves(s.Store, uri) }

type sample struct {
	b Binding
	w blockcrypt.Recipient
}

const (
	maxSamples   = 64
	probeAtMost  = 20 * time.Second
	watchEvery   = time.Second
	remembered   = time.Minute // a refusal to wrap new keys
	suspendWaits = 500         // milliseconds, for calls that are under way
)

// stale is [health.stale]; a store that waits for nobody never is. mu is held.
func (s *standing) stale(now, maxAge time.Duration) bool {
	return !s.immediate && s.health.stale(now, maxAge)
}

// forget wipes the keys that the store has by itself. mu is held.
func (s *standing) forget() {
	s.branch.wipe()
	if k, ok := s.Store.(Keeper); ok {
		k.Forget()
	}
}

// learn keeps a wrapped key for probes to unwrap: none under a branch key, which
// the store may know. mu is held.
func (s *standing) learn(b Binding, w blockcrypt.Recipient) {
	if s.immediate || len(w.Branch) > 0 {
		return
	}
	if len(s.samples) < maxSamples {
		s.samples = append(s.samples, sample{b, w})
		return
	}
	s.samples[1+rand.IntN(maxSamples-1)] = sample{b, w} // the first, the volume's own key, stays
}

// note draws the conclusions from the outcome of a call: op is "generate", "wrap" or "unwrap",
// probe says that it was made to see. mu is held.
func (l *lease) note(s *standing, op string, probe bool, err error) {
	defer l.noted()
	e, ok := errors.AsType[*Error](err)
	if s.immediate || err != nil && !ok {
		return
	}
	switch s.health.note(l.r.o.now(), outcome{op, probe, e}, rand.N[time.Duration]) {
	case restored:
		l.r.pool.failing = false
	case failed:
		s.forget()
		l.giveUp(s, s.wrong()) // waiting callers need not wait for their own deadlines
	}
}

// giveUp ends the waiting for calls to a store that are under way, with a verdict. mu is held.
func (l *lease) giveUp(s *standing, verdict *Error) {
	if s.giveUp != nil {
		s.giveUp(verdict)
	}
	s.calls, s.giveUp = context.WithCancelCause(l.r.ctx)
}

// noted wakes who waits for a proof. mu is held.
func (l *lease) noted() {
	close(l.proof)
	l.proof = make(chan struct{})
}

// ProveNow returns nil if keys may be used: the last proof is not too old, or the service is away
// and the grace has not ended. Else it returns why they may not. known is false if only a new proof
// can tell.
func (l *lease) ProveNow() (known bool, err error) {
	if !l.r.waits.Load() {
		return true, nil
	}
	l.r.mu.Lock()
	defer l.r.mu.Unlock()
	if e := l.verdict(); e != nil {
		return true, e
	}
	return !l.stale(), nil
}

// Prove is ProveNow that waits for a new proof where that is needed: after a long sleep.
func (l *lease) Prove(ctx context.Context) error {
	for {
		l.r.mu.Lock()
		c := l.proof
		l.r.used = true // or a lazy ring would never be probed
		l.r.mu.Unlock()
		if known, err := l.ProveNow(); known {
			return err
		}
		l.kick()
		select {
		case <-c:
		case <-l.r.ctx.Done():
			return &Error{Kind: Canceled, Op: "unwrap", Err: l.r.ctx.Err()}
		case <-ctx.Done():
			return &Error{Kind: Canceled, Op: "unwrap", Err: ctx.Err()}
		}
	}
}

// stale reports whether every store's last proof is too old. mu is held.
func (l *lease) stale() bool {
	t := l.r.o.now()
	return !slices.ContainsFunc(l.stores, func(s *standing) bool { return !s.stale(t, l.r.o.MaxAge) })
}

// watch probes the stores that are due, and tells of changes, until the ring closes.
func (l *lease) watch() {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	for {
		select {
		case <-l.r.ctx.Done():
			return
		case <-t.C:
		case <-l.wake:
		}
		l.r.mu.Lock()
		if l.r.dropped {
			l.r.mu.Unlock()
			return
		}
		for _, s := range l.stores {
			if l.due(s) {
				s.probing = true
				l.r.wg.Go(func() { l.probe(s) })
			}
		}
		l.r.refill()
		l.r.mu.Unlock()
		l.tellChange()
	}
}

// due reports whether a store is to be probed. mu is held.
func (l *lease) due(s *standing) bool {
	if s.immediate || s.probing || l.suspended != nil || len(s.samples) == 0 || l.r.o.Lazy && !l.r.used {
		return false
	}
	return s.health.due(l.r.o.now(), l.r.o.MaxAge, rand.N[time.Duration])
}

// probe unwraps one key, to see whether that is still allowed.
func (l *lease) probe(s *standing) {
	l.r.mu.Lock()
	s.turn++
	x := s.samples[s.turn%len(s.samples)]
	l.r.mu.Unlock()
	ctx, cancel := context.WithTimeout(WithPurpose(l.r.ctx, ForLease), probeAtMost)
	defer cancel()
	key, err := s.Unwrap(ctx, x.b, x.w)
	clear(key)
	if KindOf(err) == Denied {
		// A policy may forbid this file alone: what counts is another, the volume's own
		// key where it is known.
		l.r.mu.Lock()
		other := s.samples[0]
		if s.turn%len(s.samples) == 0 {
			other = s.samples[len(s.samples)-1]
		}
		l.r.mu.Unlock()
		key, err = s.Unwrap(ctx, other.b, other.w)
		clear(key)
	}
	if KindOf(err) == Canceled && l.r.ctx.Err() == nil {
		err = &Error{Kind: Outage, URI: s.URI(), Op: "unwrap", Err: context.DeadlineExceeded}
	}
	l.r.mu.Lock()
	s.probing, s.suspect = false, false
	l.note(s, "unwrap", true, err)
	l.r.mu.Unlock()
	l.kick()
}

// kick lets watch look at once.
func (l *lease) kick() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// verdict returns why nothing can be unwrapped any more: every store is lost. mu
// is held.
func (l *lease) verdict() *Error {
	if l.suspended != nil {
		return l.suspended
	}
	var first *Error
	for _, s := range l.stores {
		e := s.lost(l.r.o.now(), l.r.o.Grace)
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
func (l *lease) tellChange() {
	l.tellMu.Lock()
	defer l.tellMu.Unlock()
	l.r.mu.Lock()
	v := l.verdict()
	// Suspend's error is told apart from a lack of credentials, though it is of the same kind.
	changed := (v == nil) != (l.told == nil) ||
		v != nil && (v.Kind != l.told.Kind || (v == l.suspended) != l.toldSuspended)
	l.told, l.toldSuspended = v, v != nil && v == l.suspended
	reached := l.reachChanges()
	l.r.mu.Unlock()
	for _, s := range reached {
		l.r.o.Reach(s.URI, s.Error)
	}
	if !changed {
		return
	}
	if v == nil {
		l.r.o.Changed(nil)
		return
	}
	l.r.o.Changed(v)
	l.r.mu.Lock()
	defer l.r.mu.Unlock()
	if l.verdict() != nil {
		l.r.wipe()
	}
}

// reachChanges returns the stores that became unreachable since the last look, and those that
// can be reached again. mu is held.
func (l *lease) reachChanges() (out []StoreState) {
	for _, s := range l.stores {
		if away := s.down != nil && s.bad == nil; away != s.away {
			s.away = away
			st := StoreState{URI: s.URI()}
			if away {
				st.Error = s.down
			}
			out = append(out, st)
		}
	}
	return out
}

// Suspend makes every use of a key fail with err until Resume, and wipes what the
// ring holds, after Changed has returned.
func (l *lease) Suspend(err *Error) {
	l.r.mu.Lock()
	l.suspended = err
	for _, s := range l.stores {
		l.giveUp(s, err)
	}
	l.noted() // wakes the callers that wait for a proof
	l.r.mu.Unlock()
	l.tellChange()
	for range suspendWaits { // until the keys of abandoned calls are wiped too
		l.r.mu.Lock()
		n := l.r.flying
		l.r.mu.Unlock()
		if n == 0 {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// Resume ends Suspend.
func (l *lease) Resume() {
	l.r.mu.Lock()
	l.suspended = nil
	for _, s := range l.stores {
		s.next = 0
	}
	l.r.mu.Unlock()
	l.tellChange()
	l.kick()
}

// Retry asks stores at once that could not be asked.
func (l *lease) Retry() {
	l.r.mu.Lock()
	for _, s := range l.stores {
		s.next, s.again = 0, 0
	}
	l.r.pool.failing = false
	l.r.mu.Unlock()
	l.kick()
}

// wipe wipes all keys that the ring and its stores hold. mu is held.
func (l *lease) wipe() {
	for _, k := range l.r.pool.keys {
		l.r.waste(k)
	}
	l.r.pool.keys = nil
	l.r.cache.wipe()
	for _, s := range l.stores {
		s.forget()
	}
}

// cannotCreate returns why no new key can be made, nil if one can. mu is held.
func (l *lease) cannotCreate() error {
	if l.suspended != nil {
		return l.suspended
	}
	var first error
	for _, s := range l.stores {
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
func (l *lease) refuses(s *standing) error {
	l.r.mu.Lock()
	defer l.r.mu.Unlock()
	if l.suspended != nil {
		return l.suspended
	}
	if e := s.wrong(); e != nil {
		return e
	}
	return nil
}

// watched is a store whose calls are noted, and not waited for once their answers cannot be used.
type watched struct {
	r *Ring
	s *standing
}

func (w watched) URI() string { return w.s.URI() }

// Matches implements [Matcher].
func (w watched) Matches(uri string) bool { return Serves(w.s.Store, uri) }

// answer is what a call to a service has returned.
type answer struct {
	key []byte
	w   blockcrypt.Recipient
	err error
}

// call makes a call. A call whose answer cannot be used any more is left to end by itself, until
// the caller's context or the ring ends, and the key that it brings is wiped: to cancel it at once
// could leave a key in the memory of the SDK.
func (w watched) call(ctx context.Context, op string, f func(context.Context) answer) answer {
	r := w.r
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.suspended != nil:
		return answer{err: r.suspended}
	case r.ctx.Err() != nil:
		return answer{err: &Error{Kind: Canceled, URI: w.URI(), Op: op, Err: r.ctx.Err()}}
	}
	if w.s.immediate {
		r.mu.Unlock()
		defer r.mu.Lock()
		return f(ctx)
	}
	if e := w.s.wrong(); e != nil { // by now: an answer from memory would count as a proof
		return answer{err: e}
	}
	c, calls := make(chan answer), w.s.calls
	r.flying++
	r.used = true
	r.wg.Go(func() {
		defer func() {
			r.mu.Lock()
			r.flying--
			r.mu.Unlock()
		}()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(r.ctx, cancel)()
		a := f(ctx)
		r.mu.Lock()
		r.note(w.s, op, false, a.err)
		r.mu.Unlock()
		if a.err != nil {
			r.kick()
		}
		select {
		case c <- a:
		case <-calls.Done():
			clear(a.key)
			if op == "generate" && a.err == nil {
				r.mu.Lock()
				r.counts.Made++
				r.counts.Wasted++
				r.mu.Unlock()
			}
		}
	})
	r.mu.Unlock()
	defer r.mu.Lock()
	select {
	case a := <-c:
		return a
	case <-calls.Done():
	}
	if e, ok := errors.AsType[*Error](context.Cause(calls)); ok {
		return answer{err: e}
	}
	return answer{err: &Error{Kind: Canceled, URI: w.URI(), Op: op, Err: calls.Err()}}
}

func (w watched) Wrap(ctx context.Context, b Binding, key []byte) (blockcrypt.Recipient, error) {
	key = bytes.Clone(key) // a caller that gives up wipes its own copy
	a := w.call(ctx, "wrap", func(ctx context.Context) answer {
		defer clear(key)
		out, err := w.s.Wrap(ctx, b, key)
		return answer{w: out, err: err}
	})
	return a.w, a.err
}

func (w watched) Unwrap(ctx context.Context, b Binding, x blockcrypt.Recipient) ([]byte, error) {
	if key, known, err := w.known(b, x); known {
		return key, err
	}
	a := w.call(ctx, "unwrap", func(ctx context.Context) answer {
		key, err := w.s.Unwrap(ctx, b, x)
		return answer{key: key, err: err}
	})
	return a.key, a.err
}

// known unwraps a key under a branch key that the store has in memory, unless the store is not to
// be asked. That is no proof that the branch key may still be used.
func (w watched) known(b Binding, x blockcrypt.Recipient) (key []byte, known bool, err error) {
	k, ok := w.s.Store.(Keeper)
	if !ok || len(x.Branch) == 0 || w.r.refuses(w.s) != nil || w.r.ctx.Err() != nil {
		return nil, false, nil
	}
	return k.Known(b, x)
}

func (w watched) Generate(ctx context.Context, b Binding) ([]byte, blockcrypt.Recipient, error) {
	a := w.call(ctx, "generate", func(ctx context.Context) answer {
		key, out, err := w.s.Store.(Generator).Generate(ctx, b)
		return answer{key: key, w: out, err: err}
	})
	return a.key, a.w, a.err
}

// generates reports whether a store makes keys itself.
func generates(s Store) bool {
	if w, ok := s.(watched); ok {
		s = w.s.Store
	}
	_, ok := s.(Generator)
	return ok
}

// Renew unwraps a file's key again, though it is known, to see whether that is
// still allowed. For a file under a branch key the service is asked at most once a minute.
func (r *Ring) Renew(ctx context.Context, file [16]byte, ws []blockcrypt.Recipient) error {
	err := untrusted(ws)
	for _, c := range r.candidates(ws) {
		if err = r.refuses(c.s); err == nil {
			var key []byte
			key, err = watched{r, c.s}.Unwrap(WithPurpose(ctx, ForLease),
				Binding{ForFile, r.volume, file}, c.w)
			clear(key)
		}
		if err == nil {
			return nil
		}
	}
	return err
}
