//go:build linux && !portable

package volume

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume/internal/disk"
)

// NewNode says how an entry of a directory is made. Mode has a type, if it is not for a regular file
// or a directory.
type NewNode struct {
	Mode, Rdev uint32
	Caller     Caller
}

// NewFile says how a regular file is made and opened.
type NewFile struct {
	NewNode
	Excl  bool // it is an error that there is one
	Write bool // it is opened for writing, else for reading only
}

// Create makes a regular file, or opens the one that is there, and opens it.
func (ns *namespace) Create(ctx context.Context, dir *Node, name string,
	f NewFile) (*Node, Attr, *Handle, error) {
	if ns.v.o.ReadOnly {
		return nil, Attr{}, nil, unix.EROFS
	}
	if err := ns.v.descriptors.roomForFile(); err != nil {
		return nil, Attr{}, nil, err
	}
	// Before the file is there: a refusal leaves nothing behind.
	key, err := dir.newKeyIn(ctx)
	if err != nil {
		ns.v.report("new file", "no data key", err)
		return nil, Attr{}, nil, err
	}
	for range maxRaces {
		var n *Node
		var st Attr
		var h *Handle
		n, st, h, err = ns.create(ctx, dir, name, f, &key)
		if !errors.Is(err, unix.ENOENT) || f.Excl {
			return n, st, h, err
		}
		// Somebody had made it, and it went before it was opened.
		if key == nil {
			if key, err = dir.newKeyIn(ctx); err != nil {
				return nil, Attr{}, nil, err
			}
		}
	}
	return nil, Attr{}, nil, unix.ENOENT
}

// maxRaces is how often making a file begins again while others remove it.
const maxRaces = 100

// create is one attempt of Create. It uses the data key, or gives it back and
// leaves nil.
func (ns *namespace) create(ctx context.Context, dir *Node, name string, f NewFile,
	k **freshKey) (*Node, Attr, *Handle, error) {
	key := *k
	*k = nil
	created := -1
	open := func(fd int, cname string, mode uint32) (_ int, err error) {
		created, err = ns.v.disk.Open(fd, cname,
			unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|disk.FileFlags, mode&^unix.S_IFMT)
		return created, err
	}
	n, st, err := ns.make(dir, name, f.Caller, f.Mode|unix.S_IFREG, open)
	if errors.Is(err, unix.EEXIST) && !f.Excl && created < 0 {
		key.putBack()
		n, _, _, err = ns.Lookup(ctx, dir, name)
		if err != nil {
			return nil, Attr{}, nil, err
		}
		h, err := n.Open(ctx, f.Write)
		if err == nil {
			if st, err = n.Attr(); err != nil {
				h.Release()
			}
		}
		if err != nil {
			ns.v.Forget(n.id, 1)
			return nil, st, nil, err
		}
		return n, st, h, nil
	}
	if err != nil {
		if created >= 0 {
			ns.v.disk.Close(created)
		}
		key.putBack()
		return nil, Attr{}, nil, err
	}
	return n, st, n.adopt(created, &st, key, f.Write), nil
}

// Tmpfile makes a regular file in dir that has no name, and opens it; see [Volume.Link].
func (ns *namespace) Tmpfile(ctx context.Context, dir *Node, mode uint32, c Caller,
	write bool) (*Node, Attr, *Handle, error) {
	if ns.v.o.ReadOnly {
		return nil, Attr{}, nil, unix.EROFS
	}
	if err := ns.v.descriptors.roomForFile(); err != nil {
		return nil, Attr{}, nil, err
	}
	key, err := dir.newKeyIn(ctx)
	if err != nil {
		ns.v.report("new file", "no data key", err)
		return nil, Attr{}, nil, err
	}
	st, fd, last, err := ns.tmpfile(dir, mode, c)
	if err != nil {
		key.putBack()
		return nil, Attr{}, nil, err
	}
	ns.v.nodes.mu.Lock()
	n := ns.v.nodes.add(&st)
	n.lookups, n.gone, n.last = 1, true, last
	ns.v.nodes.mu.Unlock()
	if ids, err := dir.chain(); err == nil {
		n.dirs.Store(&ids)
	}
	h := n.adopt(fd, &st, key, write)
	n.fill(&st, -1, "")
	return n, st, h, nil
}

// tmpfile makes the ciphertext file of Tmpfile, and a descriptor that stays as
// long as the node is known.
func (ns *namespace) tmpfile(dir *Node, mode uint32, c Caller) (st Attr, fd, last int, err error) {
	d, err := dir.enter()
	if err != nil {
		return st, -1, -1, err
	}
	defer dir.leave()
	mode = dir.masked(d, mode, c) &^ unix.S_IFMT
	if fd, err = ns.v.disk.Open(d, ".", unix.O_TMPFILE|unix.O_RDWR, mode); err != nil {
		return st, -1, -1, err
	}
	if uid, gid, ok := ns.owners(d, c); ok {
		if err = ns.v.disk.Chown(fd, uid, gid); err == nil && mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
			err = ns.v.disk.Chmod(fd, mode) // chown took the bits
		}
	}
	if err == nil {
		err = ns.v.disk.Fstat(fd, &st)
	}
	if err == nil {
		last, err = ns.v.disk.Reopen(fd, unix.O_PATH)
	}
	if err != nil {
		ns.v.disk.Close(fd)
	}
	return st, fd, last, err
}

// adopt opens a file that was made just now, empty, by its descriptor.
func (c *content) adopt(fd int, st *Attr, key *freshKey, write bool) *Handle {
	c.openMu.Lock()
	defer c.openMu.Unlock()
	c.sound = c.v.sessions.sound()
	c.v.lists.target(c) // for when it has no name any more
	f := c.file.Load()
	if f == nil {
		f = c.newFile(fd, true, st)
		f.BelieveEmpty()
		f.handles = 1
		takes(f, key)
		if write {
			f.writers = 1
		}
		f.lease.seen.Store(bootTime())
		c.attach(f)
		f.mu.Lock()
		c.v.lists.keep(f)
		f.unlock()
		return &Handle{f, write}
	}
	c.v.disk.Close(fd) // another has opened it already
	f.mu.Lock()
	defer f.unlock()
	f.handles++
	if write {
		f.writers++
	}
	if f.next == nil && f.Size == 0 {
		takes(f, key)
	} else {
		key.putBack()
	}
	return &Handle{f, write}
}
