package volume

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/keystore"
)

// file is the ciphertext file of a node while something of it is open, or has
// still to settle: its users, its lock, its descriptors and its keys. [cfile.File] knows
// the order of writes.
type file struct {
	n *Node
	v *Volume

	refusal atomic.Pointer[refusal] // of this file alone
	used    atomic.Bool             // since park was tried last
	parked  atomic.Bool             // fd is -1; written under mu

	namesSynced atomic.Uint64 // Node.moves + 1 when the symlinks of long names were made durable

	shownMu sync.Mutex // guards shown, and nothing is done under it
	shown   shown

	// mu guards the fields below, and the ciphertext file. It is held across reads and writes of
	// the file, and shared by readers; not across an fsync by a program or a call to a key service.
	mu          sync.RWMutex
	*cfile.File        // FD is -1 while park has closed it
	moves       uint64 // of its times, as far as the node was told
	old         []int  // descriptors that could only read, closed with the file
	rw          bool
	closed      bool
	handles     int
	writers     int
	next        *keystore.DataKey // under which the first byte of an empty file will be written
	reread      bool              // loaded after a sync that failed: the kernel may have what the disk has not
	syncing     int               // fsyncs under way, which use FD without mu
}

// acquire returns the node's open file, loading it if need be; write opens it
// for writing and takes the data key that an empty file's first byte needs. No
// lock is held while a key service is asked.
func (c *content) acquire(ctx context.Context, write bool) (*file, error) {
	if c.n.typ != unix.S_IFREG {
		return nil, unix.EINVAL
	}
	if write && c.v.o.ReadOnly {
		return nil, unix.EROFS
	}
	if err := c.v.access.refuses(false); err != nil {
		return nil, err
	}
	if write && c.immutable.Load() {
		return nil, unix.EPERM
	}
	if c.file.Load() == nil {
		if err := c.v.descriptors.roomForFile(); err != nil {
			return nil, err
		}
	}
	var key *keystore.DataKey // for the first byte of an empty file
	defer func() {
		if key != nil {
			c.v.ring.PutBack(key)
		}
	}()
	told := false // the prefetcher
	opened := func(cold bool) {
		if !told {
			c.v.prefetch.opened(c.n, cold)
			told = true
		}
	}
	for {
		f, err := c.join(ctx, write, &key, func() { opened(true) })
		if err != nil {
			return nil, err
		}
		if f == nil {
			if key, err = c.v.newKey(ctx); err != nil {
				c.v.report(c.n.where(), "no data key for new content", err)
				return nil, err
			}
			continue
		}
		opened(false)
		if err := f.ready(ctx, false); err != nil { // a refusal shows at open
			f.release(write)
			return nil, err
		}
		return f, nil
	}
}

// join counts a handle of the node's file, which it loads if need be. If the file is empty and
// needs a data key for its first byte, it takes *key; without one it returns no file.
func (c *content) join(ctx context.Context, write bool, key **keystore.DataKey,
	waits func()) (f *file, err error) {
	err = c.withFile(ctx, waits, func(open *file) error {
		joined, err := open.join(write, key)
		if joined {
			f = open
		} else {
			open.dropIfIdle()
		}
		return err
	})
	return f, err
}

func (c *content) attach(f *file) {
	f.mu.Lock()
	f.unlock()
	c.n.hold()
	c.file.Store(f)
}

// join counts a handle. It is false, without an error, if a data key is needed that *key does
// not have. openMu is held.
func (f *file) join(write bool, key **keystore.DataKey) (joined bool, err error) {
	if write {
		if err := f.needWrite(); err != nil {
			return false, err
		}
	}
	f.mu.Lock()
	defer f.unlock()
	if write && f.Size == 0 && f.next == nil {
		if *key == nil {
			return false, nil
		}
		f.next, *key = *key, nil
	}
	f.handles++
	if write {
		f.writers++
	}
	return true, nil
}

