package keystore

import (
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"time"

	"kmsfs/blockcrypt"
)

// A DataKey is a new data key with the ID that it is bound to, wrapped for
// the recipients of the ring.
type DataKey struct {
	ID      [16]byte
	Key     []byte // KeySize bytes, until Wipe
	Wrapped []blockcrypt.Recipient

	ring  *Ring // whose slab has the key, nil if none
	slot  int32
	epoch uint64 // of the ring, when it was wrapped
}

// Wipe ends the use of the key.
func (k *DataKey) Wipe() {
	if k.ring == nil {
		clear(k.Key)
		k.Key = nil
		return
	}
	k.ring.mu.Lock()
	defer k.ring.mu.Unlock()
	k.ring.free(k)
}

const (
	// MaxPool bounds the data keys made ahead, and with them those that a
	// crash wastes.
	MaxPool = 2048
	// FirstPool is how many are made ahead once files are created. None is before that: a
	// reader may have no right to make keys, and denied calls trip alarms.
	FirstPool = 64
	poolCalls = 256 // how many are made at the same time

	burstQuiet = 250 * time.Millisecond // after which the pool is filled
	burstPause = 2 * time.Second        // creations further apart are not of one burst
	poolDecay  = 10 * time.Minute       // in which the target sinks to the pool's base
)

// maker makes data keys for new files, some of them ahead. Ring.mu guards its pool.
type maker struct {
	r       *Ring
	pool    pool
	sealers []Store // recipients that only wrap
	epoch   uint64  // counts the changes of the recipients
}

// pool holds data keys made ahead: as many as the last burst of creations took.
type pool struct {
	keys    []*DataKey
	used    bool // a program has asked for a key
	base    int  // how many the pool holds when it has not been used for poolDecay; 0: none are made ahead
	peak    int  // what the last burst took
	burst   int
	last    time.Duration // when the last was taken, by the ring's clock
	count   int           // how many were taken in all
	pace    int           // how many were taken while a call was made, at most, of late
	making  int
	filling bool          // it fell to a part of the target, and has not reached the target again
	failing bool          // making a key ahead failed; none is, until a key is made or the store is restored
	pause   time.Duration // until then none is made ahead, after a failure
	waiting []waiter
}

// waiter is a caller that waits for a new key.
type waiter struct {
	c     chan made
	since time.Duration
}

// made is the result of a call for a new key.
type made struct {
	key *DataKey
	err error
}

// target is how many keys the pool should hold.
func (p *pool) target(now time.Duration) int {
	if !p.used {
		return 0
	}
	if p.base == 0 || p.peak <= p.base {
		return p.base
	}
	left := max(0, 1-float64(now-p.last)/float64(poolDecay))
	return p.base + int(float64(p.peak-p.base)*left)
}

// taken counts a creation.
func (p *pool) taken(now time.Duration) {
	p.used = true
	if p.burst > 0 && now-p.last > burstPause {
		p.peak = min(max(FirstPool, p.burst), MaxPool)
		p.burst = 0
		p.pace -= p.pace / 4
	}
	p.burst++
	p.count++
	p.peak = min(max(p.peak, FirstPool, p.burst), MaxPool)
	p.last = now
}

// returned takes back the use of a key that was not used.
func (p *pool) returned() {
	p.burst = max(0, p.burst-1)
	p.count--
}

// wants reports whether another key is to be made ahead. During a burst the pool holds twice as
// many as are taken while one is made: so creations do not wait, and the calls that fill the pool
// take no time from them. A few creations after the first do not refill it: a file that stays
// empty, as git's lock does, gives its key back.
func (p *pool) wants(now time.Duration) bool {
	most := p.target(now)
	if p.burst > 0 && now-p.last < burstQuiet {
		most = min(most, max(FirstPool, 2*p.pace))
	}
	has := len(p.keys) + p.making - len(p.waiting)
	p.filling = has < most && (p.filling || has <= most*3/4)
	return p.filling
}

