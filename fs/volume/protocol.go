package volume

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
)

// begin gives an empty file its header in memory: the first run carries it to
// the disk. Of a file that will have size bytes with it, the state is that of a closed one,
// if size is not 0. mu is held.
func (f *file) begin(flags uint32, size int64) error {
	k := f.next
	rs := make([]blockcrypt.Recipient, len(k.Wrapped))
	for i, w := range k.Wrapped {
		rs[i] = blockcrypt.Recipient{URI: w.URI, Branch: w.Branch, Wrapped: w.Blob}
	}
	hdr, keys, err := blockcrypt.NewFile(f.v.geo, f.v.vk, k.ID, f.n.parentID(), k.Key, rs)
	if err != nil {
		return err
	}
	keys.SetState(hdr, blockcrypt.State{Session: f.v.sessions.now.Load(), Generation: 1, Size: size, Flags: flags})
	head, err := hdr.Encode()
	if err != nil {
		return err
	}
	f.Header, f.Keys, f.head = hdr, keys, head
	f.conf, f.durable, f.Whole = 0, 0, false
	f.born = time.Now()
	f.inked, f.announced, f.broken = false, false, false
	f.holes, f.known = nil, true
	f.tailK = -1
	f.v.ring.Learn(k)
	k.Wipe()
	f.next = nil
	return nil
}

// abandon undoes begin after the first run could not be written. Some of it may
// be on the disk, so the next attempt takes another key.
func (f *file) abandon() {
	f.becomeEmpty()
	if err := f.v.disk.Truncate(f.FD, 0); err != nil {
		f.failed("emptying the file again", err)
		f.breaks()
	}
}

// becomeEmpty forgets the content's keys. mu is held.
func (f *file) becomeEmpty() {
	f.Header, f.Keys, f.head = nil, nil, nil
	f.Size, f.conf, f.durable, f.Whole = 0, 0, 0, false
	f.tailK, f.holes, f.known = -1, nil, false
	f.announced, f.broken, f.overlong = false, false, false
	f.reserved = 0
	f.cuts++
}

// writeState writes a new state: the bytes [128,192) of the header, under the
// page rule. On an error the file has the old one. mu is held.
func (f *file) writeState(flags uint32) error {
	old := f.Header.State
	f.Keys.SetState(f.Header, blockcrypt.State{
		Size:       f.Size,
		Floor:      min(f.durable, f.Size),
		Session:    f.v.sessions.now.Load(),
		Generation: old.Generation + 1,
		Flags:      flags,
	})
	b := f.head[blockcrypt.StateOffset:][:blockcrypt.StateSize]
	f.Header.EncodeState(b)
	err := f.settleHead()
	if err == nil {
		err = f.v.disk.Pwrite(f.FD, b, blockcrypt.StateOffset)
	}
	if err != nil {
		f.Keys.SetState(f.Header, old)
		f.Header.EncodeState(b)
		return err
	}
	f.moveTime()
	return nil
}

// settleHead is S over the header's first page. A fresh file's need only not be
// under way.
func (f *file) settleHead() error {
	switch {
	case f.v.calm:
		return nil
	case f.conf > 0:
		return f.waited(f.v.disk.SettlePages(f.FD, 0, blockcrypt.PageSize))
	default:
		return f.waited(f.v.disk.WaitPages(f.FD, 0, blockcrypt.PageSize))
	}
}

// waited notes an error of sync_file_range(2): it is that of any page of the file, and fsync
// does not tell it a second time. mu is held.
func (f *file) waited(err error) error {
	f.syncFailed(err)
	return err
}

// beforeGrowth is the tail rule and the flags that must be durable before the
// length changes: once until the file settles. mu is held.
func (f *file) beforeGrowth(flags uint32) error {
	now := f.Flags()
	if flags&blockcrypt.Sparse&^now != 0 {
		f.holes, f.known = nil, true // there was none before
	}
	if f.conf == 0 {
		if flags&^now != 0 {
			return f.writeState(now | flags)
		}
		return nil
	}
	if now&blockcrypt.Cut != 0 {
		// A file that is cut ends at its floor: what grows now would be lost.
		if err := f.datasync(); err != nil {
			return err
		}
		now &^= blockcrypt.Cut
		if err := f.writeState(now | flags); err != nil {
			return err
		}
	}
	if flags&^now == 0 && f.Whole && f.announced {
		return nil
	}
	f.announced = false
	if err := f.writeState(now | flags); err != nil {
		return err
	}
	if err := f.makeWhole(); err != nil {
		return err
	}
	if err := f.datasync(); err != nil {
		return err
	}
	f.announced = true
	return nil
}

