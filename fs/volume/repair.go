package volume

import (
	"errors"

	"kmsfs/blockcrypt"
)

// findings is what a file that was being written still holds.
type findings struct {
	size  int64   // bytes of plaintext that open
	pages int64   // blocks that stay
	short []int64 // blocks in the middle that are sealed short
	last  bool    // the last block is to be sealed up to size
}

// quitEvery is after how many blocks a repair looks whether the volume is being closed.
const quitEvery = 256

// errEnding is why a repair stops: the next mount does it.
var errEnding = errors.New("the volume is being unmounted; the next mount repairs the file")

// lastHole returns the last block of the hole in the backing file that block k begins, at
// most the one before n.
func (f *file) lastHole(k, n int64) (int64, error) {
	next, err := f.dataFrom(k + 1)
	return max(k, min(next, n)-1), err
}

// assess reads a file of this length, which is dirty or beyond its floor, and
// finds where it ends. Damage below the floor is an error. mu is held.
func (f *file) assess(length int64) (r findings, err error) {
	g, s := f.v.geo, f.hdr.State
	must := int64(0) // so many blocks must open
	if s.Floor > 0 {
		must = g.Block(s.Floor-1) + 1
	}
	n := g.Last(length) + 1
	if s.Flags&blockcrypt.Cut != 0 {
		n = min(n, must)
	}
	var tail, heldPages int64 // bytes in the last block that is none of the holes, and blocks up to it
	endsInHole := false
	var page [blockcrypt.PageSize]byte
	var text [blockcrypt.BlockSize]byte
	k := int64(0)
	for ; k < n; k++ {
		if k%quitEvery == 0 && f.v.ends() {
			return r, errEnding
		}
		m, err := f.v.disk.Pread(f.fd, page[:], g.PageOff(k))
		if err != nil {
			return r, err
		}
		p := pageOf(page[:m], 0, g.Lead(k))
		if k > 0 && s.Flags&blockcrypt.Sparse != 0 && m == blockcrypt.PageSize && blockcrypt.IsHole(p) {
			// What the backing file has no data for is a hole, too: a walk costs by data.
			endsInHole = true
			if k, err = f.lastHole(k, n); err != nil {
				return r, err
			}
			continue
		}
		out, err := f.keys.Open(text[:0], k, p, g.Capacity(k))
		if err != nil {
			if k < must {
				return r, &blockcrypt.DamageError{Class: blockcrypt.BadBlock, Pos: g.PageOff(k), Detail: "a confirmed block does not open"}
			}
			break
		}
		if heldPages > 0 && heldPages == k && tail < int64(g.Capacity(k-1)) {
			r.short = append(r.short, k-1)
		}
		if heldPages > 0 && heldPages < k && tail < int64(g.Capacity(heldPages-1)) {
			r.short = append(r.short, heldPages-1)
		}
		tail, heldPages, endsInHole = int64(len(out)), k+1, false
	}
	if k < must {
		return r, &blockcrypt.DamageError{Class: blockcrypt.BadSize, Pos: length, Detail: "confirmed blocks are missing"}
	}
	r.pages = k
	if endsInHole { // holes at the end beyond the floor go
		r.pages = max(heldPages, must)
	}
	if r.pages == 0 {
		return r, nil
	}
	hole := r.pages > heldPages
	r.size = g.Start(r.pages-1) + tail
	if hole && heldPages > 0 && tail < int64(g.Capacity(heldPages-1)) {
		r.short = append(r.short, heldPages-1)
	}
	if hole || s.Flags&blockcrypt.Cut != 0 {
		if !hole && r.size < s.Floor {
			return r, &blockcrypt.DamageError{Class: blockcrypt.BadSize, Pos: -1, Detail: "the file is shorter than what was confirmed"}
		}
		r.size, r.last = s.Floor, true
	}
	if r.size < s.Floor {
		return r, &blockcrypt.DamageError{Class: blockcrypt.BadSize, Pos: -1, Detail: "the file is shorter than what was confirmed"}
	}
	return r, nil
}

