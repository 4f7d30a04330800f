//go:build linux && !portable

package volume

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// nodeTable has every node that the kernel, or something open, knows.
type nodeTable struct {
	v    *Volume
	last atomic.Uint64 // number that was given out

	// mu guards the fields below and Node.known. No syscall is made under it.
	mu       sync.Mutex
	byID     map[uint64]*Node
	byInode  map[inodeKey]*Node
	byPlace  map[location]*Node // of all links
	unneeded []int              // descriptors that unlock closes
	left     int32              // nodes without a name that are known no more; unlock counts them
}

type inodeKey struct{ dev, ino uint64 }

// init makes the table, with the root alone in it.
func (t *nodeTable) init(v *Volume, root *Node) {
	t.v = v
	t.byID = map[uint64]*Node{root.id: root}
	t.byInode = map[inodeKey]*Node{{root.dev, root.ino.Load()}: root}
	t.byPlace = map[location]*Node{}
	t.last.Store(root.id)
}

// get returns the node with this number, nil if there is none any more.
func (t *nodeTable) get(id uint64) *Node {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byID[id]
}

// all returns every node that is known now.
func (t *nodeTable) all() []*Node {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Values(t.byID))
}

// closeRemoved closes the descriptors of what lost its last name while the kernel knew it.
func (t *nodeTable) closeRemoved() {
	for _, n := range t.all() {
		if n.last >= 0 {
			t.v.disk.Close(n.last)
			n.last = -1
		}
	}
}

// again counts a lookup of a node, if it is still known.
func (t *nodeTable) again(n *Node) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byID[n.id] != n {
		return false
	}
	n.lookups++
	return true
}

// forget takes back count lookups of a node.
func (t *nodeTable) forget(id, count uint64) {
	t.mu.Lock()
	defer t.unlock()
	if n := t.byID[id]; n != nil && n != t.v.root {
		n.lookups -= min(count, n.lookups)
		t.dropIfUnknown(n)
	}
}

// at returns the node that was found at a place, nil if none was or the kernel has
// forgotten it. The directory's entries are held, so that it is still there.
func (t *nodeTable) at(p location) *Node {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byPlace[p]
}

// statAt is stat of an entry of the directory fd, as it was at the bootTime that it returns. What this host
// knows will do of a node of a shared volume that it has just asked for: an open asks again.
func (t *nodeTable) statAt(p location, fd int, st *unix.Stat_t) (asked int64, err error) {
	if !t.v.Shared() {
		return 0, t.v.disk.Stat(fd, p.cname, st)
	}
	if n := t.at(p); n != nil {
		if n.statted.recent() {
			asked = n.statted.Load()
			if err = t.v.disk.StatKnown(fd, p.cname, st); err != nil || n.is(st) {
				return asked, err
			}
		}
	}
	asked = bootTime()
	return asked, t.v.disk.Stat(fd, p.cname, st)
}

// unlock unlocks mu, and closes what nobody needs any more: closing can wait for the disk.
func (t *nodeTable) unlock() {
	fds, left := t.unneeded, t.left
	t.unneeded, t.left = nil, 0
	t.mu.Unlock()
	for _, fd := range fds {
		t.v.disk.Close(fd)
	}
	t.v.disk.Left(left)
}

// intern returns the node of what st describes, found at dir/cname, counting a
// lookup.
func (t *nodeTable) intern(st *unix.Stat_t, dir *Node, cname string) *Node {
	return t.internHandle(st, 0, dir, cname)
}

// internHandle is intern of an object with this handle, or none if it is 0.
func (t *nodeTable) internHandle(st *unix.Stat_t, handle uint64, dir *Node, cname string) *Node {
	t.mu.Lock()
	defer t.unlock()
	key := inodeKey{st.Dev, st.Ino}
	n := t.byInode[key]
	if n != nil && (n.typ != st.Mode&unix.S_IFMT || handle != 0 && n.handle != 0 && n.handle != handle) {
		t.supplanted(n) // behind our back
		n = nil
	}
	if n == nil {
		n = t.add(st)
		t.byInode[key] = n
	}
	if handle != 0 {
		n.handle = handle
	}
	n.lookups++
	n.addLink(location{dir, cname})
	return n
}

// removed reports whether a node has lost its last name: it gets no other one.
func (t *nodeTable) removed(n *Node) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return n.leaving || n.vanished
}

