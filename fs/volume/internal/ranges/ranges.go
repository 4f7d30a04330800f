// Package ranges has sets of numbers that lie in few ranges: the holes of a file, its bytes that
// were lost.
package ranges

import "slices"

// Range is the numbers from First to Last, both included.
type Range struct{ First, Last int64 }

// Set is a set of numbers: disjoint ranges in order.
type Set []Range

// With returns the set with [first, last] added.
func (r Set) With(first, last int64) Set {
	if first > last {
		return r
	}
	i := 0 // the first range that touches [first, last] or lies behind it
	for i < len(r) && r[i].Last < first-1 {
		i++
	}
	j := i // the first that lies behind
	for ; j < len(r) && r[j].First <= last+1; j++ {
		first, last = min(first, r[j].First), max(last, r[j].Last)
	}
	return slices.Replace(slices.Clone(r), i, j, Range{first, last})
}

// Without returns the set without [first, last].
func (r Set) Without(first, last int64) Set {
	if !r.Touches(first, last) {
		return r
	}
	var out Set
	for _, x := range r {
		if x.First < first {
			out = append(out, Range{x.First, min(x.Last, first-1)})
		}
		if x.Last > last {
			out = append(out, Range{max(x.First, last+1), x.Last})
		}
	}
	return out
}

// Touches reports whether a part of [first, last] is in the set.
func (r Set) Touches(first, last int64) bool {
	return slices.ContainsFunc(r, func(x Range) bool { return x.First <= last && first <= x.Last })
}

// Joined returns the set with gaps of fewer than n numbers filled.
func (r Set) Joined(n int64) Set {
	out := slices.Clone(r[:min(1, len(r))])
	for _, x := range r[len(out):] {
		if last := &out[len(out)-1]; x.First-last.Last <= n {
			last.Last = x.Last
		} else {
			out = append(out, x)
		}
	}
	return out
}
