//go:build linux && !portable

package cfile

import (
	"bytes"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
)

// pages seals blocks and states, and writes them under the page rule.
type pages struct {
	Content
	host  Host
	rules Rules

	head  []byte // the header's bytes as they are on the disk
	phase Phase
	durability
	times Times
	key   contentKey
	tail  tail
}

// contentKey is the one under which blocks are sealed now.
type contentKey struct {
	epoch  uint16
	drawn  bool  // the epoch was drawn
	blocks int64 // so many are sealed under it
}

// tail is the plaintext of the block that was written last: the next write mostly goes on there.
type tail struct {
	k    int64 // -1 for none
	text []byte
}

var zeroBlock [blockcrypt.BlockSize]byte

// block returns the plaintext of block k, in dst unless it is remembered.
func (p *pages) block(k int64, dst []byte) ([]byte, error) {
	size := p.BlockLen(k)
	if k == p.tail.k && len(p.tail.text) == size {
		return p.tail.text, nil
	}
	page := Scratches.Get().(*[blockcrypt.PageSize]byte)
	defer Scratches.Put(page)
	raw, err := p.Pages(nil, page[:], k, k)
	if err != nil {
		return nil, err
	}
	err = p.OpenBlock(dst[:0], k, PageOf(raw, 0, p.Geo.Lead(k)), size)
	return dst[:size], err
}

// holds reports whether block k of the ciphertext file has this content.
func (p *pages) holds(k int64, text []byte) bool {
	got, err := p.block(k, make([]byte, blockcrypt.BlockSize))
	return err == nil && bytes.Equal(got, text)
}

// change is a change of a file's content: it then has size bytes, of which [off, end) are b, or
// zeros if b is nil. The others are those that the file has now, or zeros.
type change struct {
	size     int64
	b        []byte
	off, end int64
}

// put seals blocks first to last of the file after a change, and writes them. One S and one pwrite
// for each run; header and block 0 go together.
func (p *pages) put(first, last int64, c change) error {
	if p.key.blocks > blockcrypt.EpochBlocks || !p.key.drawn {
		p.key = contentKey{epoch: blockcrypt.NewEpoch(), drawn: true}
	}
	buf := Runs.Get().(*[]byte)
	defer Runs.Put(buf)
	for first <= last {
		final := min(last,
			first+RunPages-1-p.Geo.PageOff(0)/blockcrypt.PageSize) // with the header's own pages
		if err := p.putRun(*buf, first, final, c); err != nil {
			return err
		}
		first = final + 1
	}
	return nil
}

func (p *pages) putRun(buf []byte, first, last int64, c change) error {
	g := p.Geo
	at, used := g.PageOff(first), 0
	if first == 0 {
		at = 0
		used = copy(buf, p.head)
	}
	scratch := Scratches.Get().(*[blockcrypt.PageSize]byte)
	defer Scratches.Put(scratch)
	var text []byte
	for k := first; k <= last; k++ {
		var err error
		if text, err = p.blockAfter(scratch[:blockcrypt.BlockSize], k, c); err != nil {
			return err
		}
		p.Keys.Seal(buf[used:], k, p.key.epoch, text)
		used += blockcrypt.SealedSize(len(text))
		next := int(g.PageOff(k+1) - at)
		clear(buf[used:next])
		used = next
	}
	p.key.blocks += last - first + 1
	if last == g.Block(c.size-1) && !p.Whole {
		used = int(g.Exact(c.size) - at)
	}
	if err := p.guard(at, first, last); err != nil {
		return err
	}
	p.tail.k = -1
	p.wrote++
	err := p.host.TakeSpace(int64(used), func() error { return p.Disk.Pwrite(p.FD, buf[:used], at) })
	if err == nil {
		p.tail.k, p.tail.text = last, append(p.tail.text[:0], text...)
	}
	return err
}

// blockAfter returns the plaintext of block k of the file after the change.
func (p *pages) blockAfter(scratch []byte, k int64, c change) ([]byte, error) {
	start := p.Geo.Start(k)
	stop := min(p.Geo.Start(k+1), c.size)
	if c.off <= start && stop <= c.end {
		if c.b == nil {
			return zeroBlock[:stop-start], nil
		}
		return c.b[start-c.off : stop-c.off], nil
	}
	text := scratch[:stop-start]
	n := 0
	if start < p.Size {
		old, err := p.block(k, scratch)
		if err != nil {
			return nil, err
		}
		n = copy(text, old)
	}
	clear(text[n:])
	if from, to := max(start, c.off), min(stop, c.end); from < to {
		if c.b == nil {
			clear(text[from-start : to-start])
		} else {
			copy(text[from-start:to-start], c.b[from-c.off:to-c.off])
		}
	}
	return text, nil
}

