package volume

import "slices"

// ranges is a set of numbers, of blocks or bytes: disjoint ranges in order, both
// ends included.
type ranges []struct{ first, last int64 }

// maxRanges is how many holes a file remembers.
const maxRanges = 4096

// with returns the set with [first, last] added.
func (r ranges) with(first, last int64) ranges {
	if first > last {
		return r
	}
	i := 0 // the first range that touches [first, last] or lies behind it
	for i < len(r) && r[i].last < first-1 {
		i++
	}
	j := i // the first that lies behind
	for ; j < len(r) && r[j].first <= last+1; j++ {
		first, last = min(first, r[j].first), max(last, r[j].last)
	}
	return slices.Replace(slices.Clone(r), i, j, struct{ first, last int64 }{first, last})
}

// without returns the set without [first, last].
func (r ranges) without(first, last int64) ranges {
	if !r.touch(first, last) {
		return r
	}
	var out ranges
	for _, x := range r {
		if x.first < first {
			out = append(out, struct{ first, last int64 }{x.first, min(x.last, first-1)})
		}
		if x.last > last {
			out = append(out, struct{ first, last int64 }{max(x.first, last+1), x.last})
		}
	}
	return out
}

// touch reports whether a part of [first, last] is in the set.
func (r ranges) touch(first, last int64) bool {
	return slices.ContainsFunc(r, func(x struct{ first, last int64 }) bool { return x.first <= last && first <= x.last })
}
