package fs

import "sync"

// table gives numbers to what the kernel has open. The kernel uses only the
// numbers that it was given, and none after it gave it back.
type table[T any] struct {
	mu   sync.RWMutex
	open []T
	free []uint64
}

func (t *table[T]) put(x T) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := len(t.free); n > 0 {
		i := t.free[n-1]
		t.free = t.free[:n-1]
		t.open[i] = x
		return i
	}
	t.open = append(t.open, x)
	return uint64(len(t.open) - 1)
}

func (t *table[T]) get(i uint64) T {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.open[i]
}

func (t *table[T]) take(i uint64) T {
	t.mu.Lock()
	defer t.mu.Unlock()
	x := t.open[i]
	var none T
	t.open[i] = none
	t.free = append(t.free, i)
	return x
}