// vanished notes that another host has removed a file, so that nothing of it can be brought into order.
func (t *nodeTable) vanished(n *Node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n.gone, n.vanished = true, true
	t.v.doubts.removed(n)
}

// supplanted notes that another object has a node's inode number, since this one was removed. mu is held.
func (t *nodeTable) supplanted(n *Node) {
	n.gone = true
	n.holds++
	for len(n.links) > 0 {
		n.dropLink(n.links[0])
	}
	t.unhold(n)
}

// add makes a node that no inode number leads to. mu is held.
func (t *nodeTable) add(st *unix.Stat_t) *Node {
	n := newNode(t.v, t.last.Add(1), st)
	t.byID[n.id] = n
	return n
}

// addLink and dropLink keep links and byPlace; mu of the table is held.
func (n *Node) addLink(p location) {
	if slices.Contains(n.links, p) {
		n.v.nodes.byPlace[p] = n
		return
	}
	if n.typ == unix.S_IFDIR {
		for len(n.links) > 0 { // moved behind our back
			n.dropLink(n.links[0])
		}
	}
	n.v.nodes.byPlace[p] = n
	n.links = append(n.links, p)
	p.dir.holds++
}

func (n *Node) dropLink(p location) {
	if n.v.nodes.byPlace[p] == n {
		delete(n.v.nodes.byPlace, p)
	}
	if i := slices.Index(n.links, p); i >= 0 {
		n.links = append(n.links[:i:i], n.links[i+1:]...)
		n.v.nodes.unhold(p.dir)
	}
}

// hold keeps a node while something of it is open; release is its inverse.
func (n *Node) hold() {
	n.v.nodes.mu.Lock()
	n.holds++
	n.v.nodes.mu.Unlock()
}

func (n *Node) release() {
	n.v.nodes.mu.Lock()
	defer n.v.nodes.unlock()
	n.v.nodes.unhold(n)
}

// unhold takes back one hold; mu is held.
func (t *nodeTable) unhold(n *Node) {
	n.holds--
	t.dropIfUnknown(n)
}

// dropIfUnknown lets go of a node that neither the kernel nor anything open knows; mu is
// held.
func (t *nodeTable) dropIfUnknown(n *Node) {
	if n.lookups > 0 || n.holds > 0 || n == t.v.root {
		return
	}
	delete(t.byID, n.id)
	if key := (inodeKey{n.dev, n.ino.Load()}); t.byInode[key] == n {
		delete(t.byInode, key)
	}
	for len(n.links) > 0 {
		n.dropLink(n.links[0])
	}
	if n.IsDir() {
		t.v.dirFDs.mu.Lock()
		if fd := t.v.dirFDs.take(n); fd >= 0 {
			t.unneeded = append(t.unneeded, fd)
		}
		t.v.dirFDs.mu.Unlock()
	}
	if n.last >= 0 {
		t.unneeded = append(t.unneeded, n.last)
		n.last = -1
	}
	if n.leaving {
		n.leaving = false
		t.left++
	}
}

// moved notes that a node went from one place to another.
func (t *nodeTable) moved(n *Node, from, to location) {
	if n == nil {
		return
	}
	t.mu.Lock()
	defer t.unlock()
	n.holds++
	n.dropLink(from)
	n.addLink(to)
	n.moves.Add(1)
	t.unhold(n)
}

// replaced notes that another inode has taken the place of a file, whose node goes on.
func (t *nodeTable) replaced(n *Node, ino uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byInode, inodeKey{n.dev, n.ino.Load()})
	n.ino.Store(ino)
	n.handle = 0
	t.byInode[inodeKey{n.dev, ino}] = n
	n.moves.Add(1)
}

// files returns the open file of every node that has one.
func (t *nodeTable) files() []*file {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []*file
	for _, n := range t.byID {
		if f := n.file.Load(); f != nil {
			out = append(out, f)
		}
	}
	return out
}

// Forget takes back count lookups of a node.
func (v *Volume) Forget(id, count uint64) { v.nodes.forget(id, count) }

// Node returns the node with a number that Lookup or Create gave out, nil if
// the kernel has forgotten it.
func (v *Volume) Node(id uint64) *Node { return v.nodes.get(id) }

// Root returns the root's node, whose number is 1.
func (v *Volume) Root() *Node { return v.root }
