//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/fs/volume/internal/ranges"
)

// programLocks are the locks of this host's programs on a file of a shared volume. Each owner has a
// descriptor of its own, so that the backing filesystem decides between all owners, of this host and of
// others.
type programLocks struct {
	v *Volume
	n *Node

	mu     sync.Mutex // held across the syscalls that lock, which do not wait
	owners map[lockOwner]*ownLocks
	given  time.Time // when an owner gave its last lock back
}

// ownLocks are the locks of an owner.
type ownLocks struct {
	fd   int        // has them
	held ranges.Set // bytes of the ciphertext file
}

// set takes, changes or gives back a lock.
func (o *ownLocks) set(d *disk.Disk, l disk.Lock) error {
	err := d.OFDLock(o.fd, l)
	switch {
	case err != nil:
	case l.Kind == disk.None:
		o.held = o.held.Without(l.At, l.At+l.N-1)
	default:
		o.held = o.held.With(l.At, l.At+l.N-1)
	}
	return err
}

// lockOwner is who has locks: for the kernel a number, which for flock(2) is another's than for fcntl(2).
type lockOwner struct {
	id    uint64
	flock bool
}

// A ProgramLock is what fcntl(2) or flock(2) asks for.
type ProgramLock struct {
	Owner       uint64
	Flock       bool
	Kind        int16 // unix.F_RDLCK, F_WRLCK or F_UNLCK
	First, Last int64 // bytes; flock has no use for them
	Wait        bool
}

const (
	lockPause  = time.Millisecond // between two attempts to take a program's lock, at first
	lockPauses = 10 * time.Millisecond
	lockTurn   = 100 * time.Millisecond // after a lock was given back, in which others that wait go first
	lockYield  = 2 * lockPauses         // in which one of them surely asks
)

func (p ProgramLock) owner() lockOwner { return lockOwner{p.Owner, p.Flock} }

// lock returns the lock of the ciphertext file that stands for it.
func (p ProgramLock) lock() disk.Lock {
	if p.Flock {
		return disk.Lock{Kind: disk.LockKind(p.Kind), At: layout.FlockByte, N: 1}
	}
	first, last := min(p.First, layout.ProgramMost), min(p.Last, layout.ProgramMost)
	return disk.Lock{Kind: disk.LockKind(p.Kind), At: layout.ProgramBytes + first, N: last - first + 1}
}

// asked returns the lock by which a program says that it waits for the lock.
func (p ProgramLock) asked(kind disk.LockKind) disk.Lock {
	if p.Flock {
		return disk.Lock{Kind: kind, At: layout.FlockAskedByte, N: 1}
	}
	l := p.lock()
	first, last := (l.At-layout.ProgramBytes)/2, (l.At+l.N-1-layout.ProgramBytes)/2
	return disk.Lock{Kind: kind, At: layout.ProgramAskedBytes + first, N: last - first + 1}
}

// Lock takes, changes or gives back a lock of a program. Data that was written under it is
// durable before it is given back, and data that other hosts wrote before is read once it is held.
func (l *programLocks) Lock(ctx context.Context, p ProgramLock) error {
	if l.v.o.ReadOnly && p.Kind == unix.F_WRLCK {
		return unix.EBADF
	}
	if p.Kind == unix.F_UNLCK {
		return l.unlockProgram(p)
	}
	waitsOf(ctx).ForKey()
	l.giveWay(ctx, p)
	asked := false
	defer func() {
		if asked {
			l.ask(p, disk.None)
		}
	}()
	for pause := lockPause; ; pause = min(2*pause, lockPauses) {
		err := l.tryLock(p)
		if err == nil {
			return l.lockedProgram(ctx)
		}
		if !disk.LockBusy(err) {
			return err
		}
		if !p.Wait {
			return unix.EAGAIN
		}
		asked = asked || l.ask(p, disk.Shared)
		if err := pauseFor(ctx, pause); err != nil {
			return err
		}
	}
}

// giveWay lets programs that wait for the same bytes go first, on this host and on others, if a lock was given
// back here just now. They poll; a program that asks again at once would always be faster.
func (l *programLocks) giveWay(ctx context.Context, p ProgramLock) {
	for end := time.Now().Add(lockYield); l.othersWait(p) && time.Now().Before(end); {
		if pauseFor(ctx, lockPauses/2) != nil {
			return
		}
	}
}

