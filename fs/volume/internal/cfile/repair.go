package cfile

import "kmsfs/blockcrypt"

// Repaired says what a repair found, for the log.
type Repaired struct {
	Was, Size int64 // bytes of the plaintext before and now
	Changed   bool  // the ciphertext file was changed, beside its state
}

// Repair brings a file of this length into order whose session ended badly: it ends where it
// no longer opens, and nothing that was confirmed goes. unsure says that no sync since then
// covers the file. Now and then it asks stop, and ends with its error.
func (f *File) Repair(length int64, unsure bool, stop func() error) (done Repaired, err error) {
	g := f.Geo
	f.Ahead.Store(nil)
	was := f.Header.State
	done.Was = was.Size
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
	f.dur.confirmed, f.dur.durable = r.Size, was.Floor
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
	f.moveTime()
	return done, f.settleRepaired()
}

// reseal seals the blocks that a repair changes, with the old state in page 0.
func (f *File) reseal(r Findings) error {
	for _, k := range r.Short {
		// The block has its wanted content, but for zeros at the end.
		if err := f.resealShort(k); err != nil {
			return err
		}
	}
	if r.Last {
		return f.resealShort(f.Geo.Block(f.Size - 1))
	}
	return nil
}

// resealShort seals block k as a file of this size has it, from its present content.
func (f *File) resealShort(k int64) error {
	g := f.Geo
	var page [blockcrypt.PageSize]byte
	m, err := f.Disk.Pread(f.FD, page[:], g.PageOff(k))
	if err != nil {
		return err
	}
	text := make([]byte, g.Capacity(k))
	if p := PageOf(page[:m], 0, g.Lead(k)); !blockcrypt.IsHole(p) {
		var tmp [blockcrypt.BlockSize]byte
		out, err := f.Keys.Open(tmp[:0], k, p, g.Capacity(k))
		if err != nil {
			return err
		}
		copy(text, out)
	}
	end := min(g.Start(k+1), f.Size)
	return f.put(k, k, f.Size, text[:end-g.Start(k)], g.Start(k), end)
}

// settleRepaired writes the clean state of a repaired file, which is durable,
// and cuts its length.
func (f *File) settleRepaired() error {
	f.dur.confirmed, f.dur.durable = f.Size, f.Size
	if err := f.writeState(f.Flags() & blockcrypt.Sparse); err != nil {
		return err
	}
	if err := f.Disk.Truncate(f.FD, f.Geo.Exact(f.Size)); err != nil {
		return err
	}
	f.Whole = false
	return f.PutMtime()
}