// guard is S over those of the blocks that may hold confirmed bytes, whose run
// begins at byte at.
func (p *pages) guard(at, first, last int64) error {
	if p.confirmed == 0 || p.rules.Calm {
		return nil
	}
	last = min(last, p.Geo.Block(p.confirmed-1))
	if first > last {
		return nil
	}
	return settlePages(p, at, p.Geo.PageOff(last+1)-at)
}

// settlePages is S over these pages. Where a sync of the whole file stands for it, it is not made again
// while nothing was written since the last one.
func settlePages(p *pages, at, n int64) error {
	if p.Disk.Remote && p.covered == p.wrote {
		return nil
	}
	err := p.SyncFailed(p.Disk.SettlePages(p.FD, at, n))
	if err == nil && p.Disk.Remote {
		p.covered = p.wrote
	}
	return err
}

// writeState writes a new state: the bytes [128,192) of the header, under the
// page rule. On an error the file has the old one.
func (p *pages) writeState(flags uint32) error {
	old := p.Header.State
	p.Keys.SetState(p.Header, blockcrypt.State{
		Size:       p.Size,
		Floor:      min(p.durable, p.Size),
		Session:    p.host.Session(),
		Generation: old.Generation + 1,
		Flags:      flags,
	})
	b := p.head[blockcrypt.StateOffset:][:blockcrypt.StateSize]
	p.Header.EncodeState(b)
	err := p.settleHead()
	if err == nil {
		p.wrote++
		err = p.Disk.Pwrite(p.FD, b, blockcrypt.StateOffset)
	}
	if err != nil {
		p.Keys.SetState(p.Header, old)
		p.Header.EncodeState(b)
		return err
	}
	p.times.move()
	p.stateWritten(flags)
	return nil
}

// stateWritten enters the phase that a new state brings. A fresh file stays fresh, whatever its
// state says.
func (p *pages) stateWritten(flags uint32) {
	switch {
	case p.phase == Fresh, p.phase == Broken:
	case flags&blockcrypt.Cut != 0:
		p.enter(Cutting)
	case flags&blockcrypt.Dirty == 0:
		p.enter(Settled)
	case p.phase == Settled, p.phase == Cutting && !p.Whole:
		p.enter(Dirty)
	case p.phase == Cutting: // it was dirty, with a length at whole pages, when a sync was made
		p.enter(Growing)
	}
}

// settleHead is S over the header's first page. A fresh file's need only not be
// under way.
func (p *pages) settleHead() error {
	switch {
	case p.rules.Calm:
		return nil
	case p.confirmed > 0:
		return settlePages(p, 0, blockcrypt.PageSize)
	default:
		return p.SyncFailed(p.Disk.WaitPages(p.FD, 0, blockcrypt.PageSize))
	}
}

// makeWhole brings the length to whole pages.
func (p *pages) makeWhole() error {
	if p.Whole {
		return nil
	}
	if err := p.Disk.Truncate(p.FD, p.Geo.Whole(p.Size)); err != nil {
		return err
	}
	p.Whole = true
	return nil
}

// datasync makes the content durable.
func (p *pages) datasync() error {
	if p.phase == Broken {
		return unix.EIO
	}
	err := p.Disk.Datasync(p.FD)
	if p.SyncFailed(err); err == nil {
		p.synced, p.covered = int64(p.changes), p.wrote
	}
	return err
}

// SyncFailed notes that a sync failed, of the file or of the whole filesystem: the kernel says so once, and takes the pages
// that it could not write for written from then on. So nothing more is said to be
// durable of the file; when it is opened again, what the disk really has is looked
// at. It returns err. That of sync_file_range(2) can be any page's, and fsync does not tell it a
// second time.
func (p *pages) SyncFailed(err error) error {
	if err != nil {
		p.host.Broke(true)
		p.enter(Broken)
	}
	return err
}

// SetHeader takes the header, and the bytes that it has on the disk. They are kept.
func (p *pages) SetHeader(h *blockcrypt.Header, raw []byte) { p.Header, p.head = h, raw }

// Phase returns the file's phase.
func (p *pages) Phase() Phase { return p.phase }

// Broken reports whether the file must be loaded again before it is used.
func (p *pages) Broken() bool { return p.phase == Broken }

// Keyless reports whether the file has content whose key was wiped.
func (p *pages) Keyless() bool { return p.Header != nil && p.Keys == nil }

// Wipe forgets the file's keys and all that is in memory of its content.
func (p *pages) Wipe() {
	p.Keys = nil
	clear(p.tail.text)
	p.tail.k = -1
}