// needWrite makes the descriptor one that can write.
func (f *file) needWrite() error {
	f.mu.Lock()
	defer f.unlock()
	if f.Header != nil && f.Header.NoWrite != 0 {
		return unix.EROFS
	}
	if f.rw {
		return nil
	}
	var st unix.Stat_t
	fd, err := f.n.openStat(unix.O_RDWR, &st)
	if errors.Is(err, unix.EACCES) {
		fd, err = f.n.openForced(unix.O_RDWR, &st)
	}
	if err != nil {
		return err
	}
	if f.FD >= 0 {
		f.old = append(f.old, f.FD) // another thread may be reading from it
	}
	f.FD, f.rw = fd, true
	f.parked.Store(false)
	return nil
}

// renewKey takes a data key in the place of one that was made for other recipients, or of none. If
// none can be had, it returns the old one, provided that one of its recipients still is one of the volume:
// accepted writes are not to be lost for that.
func (f *file) renewKey(ctx context.Context, old *keystore.DataKey) (kept *keystore.DataKey, err error) {
	k, err := f.v.newKey(ctx)
	if err != nil {
		if old != nil && f.v.ring.Opens(old.Wrapped) {
			return old, nil
		}
		f.v.report(f.n.where(), "no data key for new content", err)
		return nil, err
	}
	f.mu.Lock()
	defer f.unlock()
	if f.next == old {
		f.next, k = k, old
	}
	if k != nil {
		f.v.ring.PutBack(k)
	}
	return nil, nil
}

// release takes a handle back.
func (f *file) release(write bool) {
	f.n.openMu.Lock()
	defer f.n.openMu.Unlock()
	f.mu.Lock()
	f.handles--
	if write {
		f.writers--
	}
	if f.writers == 0 && f.next != nil {
		f.v.ring.PutBack(f.next)
		f.next = nil
	}
	f.unlock()
	f.dropIfIdle()
}

// dropIfIdle closes the file where nothing has it open, or hands it to the
// settler. openMu is held.
func (f *file) dropIfIdle() {
	f.mu.Lock()
	defer f.unlock()
	f.dropIfIdleLocked()
}

// dropIfIdleLocked is dropIfIdle; mu is held too.
func (f *file) dropIfIdleLocked() {
	if f.handles > 0 || f.closed {
		return
	}
	if f.rw && !f.n.Gone() && f.Unsettled() {
		f.v.settler.add(f)
		return
	}
	if f.rw && f.FD >= 0 && !f.Broken() && !f.n.Gone() { // a time came after the last close
		f.failed("close", f.PutMtime())
	}
	f.n.past = f.Past()
	if f.Broken() {
		f.n.believed = f.Size
	}
	f.closed = true
	f.closeFDs()
	f.n.file.Store(nil)
	f.n.release()
}

// closeFDs closes the file's descriptors.
func (f *file) closeFDs() {
	if f.FD >= 0 {
		f.v.disk.Close(f.FD)
	}
	for _, fd := range f.old {
		f.v.disk.Close(fd)
	}
	f.FD, f.old = -1, nil
}

// borrow calls g with the descriptor; done is false where the file was closed.
func (f *file) borrow(g func(fd int) error) (done bool, err error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.closed || f.FD < 0 {
		return false, nil
	}
	return true, g(f.FD)
}

// shown is what stat says of an open file besides what the backing file says.
type shown struct {
	size    int64
	mtime   unix.Timespec
	touched bool
	closed  bool
}

func (s shown) fill(st *Attr) {
	if st.Size = s.size; s.touched {
		st.Mtim = s.mtime
	}
}

// current returns what is to be shown now. mu is held.
func (f *file) current() shown {
	t := f.Times()
	return shown{f.Size, t.Mtime, t.Touched, f.closed}
}

// unlock unlocks mu after it was held for writing. Requests for attributes do not wait for
// mu: the present size and time are shown from here on.
func (f *file) unlock() {
	f.shownMu.Lock()
	f.shown = f.current()
	f.shownMu.Unlock()
	if moves := f.Times().Moves; f.moves != moves {
		f.moves = moves
		f.n.change()
	}
	f.mu.Unlock()
}

