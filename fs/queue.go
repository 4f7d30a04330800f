package fs

import (
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// queue counts the requests that are being answered or kept, and keeps those that come when most are:
// each may need a thread, and a process can have only so many. They are read all the same, for
// among them can be what others wait for: the kernel's writes, and a signal that ends a
// request.
type queue struct {
	most int32
	busy atomic.Int32

	waiting atomic.Int32
	mu      sync.Mutex
	kept    [][]byte // the oldest first
}

// urgent reports whether a request is answered whatever else is: others can wait for it. Those of
// writeback are limited by the kernel; those of programs by how many of their threads close, cut or
// write past the cache at once.
func urgent(in []byte) bool {
	switch (*fuse.InHeader)(unsafe.Pointer(&in[0])).Opcode {
	case opWrite, opSetAttr, opFlush, opForget, opBatchForget, opRelease, opReleaseDir, opDestroy:
		return true
	}
	return false
}

// admit counts a request that is to be answered now; false if it is kept, as a copy.
func (q *queue) admit(in []byte) bool {
	if q.busy.Add(1) <= q.most || urgent(in) {
		return true
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	// Whoever ends a request from here on sees this one.
	if waiting := q.waiting.Add(1); q.busy.Load()-waiting < q.most {
		q.waiting.Add(-1)
		return true
	}
	q.kept = append(q.kept, append([]byte(nil), in...))
	return false
}

// done ends a request, or one that was kept, and returns one that can be answered now, nil if
// there is none. A kept request counts as busy.
func (q *queue) done() []byte {
	if q.busy.Add(-1); q.waiting.Load() == 0 {
		return nil
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.kept) == 0 || q.busy.Load()-q.waiting.Load() >= q.most {
		return nil
	}
	in := q.kept[0]
	q.kept = q.kept[1:]
	q.waiting.Add(-1)
	return in
}
