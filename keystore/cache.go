package keystore

import "time"

// cache holds unwrapped keys, bounded in number; the least recently used go
// first. The cost is its entry, a place in the map and the slot: less than
// 150 bytes a key. The ring's mutex guards it.
type cache struct {
	slab    *slab
	where   map[[32]byte]int32 // by [cacheID], the entry and its slot
	entries []entry            // by slot
	newest  int32              // the most recently used, -1: none
	oldest  int32
	most    int
}

type entry struct {
	id           [32]byte
	since        time.Duration // by the ring's clock
	newer, older int32
	ahead        bool // prefetched, and not used yet
}

func newCache(s *slab, most int) *cache {
	return &cache{slab: s, where: map[[32]byte]int32{}, newest: -1, oldest: -1, most: most}
}

func (c *cache) has(id [32]byte) bool {
	_, ok := c.where[id]
	return ok
}

// get returns a copy of a key, nil if it is not there; ahead says that it was
// prefetched, and is used for the first time.
func (c *cache) get(id [32]byte) (key []byte, ahead bool) {
	i, ok := c.where[id]
	if !ok {
		return nil, false
	}
	c.unlink(i)
	c.link(i)
	ahead, c.entries[i].ahead = c.entries[i].ahead, false
	return append([]byte(nil), c.slab.at(i)...), ahead
}

// since returns when a key was put in, 0 if it is not there.
func (c *cache) since(id [32]byte) time.Duration {
	if i, ok := c.where[id]; ok {
		return c.entries[i].since
	}
	return 0
}

// put keeps a copy of key.
func (c *cache) put(id [32]byte, key []byte, now time.Duration, ahead bool) {
	if i, ok := c.where[id]; ok {
		c.entries[i].since = now
		return
	}
	if len(c.where) >= c.most {
		c.drop(c.oldest)
	}
	i := c.slab.take()
	if i < 0 {
		return
	}
	copy(c.slab.at(i), key)
	for int(i) >= len(c.entries) {
		c.entries = append(c.entries, entry{})
	}
	c.entries[i] = entry{id: id, since: now, ahead: ahead}
	c.where[id] = i
	c.link(i)
}

// drop wipes an entry.
func (c *cache) drop(i int32) {
	c.unlink(i)
	delete(c.where, c.entries[i].id)
	c.slab.give(i)
}

// wipe empties the cache.
func (c *cache) wipe() {
	for c.oldest >= 0 {
		c.drop(c.oldest)
	}
}

func (c *cache) link(i int32) {
	e := &c.entries[i]
	e.newer, e.older = -1, c.newest
	if c.newest >= 0 {
		c.entries[c.newest].newer = i
	} else {
		c.oldest = i
	}
	c.newest = i
}

func (c *cache) unlink(i int32) {
	e := c.entries[i]
	if e.newer >= 0 {
		c.entries[e.newer].older = e.older
	} else {
		c.newest = e.older
	}
	if e.older >= 0 {
		c.entries[e.older].newer = e.newer
	} else {
		c.oldest = e.newer
	}
}