// cleanFlags are the flags of a clean state: sparse goes when no hole is left.
func (f *file) cleanFlags() uint32 {
	if f.known && len(f.holes) == 0 {
		return 0
	}
	return f.Flags() & blockcrypt.Sparse
}

// makeWhole brings the length to whole pages.
func (f *file) makeWhole() error {
	if f.Whole {
		return nil
	}
	if err := f.v.disk.Truncate(f.FD, f.v.geo.Whole(f.Size)); err != nil {
		return err
	}
	f.Whole = true
	return nil
}

// truncate changes the size of a file that may be closed.
func (n *Node) truncate(ctx context.Context, size int64) error {
	if size < 0 || size > blockcrypt.MaxPlain {
		return unix.EFBIG
	}
	f, err := n.acquire(ctx, size > 0)
	if err != nil && size == 0 && blockcrypt.ClassOf(err) != "" {
		return n.emptyDamaged(err)
	}
	if err != nil {
		return err
	}
	write := size > 0
	if err = f.resize(ctx, size); err == nil {
		n.cutLost(size)
	}
	f.mu.Lock()
	err = errors.Join(err, f.rest())
	f.unlock()
	f.release(write)
	return f.failed("truncate", err)
}

// emptyDamaged empties a file that does not open: no key is needed to throw its
// content away.
func (n *Node) emptyDamaged(damage error) error {
	if n.v.o.ReadOnly {
		return unix.EROFS
	}
	n.openMu.Lock()
	defer n.openMu.Unlock()
	if n.file.Load() != nil {
		return damage
	}
	n.dropHalf()
	fd, err := n.open(unix.O_RDWR)
	if err != nil {
		return err
	}
	defer n.v.disk.Close(fd)
	return n.v.disk.Truncate(fd, 0)
}

// resize is truncate for an open file.
func (f *file) resize(ctx context.Context, size int64) error {
	if err := f.needWrite(); err != nil {
		return err
	}
	if size == 0 {
		return f.empty(ctx)
	}
	unlock, err := f.lockForContent(ctx, false)
	if err != nil {
		return err
	}
	defer unlock()
	switch {
	case size > f.Size:
		return f.write(nil, size-1, 1)
	case size < f.Size:
		f.growOld()
		f.touch()
		err = f.shrink(size)
	}
	return err
}

// empty truncates to nothing. Where somebody has the file open for writing, the
// new content's data key is taken before the old content goes.
func (f *file) empty(ctx context.Context) error {
	for {
		if err := f.wake(); err != nil {
			return err
		}
		f.mu.Lock()
		if f.FD < 0 { // just now
			f.unlock()
			continue
		}
		if f.writers == 0 || f.next != nil {
			break
		}
		f.unlock()
		if err := f.takeKey(ctx); err != nil {
			return err
		}
	}
	defer f.unlock()
	if f.Header == nil && f.isZeroLength() {
		return nil
	}
	if err := f.v.disk.Truncate(f.FD, 0); err != nil {
		return err
	}
	f.becomeEmpty()
	f.n.cutLost(0)
	f.touch()
	return nil
}

func (f *file) isZeroLength() bool {
	var st unix.Stat_t
	return f.v.disk.Fstat(f.FD, &st) == nil && st.Size == 0
}

// shrink truncates to a size between 1 and the present one. mu is held.
func (f *file) shrink(size int64) error {
	g := f.v.geo
	k := g.Block(size - 1)
	reseal, text, err := f.reseals(k, size)
	if err != nil {
		return err
	}
	before, durable := f.Flags(), f.durable
	if size < f.conf {
		if err := f.announceCut(size, reseal); err != nil {
			return err
		}
	}
	if f.Flags()&blockcrypt.Dirty == 0 { // fresh, and closed before
		if err := f.writeState(f.Flags() | blockcrypt.Dirty); err != nil {
			return err
		}
	}
	if reseal {
		// To the end of its page: nothing of the old block may stay behind it.
		whole := f.Whole
		f.Whole = true
		err := f.put(k, k, size, text, g.Start(k), size)
		f.Whole = whole
		if err != nil {
			f.takeBackCut(before|blockcrypt.Dirty, durable)
			return err
		}
	}
	f.cuts++
	f.tailK = -1
	f.holes = f.holes.without(k, 1<<62)
	f.Size, f.conf, f.durable = size, min(f.conf, size), min(f.durable, size)
	f.overlong = true
	f.n.cutLost(size)
	// The content is cut. What cannot be cut off the ciphertext now is cut off
	// before anything else is written; the callers of fsync are told.
	f.failed("cutting the ciphertext's length", f.trim())
	return nil
}

