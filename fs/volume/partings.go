//go:build linux && !portable

package volume

import "golang.org/x/sys/unix"

// A parting is a name that goes, by a removal or a rename over it. The kernel goes on
// asking for the node by its number: for a moment, and as long as something refers to
// it. So it is opened while it can be found.
type parting struct {
	at   location
	n    *Node       // nil if the kernel does not know what is there
	fd   int         // O_PATH; -1 if it could not be opened
	ours bool        // fd is not n's yet
	st   unix.Stat_t // of the object before its name went
}

// part begins the removal of a name in the directory that fd is of, whose entries are
// held.
func (t *nodeTable) part(p location, fd int) parting {
	t.mu.Lock()
	n := t.byPlace[p]
	if n == nil {
		t.mu.Unlock()
		return parting{at: p, fd: -1}
	}
	n.holds++
	last := n.last
	t.mu.Unlock()
	n.moving.Add(1)
	x := parting{at: p, n: n, fd: last}
	// A network filesystem keeps the file under another name in the directory while a descriptor is open.
	if last < 0 && !(t.v.disk.Remote && n.file.Load() == nil) {
		var err error
		if t.v.Shared() { // else the name may be another file's by now, and this one be given up
			p.dir.fresh(fd) // if it fails, the removal will
		}
		x.fd, err = t.v.disk.Open(fd, p.cname, unix.O_PATH, 0)
		x.ours = err == nil
	}
	if x.fd >= 0 {
		t.fstat(x.fd, &x.st)
	} else {
		t.statAt(p, fd, &x.st) // if it fails too, the removal will
	}
	return x
}

// fstat is fstat of an object whose names other hosts may change.
func (t *nodeTable) fstat(fd int, st *unix.Stat_t) error {
	if t.v.Shared() {
		return t.v.disk.FstatFresh(fd, st)
	}
	return t.v.disk.Fstat(fd, st)
}

// stays ends a removal that was not made.
func (t *nodeTable) stays(x parting) {
	if x.n == nil {
		return
	}
	t.mu.Lock()
	defer t.unlock()
	if x.ours {
		t.unneeded = append(t.unneeded, x.fd)
	}
	x.n.moving.Add(-1)
	t.unhold(x.n)
}

// leaves ends a removal that was made. It returns the node if that was its last name.
func (t *nodeTable) leaves(x parting) (gone *Node) {
	n := x.n
	if n == nil {
		return nil
	}
	same := n.is(&x.st) // or the tree was changed behind our back
	last := x.st.Nlink <= 1 || n.IsDir()
	// If others add or remove names at the same time, the disk tells who was the last. A
	// network filesystem may keep a name of its own for an open object (.nfsXXXX).
	if same && x.fd >= 0 && (!last || n.linked.Load()) {
		var now unix.Stat_t
		last = t.fstat(x.fd, &now) != nil || now.Nlink == 0
	}
	t.mu.Lock()
	defer t.unlock()
	if !same {
		last = len(n.links) <= 1 && !t.v.Shared() // another host has moved it
	}
	if last && !n.gone {
		gone = n
		n.gone = true
		// The filesystem gives the inode number of a removed file to the next file: no
		// later lookup may find this node by it.
		if key := (inodeKey{n.dev, n.ino.Load()}); t.byInode[key] == n {
			delete(t.byInode, key)
		}
		n.leaving = true
		t.v.disk.Leaves()
	}
	if x.ours && last && same && n.last < 0 {
		n.last = x.fd
	} else if x.ours {
		t.unneeded = append(t.unneeded, x.fd)
	}
	n.dropLink(x.at)
	n.moves.Add(1)
	n.moving.Add(-1)
	n.change()
	t.unhold(n)
	return gone
}
