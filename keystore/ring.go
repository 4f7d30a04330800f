package keystore

import (
	"container/list"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"sync"
)

// A DataKey is a new data key with the ID that it is bound to, wrapped for
// every recipient of the ring.
type DataKey struct {
	ID      [16]byte
	Key     [KeySize]byte
	Wrapped []Wrapped
}

// Ring is the set of stores that a volume trusts: it makes data keys for all of
// them and unwraps through any of them. Close wipes what it holds.
type Ring struct {
	volume [16]byte
	stores []Store
	report func(error)

	// mu guards the fields below. No call to a store is made under it.
	mu      sync.Mutex
	cache   map[[32]byte]*list.Element // of *cached
	lru     list.List                  // most recently used first
	calls   map[[32]byte]*call
	pool    []*DataKey
	target  int // how many the pool should hold; 0: none are made ahead
	filling int
	failing bool // what makes keys ahead failed; it stops until a NewKey succeeds
	stop    context.CancelFunc
	ctx     context.Context
	wg      sync.WaitGroup
}

// RingOptions of [NewRing]; the zero value makes no keys ahead.
type RingOptions struct {
	Pool   int         // data keys made ahead at first; grows with use up to MaxPool
	Report func(error) // told of what failed in the background
}

const (
	// MaxPool bounds the data keys made ahead, and with them those that a
	// crash wastes.
	MaxPool   = 256
	maxCached = 16384
	// poolCalls is how many keys are made at the same time.
	poolCalls = 32
)

type cached struct {
	id  [32]byte
	key [KeySize]byte
}

type call struct {
	done chan struct{}
	key  []byte
	err  error
}

// NewRing makes the ring of a volume.
func NewRing(volume [16]byte, stores []Store, o RingOptions) *Ring {
	r := &Ring{volume: volume, stores: stores, report: o.Report, target: min(o.Pool, MaxPool),
		cache: map[[32]byte]*list.Element{}, calls: map[[32]byte]*call{}}
	if r.report == nil {
		r.report = func(error) {}
	}
	r.ctx, r.stop = context.WithCancel(context.Background())
	r.mu.Lock()
	r.refill()
	r.mu.Unlock()
	return r
}

// Close ends what runs in the background and wipes the pool and the cache.
func (r *Ring) Close() {
	r.mu.Lock()
	r.stop() // under mu: refill starts nothing after it
	r.mu.Unlock()
	r.wg.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range r.pool {
		clear(k.Key[:])
	}
	r.pool, r.target = nil, 0
	for _, e := range r.cache {
		clear(e.Value.(*cached).key[:])
	}
	clear(r.cache)
	r.lru.Init()
}

// Stores returns the trusted stores.
func (r *Ring) Stores() []Store { return r.stores }

// store returns the trusted store of a recipient, nil if there is none.
func (r *Ring) store(uri string) Store {
	for _, s := range r.stores {
		if s.URI() == uri {
			return s
		}
	}
	for _, s := range r.stores {
		if m, ok := s.(Matcher); ok && m.Matches(uri) {
			return s
		}
	}
	return nil
}

// NewKey returns a data key for a new file: from the pool, or made now.
func (r *Ring) NewKey(ctx context.Context) (*DataKey, error) {
	r.mu.Lock()
	if n := len(r.pool); n > 0 {
		k := r.pool[n-1]
		r.pool = r.pool[:n-1]
		r.refill()
		r.mu.Unlock()
		return k, nil
	}
	if !r.failing {
		r.target = min(2*r.target, MaxPool)
		r.refill()
	}
	r.mu.Unlock()
	var id [16]byte
	rand.Read(id[:])
	k, err := New(ctx, r.stores, Binding{ForFile, r.volume, id})
	if err == nil {
		r.mu.Lock()
		r.failing = false
		r.mu.Unlock()
	}
	return k, err
}

// PutBack returns a key under which nothing was written.
func (r *Ring) PutBack(k *DataKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.pool) < r.target {
		r.pool = append(r.pool, k)
	} else {
		clear(k.Key[:])
	}
}

// refill starts what brings the pool to its target. r.mu is held.
func (r *Ring) refill() {
	for !r.failing && r.filling < poolCalls && len(r.pool)+r.filling < r.target && r.ctx.Err() == nil {
		r.filling++
		r.wg.Go(func() {
			var id [16]byte
			rand.Read(id[:])
			k, err := New(r.ctx, r.stores, Binding{ForFile, r.volume, id})
			r.mu.Lock()
			defer r.mu.Unlock()
			r.filling--
			switch {
			case err == nil:
				r.pool = append(r.pool, k)
				r.refill()
			case r.ctx.Err() == nil:
				if !r.failing {
					r.report(err)
				}
				r.failing = true
			}
		})
	}
}

