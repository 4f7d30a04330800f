//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/disk"
)

const (
	leaseTick   = 20 * time.Millisecond  // between two looks whether others wait for a lease
	leaseIdle   = 300 * time.Millisecond // without a write, after which a lease is given back
	leaseMost   = 5 * time.Second        // after which it is given back anyway
	leaseSeen   = 100 * time.Millisecond // in which attributes are not read again; the kernel keeps them for 0.9 s
	leaseYield  = 40 * time.Millisecond  // in which a lease that another waits for is not taken again
	leasePause  = time.Millisecond       // between two attempts to take a lease, at first
	leasePauses = 10 * time.Millisecond  // and at most
)

// lease is the right to write a ciphertext file of a shared volume, and to read what does not open
// without it: a lock of the file's descriptor. file.mu guards it.
type lease struct {
	f       *file
	held    bool
	late    uint64        // peers.late when it was taken
	since   atomic.Int64  // bootTime when it was taken
	used    atomic.Int64  // and when it was used for a write; read without mu, too
	checked atomic.Bool   // check is under way
	doubt   atomic.Uint64 // a session that left the file unfinished, and that no dead host is known to have had
	wanted  bool          // another host waits for it
	stale   atomic.Bool   // programs had locks on the file that this host may have lost: it must be opened again
	seen    sight         // of the file
	version version       // then
	wanting bool          // this host has said that it waits
	free    time.Time     // when it may be taken again
}

// A version is what the filesystem says of a file before its header is read. A file that has the same
// again was not changed since, if the version is old enough by the filesystem's clock: a change later would
// have got another time.
type version struct {
	changed unix.Timespec
	size    int64
	old     bool
}

// settledAfter is more than a filesystem's clock takes from one time to the next.
const settledAfter = time.Second

func (p *peers) versionOf(st *unix.Stat_t) version {
	return version{st.Ctim, st.Size, p.clock.Load()-st.Ctim.Nano() > int64(settledAfter)}
}

func (x version) is(st *unix.Stat_t) bool { return x.old && x.changed == st.Ctim && x.size == st.Size }

// leases are the files whose leases this host has.
type leases struct {
	v     *Volume
	mu    sync.Mutex    // no other lock is taken under it, and no syscall is made
	files map[*file]int // with their descriptors
}

// errStale says that a file must be opened again.
var errStale = fmt.Errorf("programs had locks on it that this host may have lost; it must be closed, and opened again: %w", unix.EIO)

// errTaken says that the filesystem gave the lease to another host, without a word.
var errTaken = fmt.Errorf("another host has changed the file meanwhile: the filesystem has taken this host's lock away: %w", unix.EIO)

// has takes the lease of the file if it can be had at once, and takes over what others have
// changed. If it is false, the caller unlocks mu and calls wait with the error. mu is held for
// writing, and the descriptor is open.
func (l *lease) has() (bool, error) {
	f := l.f
	if !f.v.Shared() {
		return true, nil
	}
	if l.stale.Load() {
		return false, errStale
	}
	late, err := uint64(0), error(nil)
	if !f.v.o.ReadOnly {
		if late, err = f.v.peers.leases(); err != nil {
			return false, err
		}
	}
	if l.held && l.late != late {
		if l.confirm(late); f.Broken() {
			return false, unix.EIO
		}
	}
	if l.held {
		l.used.Store(bootTime())
		return true, nil
	}
	if time.Now().Before(l.free) {
		return false, nil
	}
	kind := disk.Shared
	if f.rw {
		kind = disk.Alone
	}
	if err := f.v.disk.OFDLock(f.FD, leaseLock(kind)); disk.LockBusy(err) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	l.held, l.late = true, late
	l.since.Store(bootTime())
	l.used.Store(l.since.Load())
	if l.wanting {
		f.v.disk.OFDLock(f.FD, wantedLock(disk.None))
		l.wanting = false
	}
	if err := l.reload(true); err != nil {
		l.drop()
		return false, err
	}
	f.v.leases.add(f)
	return true, nil
}

