//go:build linux && !portable

package volume

import (
	"context"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
)

// acquire returns the node's open file, loading it if need be; write opens it
// for writing and takes the data key that an empty file's first byte needs. No
// lock is held while a key service is asked.
func (c *content) acquire(ctx context.Context, write bool) (*file, error) {
	asked := bootTime()
	if c.n.typ != unix.S_IFREG {
		return nil, unix.EINVAL
	}
	if write && c.v.o.ReadOnly {
		return nil, unix.EROFS
	}
	if err := c.v.access.refused(c); err != nil {
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
	var key *freshKey // for the first byte of an empty file
	defer func() {
		if key != nil {
			key.putBack()
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
			if key, err = c.newKey(ctx); err != nil {
				c.v.report(c.n.where(), "no data key for new content", err)
				return nil, err
			}
			continue
		}
		opened(false)
		err = f.ready(ctx, false) // a refusal shows at open
		if err == nil {
			err = f.lease.follow(ctx, asked, false)
		}
		if err != nil {
			f.release(write)
			return nil, err
		}
		return f, nil
	}
}

// join counts a handle of the node's file, which it loads if need be. If the file is empty and
// needs a data key for its first byte, it takes *key; without one it returns no file.
func (c *content) join(ctx context.Context, write bool, key **freshKey,
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

// join counts a handle. It is false, without an error, if a data key is needed that *key does
// not have. openMu is held.
func (f *file) join(write bool, key **freshKey) (joined bool, err error) {
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
		takes(f, *key)
		*key = nil
	}
	f.handles++
	if write {
		f.writers++
	}
	return true, nil
}

// A Handle is an open file. Its methods may be called by several goroutines.
type Handle struct {
	f     *file
	write bool
}

// Reread reports, once, whether the file was loaded after a sync that failed. If so, the kernel's
// cache may hold other bytes than the disk.
func (h *Handle) Reread() bool {
	h.f.mu.Lock()
	defer h.f.unlock()
	was := h.f.reread
	h.f.reread = false
	return was
}

// Foreign reports, once, whether another host has changed the file, so that the kernel's cache may be
// of before.
func (h *Handle) Foreign() bool { return h.f.n.foreign.Swap(false) }

// AsTold reports whether the file is as the kernel was told last, so that it need not ask again.
func (h *Handle) AsTold() bool {
	f, told := h.f, h.f.n.told.Load()
	if told == nil || !told.first || f.n.changed.Load() > told.clock {
		return false
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.AtRest() && told.st.Size == f.Size && told.st.Ctim == f.lease.version.changed
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
	err := error(nil)
	if h.f.v.Shared() {
		err = h.f.failed("close", h.f.lease.giveBack())
	} else {
		err = h.f.Rest()
	}
	if err != nil {
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
	// First the IDs of the directories and the long name: the fsync of the file can make its name
	// durable, and without them that cannot be decoded.
	if err := h.f.syncPath(); err != nil {
		return h.f.failed("fsync", err)
	}
	if err := h.fsync(); err != nil {
		return h.f.failed("fsync", err)
	}
	return h.f.n.lost.tell()
}

// fsync makes the content durable. mu is not held during the fsync itself.
func (h *Handle) fsync() error {
	f := h.f
	if err := f.lockAwake(); err != nil {
		return err
	}
	defer f.unlock()
	if f.v.Shared() {
		rested := f.lease.held && !f.AtRest()
		if err := f.lease.giveBack(); err != nil || rested {
			return err
		}
		return f.SyncFailed(f.v.disk.Fsync(f.FD)) // for its name, mode and times, which are not content
	}
	return f.Sync(func(fsync func() error) error {
		f.syncing++
		f.unlock()
		err := fsync()
		f.mu.Lock()
		f.syncing--
		return err
	})
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

// syncPath makes the IDs of the directories above durable, and the file's own
// directory where its name is a long one: once for each change of its names.
func (f *file) syncPath() error {
	n := f.n
	moves := n.moves.Load() + 1
	n.v.nodes.mu.Lock()
	links := slices.Clone(n.links)
	n.v.nodes.mu.Unlock()
	for _, l := range links {
		if err := l.dir.syncIDs(); err != nil {
			return err
		}
		if f.namesSynced.Load() != moves && strings.HasPrefix(l.cname, blockcrypt.LongPrefix) {
			if err := l.dir.syncDir(); err != nil {
				return err
			}
		}
	}
	f.namesSynced.Store(moves)
	return nil
}