// othersWait reports whether other programs wait for the bytes of p. It does not look if the owner of p has a
// lock already: the others wait until that one is given back.
func (l *programLocks) othersWait(p ProgramLock) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.given) > lockTurn {
		return false
	}
	o, err := l.of(p.owner())
	if err != nil || len(o.held) > 0 {
		return false
	}
	in, err := l.v.disk.OFDLocked(o.fd, p.asked(disk.Alone))
	return err == nil && in.Kind != disk.None
}

// ask says to others that an owner waits for a lock, or no more.
func (l *programLocks) ask(p ProgramLock, kind disk.LockKind) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	o := l.owners[p.owner()]
	return o != nil && l.v.disk.OFDLock(o.fd, p.asked(kind)) == nil
}

// tryLock is one attempt.
func (l *programLocks) tryLock(p ProgramLock) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	o, err := l.of(p.owner())
	if err != nil {
		return err
	}
	return o.set(&l.v.disk, p.lock())
}

// of returns the locks of an owner. mu is held.
func (l *programLocks) of(owner lockOwner) (*ownLocks, error) {
	if o := l.owners[owner]; o != nil {
		return o, nil
	}
	flags := unix.O_RDWR
	if l.v.o.ReadOnly {
		flags = unix.O_RDONLY
	}
	fd, err := l.n.openFor(flags)
	if err != nil {
		return nil, err
	}
	if l.owners == nil {
		l.owners = map[lockOwner]*ownLocks{}
	}
	o := &ownLocks{fd: fd}
	l.owners[owner] = o
	return o, nil
}

// lockedProgram makes this host read what others wrote before a lock came here: in the daemon, and then
// in the kernel.
func (l *programLocks) lockedProgram(ctx context.Context) error {
	if f := l.n.file.Load(); f != nil {
		if f.lease.stale.Load() {
			return errStale
		}
		if err := f.lease.follow(ctx, bootTime(), true); err != nil {
			return err
		}
	}
	if l.n.foreign.Swap(false) {
		return l.v.access.letGo(l.n.id)
	}
	return l.v.access.tellAttr(l.n.id) // it may have been told the size before others wrote
}

// unlockProgram makes what was written under the lock durable, and gives the lock back.
func (l *programLocks) unlockProgram(p ProgramLock) error {
	l.mu.Lock()
	o := l.owners[p.owner()]
	l.mu.Unlock()
	if o == nil {
		return nil
	}
	err := l.rest()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.owners[p.owner()] != o { // a close was faster
		return err
	}
	err = errors.Join(err, o.set(&l.v.disk, p.lock()))
	if len(o.held) == 0 {
		l.given = time.Now()
	}
	return err
}

// rest gives the lease of the file back, if this host has it.
func (l *programLocks) rest() error {
	f := l.n.file.Load()
	if f == nil || l.v.o.ReadOnly {
		return nil
	}
	f.mu.Lock()
	defer f.unlock()
	if f.closed {
		return nil
	}
	return f.failed("giving its lease back", f.lease.giveBack())
}

// TestLock returns a lock that is in the way of p; one of kind F_UNLCK if there is none.
func (l *programLocks) TestLock(p ProgramLock) (ProgramLock, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	o, err := l.of(p.owner())
	if err != nil {
		return p, err
	}
	in, err := l.v.disk.OFDLocked(o.fd, p.lock())
	if err != nil {
		return p, err
	}
	p.Kind = int16(in.Kind)
	if in.Kind != disk.None && !p.Flock {
		p.First = in.At - layout.ProgramBytes
		p.Last = p.First + in.N - 1
		if in.N == 0 || p.Last >= layout.ProgramMost {
			p.Last = 1<<63 - 1
		}
	}
	return p, nil
}

// DropLocks gives back all locks of an owner, as the close of a file does.
func (l *programLocks) DropLocks(owner uint64, flock bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := lockOwner{owner, flock}
	if o := l.owners[at]; o != nil {
		// Some filesystems forget to when a descriptor is closed.
		for _, p := range []ProgramLock{{Flock: true}, {Last: layout.ProgramMost}} {
			p.Kind = unix.F_UNLCK
			l.v.disk.OFDLock(o.fd, p.lock())
			l.v.disk.OFDLock(o.fd, p.asked(disk.None))
		}
		l.v.disk.Close(o.fd)
		delete(l.owners, at)
		l.given = time.Now()
	}
}

// locked reports whether programs have locks on the file.
func (l *programLocks) locked() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.owners) > 0
}
