package cfile

import "kmsfs/blockcrypt"

// LookThrough finds out how much of an unfinished file opens, and shows that.
func (c *Content) LookThrough(length int64) error {
	r, err := c.Assess(length, nil)
	if err != nil {
		return err
	}
	c.Size, c.Partial = r.Size, true
	return nil
}

// Findings are the blocks of an unfinished file that open.
type Findings struct {
	Size  int64   // of the plaintext: up to the last block that opens, or the floor
	Pages int64   // blocks that stay
	Short []int64 // blocks in the middle that are sealed short
	Last  bool    // the last block is to be sealed up to size
}

// Assess asks at the multiples of stopEvery blocks, as far as it meets them, whether to stop.
const stopEvery = 256

// lastHole returns the last block of the run of pages without data in the ciphertext file that
// begins with block k; at most block n-1.
func (c *Content) lastHole(k, n int64) (int64, error) {
	next, err := c.dataFrom(k + 1)
	return max(k, min(next, n)-1), err
}

// Assess reads a file of this length, which is dirty or beyond its floor, and
// finds where it ends. Damage below the floor is an error. Now and then it asks
// stop, if that is not nil, and ends with its error.
func (c *Content) Assess(length int64, stop func() error) (r Findings, err error) {
	g, s := c.Geo, c.Header.State
	must := int64(0) // blocks below the floor, which must open
	if s.Floor > 0 {
		must = g.Block(s.Floor-1) + 1
	}
	n := g.Last(length) + 1
	if s.Flags&blockcrypt.Cut != 0 {
		n = min(n, must)
	}
	var tail, heldPages int64 // of the last block that is no hole: its bytes of plaintext, and its number plus one
	endsInHole := false
	var page [blockcrypt.PageSize]byte
	var text [blockcrypt.BlockSize]byte
	k := int64(0)
	for ; k < n; k++ {
		if k%stopEvery == 0 && stop != nil {
			if err := stop(); err != nil {
				return r, err
			}
		}
		m, err := c.Disk.Pread(c.FD, page[:], g.PageOff(k))
		if err != nil {
			return r, err
		}
		p := PageOf(page[:m], 0, g.Lead(k))
		if k > 0 && s.Flags&blockcrypt.Sparse != 0 && m == blockcrypt.PageSize && blockcrypt.IsHole(p) {
			// Pages for which the ciphertext file has no data are holes, too: they are skipped,
			// so that a sparse file costs as much as its data.
			endsInHole = true
			if k, err = c.lastHole(k, n); err != nil {
				return r, err
			}
			continue
		}
		out, err := c.Keys.Open(text[:0], k, p, g.Capacity(k))
		if err != nil {
			if k < must {
				return r, &blockcrypt.DamageError{Class: blockcrypt.BadBlock, Pos: g.PageOff(k),
					Detail: "a confirmed block does not open"}
			}
			break
		}
		if heldPages > 0 && heldPages == k && tail < int64(g.Capacity(k-1)) {
			r.Short = append(r.Short, k-1)
		}
		if heldPages > 0 && heldPages < k && tail < int64(g.Capacity(heldPages-1)) {
			r.Short = append(r.Short, heldPages-1)
		}
		tail, heldPages, endsInHole = int64(len(out)), k+1, false
	}
	if k < must {
		return r, &blockcrypt.DamageError{Class: blockcrypt.BadSize, Pos: length,
			Detail: "confirmed blocks are missing"}
	}
	r.Pages = k
	if endsInHole { // holes at the end beyond the floor go
		r.Pages = max(heldPages, must)
	}
	if r.Pages == 0 {
		return r, nil
	}
	hole := r.Pages > heldPages
	r.Size = g.Start(r.Pages-1) + tail
	if hole && heldPages > 0 && tail < int64(g.Capacity(heldPages-1)) {
		r.Short = append(r.Short, heldPages-1)
	}
	if hole || s.Flags&blockcrypt.Cut != 0 {
		if !hole && r.Size < s.Floor {
			return r, &blockcrypt.DamageError{Class: blockcrypt.BadSize, Pos: -1,
				Detail: "the file is shorter than its confirmed length"}
		}
		r.Size, r.Last = s.Floor, true
	}
	if r.Size < s.Floor {
		return r, &blockcrypt.DamageError{Class: blockcrypt.BadSize, Pos: -1,
			Detail: "the file is shorter than its confirmed length"}
	}
	return r, nil
}
