package keystore

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"kmsfs/blockcrypt"
)

// Ring is the set of stores that a volume trusts: it makes data keys for all of
// them and unwraps through any of them. It asks a service as rarely as it can:
// keys are made ahead and unwrapped ones kept; a key that was revoked is not used
// for longer than RingOptions.MaxAge, nor one whose service cannot be reached for
// longer than Grace. Close wipes what it holds.
type Ring struct {
	lease
	maker
	volume [16]byte
	o      RingOptions
	report func(error)
	waits  atomic.Bool // any store is a service that has to be waited for
	ctx    context.Context
	stop   context.CancelFunc
	wg     sync.WaitGroup

	// mu guards the fields below, and those of lease and maker that say so. No key service is
	// called under it.
	mu     sync.Mutex
	slab   *slab
	cache  *cache
	calls  map[[32]byte]*call
	flying int // calls to services that have not ended
	counts Counts

	dropped bool // by Drop
	used    bool // a key was asked for
}

// RingOptions of [NewRing]; the zero value makes no keys ahead.
type RingOptions struct {
	Pool      int                         // data keys that are held ready in the long run, once a program has made a file; 0: none are made ahead
	MaxAge    time.Duration               // how long a proof that a key may be used is good for; 5 min if zero
	Grace     time.Duration               // how long cached keys are used while a service cannot be reached; 1 h if zero, not at all if negative
	EachKey   bool                        // a key is used for MaxAge only, whatever was proven of others
	Branches  time.Duration               // how long a branch key is used for new files; 0: each file costs a call
	Sample    Sample                      // what a probe unwraps before there are files
	Keys      int                         // how many unwrapped keys are kept in memory; 16,384 if zero
	Lazy      bool                        // nothing is probed before a key was used
	Suspended *Error                      // the ring begins suspended, as by Suspend
	Report    func(error)                 // told of what failed in the background
	Changed   func(verdict error)         // told when no key can be used any more, and with nil when one can again
	Reach     func(uri string, err error) // told when a store cannot be reached any more, and with nil when it can again

	now func() time.Duration // the clock: CLOCK_BOOTTIME but in tests
}

const maxCached = 16384

// Sample is a key as a ring's recipients have it, such as the volume key.
type Sample struct {
	Binding
	Wrapped []blockcrypt.Recipient
}

// SampleOfVolume is that of a volume key.
func SampleOfVolume(volume [16]byte, wrapped []blockcrypt.Recipient) Sample {
	return Sample{Binding{Use: ForVolume, Volume: volume}, wrapped}
}

// call is one unwrapping that several may wait for.
type call struct {
	store *standing
	b     Binding
	w     blockcrypt.Recipient
	ahead bool // before a program asked

	done  chan struct{}
	raise func() // tells that a program waits; nil where one did from the start
	err   error
}

// NewRing makes the ring of a volume. The stores are taken to have just proven
// that their keys may be used.
func NewRing(volume [16]byte, stores []Store, o RingOptions) *Ring {
	if o.MaxAge == 0 {
		o.MaxAge = 5 * time.Minute
	}
	if o.Grace == 0 {
		o.Grace = time.Hour
	}
	if o.now == nil {
		o.now = bootTime
	}
	if o.Reach == nil {
		o.Reach = func(string, error) {}
	}
	if o.Changed == nil {
		o.Changed = func(error) {}
	}
	r := &Ring{volume: volume, o: o, report: o.Report, calls: map[[32]byte]*call{}}
	r.lease.r, r.maker.r = r, r
	r.wake, r.proof = make(chan struct{}, 1), make(chan struct{})
	r.ctx, r.stop = context.WithCancel(context.Background())
	if r.report == nil {
		r.report = func(error) {}
	}
	if o.Keys == 0 {
		o.Keys = maxCached
	}
	if o.Suspended != nil {
		r.suspended, r.told, r.toldSuspended = o.Suspended, o.Suspended, true
	}
	r.slab = newSlab(o.Keys + min(o.Keys, 2*MaxPool+poolCalls))
	r.cache = newCache(r.slab, o.Keys)
	r.SetStores(stores, o.Sample)
	return r
}

