//go:build linux && !portable

package cfile

import "kmsfs/blockcrypt"

// Repaired says what a repair found, for the log.
type Repaired struct {
	Was, Size int64 // bytes of the plaintext before and now
	Changed   bool  // the ciphertext file was changed, beside its state
}

// generationsLost is more than the states that a session can have written of a file that others have
// seen, and that did not last: no generation comes twice.
const generationsLost = 1 << 32

// Repair brings a file of this length into order whose session ended badly: it ends where it
// no longer opens, and nothing that was confirmed goes. unsure says that no sync since then
// covers the file. Now and then it asks stop, and ends with its error.
func (f *File) Repair(length int64, unsure bool, stop func() error) (done Repaired, err error) {
	g := f.Geo
	f.Ahead.Store(nil)
	was := f.Header.State
	done.Was = was.Size
	f.Header.State.Generation += generationsLost
	r, err := f.Assess(length, stop)
	if err != nil {
		return done, err
	}
	f.enter(Dirty)
	if r.Pages == 0 {
		f.becomeEmpty()
		done.Changed = true
		if err := f.Disk.Truncate(f.FD, 0); err != nil {
			return done, err
		}
		return done, f.Disk.Datasync(f.FD)
	}
	f.Size, f.Whole, done.Size = r.Size, true, r.Size
	f.confirmed, f.durable = r.Size, was.Floor
	f.holes = holes{}
	done.Changed = len(r.Short) > 0 || r.Last || length != g.Exact(r.Size) && length != g.Whole(r.Size)
	if err := f.reseal(r); err != nil {
		return done, err
	}
	if done.Changed {
		if err := f.Disk.Truncate(f.FD, g.PageOff(r.Pages)); err != nil {
			return done, err
		}
		if err := f.Disk.Datasync(f.FD); err != nil {
			return done, err
		}
	} else if unsure {
		if err := f.datasync(); err != nil {
			return done, err
		}
	}
	f.times.move()
	return done, f.settleRepaired()
}

// reseal seals the blocks that a repair changes, with the old state in page 0. A short one has its
// wanted content, but for zeros at the end.
func (p *pages) reseal(r Findings) error {
	blocks := r.Short
	if r.Last {
		blocks = append(blocks, p.Geo.Block(p.Size-1))
	}
	for _, k := range blocks {
		if err := p.resealShort(k); err != nil {
			return err
		}
	}
	return nil
}

// resealShort seals block k as a file of this size has it, from its present content.
func (p *pages) resealShort(k int64) error {
	g := p.Geo
	var page [blockcrypt.PageSize]byte
	m, err := p.Disk.Pread(p.FD, page[:], g.PageOff(k))
	if err != nil {
		return err
	}
	text := make([]byte, g.Capacity(k))
	if b := PageOf(page[:m], 0, g.Lead(k)); !blockcrypt.IsHole(b) {
		var tmp [blockcrypt.BlockSize]byte
		out, err := p.Keys.Open(tmp[:0], k, b, g.Capacity(k))
		if err != nil {
			return err
		}
		copy(text, out)
	}
	end := min(g.Start(k+1), p.Size)
	return p.put(k, k, change{p.Size, text[:end-g.Start(k)], g.Start(k), end})
}

// settleRepaired writes the clean state of a repaired file, which is durable,
// and cuts its length.
func (f *File) settleRepaired() error {
	f.confirmed, f.durable = f.Size, f.Size
	if err := f.writeState(f.Flags() & blockcrypt.Sparse); err != nil {
		return err
	}
	if err := f.Disk.Truncate(f.FD, f.Geo.Exact(f.Size)); err != nil {
		return err
	}
	f.Whole = false
	return f.PutMtime()
}
