//go:build linux && !portable

package volume

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/layout"
)

// file is the ciphertext file of a node while something of it is open, or has
// still to settle: its users, its lock, its descriptors and its keys. [cfile.File] knows
// the order of writes.
type file struct {
	n *Node
	v *Volume

	refusal atomic.Pointer[refusal] // of this file alone
	domain  atomic.Pointer[domain]  // by its header, or of its next content
	parking

	namesSynced atomic.Uint64 // Node.moves + 1 when the symlinks of long names were made durable

	showing showing

	// mu guards the fields below, and the ciphertext file. It is held across reads and writes of
	// the file, and shared by readers; not across a call to a key service, nor across the fsync by a
	// program but of a file that was cut, or whose key was wiped.
	mu          sync.RWMutex
	*cfile.File        // FD is -1 while park has closed it
	moves       uint64 // of its times, as far as the node was told
	old         []int  // descriptors that could only read, closed with the file
	rw          bool
	closed      bool
	handles     int
	writers     int
	next        *freshKey // under which the first byte of an empty file will be written
	reread      bool      // loaded after a sync that failed: the kernel may have what the disk has not
	syncing     int       // fsyncs under way, which use FD without mu
	lease       lease
}

// parking says whether the descriptor may be closed for a while, see park.
type parking struct {
	used   atomic.Bool // since park was tried last
	parked atomic.Bool // fd is -1; written under mu
}

func (c *content) attach(f *file) {
	f.mu.Lock()
	f.unlock()
	c.n.hold()
	c.file.Store(f)
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
		f.lease.leaveFD()
		f.old = append(f.old, f.FD) // another thread may be reading from it
	}
	f.FD, f.rw = fd, true
	f.parked.Store(false)
	return nil
}

// sizes returns the sizes of headers, as they are now.
func (b *base) sizes() layout.Sizes { return *b.headers.Load() }

// errClosed is the answer to a handle that is used after the volume was closed.
var errClosed = unix.EBADF

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

// current returns what is to be shown now. mu is held.
func (f *file) current() shown {
	t := f.Times()
	return shown{f.Size, t.Mtime, t.Touched && !f.v.Shared(), f.closed}
}

// unlock unlocks mu after it was held for writing. Requests for attributes do not wait for
// mu: the present size and time are shown from here on.
func (f *file) unlock() {
	moves := f.Times().Moves
	f.showing.change(f.current(), f.v.Shared() && f.moves == moves)
	if f.moves != moves {
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
	if f.v.Shared() {
		f.showing.tell(st, f.Size, f.AtRest())
	} else {
		f.current().fill(st)
	}
	return true, nil
}

func (c *content) newFile(fd int, rw bool, st *Attr) *file {
	f := &file{n: c.n, v: c.v, rw: rw}
	f.domain.Store(c.v.lists.own)
	f.lease.f = f
	f.File = blank(f, fd, st.Mtim)
	return f
}

// blank returns the ciphertext file of this descriptor, whose header was not read yet.
func blank(f *file, fd int, mtime unix.Timespec) *cfile.File {
	rules := cfile.Rules{Calm: f.v.calm, KernelTimes: f.v.o.KernelTimes}
	x := cfile.New(&f.v.disk, f.v.sizes().New, cfile.Opened{FD: fd, Mtime: mtime}, rules, host{f})
	if f.v.o.ReadOnly || f.v.cfg.Shared {
		x.AheadUntil = time.Now().Add(aheadFor)
	}
	return x
}

// withFD calls f with a descriptor of the object, O_PATH perhaps.
func (n *Node) withFD(f func(fd int) error) error {
	if n.IsDir() {
		fd, err := n.enter()
		if err != nil {
			return err
		}
		defer n.leave()
		return f(fd)
	}
	if o := n.file.Load(); o != nil {
		if done, err := o.borrow(f); done {
			return err
		}
	}
	fd, err := n.open(unix.O_PATH)
	if err != nil {
		return err
	}
	defer n.v.disk.Close(fd)
	return f(fd)
}

// Writing reports whether somebody has the file open for writing: the kernel may
// hold something back.
func (n *Node) Writing() bool {
	f := n.file.Load()
	if f == nil {
		return false
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.writers > 0
}

// failed logs that an operation on the file failed, unless what was asked for
// cannot be.
func (f *file) failed(op string, err error) error {
	asked := errors.Is(err, unix.EFBIG) || errors.Is(err, unix.EPERM) && f.n.immutable.Load()
	if err != nil && !asked {
		f.v.report(f.n.where(), op+" failed", err)
	}
	return err
}

// openForced opens a file whose mode does not let its own owner: what a
// program may do was decided before, this is for writing parts of blocks and
// for repair. The mode is another for that moment, and in now.
func (c *content) openForced(flags int, now *unix.Stat_t) (fd int, err error) {
	p, err := c.n.open(unix.O_PATH)
	if err != nil {
		return -1, err
	}
	defer c.v.disk.Close(p)
	var st unix.Stat_t
	if err := c.v.disk.Fstat(p, &st); err != nil {
		return -1, err
	}
	if int(st.Uid) != unix.Geteuid() {
		return -1, unix.EACCES
	}
	if err := c.v.disk.Chmod(p, st.Mode&0o7777|0o600); err != nil {
		return -1, err
	}
	fd, err = c.n.openStat(flags, now)
	if cerr := c.v.disk.Chmod(p, st.Mode&0o7777); cerr != nil && err == nil {
		c.v.disk.Close(fd)
		return -1, cerr
	}
	return fd, err
}