// NewKeyNow returns a data key for a new file if no service has to be waited for; ok is false
// if one has to be.
func (m *maker) NewKeyNow() (k *DataKey, ok bool, err error) {
	m.r.mu.Lock()
	p := &m.pool
	if e := m.r.verdict(); e != nil {
		m.r.mu.Unlock()
		return nil, true, e
	}
	if !m.r.waits.Load() { // a key costs less than handing one over
		m.r.mu.Unlock()
		if k, err = m.make(m.r.ctx); err == nil {
			m.r.mu.Lock()
			m.r.counts.Made++
			m.r.mu.Unlock()
		}
		return k, true, err
	}
	defer m.r.mu.Unlock()
	n := len(p.keys)
	if n == 0 || m.r.stale() {
		return nil, false, nil
	}
	p.taken(m.r.o.now())
	k, p.keys = p.keys[n-1], p.keys[:n-1]
	m.refill()
	return k, true, nil
}

// NewKey returns a data key for a new file: from the pool, or as soon as one is
// made.
func (m *maker) NewKey(ctx context.Context) (*DataKey, error) {
	if k, ok, err := m.NewKeyNow(); ok {
		return k, err
	}
	m.r.mu.Lock()
	p := &m.pool
	if err := m.r.cannotCreate(); err != nil {
		m.r.mu.Unlock()
		return nil, err
	}
	p.taken(m.r.o.now())
	c := make(chan made, 1)
	p.waiting = append(p.waiting, waiter{c, m.r.o.now()})
	m.refill()
	m.r.mu.Unlock()
	select {
	case got := <-c:
		return got.key, got.err
	case <-ctx.Done():
	}
	m.r.mu.Lock()
	i := slices.IndexFunc(p.waiting, func(w waiter) bool { return w.c == c })
	if i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
		p.returned()
	}
	m.r.mu.Unlock()
	if i < 0 { // it came just now
		if got := <-c; got.key != nil {
			m.PutBack(got.key)
		}
	}
	return nil, &Error{Kind: Canceled, Op: "generate", Err: ctx.Err()}
}

// Current reports whether a key is wrapped for just the recipients that are trusted now.
func (m *maker) Current(k *DataKey) bool {
	m.r.mu.Lock()
	defer m.r.mu.Unlock()
	return k.epoch == m.epoch
}

// PutBack returns a key under which nothing was written.
func (m *maker) PutBack(k *DataKey) {
	m.r.mu.Lock()
	defer m.r.mu.Unlock()
	m.pool.returned()
	if p := &m.pool; m.r.verdict() == nil && k.epoch == m.epoch && p.base > 0 &&
		len(p.keys) < max(p.base, p.peak) && m.r.ctx.Err() == nil {
		p.keys = append(p.keys, k)
		return
	}
	m.waste(k)
}

// waste wipes a key that was made for nothing. mu is held.
func (m *maker) waste(k *DataKey) {
	m.r.counts.Wasted++
	m.free(k)
}

// refill starts the calls that bring the pool to its target and give each waiting
// caller a key. mu is held.
func (m *maker) refill() {
	p := &m.pool
	most := poolCalls
	if m.r.counts.Made == 0 {
		most = 1 // until it is known that one can be made
	}
	for m.r.ctx.Err() == nil && p.making < most {
		purpose := ForCreate
		if p.making >= len(p.waiting) {
			purpose = ForPool
			if p.failing || m.r.o.now() < p.pause || m.r.suspended != nil || m.r.cannotCreate() != nil ||
				!p.wants(m.r.o.now()) {
				return
			}
		}
		p.making++
		begun, since := p.count, m.r.o.now()
		m.r.wg.Go(func() {
			k, err := m.make(WithPurpose(m.r.ctx, purpose))
			m.r.mu.Lock()
			p.making--
			p.pace = max(p.pace, p.count-begun)
			toReport := m.arrived(k, err, since)
			m.refill()
			m.r.mu.Unlock()
			if toReport != nil {
				m.r.report(toReport)
			}
		})
	}
}