// drop gives the lock itself back.
func (l *lease) drop() {
	f := l.f
	l.held = false
	f.showing.rests()
	if f.FD >= 0 {
		f.v.disk.OFDLock(f.FD, leaseLock(disk.None))
	}
	f.v.leases.remove(f)
}

// confirm finds out whether the lease is still this host's after a proof that came too late. It is
// if the file is as this host left it: nobody else changes it without another state. Where it is not,
// changes that were not at rest are lost.
func (l *lease) confirm(late uint64) {
	f := l.f
	if l.late == late {
		return
	}
	kind := disk.Shared
	if f.rw {
		kind = disk.Alone
	}
	if f.v.disk.OFDLock(f.FD, leaseLock(kind)) == nil && f.Header != nil && l.holds() {
		l.late = late
		return
	}
	if !f.AtRest() {
		f.failed("writing", errDark)
		cfile.GiveUp(f.File)
	}
	l.drop()
}

// wait waits for what keeps the file from being used, as has said it. No lock is held.
func (l *lease) wait(ctx context.Context, why error, pause *time.Duration) error {
	f := l.f
	waitsOf(ctx).ForKey()
	if why == error(errDark) { // as long as a filesystem that does not answer is waited for
		why = nil
	}
	switch w := why.(type) {
	case nil:
	case needsKey:
		_, _, err := f.v.lists.unlock(ctx, w.hdr)
		return f.failed("unwrapping its key", err)
	case unsettled:
		dead, err := f.v.peers.await(ctx, w.session)
		if err == nil && !dead && l.doubt.Swap(w.session) == w.session { // else it was repaired just now, perhaps
			err = f.failed("opening", w.error)
		}
		return err
	default:
		return f.failed("taking its lease", why)
	}
	f.mu.Lock()
	if !l.wanting && f.FD >= 0 && !f.closed {
		l.wanting = f.v.disk.OFDLock(f.FD, wantedLock(disk.Shared)) == nil
	}
	f.unlock()
	if *pause == 0 {
		*pause = leasePause
	}
	if err := pauseFor(ctx, *pause); err != nil {
		f.mu.Lock()
		defer f.unlock()
		if l.wanting && f.FD >= 0 {
			f.v.disk.OFDLock(f.FD, wantedLock(disk.None))
			l.wanting = false
		}
		return err
	}
	*pause = min(2**pause, leasePauses)
	return nil
}

// lock takes mu with the descriptor open and the lease at hand.
func (l *lease) lock(ctx context.Context) error {
	f := l.f
	var pause time.Duration
	for {
		if err := f.lockAwake(); err != nil {
			return err
		}
		ok, err := l.has()
		if ok {
			return nil
		}
		f.unlock()
		if err := l.wait(ctx, err, &pause); err != nil {
			return err
		}
	}
}

// lockBare takes the lease of a file that nobody else uses yet, and whose header was not read.
func (l *lease) lockBare(ctx context.Context) error {
	f := l.f
	kind := disk.Shared
	if f.rw {
		kind = disk.Alone
	}
	late, err := uint64(0), error(nil)
	if !f.v.o.ReadOnly {
		if late, err = f.v.peers.leases(); err != nil {
			return err
		}
	}
	waitsOf(ctx).ForKey()
	if err := leaseFD(ctx, f.v, f.FD, kind); err != nil {
		return err
	}
	l.held, l.late = true, late
	l.since.Store(bootTime())
	l.used.Store(l.since.Load())
	return nil
}

// leaseFD takes the lease of the ciphertext file of a descriptor.
func leaseFD(ctx context.Context, v *Volume, fd int, kind disk.LockKind) error {
	asked := false
	defer func() {
		if asked {
			v.disk.OFDLock(fd, wantedLock(disk.None))
		}
	}()
	for pause := leasePause; ; pause = min(2*pause, leasePauses) {
		if err := v.disk.OFDLock(fd, leaseLock(kind)); !disk.LockBusy(err) {
			return err
		}
		asked = asked || v.disk.OFDLock(fd, wantedLock(disk.Shared)) == nil
		if err := pauseFor(ctx, pause); err != nil {
			return err
		}
	}
}

