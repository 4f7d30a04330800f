package keystore

import "time"

// Counts are the totals of a ring's work so far, and its contents.
type Counts struct {
	Hits, Misses             uint64 // unwrappings that were answered from memory, and others
	Prefetched, PrefetchUsed uint64
	Made, Wasted             uint64 // new keys, and those that were wiped without being used
	Cached, Pool, PoolTarget int
}

// Counts returns them.
func (r *Ring) Counts() Counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.counts
	c.Cached, c.Pool, c.PoolTarget = len(r.cache.where), len(r.pool.keys), r.pool.target(r.o.now())
	return c
}

// Plus returns the sum of the totals of two rings.
func (c Counts) Plus(d Counts) Counts {
	return Counts{c.Hits + d.Hits, c.Misses + d.Misses, c.Prefetched + d.Prefetched, c.PrefetchUsed + d.PrefetchUsed,
		c.Made + d.Made, c.Wasted + d.Wasted, c.Cached + d.Cached, c.Pool + d.Pool, c.PoolTarget + d.PoolTarget}
}

// StoreState is what is known of a store.
type StoreState struct {
	URI    string
	Proven time.Duration // how long ago it last proved that its key may be used
	Error  error         // why it is not asked, nil if it can be
}

// States returns them, in the order of the stores.
func (r *Ring) States() []StoreState {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []StoreState
	for _, s := range r.stores {
		st := StoreState{URI: s.URI(), Proven: r.o.now() - s.proven}
		if s.immediate {
			st.Proven = 0
		}
		if e := s.wrong(); e != nil {
			st.Error = e
		}
		out = append(out, st)
	}
	return out
}