// repair brings a file into order whose session ended badly: it ends where it
// no longer opens, and nothing that was confirmed goes. openMu is held, and
// nobody else has the file.
func (f *file) repair(length int64) error {
	v, g := f.v, f.v.geo
	if !f.rw {
		if err := f.needWrite(); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.unlock()
	f.ahead.Store(nil)
	was := f.hdr.State
	r, err := f.assess(length)
	if err != nil {
		return err
	}
	if r.pages == 0 {
		f.becomeEmpty()
		if err := v.disk.Truncate(f.fd, 0); err != nil {
			return err
		}
		v.log.Warn("a file was repaired", "at", f.n.where(), "bytes", 0, "bytes it had", was.Size)
		return v.disk.Datasync(f.fd)
	}
	f.size, f.conf, f.durable, f.whole = r.size, r.size, was.Floor, true
	f.holes, f.known = nil, false
	changed := len(r.short) > 0 || r.last || length != g.Exact(r.size) && length != g.Whole(r.size)
	unsure := v.doubts.of(f.n) // the sync at the mount's begin does not cover it
	if err := f.reseal(r); err != nil {
		return err
	}
	if changed {
		if err := v.disk.Truncate(f.fd, g.PageOff(r.pages)); err != nil {
			return err
		}
		if err := v.disk.Datasync(f.fd); err != nil {
			return err
		}
		v.log.Warn("a file was repaired", "at", f.n.where(), "bytes", r.size, "bytes it had", was.Size)
	} else if unsure {
		if err := f.datasync(); err != nil {
			return err
		}
	}
	f.moveTime()
	return f.settleRepaired()
}

// reseal seals the blocks that a repair changes, with the old state in page 0.
func (f *file) reseal(r findings) error {
	size, g := f.size, f.v.geo
	last := g.Block(size - 1)
	for _, k := range r.short {
		// content reads what the block has: that is all of what it is to have but zeros.
		if err := f.resealShort(k, size); err != nil {
			return err
		}
	}
	if r.last {
		return f.resealShort(last, size)
	}
	return nil
}

// resealShort seals block k as a file of size bytes has it, from what it holds.
func (f *file) resealShort(k, size int64) error {
	g := f.v.geo
	var page [blockcrypt.PageSize]byte
	m, err := f.v.disk.Pread(f.fd, page[:], g.PageOff(k))
	if err != nil {
		return err
	}
	text := make([]byte, g.Capacity(k))
	if p := pageOf(page[:m], 0, g.Lead(k)); !blockcrypt.IsHole(p) {
		var tmp [blockcrypt.BlockSize]byte
		out, err := f.keys.Open(tmp[:0], k, p, g.Capacity(k))
		if err != nil {
			return err
		}
		copy(text, out)
	}
	end := min(g.Start(k+1), size)
	return f.put(k, k, size, text[:end-g.Start(k)], g.Start(k), end)
}

// settleRepaired writes the clean state of a repaired file, which is durable,
// and cuts its length.
func (f *file) settleRepaired() error {
	f.conf, f.durable = f.size, f.size
	if err := f.writeState(f.flags() & blockcrypt.Sparse); err != nil {
		return err
	}
	if err := f.v.disk.Truncate(f.fd, f.v.geo.Exact(f.size)); err != nil {
		return err
	}
	f.whole = false
	return f.putMtime()
}

// lookThrough shows of a file that is being written what opens, and changes
// nothing: for read-only mounts.
func (f *file) lookThrough(length int64) error {
	r, err := f.assess(length)
	if err != nil {
		return err
	}
	f.v.log.Warn("a file was being written when it was copied, or is now; what opens is shown", "at", f.n.where(), "bytes", r.size)
	f.size, f.view = r.size, true
	return nil
}