// trim cuts off pages behind the end that an earlier truncation has left: they
// would come back when the file grows. mu is held.
func (f *file) trim() error {
	if !f.overlong {
		return nil
	}
	length := f.Length(f.Size)
	var st unix.Stat_t
	if err := f.v.disk.Fstat(f.FD, &st); err != nil {
		return err
	}
	if st.Size != length { // on a full filesystem even that can fail
		if err := f.v.disk.Truncate(f.FD, length); err != nil {
			return err
		}
	}
	f.overlong, f.reserved = false, 0
	return nil
}

// takeBackCut undoes announceCut after the truncation failed.
func (f *file) takeBackCut(flags uint32, durable int64) {
	f.durable = durable
	err := f.datasync()
	if err == nil {
		err = f.writeState(flags)
	}
	if err != nil {
		f.failed("taking a truncation back", err)
		f.breaks()
	}
}

// reseals reports whether a truncation to size changes a page: within a block,
// or where a hole would come last. text is what block k then holds.
func (f *file) reseals(k, size int64) (bool, []byte, error) {
	buf := make([]byte, blockcrypt.BlockSize)
	if f.v.geo.Block(size) != k {
		if f.Flags()&blockcrypt.Sparse == 0 || k == f.v.geo.Block(f.Size-1) {
			return false, nil, nil
		}
		var page [blockcrypt.PageSize]byte
		n, err := f.v.disk.Pread(f.FD, page[:], f.v.geo.PageOff(k))
		if err != nil || !f.IsHole(k, cfile.PageOf(page[:n], 0, f.v.geo.Lead(k))) {
			return false, nil, err
		}
		return true, buf[:size-f.v.geo.Start(k)], nil
	}
	old, err := f.readBlock(k, buf)
	if err != nil {
		return false, nil, err
	}
	return true, append([]byte(nil), old[:size-f.v.geo.Start(k)]...), nil
}

// announceCut makes durable that confirmed bytes are to go: dirty, a lower
// floor, and cut where a page is sealed again. mu is held.
func (f *file) announceCut(size int64, reseal bool) error {
	flags := f.Flags() | blockcrypt.Dirty
	if reseal {
		flags |= blockcrypt.Cut
	}
	lower := f.Header.State.Floor > size
	if !reseal && !lower && flags == f.Flags() && f.Whole {
		return nil
	}
	if f.durable < size {
		// A floor below size would cut off more than is to go.
		if err := f.datasync(); err != nil {
			return err
		}
		f.durable = f.Size
	}
	old := f.durable
	f.durable = min(f.durable, size)
	if err := f.writeState(flags); err != nil {
		f.durable = old
		return err
	}
	f.cuts++ // an fsync under way must not raise durable again
	err := f.makeWhole()
	if err == nil {
		err = f.datasync()
	}
	if err != nil {
		f.takeBackCut(f.Flags()&^blockcrypt.Cut, old)
		return err
	}
	f.announced = true
	return nil
}

