package fs

import (
	"maps"
	"sync"
	"sync/atomic"
)

// hot says which files most bytes are read from and written to. It costs one addition for each request:
// the file that fills a further unit is charged all of it, which over many units is fair.
type hot struct {
	sum atomic.Uint64

	mu sync.Mutex
	by map[uint64]uint64 // bytes by node
}

const (
	hotUnit  = 64 << 10
	hotFiles = 256 // at most; then half of each count is forgotten
)

// note counts bytes of a node.
func (h *hot) note(node, bytes uint64) {
	after := h.sum.Add(bytes)
	units := after/hotUnit - (after-bytes)/hotUnit
	if units == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.by == nil {
		h.by = map[uint64]uint64{}
	}
	h.by[node] += units * hotUnit
	for len(h.by) > hotFiles {
		maps.DeleteFunc(h.by, func(_, n uint64) bool { return n/2 < hotUnit })
		for node := range h.by {
			h.by[node] /= 2
		}
	}
}

// Hot returns about how many bytes went to and from the files that have most of them, by their nodes'
// numbers. Of files that are used less for a while it forgets.
func (s *Server) Hot() map[uint64]uint64 {
	h := &s.loop.meter.hot
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.by)
}