// pauseFor waits, or returns EINTR when ctx ends.
func pauseFor(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return unix.EINTR
	case <-time.After(d):
		return nil
	}
}

// freshen takes over what others have changed, under the lease: after a read found what does not open.
func (l *lease) freshen(ctx context.Context) error {
	f := l.f
	if err := l.lock(ctx); err != nil {
		return err
	}
	f.unlock()
	return nil
}

// follow takes over what others have changed before asked, a bootTime, without the lease if the
// file is at rest. locked says that a program has a lock, so that it must read nothing older.
func (l *lease) follow(ctx context.Context, asked int64, locked bool) error {
	f := l.f
	if !f.v.Shared() || l.seen.Load() >= asked {
		return nil
	}
	for {
		if err := f.lockAwake(); err != nil {
			return err
		}
		err := error(nil)
		switch {
		case f.Broken():
		case !l.held:
			err = l.reload(locked)
		case !f.v.o.ReadOnly: // the filesystem may have given it to another host
			var late uint64
			if late, err = f.v.peers.leases(); err == nil && l.late != late {
				err = errNeedsLease
			}
		}
		f.unlock()
		switch w := err.(type) {
		case nil:
			return nil
		case needsKey:
			waitsOf(ctx).ForKey()
			if _, _, err := f.v.lists.unlock(ctx, w.hdr); err != nil {
				return f.failed("unwrapping its key", err)
			}
		default: // it is being written, or is damaged
			return l.freshen(ctx)
		}
	}
}

// look is follow where that needs not wait for anybody: for attributes, which programs ask for just after
// an open.
func (l *lease) look() {
	f := l.f
	if !f.v.Shared() {
		return
	}
	if l.seen.recent() || !f.mu.TryLock() {
		return
	}
	defer f.unlock()
	if f.FD >= 0 && !f.closed && !l.held && !f.Broken() {
		l.reload(false) // else the file is shown as it was
	}
}

// reload reads the header again, and where it is another than before takes the file as it is now.
// Without the lease it needs a file at rest. If it must not be sure, it believes a version that did not
// change. On an error the file is as before. mu is held for writing.
//
// The cache of a network filesystem is not believed. Linux' NFS keeps the pages of a file that is open for
// writing here when another host has changed it, until a lock is taken; and even then if the server has
// delegated reading to this host meanwhile.
func (l *lease) reload(sure bool) error {
	f := l.f
	v, c := f.v, &f.n.content
	asked := bootTime()
	var st unix.Stat_t
	if err := v.disk.FstatFresh(f.FD, &st); err != nil {
		return err
	}
	if st.Size == 0 && f.Header == nil || f.Broken() {
		return nil
	}
	if !sure && !v.blurred && l.version.is(&st) {
		l.seen.Store(asked)
		return nil
	}
	now := v.peers.versionOf(&st)
	if v.disk.Remote {
		v.disk.ForgetPages(f.FD, 0, blockcrypt.PageSize)
	}
	if f.Header != nil && st.Size > 0 {
		head := make([]byte, f.Geo.Header())
		n, err := v.disk.Pread(f.FD, head, 0)
		if err != nil {
			return err
		}
		if cfile.SameHead(f.File, head[:n]) {
			if v.blurred { // pages can be older than the header
				v.disk.ForgetPages(f.FD, 0, 0)
			}
			l.seen.Store(asked)
			l.version = now
			return nil
		}
	}
	if v.disk.Remote {
		v.disk.ForgetPages(f.FD, 0, 0)
	}
	was, of := f.File, f.domain.Load()
	f.File = blank(f, f.FD, st.Mtim)
	err := error(nil)
	if st.Size > 0 {
		err = c.readHeader(f, st.Size)
	}
	switch {
	case err != nil:
	case f.Header == nil:
		f.BelieveEmpty()
	default:
		var known bool
		if f.Keys, of, known, err = v.lists.unlockNow(f.Header); err == nil && !known {
			err = needsKey{errNeedsLease, f.Header}
		}
		if err == nil {
			f.domain.Store(of)
			err = c.takeState(f, st.Size)
		}
	}
	if err != nil {
		if blockcrypt.ClassOf(err) != "" && !l.held {
			err = errNeedsLease
		}
		f.File = was
		if of != nil {
			f.domain.Store(of)
		}
		return err
	}
	f.moves = f.Times().Moves
	c.foreign.Store(true)
	v.lists.keep(f)
	l.seen.Store(asked)
	l.version = now
	return nil
}