// SetStores makes these the stores that are trusted, from now on. Those that were before keep what
// is known of them. Keys that were made ahead, for other recipients, are wiped. sample is what a
// probe unwraps.
func (r *Ring) SetStores(stores []Store, sample Sample) {
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.stores
	r.stores, r.sealers = nil, nil
	waits := false
	for _, s := range stores {
		if OnlySeals(s) {
			r.sealers = append(r.sealers, s)
			continue
		}
		i := slices.IndexFunc(before, func(x *standing) bool { return x.URI() == s.URI() })
		if i < 0 {
			before, i = append(before, r.newStanding(s, sample)), len(before)
		}
		before[i].retiring = false
		r.stores = append(r.stores, before[i])
		waits = waits || !before[i].immediate
	}
	for _, s := range before {
		if !slices.Contains(r.stores, s) {
			s.forget()
		}
	}
	r.drain()
	r.pool.base = 0
	if waits {
		r.pool.base = min(r.o.Pool, MaxPool)
	}
	r.refill()
	if waits && !r.waits.Swap(waits) && r.ctx.Err() == nil {
		r.watching.Do(func() { r.wg.Go(r.watch) })
	}
	r.waits.Store(waits)
	r.noted() // for callers that wait for a proof by a store that is gone
}

// Drop ends the use of the ring but for keys that were handed out: it trusts nobody any more, and
// wipes what it holds. Close follows at the end.
func (l *lease) Drop() {
	r := l.r
	r.SetStores(nil, Sample{})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropped = true
	r.wipe()
}

// Retire makes the ring wrap no new key for a store. The store still unwraps, if it can.
// [Ring.SetStores] ends that.
func (r *Ring) Retire(s Store) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range r.stores {
		if x.URI() == s.URI() {
			x.retiring = true
		}
	}
	r.sealers = slices.DeleteFunc(slices.Clone(r.sealers), func(x Store) bool { return x.URI() == s.URI() })
	r.drain()
	r.refill()
}

// drain wipes the keys that were made ahead; those that are on their way are wiped when they come.
// mu is held.
func (r *Ring) drain() {
	r.epoch++
	for _, k := range r.pool.keys {
		r.waste(k)
	}
	r.pool.keys = nil
}

// newStanding takes the store to have just proven that its key may be used. mu is held.
func (r *Ring) newStanding(s Store, sample Sample) *standing {
	_, immediate := s.(Immediate)
	st := &standing{Store: s, immediate: immediate, health: health{proven: r.o.now()},
		branch: branch{busy: make(chan struct{}, 1)}}
	for _, w := range sample.Wrapped {
		if Serves(s, w.URI) {
			st.learn(sample.Binding, w)
		}
	}
	r.giveUp(st, nil)
	return st
}

// trusted returns the stores that can unwrap, and those that only wrap. The lists are replaced, and
// never changed.
func (r *Ring) trusted() (stores []*standing, sealers []Store) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stores, r.sealers
}

// Close ends what runs in the background and wipes the pool and the cache.
func (r *Ring) Close() {
	r.mu.Lock()
	r.stop() // under mu: refill starts nothing after it
	for _, w := range r.pool.waiting {
		w.c <- made{err: &Error{Kind: Canceled, Op: "generate", Err: context.Canceled}}
	}
	r.pool.waiting = nil
	r.mu.Unlock()
	r.wg.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.slab.mem == nil {
		return
	}
	r.wipe()
	r.slab.close()
}

// Same reports whether two recipients are one: replicas of one key are.
func (r *Ring) Same(a, b string) bool {
	stores, _ := r.trusted()
	s := StoreFor(stores, a)
	return a == b || s != nil && s == StoreFor(stores, b)
}

// candidate is a recipient of a file with its trusted store.
type candidate struct {
	s *standing
	w blockcrypt.Recipient
}

// candidates returns the recipients that are trusted, in the order in which they
// are asked: first those that answer at once, then those without a known fault.
func (r *Ring) candidates(ws []blockcrypt.Recipient) []candidate {
	var out []candidate
	stores, _ := r.trusted()
	for _, w := range ws {
		if s := StoreFor(stores, w.URI); s != nil {
			out = append(out, candidate{s, w})
		}
	}
	if len(out) < 2 {
		return out
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	rank := func(c candidate) int {
		switch {
		case c.s.immediate:
			return 0
		case c.s.wrong() == nil:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(out, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)),
			cmp.Compare(b.s.proven/time.Minute, a.s.proven/time.Minute))
	})
	return out
}

func untrusted(ws []blockcrypt.Recipient) error {
	uri := ""
	if len(ws) > 0 {
		uri = ws[0].URI
	}
	return &Error{Kind: Untrusted, URI: uri, Op: "unwrap",
		Err: errors.New("it is under keys that no user named")}
}