// sync is fsync. mu is not held while the disk works.
func (f *file) sync() error {
	for {
		if err := f.wake(); err != nil {
			return err
		}
		f.mu.Lock()
		if f.FD >= 0 {
			break
		}
		f.unlock() // just now
	}
	if f.broken {
		f.unlock()
		return unix.EIO
	}
	if f.keyless() { // nothing has changed since it was settled
		defer f.unlock()
		if f.Flags()&(blockcrypt.Dirty|blockcrypt.Cut) != 0 {
			return unix.EIO // it could not be settled: nothing is confirmed
		}
		f.conf = max(f.conf, f.Size)
		err := f.v.disk.Fsync(f.FD)
		f.syncFailed(err)
		if err == nil {
			f.durable, f.synced = f.Size, int64(f.changes)
		}
		return err
	}
	if err := f.trim(); err != nil {
		f.unlock()
		return err
	}
	if f.Header != nil && f.conf == 0 && (f.Flags()&blockcrypt.Dirty != 0 || f.Header.State.Size != f.Size) {
		// A fresh file's state goes with the same sync: clean, at its exact length.
		if err := f.writeState(f.cleanFlags()); err != nil {
			f.unlock()
			return err
		}
	}
	size, cuts, changes := f.Size, f.cuts, f.changes
	f.conf = max(f.conf, size) // confirmed counts from here
	if !f.near(f.mtime) {      // else it can wait for the file's last close
		if err := f.putMtime(); err != nil {
			f.unlock()
			return err
		}
	}
	fd := f.FD
	f.syncing++
	f.unlock()
	err := f.v.disk.Fsync(fd)
	f.mu.Lock()
	f.syncing--
	if f.syncFailed(err); err == nil {
		f.synced = max(f.synced, int64(changes))
	}
	f.unlock()
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.unlock()
	if f.cuts == cuts {
		f.durable = max(f.durable, size)
	}
	if f.Flags()&blockcrypt.Cut == 0 || f.keyless() {
		return nil
	}
	if f.cuts != cuts { // of a truncation that this sync did not cover
		if err := f.datasync(); err != nil {
			return err
		}
	}
	if err := f.writeState(f.Flags() &^ blockcrypt.Cut); err != nil {
		return err
	}
	return f.datasync()
}

// datasync makes the content durable. mu is held.
func (f *file) datasync() error {
	if f.broken {
		return unix.EIO
	}
	err := f.v.disk.Datasync(f.FD)
	if f.syncFailed(err); err == nil {
		f.synced = int64(f.changes)
	}
	return err
}

// syncFailed notes that a sync failed: the kernel says so once, and takes the pages
// that it could not write for written from then on. So nothing more is said to be
// durable of the file; when it is opened again, what the disk really has is looked
// at. mu is held.
func (f *file) syncFailed(err error) {
	if err != nil {
		f.v.doubts.begin(f.n)
		f.breaks()
	}
}

// settle brings a file whose data a sync has made durable, up to the change
// with the number changes, into its final form: clean, at its exact length,
// with its own time. It does nothing where the file has changed since. mu is held.
func (f *file) settle(changes uint64) error {
	if !f.unsettled() || f.closed || f.changes != changes {
		return nil
	}
	f.conf, f.durable, f.synced = f.Size, f.Size, int64(f.changes)
	if err := f.writeState(f.cleanFlags()); err != nil {
		return err
	}
	f.announced = false
	if !f.reservedBeyond() || f.overlong {
		if err := f.v.disk.Truncate(f.FD, f.v.geo.Exact(f.Size)); err != nil {
			return err
		}
		f.Whole, f.overlong, f.reserved = false, false, 0
	}
	return f.putMtime()
}

// settleNow settles one file at once.
func (f *file) settleNow() error {
	f.mu.Lock()
	defer f.unlock()
	if f.closed || !f.rw {
		return nil
	}
	if f.Header != nil && f.conf == 0 || f.keyless() {
		return f.rest()
	}
	if !f.unsettled() {
		return nil
	}
	if err := f.datasync(); err != nil {
		return err
	}
	return f.settle(f.changes)
}

// finish brings a file into its final form at the end of a session; all was
// synced before.
func (f *file) finish() error {
	f.mu.Lock()
	defer f.unlock()
	if f.closed || !f.rw || f.broken || f.n.Gone() {
		return nil
	}
	return f.failed("settling", errors.Join(f.rest(), f.settle(f.changes)))
}

// unconfirmed reports whether the state says that more was written than is
// known to be on the disk: only in a session that the marker names is that no
// damage. mu is held.
func (f *file) unconfirmed() bool {
	s := f.Header.State
	return s.Flags&(blockcrypt.Dirty|blockcrypt.Cut) != 0 || s.Floor < s.Size
}

// restamp rewrites the states of open files that another session wrote.
func (v *Volume) restamp(now uint64) error {
	for _, f := range v.files() {
		f.mu.Lock()
		var err error
		if f.rw && !f.closed && !f.broken && f.Header != nil && !f.keyless() && f.Header.State.Session != now && f.unconfirmed() {
			err = f.writeState(f.Flags())
		}
		f.unlock()
		if err != nil {
			return f.failed("beginning a session", err)
		}
	}
	return nil
}