// arrived hands a new key, or the error, to the caller that has waited longest; the
// error that it returns is to be reported. A denial of a call that began before the
// caller waited is not handed to it: the right may have been given since. mu is held.
func (m *maker) arrived(k *DataKey, err error, begun time.Duration) (toReport error) {
	p := &m.pool
	if err == nil {
		p.failing = false
		m.r.counts.Made++
		if e := m.r.verdict(); e != nil { // no key may be used by now
			m.waste(k)
			k, err = nil, e
		} else if k.epoch != m.epoch { // others are the recipients by now: refill makes another
			m.waste(k)
			return nil
		}
	}
	switch {
	case len(p.waiting) > 0 && (KindOf(err) != Denied || p.waiting[0].since <= begun):
		c := p.waiting[0].c
		p.waiting = p.waiting[1:]
		if err != nil {
			p.returned()
		}
		c <- made{k, err}
	case err != nil:
		if !p.failing && m.r.ctx.Err() == nil && m.r.suspended == nil {
			toReport = err
		}
		unlucky := KindOf(err) == Outage && m.r.cannotCreate() == nil // keys can be made, as far as is known
		p.failing = m.r.suspended == nil && (p.failing || !unlucky)
		p.pause = m.r.o.now() + firstRetry
	default:
		p.keys = append(p.keys, k)
	}
	return toReport
}

// make makes one data key.
func (m *maker) make(ctx context.Context) (*DataKey, error) {
	var id [16]byte
	rand.Read(id[:])
	k, missing, err := m.wrapForAll(ctx, Binding{ForFile, m.r.volume, id})
	if err != nil {
		return nil, err
	}
	for _, err := range missing { // there is a key all the same
		m.r.report(err)
	}
	m.r.mu.Lock()
	defer m.r.mu.Unlock()
	// What the cache may need stays free: files that stay empty can be many.
	if len(m.r.slab.free) <= m.r.cache.most-len(m.r.cache.where) {
		return k, nil
	}
	if i := m.r.slab.take(); i >= 0 {
		raw := k.Key
		k.Key = m.r.slab.at(i)
		copy(k.Key, raw)
		clear(raw)
		k.ring, k.slot = m.r, i
	}
	return k, nil
}

// free wipes a key and gives its slot back. mu is held.
func (m *maker) free(k *DataKey) {
	switch {
	case k.ring == nil:
		clear(k.Key)
	case m.r.slab.mem != nil: // else it was wiped with all others
		m.r.slab.give(k.slot)
	}
	k.Key, k.ring = nil, nil
}

// wrapForAll makes one data key and wraps it for every store that answers now. A store that does
// not is left out, as long as there is another: the file is then readable by the others only, and
// fsck lists it. That a store may not wrap new keys is remembered for a minute.
func (m *maker) wrapForAll(ctx context.Context, b Binding) (k *DataKey, missing []error, err error) {
	var usable []Store
	var which []*standing
	m.r.mu.Lock()
	stores := slices.DeleteFunc(slices.Clone(m.r.stores), func(s *standing) bool { return s.retiring })
	sealers, epoch := m.r.sealers, m.epoch
	m.r.mu.Unlock()
	for _, s := range stores {
		err := m.r.refuses(s)
		if err == nil && len(stores) > 1 {
			err = m.forbidden(s)
		}
		if err != nil {
			missing = append(missing, err)
			continue
		}
		usable, which = append(usable, m.r.wraps(s)), append(which, s)
	}
	if len(usable) == 0 {
		if len(missing) == 0 {
			return nil, nil, &Error{Kind: Invalid, Op: "generate",
				Err: errors.New("a data key has no recipient to be wrapped for")}
		}
		return nil, nil, missing[0]
	}
	k, errs, err := newKey(ctx, append(usable, sealers...), b)
	if k != nil {
		k.epoch = epoch
	}
	for i, e := range errs {
		if e == nil {
			continue
		}
		missing = append(missing, e)
		if i < len(which) {
			m.forbid(which[i], e)
		}
	}
	if err == nil && !opens(usable, k.Wrapped) {
		// Only recipients that wrap got it: nobody here could open the file.
		clear(k.Key)
		k, err = nil, &Error{Kind: Invalid, Op: "generate",
			Err: errors.New("no key that unwraps has wrapped the new data key")}
		if len(missing) > 0 {
			err = missing[0]
		}
	}
	if err != nil && len(missing) > 0 && KindOf(err) != Canceled {
		err = missing[0]
	}
	return k, missing, err
}