// Unwrap returns the data key of a file through the first of its recipients
// that is trusted and can. Many wanting the same key cause one call. The caller
// owns the result and wipes it.
func (r *Ring) Unwrap(ctx context.Context, file [16]byte, ws []blockcrypt.Recipient) ([]byte, error) {
	cs := r.candidates(ws)
	if len(cs) == 0 {
		return nil, untrusted(ws)
	}
	errs := map[string]error{}
	for _, c := range cs {
		key, err := r.unwrap(ctx, c.s, Binding{ForFile, r.volume, file}, c.w)
		if err == nil || KindOf(err) == Canceled {
			return key, err
		}
		errs[c.w.URI] = err
	}
	// The first recipient's verdict is the one that the file shows; but it is damaged only if
	// every recipient says so.
	var damaged error
	for _, w := range ws {
		err := errs[w.URI]
		if err != nil && KindOf(err) != Damaged {
			return nil, err
		}
		damaged = cmp.Or(damaged, err)
	}
	return nil, cmp.Or(damaged, untrusted(ws))
}

// Unlock unwraps the data key of a file and gives its content keys; see [Ring.Unwrap].
func (r *Ring) Unlock(ctx context.Context, h *blockcrypt.Header) (*blockcrypt.FileKeys, error) {
	key, err := r.Unwrap(ctx, h.File, h.Recipients)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	return h.Unlock(key)
}

// UnlockNow is Unlock if no service has to be waited for; ok is false if one has to be.
func (r *Ring) UnlockNow(h *blockcrypt.Header) (keys *blockcrypt.FileKeys, ok bool, err error) {
	key, ok, err := r.UnwrapNow(h.File, h.Recipients)
	if err != nil || !ok {
		return nil, ok, err
	}
	defer clear(key)
	keys, err = h.Unlock(key)
	return keys, true, err
}

// UnwrapNow is Unwrap where no service has to be waited for; ok is false where
// one has to be.
func (r *Ring) UnwrapNow(file [16]byte, ws []blockcrypt.Recipient) (key []byte, ok bool, err error) {
	cs := r.candidates(ws)
	refused := 0
	var first error
	for _, c := range cs {
		key, err := r.cachedKey(c.s, cacheID(Binding{ForFile, r.volume, file}, c.w))
		if key != nil {
			return key, true, nil
		}
		if err != nil {
			if refused++; first == nil {
				first = err
			}
		}
	}
	if refused > 0 && refused == len(cs) { // every recipient refuses
		return nil, true, first
	}
	err = untrusted(ws)
	for _, c := range cs {
		if !c.s.immediate {
			return r.underBranch(c, Binding{ForFile, r.volume, file})
		}
		if key, err = r.unwrap(context.Background(), c.s, Binding{ForFile, r.volume, file},
			c.w); err == nil {
			return key, true, nil
		}
	}
	return nil, true, err
}

// underBranch unwraps a key under a branch key that the store has in memory.
func (r *Ring) underBranch(c candidate, b Binding) (key []byte, ok bool, err error) {
	r.mu.Lock()
	stale := c.s.stale(r.o.now(), r.o.MaxAge)
	r.mu.Unlock()
	if stale {
		return nil, false, nil
	}
	if key, ok, err = (watched{r, c.s}).known(b, c.w); !ok || err != nil {
		return nil, false, nil // Unwrap says what is wrong
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.unusable(c.s) != nil { // it is suspended by now
		clear(key)
		return nil, false, nil
	}
	r.insert(cacheID(b, c.w), key, false)
	r.counts.Hits++
	return key, true, nil
}

// Prefetch begins to unwrap a file's key, so that Unwrap finds it. It does
// nothing, and returns false, if the key is there or coming, or cannot be had.
func (r *Ring) Prefetch(file [16]byte, ws []blockcrypt.Recipient) (began bool) {
	cs := r.candidates(ws)
	if len(cs) == 0 || cs[0].s.immediate {
		return false
	}
	c := cs[0]
	b := Binding{ForFile, r.volume, file}
	id := cacheID(b, c.w)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.suspended != nil || c.s.wrong() != nil || r.cache.has(id) || r.calls[id] != nil ||
		r.ctx.Err() != nil {
		return false
	}
	r.counts.Prefetched++
	ctx, raise := WithRaise(r.ctx, ForPrefetch)
	x := &call{store: c.s, b: b, w: c.w, ahead: true, done: make(chan struct{}), raise: raise}
	r.calls[id] = x
	r.wg.Go(func() {
		key, err := watched{r, c.s}.Unwrap(ctx, b, c.w)
		r.finish(id, x, key, err)
		clear(key)
	})
	return true
}

// Forget wipes what is known of a file's key.
func (r *Ring) Forget(file [16]byte, ws []blockcrypt.Recipient) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, w := range ws {
		if i, ok := r.cache.where[cacheID(Binding{ForFile, r.volume, file}, w)]; ok {
			r.cache.drop(i)
		}
	}
}

