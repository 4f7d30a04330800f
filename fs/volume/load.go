//go:build linux && !portable

package volume

import (
	"bytes"
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/fs/volume/internal/ranges"
	"kmsfs/keystore"
)

// half is a file that was opened and whose header was read, and whose key is not known yet.
type half struct {
	f       *file
	st      unix.Stat_t // before the header was read
	doubted bool
	begun   int64 // bootTime before the header was read
	version version
	waiting int  // calls that wait for its key; guarded by openMu
	stale   bool // its lease was given back while its key was waited for
}

// holds reports whether the data that was read of the file still holds.
func (h *half) holds() bool {
	var st unix.Stat_t
	f := h.f
	return !f.v.doubts.of(f.n) && f.v.disk.Fstat(f.FD, &st) == nil && st.Size == h.st.Size &&
		st.Mtim == h.st.Mtim && st.Ctim == h.st.Ctim
}

// dropHalf closes the file that waits for its key. openMu is held.
func (c *content) dropHalf() {
	if c.half != nil {
		if c.half.f.lease.held {
			c.half.f.lease.drop()
		}
		c.half.f.closeFDs()
		c.half = nil
	}
}

// openLeased opens the file under its lease, and reads its header. openMu is held, but not while the
// lease is waited for.
func (c *content) openLeased(ctx context.Context) error {
	c.openMu.Unlock()
	f, st, err := c.openFile()
	if err == nil {
		if err = f.lease.lockBare(ctx); err == nil {
			err = c.v.disk.FstatFresh(f.FD, &st)
		}
		if err != nil {
			f.lease.drop()
			f.closeFDs()
		}
	}
	c.openMu.Lock()
	if err != nil {
		return err
	}
	if c.file.Load() != nil || c.half != nil || c.isPending() {
		f.lease.drop()
		f.closeFDs()
		return nil // another call was faster
	}
	c.half, err = halfOf(c, f, st)
	return err
}

// awaitHost waits until it is known whether the host is dead that left the file unfinished. openMu is
// held, but not meanwhile.
func awaitHost(ctx context.Context, c *content, u unsettled, doubt *uint64) error {
	c.openMu.Unlock()
	defer c.openMu.Lock()
	waitsOf(ctx).ForKey()
	dead, err := c.v.peers.await(ctx, u.session)
	if err == nil && !dead && *doubt == u.session+1 {
		err = c.loadFailed(u.error)
	}
	*doubt = u.session + 1 // if the host is not found, the file was repaired just now, perhaps: it is read once more
	return err
}

// withFile calls use with the node's open file, under openMu. If the file is not open, it is
// loaded: its header is read, then its key is taken from memory or unwrapped, then its state is
// believed or repaired. While a key service is asked, which waits is told of, no lock is held;
// the header and the descriptor stay for the calls that wait for the key.
func (c *content) withFile(ctx context.Context, waits func(), use func(*file) error) error {
	c.openMu.Lock()
	defer c.openMu.Unlock()
	for doubt := uint64(0); ; {
		if f := c.file.Load(); f != nil {
			return use(f)
		}
		h, resumed, err := c.openedHalf()
		if errors.Is(err, errNeedsLease) {
			err = c.openLeased(ctx)
			if u, ok := errors.AsType[unsettled](err); ok {
				err = awaitHost(ctx, c, u, &doubt)
			}
			if err == nil {
				continue
			}
		}
		if err != nil {
			return c.loadFailed(err)
		}
		keys, known, err := h.keysNow()
		if err == nil && !known {
			waits()
			resumed = true
			if h.f.lease.held { // nobody is to wait for a key service
				h.f.lease.drop()
				h.stale = true
			}
			keys, err = c.await(ctx, h)
		}
		switch {
		case err != nil:
			if c.half == h && h.waiting == 0 {
				c.dropHalf()
			}
			return c.loadFailed(err)
		case resumed && (c.file.Load() != nil || c.half != h || c.isPending()):
			continue // another call was faster, or emptied it, or gave the node up
		case resumed && (h.stale || !h.f.lease.held && !h.holds()):
			c.dropHalf()
			continue
		}
		err = c.finish(h, keys)
		if u, ok := errors.AsType[unsettled](err); ok {
			err = awaitHost(ctx, c, u, &doubt)
		} else if errors.Is(err, errNeedsLease) {
			err = c.openLeased(ctx)
		}
		if err != nil {
			return err
		}
	}
}

// openedHalf returns the file that waits for its key, resumed, or opens the node's. openMu is
// held.
func (c *content) openedHalf() (h *half, resumed bool, err error) {
	if c.isPending() {
		// The attributes that the kernel knows are wrong, and the node that a lookup makes now
		// may have changed the file already: this one must not touch it.
		c.dropHalf()
		return nil, false, unix.ESTALE
	}
	if c.half != nil {
		return c.half, true, nil
	}
	c.half, err = c.openHalf()
	return c.half, false, err
}