// New makes a data key and wraps it for every store: the first that can
// generate makes it, the others wrap it.
func New(ctx context.Context, stores []Store, b Binding) (*DataKey, error) {
	k := &DataKey{ID: b.ID, Wrapped: make([]Wrapped, len(stores))}
	if len(stores) == 0 {
		return nil, &Error{Kind: Invalid, Op: "generate", Err: errors.New("no recipient")}
	}
	made := -1
	for i, s := range stores {
		g, ok := s.(Generator)
		if !ok {
			continue
		}
		key, w, err := g.Generate(ctx, b)
		if err != nil {
			return nil, err
		}
		copy(k.Key[:], key)
		clear(key)
		k.Wrapped[i], made = w, i
		break
	}
	if made < 0 {
		rand.Read(k.Key[:])
	}
	for i, s := range stores {
		if i == made {
			continue
		}
		w, err := s.Wrap(ctx, b, k.Key[:])
		if err != nil {
			return nil, err
		}
		k.Wrapped[i] = w
	}
	return k, nil
}

// Unwrap returns the data key of a file through the first of its recipients
// that is trusted and can. Many wanting the same key cause one call. The caller
// owns the result and wipes it.
func (r *Ring) Unwrap(ctx context.Context, file [16]byte, ws []Wrapped) ([]byte, error) {
	var errs []error
	for _, w := range ws {
		if s := r.store(w.URI); s != nil {
			key, err := r.unwrap(ctx, s, Binding{ForFile, r.volume, file}, w)
			if err == nil {
				return key, nil
			}
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 {
		uri := ""
		if len(ws) > 0 {
			uri = ws[0].URI
		}
		return nil, &Error{Kind: Untrusted, URI: uri, Op: "unwrap", Err: errors.New("nobody named this key for the volume")}
	}
	// The first recipient's verdict is the one that the file shows.
	return nil, errs[0]
}

// UnwrapNow is Unwrap where no service has to be waited for; ok is false where
// one has to be.
func (r *Ring) UnwrapNow(file [16]byte, ws []Wrapped) (key []byte, ok bool, err error) {
	for _, w := range ws {
		s := r.store(w.URI)
		if s == nil {
			continue
		}
		if key := r.cachedKey(cacheID(Binding{ForFile, r.volume, file}, w)); key != nil {
			return key, true, nil
		}
		if _, ok := s.(Immediate); !ok {
			return nil, false, nil
		}
		break
	}
	key, err = r.Unwrap(context.Background(), file, ws)
	return key, true, err
}

// Learn keeps the key of a new file, so that opening it again asks nobody.
func (r *Ring) Learn(k *DataKey) {
	for _, w := range k.Wrapped {
		r.mu.Lock()
		r.insert(cacheID(Binding{ForFile, r.volume, k.ID}, w), k.Key[:])
		r.mu.Unlock()
	}
}

func (r *Ring) cachedKey(id [32]byte) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.cache[id]
	if e == nil {
		return nil
	}
	r.lru.MoveToFront(e)
	return append([]byte(nil), e.Value.(*cached).key[:]...)
}

// insert puts a key into the cache; mu is held.
func (r *Ring) insert(id [32]byte, key []byte) {
	if r.cache[id] != nil || r.ctx.Err() != nil {
		return
	}
	e := &cached{id: id}
	copy(e.key[:], key)
	r.cache[id] = r.lru.PushFront(e)
	for len(r.cache) > maxCached {
		old := r.lru.Remove(r.lru.Back()).(*cached)
		delete(r.cache, old.id)
		clear(old.key[:])
	}
}

func (r *Ring) unwrap(ctx context.Context, s Store, b Binding, w Wrapped) ([]byte, error) {
	id := cacheID(b, w)
	for {
		if key := r.cachedKey(id); key != nil {
			return key, nil
		}
		r.mu.Lock()
		c := r.calls[id]
		mine := c == nil
		if mine {
			c = &call{done: make(chan struct{})}
			r.calls[id] = c
		}
		r.mu.Unlock()
		if mine {
			key, err := s.Unwrap(ctx, b, w)
			r.finish(id, c, key, err)
			return key, err
		}
		Waits(ctx)
		select {
		case <-c.done:
			if KindOf(c.err) == Canceled { // the one who asked went away, not we
				continue
			}
			return append([]byte(nil), c.key...), c.err
		case <-ctx.Done():
			return nil, &Error{Kind: Canceled, URI: w.URI, Op: "unwrap", Err: ctx.Err()}
		}
	}
}

func (r *Ring) finish(id [32]byte, c *call, key []byte, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.calls, id)
	c.err = err
	if err == nil {
		c.key = append([]byte(nil), key...)
		r.insert(id, key)
	}
	close(c.done)
}

// cacheID covers everything that the answer depends on.
func cacheID(b Binding, w Wrapped) [32]byte {
	var m []byte
	for _, p := range [][]byte{[]byte(b.Use), b.Volume[:], b.ID[:], []byte(w.URI), w.Branch, w.Blob} {
		m = append(binary.BigEndian.AppendUint32(m, uint32(len(p))), p...)
	}
	return sha256.Sum256(m)
}
