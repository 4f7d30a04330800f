package volume

import (
	"errors"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
)

// errEnding is why a repair stops: the next mount does it.
var errEnding = errors.New("the volume is being unmounted; the next mount repairs the file")

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
	f.Ahead.Store(nil)
	was := f.Header.State
	r, err := f.Assess(length, v.ending)
	if err != nil {
		return err
	}
	if r.Pages == 0 {
		f.becomeEmpty()
		if err := v.disk.Truncate(f.FD, 0); err != nil {
			return err
		}
		v.log.Warn("a file was repaired", "at", f.n.where(), "bytes", 0, "bytes it had", was.Size)
		return v.disk.Datasync(f.FD)
	}
	f.Size, f.conf, f.durable, f.Whole = r.Size, r.Size, was.Floor, true
	f.holes, f.known = nil, false
	changed := len(r.Short) > 0 || r.Last || length != g.Exact(r.Size) && length != g.Whole(r.Size)
	unsure := v.doubts.of(f.n) // the sync at the mount's begin does not cover it
	if err := f.reseal(r); err != nil {
		return err
	}
	if changed {
		if err := v.disk.Truncate(f.FD, g.PageOff(r.Pages)); err != nil {
			return err
		}
		if err := v.disk.Datasync(f.FD); err != nil {
			return err
		}
		v.log.Warn("a file was repaired", "at", f.n.where(), "bytes", r.Size, "bytes it had", was.Size)
	} else if unsure {
		if err := f.datasync(); err != nil {
			return err
		}
	}
	f.moveTime()
	return f.settleRepaired()
}

// reseal seals the blocks that a repair changes, with the old state in page 0.
func (f *file) reseal(r cfile.Findings) error {
	size, g := f.Size, f.v.geo
	last := g.Block(size - 1)
	for _, k := range r.Short {
		// The block has its wanted content, but for zeros at the end.
		if err := f.resealShort(k, size); err != nil {
			return err
		}
	}
	if r.Last {
		return f.resealShort(last, size)
	}
	return nil
}

// resealShort seals block k as a file of size bytes has it, from its present content.
func (f *file) resealShort(k, size int64) error {
	g := f.v.geo
	var page [blockcrypt.PageSize]byte
	m, err := f.v.disk.Pread(f.FD, page[:], g.PageOff(k))
	if err != nil {
		return err
	}
	text := make([]byte, g.Capacity(k))
	if p := cfile.PageOf(page[:m], 0, g.Lead(k)); !blockcrypt.IsHole(p) {
		var tmp [blockcrypt.BlockSize]byte
		out, err := f.Keys.Open(tmp[:0], k, p, g.Capacity(k))
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
	f.conf, f.durable = f.Size, f.Size
	if err := f.writeState(f.Flags() & blockcrypt.Sparse); err != nil {
		return err
	}
	if err := f.v.disk.Truncate(f.FD, f.v.geo.Exact(f.Size)); err != nil {
		return err
	}
	f.Whole = false
	return f.putMtime()
}
