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
)

// programLocks are the locks of this host's programs on a file of a shared volume. Each owner has a
// descriptor of its own, so that the backing filesystem decides between all owners, of this host and of
// others.
type programLocks struct {
	v *Volume
	n *Node

	mu  sync.Mutex // held across the syscalls that lock, which do not wait
	fds map[lockOwner]int
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
)

// lock returns the lock of the ciphertext file that stands for it.
func (p ProgramLock) lock() disk.Lock {
	if p.Flock {
		return disk.Lock{Kind: disk.LockKind(p.Kind), At: layout.FlockByte, N: 1}
	}
	first, last := min(p.First, layout.ProgramMost), min(p.Last, layout.ProgramMost)
	return disk.Lock{Kind: disk.LockKind(p.Kind), At: layout.ProgramBytes + first, N: last - first + 1}
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
		select {
		case <-ctx.Done():
			return unix.EINTR
		case <-time.After(pause):
		}
	}
}

// tryLock is one attempt.
func (l *programLocks) tryLock(p ProgramLock) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	fd, err := l.lockFD(lockOwner{p.Owner, p.Flock})
	if err != nil {
		return err
	}
	return l.v.disk.OFDLock(fd, p.lock())
}

// lockFD returns the descriptor that has the locks of an owner. programs.mu is held.
func (l *programLocks) lockFD(o lockOwner) (int, error) {
	if fd, ok := l.fds[o]; ok {
		return fd, nil
	}
	flags := unix.O_RDWR
	if l.v.o.ReadOnly {
		flags = unix.O_RDONLY
	}
	fd, err := l.n.openFor(flags)
	if err != nil {
		return -1, err
	}
	if l.fds == nil {
		l.fds = map[lockOwner]int{}
	}
	l.fds[o] = fd
	return fd, nil
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
	fd, ok := l.fds[lockOwner{p.Owner, p.Flock}]
	l.mu.Unlock()
	if !ok {
		return nil
	}
	err := l.rest()
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(err, l.v.disk.OFDLock(fd, p.lock()))
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
	fd, err := l.lockFD(lockOwner{p.Owner, p.Flock})
	if err != nil {
		return p, err
	}
	in, err := l.v.disk.OFDLocked(fd, p.lock())
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
	o := lockOwner{owner, flock}
	if fd, ok := l.fds[o]; ok {
		// Some filesystems forget to when a descriptor is closed.
		l.v.disk.OFDLock(fd, disk.Lock{Kind: disk.None, At: layout.FlockByte, N: 1})
		l.v.disk.OFDLock(fd, disk.Lock{Kind: disk.None, At: layout.ProgramBytes, N: layout.ProgramMost + 1})
		l.v.disk.Close(fd)
		delete(l.fds, o)
	}
}

// locked reports whether programs have locks on the file.
func (l *programLocks) locked() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.fds) > 0
}
