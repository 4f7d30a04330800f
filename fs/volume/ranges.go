package volume

// ranges is a set of block numbers: disjoint ranges in order, both ends included.
type ranges []struct{ first, last int64 }

// maxRanges is how many a file remembers.
const maxRanges = 4096

// with returns the set with [first, last] added, which lies behind all of it.
func (r ranges) with(first, last int64) ranges {
	if first > last {
		return r
	}
	return append(r, struct{ first, last int64 }{first, last})
}

// without returns the set without [first, last].
func (r ranges) without(first, last int64) ranges {
	touched := false
	for _, x := range r {
		touched = touched || x.first <= last && first <= x.last
	}
	if !touched {
		return r
	}
	var out ranges
	for _, x := range r {
		if x.first > last || first > x.last {
			out = append(out, x)
			continue
		}
		out = out.with(x.first, first-1).with(max(x.first, last+1), x.last)
	}
	return out
}
