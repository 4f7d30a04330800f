package fs

import "testing"

// The files with most bytes are found among many with few, and memory is bounded.
func TestHot(t *testing.T) {
	var h hot
	for i := range uint64(100000) {
		h.note(1000+i, 4096)
		if i%2 == 0 {
			h.note(1, 100000)
		}
		if i%4 == 0 {
			h.note(2, 100000)
		}
	}
	if len(h.by) > hotFiles {
		t.Errorf("%d files", len(h.by))
	}
	for node, n := range h.by {
		if node > 2 && n > h.by[2]/4 {
			t.Errorf("file %d has %d bytes, the second hottest %d", node, n, h.by[2])
		}
	}
	if r := float64(h.by[1]) / float64(h.by[2]); r < 1.5 || r > 2.5 {
		t.Errorf("%d and %d bytes: not 2 to 1", h.by[1], h.by[2])
	}
}