// isPending reports whether a lookup gave the node up, since it could not be repaired yet.
func (c *content) isPending() bool {
	c.v.nodes.mu.Lock()
	defer c.v.nodes.mu.Unlock()
	return c.n.pending
}

// keysNow returns the keys of the file if its data key is in memory, or can be unwrapped without
// a key service. An empty file has none, and they are known.
func (h *half) keysNow() (keys *blockcrypt.FileKeys, known bool, err error) {
	hdr := h.f.Header
	if hdr == nil {
		return nil, true, nil
	}
	keys, d, known, err := h.f.v.lists.unlockNow(hdr)
	if keys != nil {
		h.f.domain.Store(d)
	}
	return keys, known, err
}

// await unwraps the data key of a file by a key service. openMu is held, but not meanwhile.
func (c *content) await(ctx context.Context, h *half) (*blockcrypt.FileKeys, error) {
	hdr := h.f.Header
	h.waiting++
	c.openMu.Unlock()
	defer func() {
		c.openMu.Lock()
		h.waiting--
	}()
	waitsOf(ctx).ForKey()
	keys, d, err := c.v.lists.unlock(ctx, hdr)
	if err == nil {
		h.f.domain.Store(d)
	}
	return keys, err
}

// finish makes the node's open file of one whose keys are known. openMu is held.
func (c *content) finish(h *half, keys *blockcrypt.FileKeys) error {
	f := h.f
	if f.Header != nil { // or it is empty
		f.Keys = keys
		if err := c.takeState(f, h.st.Size); err != nil {
			c.dropHalf()
			if _, ok := errors.AsType[unsettled](err); ok || errors.Is(err, errNeedsLease) {
				return err
			}
			return c.loadFailed(err)
		}
	} else {
		f.BelieveEmpty()
	}
	c.half = nil
	c.v.doubts.end(c.n)
	if f.reread = h.doubted; c.believed > f.Size && !c.v.Shared() {
		// The kernel goes on to believe in a file of that size, and would show zeros.
		c.lost.add(ranges.Set{{First: f.Size, Last: c.believed - 1}}, nil, 0, unix.EIO)
	}
	c.believed = 0
	if h.st.Blocks*512 > h.st.Size+reservedLeast {
		f.Reserved(h.st.Blocks * 512) // as many were reserved, and left so when it settled
	}
	f.lease.seen.Store(h.begun)
	f.lease.version = h.version // before others find the file
	c.attach(f)
	if f.lease.held {
		c.v.leases.add(f)
	}
	if head := cfile.HeadOf(f.File); c.lastHead != nil && !bytes.Equal(c.lastHead, head) {
		c.foreign.Store(true)
	}
	f.mu.Lock()
	c.v.lists.keep(f) // the lists may be others since the header was read
	f.unlock()
	c.v.lists.target(c)                      // for when it has no name any more
	if err := f.refuses(false); err != nil { // just now, and its key was not among those wiped
		f.mu.Lock()
		f.wipe()
		f.unlock()
		f.dropIfIdle()
		return err
	}
	return nil
}

// loadFailed logs damage, and verdicts of key services.
func (c *content) loadFailed(err error) error {
	if blockcrypt.ClassOf(err) != "" || keystore.KindOf(err) != 0 {
		c.v.report(c.n.where(), "a file cannot be opened", err)
	}
	return err
}

// openHalf opens the file and reads its header. openMu is held.
func (c *content) openHalf() (*half, error) {
	f, st, err := c.openFile()
	if err != nil {
		return nil, err
	}
	return halfOf(c, f, st)
}

// halfOf reads the header of a file that was opened. openMu is held.
func halfOf(c *content, f *file, st unix.Stat_t) (*half, error) {
	h := &half{f: f, st: st, doubted: c.v.doubts.of(c.n), begun: bootTime(), version: c.v.peers.versionOf(&st)}
	err := error(nil)
	// After a sync that failed, of this mount or of one that ended badly, the page cache
	// can say more than the disk has; and less, if another host wrote.
	old := c.v.Shared() && c.v.disk.Remote && (f.lease.held || !c.lastSeen.is(&st))
	if h.doubted || c.v.repairs() || c.v.blurred || old {
		c.v.disk.ForgetPages(f.FD, 0, 0)
	}
	if st.Size > 0 {
		err = c.readHeader(f, st.Size)
	}
	if err == nil && f.Header == nil {
		var d *domain
		if d, err = c.v.lists.target(c); err == nil {
			f.domain.Store(d)
		}
	}
	if err != nil {
		if c.v.Shared() && !f.lease.held && blockcrypt.ClassOf(err) != "" {
			err = errNeedsLease // it may be written just now
		}
		if f.lease.held {
			f.lease.drop()
		}
		c.v.disk.Close(f.FD)
		return nil, err
	}
	return h, nil
}

// reservedLeast is how much more than its length a file must take to count as one
// that has space reserved: more than a filesystem takes for itself.
const reservedLeast = 64 << 10

