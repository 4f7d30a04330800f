package volume

import (
	"context"
	"errors"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// half is a file that was opened and whose header was read, and whose key is not known yet.
type half struct {
	f       *file
	st      unix.Stat_t // before the header was read
	doubted bool
	waiting int // calls that wait for its key; guarded by openMu
}

// holds reports whether the data that was read of the file still holds.
func (h *half) holds() bool {
	var st unix.Stat_t
	f := h.f
	return !f.v.doubts.of(f.n) && f.v.disk.Fstat(f.FD, &st) == nil && st.Size == h.st.Size && st.Mtim == h.st.Mtim && st.Ctim == h.st.Ctim
}

// dropHalf closes the file that waits for its key. openMu is held.
func (n *Node) dropHalf() {
	if n.half != nil {
		n.half.f.closeFDs()
		n.half = nil
	}
}

// withFile calls use with the node's open file, under openMu. If the file is not open, it is
// loaded: its header is read, then its key is taken from memory or unwrapped, then its state is
// believed or repaired. While a key service is asked, which waits is told of, no lock is held;
// the header and the descriptor stay for the calls that wait for the key.
func (n *Node) withFile(ctx context.Context, waits func(), use func(*file) error) error {
	n.openMu.Lock()
	defer n.openMu.Unlock()
	for {
		if f := n.file.Load(); f != nil {
			return use(f)
		}
		h, resumed, err := n.openedHalf()
		if err != nil {
			return n.loadFailed(err)
		}
		keys, known, err := h.keysNow()
		if err == nil && !known {
			waits()
			resumed = true
			keys, err = n.await(ctx, h)
		}
		switch {
		case err != nil:
			if n.half == h && h.waiting == 0 {
				n.dropHalf()
			}
			return n.loadFailed(err)
		case resumed && (n.file.Load() != nil || n.half != h || n.isPending()):
			continue // another call was faster, or emptied it, or gave the node up
		case resumed && !h.holds():
			n.dropHalf()
			continue
		}
		if err := n.finish(h, keys); err != nil {
			return err
		}
	}
}

// openedHalf returns the file that waits for its key, resumed, or opens the node's. openMu is
// held.
func (n *Node) openedHalf() (h *half, resumed bool, err error) {
	if n.isPending() {
		// The attributes that the kernel knows are wrong, and the node that a lookup makes now
		// may have changed the file already: this one must not touch it.
		n.dropHalf()
		return nil, false, unix.ESTALE
	}
	if n.half != nil {
		return n.half, true, nil
	}
	n.half, err = n.openHalf()
	return n.half, false, err
}

// isPending reports whether a lookup gave the node up, since it could not be repaired yet.
func (n *Node) isPending() bool {
	n.v.nodes.mu.Lock()
	defer n.v.nodes.mu.Unlock()
	return n.pending
}

// keysNow returns the keys of the file if its data key is in memory, or can be unwrapped without
// a key service. An empty file has none, and they are known.
func (h *half) keysNow() (keys *blockcrypt.FileKeys, known bool, err error) {
	hdr := h.f.Header
	if hdr == nil {
		return nil, true, nil
	}
	key, known, err := h.f.v.ring.UnwrapNow(hdr.File, wrapped(hdr.Recipients))
	if err != nil || !known {
		return nil, known, err
	}
	defer clear(key)
	keys, err = hdr.Unlock(key)
	return keys, true, err
}

// await unwraps the data key of a file by a key service. openMu is held, but not meanwhile.
func (n *Node) await(ctx context.Context, h *half) (*blockcrypt.FileKeys, error) {
	hdr := h.f.Header
	h.waiting++
	n.openMu.Unlock()
	defer func() {
		n.openMu.Lock()
		h.waiting--
	}()
	key, err := n.v.ring.Unwrap(ctx, hdr.File, wrapped(hdr.Recipients))
	if err != nil {
		return nil, err
	}
	defer clear(key) // before it waits for openMu
	return hdr.Unlock(key)
}

// finish makes the node's open file of one whose keys are known. openMu is held.
func (n *Node) finish(h *half, keys *blockcrypt.FileKeys) error {
	f := h.f
	if f.Header != nil { // or it is empty
		f.Keys = keys
		if err := f.takeState(h.st.Size); err != nil {
			n.dropHalf()
			return n.loadFailed(err)
		}
	} else {
		f.BelieveEmpty()
	}
	n.half = nil
	n.v.doubts.end(n)
	if f.reread = h.doubted; n.believed > f.Size {
		f.loseEnd(n.believed)
	}
	n.believed = 0
	if h.st.Blocks*512 > h.st.Size+reservedLeast {
		f.Reserved(h.st.Blocks * 512) // as many were reserved, and left so when it settled
	}
	n.attach(f)
	if err := n.v.access.refuses(false); err != nil { // just now, and its key was not among those wiped
		f.mu.Lock()
		f.wipe()
		f.unlock()
		f.dropIfIdle()
		return err
	}
	return nil
}

// loadFailed logs damage, and verdicts of key services.
func (n *Node) loadFailed(err error) error {
	if blockcrypt.ClassOf(err) != "" || keystore.KindOf(err) != 0 {
		n.v.report(n.where(), "a file cannot be opened", err)
	}
	return err
}

// openHalf opens the file and reads its header. openMu is held.
func (n *Node) openHalf() (*half, error) {
	f, st, err := n.openFile()
	if err != nil {
		return nil, err
	}
	h := &half{f: f, st: st, doubted: n.v.doubts.of(n)}
	// After a sync that failed, of this mount or of one that ended badly, the page cache
	// can say more than the disk has.
	if h.doubted || n.v.repairs() {
		n.v.disk.ForgetPages(f.FD, 0, 0)
	}
	if st.Size > 0 {
		if err := f.readHeader(st.Size); err != nil {
			n.v.disk.Close(f.FD)
			return nil, err
		}
	}
	return h, nil
}

// reservedLeast is how much more than its length a file must take to count as one
// that has space reserved: more than a filesystem takes for itself.
const reservedLeast = 64 << 10

// openFile opens the descriptor, one that can write if that is possible.
func (n *Node) openFile() (*file, unix.Stat_t, error) {
	fd, rw := -1, !n.v.o.ReadOnly
	err := error(nil)
	var st unix.Stat_t
	if rw {
		fd, err = n.openStat(unix.O_RDWR, &st)
		if errors.Is(err, unix.EACCES) {
			fd, err = n.openForced(unix.O_RDWR, &st)
		}
		rw = err == nil
	}
	if !rw && (err == nil || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EROFS)) {
		fd, err = n.openStat(unix.O_RDONLY, &st)
	}
	if err != nil {
		return nil, st, err
	}
	return n.newFile(fd, rw, &st), st, nil
}

