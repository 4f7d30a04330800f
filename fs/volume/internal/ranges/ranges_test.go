package ranges

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func TestSet(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var set Set
		var want [40]bool
		for range 30 {
			a := r.IntN(40)
			b := a + r.IntN(40-a)
			add := r.IntN(2) == 0
			for i := a; i <= b; i++ {
				want[i] = add
			}
			if add {
				set = set.With(int64(a), int64(b))
			} else {
				set = set.Without(int64(a), int64(b))
			}
			for i, in := range want {
				if set.Touches(int64(i), int64(i)) != in {
					t.Fatalf("%d: %v, want %v in %v", i, !in, in, set)
				}
			}
			for i, x := range set {
				if x.First > x.Last || i > 0 && x.First <= set[i-1].Last+1 {
					t.Fatalf("not disjoint ranges in order: %v", set)
				}
			}
		}
	}
}

// Joined fills gaps of fewer than n numbers, and changes nothing else.
func TestJoined(t *testing.T) {
	set := Set{}.With(0, 3).With(6, 7).With(20, 20)
	if got := set.Joined(3); !slices.Equal(got, Set{{0, 7}, {20, 20}}) {
		t.Error(got)
	}
	if got := set.Joined(2); !slices.Equal(got, set) {
		t.Error(got)
	}
	if got := Set(nil).Joined(5); len(got) != 0 {
		t.Error(got)
	}
}