// giveBack brings the file to rest and gives its lease back. On an error that leaves the file usable it
// keeps the lease. mu is held for writing.
func (l *lease) giveBack() error {
	f := l.f
	if f.v.nodes.removed(f.n) {
		l.drop()
		return nil
	}
	if f.Broken() {
		l.drop()
		return unix.EIO
	}
	if !l.held {
		return nil
	}
	if !f.v.o.ReadOnly {
		late, err := f.v.peers.leases()
		if err != nil && !f.AtRest() {
			return err
		}
		if l.confirm(late); f.Broken() {
			return unix.EIO
		}
		if !l.held {
			return nil
		}
	}
	if f.rw {
		if f.v.blurred && !f.AtRest() && !l.holds() {
			f.failed("giving its lease back", errTaken)
			cfile.GiveUp(f.File)
		}
		err := f.ComeToRest(f.showing.known())
		if errors.Is(err, unix.ESTALE) { // another host has removed it
			f.v.nodes.vanished(f.n)
		} else if err != nil && !f.Broken() {
			return err
		}
		if err != nil {
			l.drop()
			return err
		}
	}
	if l.wanted {
		l.wanted, l.free = false, time.Now().Add(leaseYield)
	}
	l.drop()
	return nil
}

// holds reports whether the header on the disk is the one that this host has left there. A filesystem that
// does not fence may have taken the lease away, and another host has written since.
func (l *lease) holds() bool {
	f := l.f
	if f.Header == nil {
		return true // it was emptied under the lease
	}
	f.v.disk.ForgetPages(f.FD, 0, blockcrypt.PageSize)
	head := make([]byte, f.Geo.Header())
	n, err := f.v.disk.Pread(f.FD, head, 0)
	return err == nil && cfile.SameHead(f.File, head[:n])
}

func (s *leases) add(f *file) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files == nil {
		s.files = map[*file]int{}
	}
	s.files[f] = f.FD
}

func (s *leases) remove(f *file) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.files, f)
}

func (s *leases) now() (files []*file, fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for f, fd := range s.files {
		files, fds = append(files, f), append(fds, fd)
	}
	return files, fds
}

// run gives leases back that others wait for, or that nobody uses.
func (s *leases) run() {
	t := time.NewTicker(leaseTick)
	defer t.Stop()
	for looked := time.Now(); ; {
		select {
		case <-s.v.quit:
			return
		case <-t.C:
		}
		now := time.Now()
		if now.Sub(looked) >= entriesLook {
			looked = now
			s.v.locks.check()
		}
		files, fds := s.now()
		for i, f := range files {
			// Most are written and closed before anybody can wait. One that waits holds no other up.
			if bootTime()-f.lease.since.Load() >= int64(leaseTick) && !f.lease.checked.Swap(true) {
				s.v.bg.Go(func() {
					defer f.lease.checked.Store(false)
					f.lease.check(fds[i])
				})
			}
		}
	}
}

// check gives the lease back if another host waits for it, or it was not used for a while. No lock
// is held while the filesystem is asked: at worst the answer is that of another file.
func (l *lease) check(fd int) {
	f := l.f
	in, err := f.v.disk.OFDLocked(fd, wantedLock(disk.Alone))
	wanted := err == nil && in.Kind != disk.None
	now := bootTime()
	if !wanted && now-l.used.Load() < int64(leaseIdle) && now-l.since.Load() < int64(leaseMost) {
		return
	}
	f.mu.Lock()
	defer f.unlock()
	l.wanted = wanted
	if f.failed("giving its lease back", l.giveBack()) != nil {
		l.used.Store(bootTime()) // and again after a while
		l.since.Store(l.used.Load())
	}
}