// openForced opens a file whose mode does not let its own owner: what a
// program may do was decided before, this is for writing parts of blocks and
// for repair. The mode is another for that moment, and in now.
func (n *Node) openForced(flags int, now *unix.Stat_t) (fd int, err error) {
	p, err := n.open(unix.O_PATH)
	if err != nil {
		return -1, err
	}
	defer n.v.disk.Close(p)
	var st unix.Stat_t
	if err := n.v.disk.Fstat(p, &st); err != nil {
		return -1, err
	}
	if int(st.Uid) != unix.Geteuid() {
		return -1, unix.EACCES
	}
	if err := n.v.disk.Chmod(p, st.Mode&0o7777|0o600); err != nil {
		return -1, err
	}
	fd, err = n.openStat(flags, now)
	if cerr := n.v.disk.Chmod(p, st.Mode&0o7777); cerr != nil && err == nil {
		n.v.disk.Close(fd)
		return -1, cerr
	}
	return fd, err
}

// aheadFor is how long a read-only mount, beside which another may write, uses the data that
// it read with the header.
const aheadFor = time.Second

// mostAhead is the length in bytes up to which a ciphertext file is read whole with its
// header.
const mostAhead = 16 << 10

// readHeader reads and checks the header of a file of this length. The first block comes with
// it, and a small file as a whole.
func (f *file) readHeader(length int64) error {
	v := f.v
	n := min(length, mostAhead)
	if length > mostAhead {
		n = v.geo.PageOff(1)
	}
	hdr, b, err := layout.ReadHeader(&v.disk, f.FD, int(n))
	if errors.Is(err, layout.ErrUnwritten) && v.repairs() && f.rw {
		v.log.Warn("a file was never written before the power failed; it is empty now", "at", f.n.where())
		if err := v.disk.Truncate(f.FD, 0); err != nil {
			return err
		}
		return v.disk.Datasync(f.FD)
	}
	if err != nil {
		return err
	}
	if err := layout.CheckHeader(hdr, v.geo, v.cfg.Volume, v.vk); err != nil {
		return err
	}
	head := slices.Clone(b[:min(len(b), v.geo.Header())])
	f.SetHeader(hdr, head)
	f.Ahead.Store(&b)
	return nil
}

