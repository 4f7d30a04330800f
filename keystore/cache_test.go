package keystore

import (
	"bytes"
	"testing"
)

// An evicted key is wiped, and the least recently used goes first.
func TestEvictionWipes(t *testing.T) {
	s := newSlab(8)
	defer s.close()
	c := newCache(s, 4)
	key := func(i byte) []byte { return bytes.Repeat([]byte{i}, KeySize) }
	for i := range byte(4) {
		c.put([32]byte{i}, key(i+1), 0, false)
	}
	c.get([32]byte{0})
	c.put([32]byte{9}, key(10), 0, false)
	if c.has([32]byte{1}) || !c.has([32]byte{0}) {
		t.Error("another than the least recently used is gone")
	}
	if bytes.Contains(s.mem, key(2)) || !bytes.Contains(s.mem, key(1)) {
		t.Error("the key is in memory")
	}
	c.wipe()
	if !bytes.Equal(s.mem, make([]byte, len(s.mem))) || len(s.free) != 8 {
		t.Error("wiped, and not empty")
	}
}