// opens reports whether one of these stores has wrapped the key.
func opens(stores []Store, ws []blockcrypt.Recipient) bool {
	return slices.ContainsFunc(ws, func(w blockcrypt.Recipient) bool {
		return slices.ContainsFunc(stores,
			func(s Store) bool { return Serves(s, w.URI) })
	})
}

// forbidden returns why a store is known not to wrap new keys, nil if it may.
func (m *maker) forbidden(s *standing) error {
	m.r.mu.Lock()
	defer m.r.mu.Unlock()
	if s.mayNot != nil && m.r.o.now() < s.again {
		return s.mayNot
	}
	return nil
}

// forbid remembers a refusal for a minute: at once it would be the same.
func (m *maker) forbid(s *standing, err error) {
	m.r.mu.Lock()
	defer m.r.mu.Unlock()
	if e, ok := errors.AsType[*Error](err); ok && (e.Kind == Denied || e.Kind == Invalid) {
		s.mayNot, s.again = e, m.r.o.now()+remembered
	}
}

// New makes a data key and wraps it for every store: the first that can
// generate makes it, the others wrap it.
func New(ctx context.Context, stores []Store, b Binding) (*DataKey, error) {
	k, errs, err := newKey(ctx, stores, b)
	for _, e := range errs {
		if err == nil && e != nil {
			k.Wipe()
			k, err = nil, e
		}
	}
	return k, err
}

// newKey is New, which goes on if a store fails. errs are the failures by store; err says that
// there is no key at all.
func newKey(ctx context.Context, stores []Store, b Binding) (k *DataKey, errs []error, err error) {
	if len(stores) == 0 {
		return nil, nil, &Error{Kind: Invalid, Op: "generate",
			Err: errors.New("a data key has no recipient to be wrapped for")}
	}
	k = &DataKey{ID: b.ID}
	wrapped, errs := make([]blockcrypt.Recipient, len(stores)), make([]error, len(stores))
	made := -1
	for i, s := range stores {
		g, ok := s.(Generator)
		if !ok || !generates(s) {
			continue
		}
		if k.Key, wrapped[i], errs[i] = g.Generate(ctx, b); errs[i] == nil {
			made = i
			break
		}
		if KindOf(errs[i]) == Canceled {
			return nil, nil, errs[i]
		}
		if i > 0 && KindOf(errs[i]) == Denied {
			errs[i] = nil // a key that is not the first may have the right to wrap only
		}
	}
	if made < 0 {
		k.Key = make([]byte, KeySize)
		rand.Read(k.Key)
	}
	for i, s := range stores {
		if i != made && errs[i] == nil {
			wrapped[i], errs[i] = s.Wrap(ctx, b, k.Key)
		}
		switch {
		case errs[i] == nil:
			k.Wrapped = append(k.Wrapped, wrapped[i])
		case KindOf(errs[i]) == Canceled:
			clear(k.Key)
			return nil, nil, errs[i]
		}
	}
	if len(k.Wrapped) == 0 {
		clear(k.Key)
		return nil, errs, errs[0]
	}
	return k, errs, nil
}