// takeState believes the state, or repairs the file. openMu is held.
func (f *file) takeState(length int64) error {
	v, s := f.v, f.Header.State
	dirty := f.Unfinished()
	if v.o.ReadOnly && dirty {
		if err := f.BelievePartial(length); err != nil {
			return err
		}
		v.log.Warn("a file was being written when it was copied, or is now; the blocks that open are shown", "at", f.n.where(), "bytes", f.Size)
		return nil
	}
	bad := v.sessions.isBad(s.Session)
	if !v.o.ReadOnly {
		unsure := v.sessions.wasBad(s.Session) || v.doubts.of(f.n) && bad
		if unsure && f.Unconfirmed() || dirty && bad {
			return f.repair(length)
		}
		if dirty {
			return &blockcrypt.DamageError{Class: blockcrypt.BadState, Pos: blockcrypt.StateOffset,
				Detail: "the file was being written when it was copied here; kmsfs cat gives what opens"}
		}
	}
	return f.Believe(length, f.n.past, bad)
}

// errEnding is why a repair stops: the next mount does it.
var errEnding = errors.New("the volume is being unmounted; the next mount repairs the file")

// repair brings a file into order whose session ended badly. openMu is held, and nobody else has
// the file.
func (f *file) repair(length int64) error {
	v := f.v
	if !f.rw {
		if err := f.needWrite(); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.unlock()
	// The sync at the mount's begin does not cover a file of which a later one failed.
	done, err := f.Repair(length, v.doubts.of(f.n), v.ending)
	if err == nil && done.Changed {
		v.log.Warn("a file was repaired", "at", f.n.where(), "bytes", done.Size, "bytes it had", done.Was)
	}
	return err
}

// checkSession repairs the file if a session that ended badly wrote it. ok is
// false where it cannot be done yet, since its key is not to be had.
func (n *Node) checkSession(ctx context.Context) (ok bool, err error) {
	needs, err := n.unsound()
	if err != nil {
		return false, err
	}
	if needs {
		err := n.withFile(ctx, func() {}, func(f *file) error {
			f.dropIfIdle()
			return nil
		})
		switch {
		case err == nil, blockcrypt.ClassOf(err) != "", keystore.KindOf(err) == keystore.Damaged:
			// Damage shows when the file is opened; it can be removed.
		case keystore.KindOf(err) != 0, errors.Is(err, errEnding):
			return false, nil
		default:
			n.v.report(n.where(), "a file cannot be repaired yet", err)
			return false, nil
		}
	}
	n.openMu.Lock()
	defer n.openMu.Unlock()
	n.sound = true
	return true, nil
}

// unsound reports whether the file may have to be repaired.
func (n *Node) unsound() (bool, error) {
	n.openMu.Lock()
	defer n.openMu.Unlock()
	if n.sound || n.file.Load() != nil {
		return false, nil
	}
	return n.needsRepair()
}

// needsRepair looks at the state, unauthenticated: repairing checks it.
func (n *Node) needsRepair() (bool, error) {
	var st unix.Stat_t
	fd, err := n.openStat(unix.O_RDONLY, &st)
	if errors.Is(err, unix.EACCES) {
		fd, err = n.openForced(unix.O_RDONLY, &st)
	}
	if err != nil {
		return false, err
	}
	defer n.v.disk.Close(fd)
	if st.Size == 0 {
		return false, nil
	}
	n.v.disk.ForgetPages(fd, 0, 0) // as load does; a part of a file may be less than the kernel can forget
	h, _, err := layout.ReadHeader(&n.v.disk, fd, n.v.geo.Header())
	if errors.Is(err, layout.ErrUnwritten) {
		return true, nil
	}
	if blockcrypt.ClassOf(err) != "" {
		return false, nil // it shows when the file is opened
	}
	if err != nil {
		return false, err
	}
	s := h.State
	return n.v.sessions.wasBad(s.Session) && (s.Flags&(blockcrypt.Dirty|blockcrypt.Cut) != 0 || s.Floor < s.Size), nil
}
