package keystore

// slab holds raw keys in slots of [KeySize] bytes that are neither swapped out
// nor dumped, nor moved by the garbage collector, as far as newSlab gets such memory. Its owner's mutex guards it.
type slab struct {
	mem    []byte
	mapped bool
	locked bool
	free   []int32
}

// newSlab makes a slab of n slots. Where the limit of locked memory
// (RLIMIT_MEMLOCK) is too low it is not locked, and where the kernel gives no
// pages it is of Go's memory.
func newSlab(n int) *slab {
	s := &slab{free: make([]int32, n)}
	if s.mem, s.locked = mapPages(n * KeySize); s.mem == nil {
		s.mem = make([]byte, n*KeySize)
	} else {
		s.mapped = true
	}
	for i := range s.free {
		s.free[i] = int32(n - 1 - i)
	}
	return s
}

// take returns a free slot, -1 if there is none.
func (s *slab) take() int32 {
	n := len(s.free)
	if n == 0 {
		return -1
	}
	i := s.free[n-1]
	s.free = s.free[:n-1]
	return i
}

// at returns the bytes of a slot.
func (s *slab) at(i int32) []byte {
	return s.mem[int(i)*KeySize:][:KeySize:KeySize]
}

// give wipes a slot and takes it back.
func (s *slab) give(i int32) {
	clear(s.at(i))
	s.free = append(s.free, i)
}

// close wipes everything.
func (s *slab) close() {
	clear(s.mem)
	if s.mapped {
		unmapPages(s.mem)
	}
	s.mem, s.free = nil, nil
}