// Learn keeps the key of a new file, so that opening it again asks nobody.
func (r *Ring) Learn(k *DataKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, w := range k.Wrapped {
		b := Binding{ForFile, r.volume, k.ID}
		r.insert(cacheID(b, w), k.Key, false)
		if s := StoreFor(r.stores, w.URI); s != nil {
			s.learn(b, w)
		}
	}
}

// cachedKey returns a key that is known, nil if it is not or waits for a proof,
// or why it may not be used.
func (r *Ring) cachedKey(s *standing, id [32]byte) ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.unusable(s); e != nil {
		return nil, e
	}
	if s.stale(r.o.now(), r.o.MaxAge) {
		return nil, nil
	}
	if r.o.EachKey && s.down == nil && r.o.now()-r.cache.since(id) > r.o.MaxAge {
		return nil, nil
	}
	key, ahead := r.cache.get(id)
	if key != nil {
		r.counts.Hits++
	}
	if ahead {
		r.counts.PrefetchUsed++
	}
	return key, nil
}

// unusable returns why a store's keys may not be used. mu is held.
func (r *Ring) unusable(s *standing) error {
	if r.suspended != nil {
		return r.suspended
	}
	if e := s.lost(r.o.now(), r.o.Grace); e != nil {
		return e
	}
	return nil
}

// insert puts a key into the cache; mu is held.
func (r *Ring) insert(id [32]byte, key []byte, ahead bool) {
	if r.ctx.Err() == nil && r.suspended == nil && !r.dropped {
		r.cache.put(id, key, r.o.now(), ahead)
	}
}

func (r *Ring) unwrap(ctx context.Context, s *standing, b Binding, w blockcrypt.Recipient) ([]byte, error) {
	id := cacheID(b, w)
	failed := false // a call of another has, once
	for {
		if key, err := r.cachedKey(s, id); key != nil || err != nil {
			return key, err
		}
		r.mu.Lock()
		c := r.calls[id]
		mine := c == nil
		if mine {
			if e := s.wrong(); e != nil {
				r.mu.Unlock()
				return nil, e
			}
			c = &call{store: s, b: b, w: w, done: make(chan struct{})}
			r.calls[id] = c
			r.counts.Misses++
		}
		stale := s.stale(r.o.now(), r.o.MaxAge)
		r.mu.Unlock()
		if k, ok := s.Store.(Keeper); ok && mine && stale {
			k.Forget() // a branch key from before a long sleep is no proof
		}
		if mine {
			key, err := watched{r, s}.Unwrap(ctx, b, w)
			r.finish(id, c, key, err)
			r.mu.Lock()
			e := r.unusable(s) // it may be suspended by now
			r.mu.Unlock()
			if err == nil && e != nil {
				clear(key)
				return nil, e
			}
			return key, err
		}
		if c.raise != nil {
			c.raise()
		}
		select {
		case <-c.done:
			if c.err != nil && KindOf(c.err) != Canceled && (failed || KindOf(c.err) != Outage) {
				return nil, c.err
			}
			// A call that began long before may have been unlucky: it is made again one time,
			// unless the store is down by now.
			failed = failed || c.err != nil
			if r.ctx.Err() != nil {
				return nil, &Error{Kind: Canceled, URI: w.URI, Op: "unwrap", Err: r.ctx.Err()}
			}
			// It is in the cache; or the one who asked went away, not we.
		case <-ctx.Done():
			return nil, &Error{Kind: Canceled, URI: w.URI, Op: "unwrap", Err: ctx.Err()}
		}
	}
}

// finish ends a call with its outcome.
func (r *Ring) finish(id [32]byte, c *call, key []byte, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.calls, id)
	c.err = err
	if err == nil {
		r.insert(id, key, c.ahead)
		c.store.learn(c.b, c.w)
	}
	close(c.done)
}

// MemoryLocked reports whether the keys that the ring keeps cannot be swapped out:
// RLIMIT_MEMLOCK can be too low for it.
func (r *Ring) MemoryLocked() bool { return r.slab.locked }

// Waits reports whether any store is a service that has to be waited for.
func (r *Ring) Waits() bool { return r.waits.Load() }

// cacheID covers everything that the answer depends on.
func cacheID(b Binding, w blockcrypt.Recipient) [32]byte {
	var m []byte
	for _, p := range [][]byte{[]byte(b.Use), b.Volume[:], b.ID[:], []byte(w.URI), w.Branch, w.Wrapped} {
		m = append(binary.BigEndian.AppendUint32(m, uint32(len(p))), p...)
	}
	return sha256.Sum256(m)
}