// openFile opens the descriptor, one that can write if that is possible.
func (c *content) openFile() (*file, unix.Stat_t, error) {
	fd, rw := -1, !c.v.o.ReadOnly
	err := error(nil)
	var st unix.Stat_t
	if rw {
		fd, err = c.n.openStat(unix.O_RDWR, &st)
		if errors.Is(err, unix.EACCES) {
			fd, err = c.openForced(unix.O_RDWR, &st)
		}
		rw = err == nil
	}
	if !rw && (err == nil || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) ||
		errors.Is(err, unix.EROFS)) {
		fd, err = c.n.openStat(unix.O_RDONLY, &st)
	}
	if err != nil {
		return nil, st, err
	}
	return c.newFile(fd, rw, &st), st, nil
}

// checkSession repairs the file if a session that ended badly wrote it. ok is
// false where it cannot be done yet, since its key is not to be had.
func (c *content) checkSession(ctx context.Context) (ok bool, err error) {
	sound := c.v.sessions.sound()
	needs, err := c.unsound(sound)
	if err != nil {
		return false, err
	}
	if needs {
		if f := c.file.Load(); f != nil { // it was opened before that host died
			err = f.lease.freshen(ctx)
		} else {
			err = c.withFile(ctx, func() {}, func(f *file) error {
				f.dropIfIdle()
				return nil
			})
		}
		switch {
		case err == nil, blockcrypt.ClassOf(err) != "", keystore.KindOf(err) == keystore.Damaged:
			// Damage shows when the file is opened; it can be removed.
		case keystore.KindOf(err) != 0, errors.Is(err, errEnding):
			return false, nil
		default:
			c.v.report(c.n.where(), "a file cannot be repaired yet", err)
			return false, nil
		}
	}
	c.openMu.Lock()
	defer c.openMu.Unlock()
	c.sound = sound
	return true, nil
}

// unsound reports whether the file may have to be repaired.
func (c *content) unsound(sound uint64) (bool, error) {
	c.openMu.Lock()
	defer c.openMu.Unlock()
	if f := c.file.Load(); f != nil && c.v.Shared() {
		return c.sound != sound, nil
	} else if c.sound == sound || f != nil {
		return false, nil
	}
	return c.needsRepair()
}

// needsRepair looks at the state, unauthenticated: repairing checks it.
func (c *content) needsRepair() (bool, error) {
	var st unix.Stat_t
	fd, err := c.n.openStat(unix.O_RDONLY, &st)
	if errors.Is(err, unix.EACCES) {
		fd, err = c.openForced(unix.O_RDONLY, &st)
	}
	if err != nil {
		return false, err
	}
	defer c.v.disk.Close(fd)
	if st.Size == 0 {
		return false, nil
	}
	c.v.disk.ForgetPages(fd, 0, 0) // as load does; a part of a file may be less than the kernel can forget
	h, _, err := layout.ReadHeader(&c.v.disk, fd, c.v.sizes().Most(), false)
	if c.v.sessions.unwritten(err) {
		return true, nil
	}
	if blockcrypt.ClassOf(err) != "" {
		return false, nil // it shows when the file is opened
	}
	if err != nil {
		return false, err
	}
	s := h.State
	return c.v.sessions.wasBad(s.Session) && (s.Flags&(blockcrypt.Dirty|blockcrypt.Cut) != 0 ||
		s.Floor < s.Size), nil
}

// header reads the header of the node's file, and checks that it is of this volume; nil if the file
// is empty.
func (c *content) header() (*blockcrypt.Header, error) {
	if f := c.file.Load(); f != nil {
		f.mu.RLock()
		defer f.mu.RUnlock()
		if !f.closed {
			if f.Header == nil {
				return nil, nil
			}
			h := *f.Header
			return &h, nil
		}
	}
	fd, err := c.openFor(unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer c.v.disk.Close(fd)
	hdr, _, err := c.readOwn(fd)
	return hdr, err
}

// openFor opens the file itself, whatever its mode is.
func (c *content) openFor(flags int) (int, error) {
	fd, err := c.n.open(flags)
	if errors.Is(err, unix.EACCES) {
		var st unix.Stat_t
		fd, err = c.openForced(flags, &st)
	}
	return fd, err
}

// readOwn reads and checks a header; nil if the file is empty.
func (c *content) readOwn(fd int) (*blockcrypt.Header, []byte, error) {
	var st unix.Stat_t
	if err := c.v.disk.Fstat(fd, &st); err != nil || st.Size == 0 {
		return nil, nil, err
	}
	sizes := c.v.sizes()
	hdr, raw, err := layout.ReadHeader(&c.v.disk, fd, sizes.Most(), false)
	if err == nil {
		err = layout.CheckHeader(hdr, sizes, c.v.cfg.Volume, c.v.vk)
	}
	if err != nil {
		return nil, nil, err
	}
	return hdr, raw, nil
}
