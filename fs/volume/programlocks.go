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
	lockPauses = 50 * time.Millisecond
)

// lock returns the lock of the ciphertext file that stands for it.
func (p ProgramLock) lock() disk.Lock {
	if p.Flock {
		return disk.Lock{Kind: disk.LockKind(p.Kind), At: layout.FlockByte, N: 1}
	}
	first, last := min(p.First, layout.ProgramMost), min(p.Last, layout.ProgramMost)
	return disk.Lock{Kind: disk.LockKind(p.Kind), At: layout.ProgramBytes + first, N: last - first + 1}
}

// Lock takes, changes or gives back a lock of a program. What was written under it is there for other
// hosts before it goes, and what they wrote before is read after it came.
func (c *content) Lock(ctx context.Context, p ProgramLock) error {
	if c.v.o.ReadOnly && p.Kind == unix.F_WRLCK {
		return unix.EBADF
	}
	if p.Kind == unix.F_UNLCK {
		return c.unlockProgram(p)
	}
	waitsOf(ctx).ForKey()
	for pause := lockPause; ; pause = min(2*pause, lockPauses) {
		err := c.tryLock(p)
		if err == nil {
			return c.lockedProgram(ctx)
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
func (c *content) tryLock(p ProgramLock) error {
	l := &c.programs
	l.mu.Lock()
	defer l.mu.Unlock()
	fd, err := c.lockFD(lockOwner{p.Owner, p.Flock})
	if err != nil {
		return err
	}
	return c.v.disk.OFDLock(fd, p.lock())
}

// lockFD returns the descriptor that has the locks of an owner. programs.mu is held.
func (c *content) lockFD(o lockOwner) (int, error) {
	l := &c.programs
	if fd, ok := l.fds[o]; ok {
		return fd, nil
	}
	flags := unix.O_RDWR
	if c.v.o.ReadOnly {
		flags = unix.O_RDONLY
	}
	fd, err := c.openFor(flags)
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
func (c *content) lockedProgram(ctx context.Context) error {
	if f := c.file.Load(); f != nil {
		if f.stale.Load() {
			return errStale
		}
		if err := f.follow(ctx); err != nil {
			return err
		}
	}
	if c.foreign.Swap(false) {
		return c.v.access.letGo(c.n.id)
	}
	return nil
}

// unlockProgram makes what was written under the lock durable, and gives the lock back.
func (c *content) unlockProgram(p ProgramLock) error {
	l := &c.programs
	l.mu.Lock()
	fd, ok := l.fds[lockOwner{p.Owner, p.Flock}]
	l.mu.Unlock()
	if !ok {
		return nil
	}
	err := c.rest()
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(err, c.v.disk.OFDLock(fd, p.lock()))
}

// rest gives the lease of the file back, if this host has it.
func (c *content) rest() error {
	f := c.file.Load()
	if f == nil || c.v.o.ReadOnly {
		return nil
	}
	f.mu.Lock()
	defer f.unlock()
	if f.closed {
		return nil
	}
	return f.failed("giving its lease back", f.giveBack())
}

// TestLock returns a lock that is in the way of p; one of kind F_UNLCK if there is none.
func (c *content) TestLock(p ProgramLock) (ProgramLock, error) {
	l := &c.programs
	l.mu.Lock()
	defer l.mu.Unlock()
	fd, err := c.lockFD(lockOwner{p.Owner, p.Flock})
	if err != nil {
		return p, err
	}
	in, err := c.v.disk.OFDLocked(fd, p.lock())
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
func (c *content) DropLocks(owner uint64, flock bool) {
	l := &c.programs
	l.mu.Lock()
	defer l.mu.Unlock()
	o := lockOwner{owner, flock}
	if fd, ok := l.fds[o]; ok {
		// Some filesystems forget to when a descriptor is closed.
		c.v.disk.OFDLock(fd, disk.Lock{Kind: disk.None, At: layout.FlockByte, N: 1})
		c.v.disk.OFDLock(fd, disk.Lock{Kind: disk.None, At: layout.ProgramBytes, N: layout.ProgramMost + 1})
		c.v.disk.Close(fd)
		delete(l.fds, o)
	}
}

// locked reports whether programs have locks on the file.
func (c *content) locked() bool {
	c.programs.mu.Lock()
	defer c.programs.mu.Unlock()
	return len(c.programs.fds) > 0
}