// attr is stat of the open file; done is false where it was closed, or, if wait is not set,
// somebody changes it at the moment.
func (f *file) attr(st *Attr, wait bool) (done bool, err error) {
	if wait {
		f.mu.RLock()
	} else if !f.mu.TryRLock() {
		return false, nil
	}
	defer f.mu.RUnlock()
	if f.closed || f.FD < 0 {
		return false, nil
	}
	if err := f.v.disk.Fstat(f.FD, st); err != nil {
		return true, err
	}
	st.Ino = f.v.foldIno(st.Dev, st.Ino)
	st.Blksize = blockcrypt.PageSize
	f.current().fill(st)
	return true, nil
}

// fill puts size and time into st; false where the file was closed.
func (f *file) fill(st *Attr) bool {
	f.shownMu.Lock()
	defer f.shownMu.Unlock()
	if f.shown.closed {
		return false
	}
	f.shown.fill(st)
	return true
}

// A Handle is an open file. Its methods may be called by several goroutines.
type Handle struct {
	f     *file
	write bool
}

// Open opens a regular file. Opening an empty one for writing takes a data key,
// so that a refusal by the key service shows here.
func (c *content) Open(ctx context.Context, write bool) (*Handle, error) {
	f, err := c.acquire(ctx, write)
	if err != nil {
		return nil, err
	}
	return &Handle{f, write}, nil
}

func (c *content) newFile(fd int, rw bool, st *Attr) *file {
	f := &file{n: c.n, v: c.v, rw: rw}
	rules := cfile.Rules{Calm: c.v.calm, KernelTimes: c.v.o.KernelTimes}
	f.File = cfile.New(&c.v.disk, c.v.geo, cfile.Opened{FD: fd, Mtime: st.Mtim}, rules, host{f})
	if c.v.o.ReadOnly {
		f.AheadUntil = time.Now().Add(aheadFor)
	}
	return f
}

// Reread reports, once, whether the file was loaded after a sync that failed: then what the
// kernel can have other bytes in its cache than the disk has.
func (h *Handle) Reread() bool {
	h.f.mu.Lock()
	defer h.f.unlock()
	was := h.f.reread
	h.f.reread = false
	return was
}

// Node returns the node of the file.
func (h *Handle) Node() *Node { return h.f.n }

// Flush is called at each close of a descriptor: all that was written so far is
// there after a SIGKILL when it returns.
func (h *Handle) Flush() error {
	if !h.write {
		return nil
	}
	h.f.mu.Lock()
	defer h.f.unlock()
	if err := h.f.Rest(); err != nil {
		return err
	}
	return h.f.n.lost.tell()
}

// Release closes the handle.
func (h *Handle) Release() error {
	err := h.Flush()
	h.f.release(h.write)
	return err
}

// Fsync makes what was written so far durable, and what leads to the file.
func (h *Handle) Fsync() error {
	if h.f.v.o.ReadOnly {
		return nil
	}
	// First what leads to it: the fsync of a file can make a name of it durable
	// that cannot be read without.
	if err := h.f.syncPath(); err != nil {
		return h.f.failed("fsync", err)
	}
	if err := h.fsync(); err != nil {
		return h.f.failed("fsync", err)
	}
	return h.f.n.lost.tell()
}

// fsync makes the content durable. mu is not held while the disk works.
func (h *Handle) fsync() error {
	f := h.f
	if err := f.lockAwake(); err != nil {
		return err
	}
	defer f.unlock()
	return f.Sync(func(fsync func() error) error {
		f.syncing++
		f.unlock()
		err := fsync()
		f.mu.Lock()
		f.syncing--
		return err
	})
}

// syncPath makes the IDs of the directories above durable, and the file's own
// directory where its name is a long one: once for each change of its names.
func (f *file) syncPath() error {
	n := f.n
	names := n.moves.Load() + 1
	n.v.nodes.mu.Lock()
	links := slices.Clone(n.links)
	n.v.nodes.mu.Unlock()
	for _, l := range links {
		if err := l.dir.syncIDs(); err != nil {
			return err
		}
		if f.namesSynced.Load() != names && strings.HasPrefix(l.cname, blockcrypt.LongPrefix) {
			if err := l.dir.syncDir(); err != nil {
				return err
			}
		}
	}
	f.namesSynced.Store(names)
	return nil
}
