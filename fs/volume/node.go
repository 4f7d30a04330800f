package volume

import (
	"container/list"
	"errors"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
)

// Node is an object of the tree as long as the kernel, or something open, knows it.
type Node struct {
	v        *Volume
	id       uint64
	dev, ino uint64
	typ      uint32 // S_IFMT bits

	// Guarded by Volume.mu.
	lookups uint64 // the kernel's
	holds   int    // of children's links, open files and directories
	links   []link // where it is: none for the root, or when it is gone
	gone    bool   // the last name went
	leaving bool   // with the space that it took
	last    int    // O_PATH, of what lost its last name or is about to; -1 otherwise
	pending bool   // a file that is still to be repaired: nobody may remember it

	// Guarded by Volume.fdMu, of directories.
	dirFD   int // O_PATH, -1 while closed
	dirRefs int
	dirElem *list.Element

	// dirMu guards the ID of a directory.
	dirMu    sync.Mutex
	dirID    blockcrypt.ID
	hasID    bool
	acl      aclKnown // whether it has a default ACL
	idSynced bool     // the ID is durable

	// lostMu guards lost.
	lostMu  sync.Mutex
	lost    lost
	anyLost atomic.Bool

	immutable atomic.Bool // by [Node.SetFlags]

	// openMu is held while the file is loaded, repaired or let go.
	openMu sync.Mutex
	file   atomic.Pointer[file]
	fresh  fresh // guarded by openMu
	sound  bool  // guarded by openMu: no earlier session has left it to be repaired

	believed int64       // guarded by openMu: the size that a file had when it broke, which the kernel goes on to believe in
	linked   atomic.Bool // another name was made in this mount
}

// link is one name of a node.
type link struct {
	dir   *Node
	cname string // as it stands in the ciphertext directory
}

// Attr is what stat says of a node: plaintext size, folded inode number.
type Attr = unix.Stat_t

// ID returns the node's number: 1 for the root, never used twice in a mount.
func (n *Node) ID() uint64 { return n.id }

// IsDir reports whether the node is a directory.
func (n *Node) IsDir() bool { return n.typ == unix.S_IFDIR }

// IsFile reports whether the node is a regular file.
func (n *Node) IsFile() bool { return n.typ == unix.S_IFREG }

// Gone reports whether the node has no name any more.
func (n *Node) Gone() bool {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	return n.gone
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

// Node returns the node with a number that Lookup or Create gave out, nil if
// the kernel has forgotten it.
func (v *Volume) Node(id uint64) *Node {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.nodes[id]
}

// intern returns the node of what st describes, found at dir/cname, counting a
// lookup.
func (v *Volume) intern(st *unix.Stat_t, dir *Node, cname string) *Node {
	v.mu.Lock()
	defer v.mu.Unlock()
	key := inodeKey{st.Dev, st.Ino}
	n := v.inodes[key]
	if n != nil && n.typ != st.Mode&unix.S_IFMT { // changed behind our back
		n.gone, n = true, nil
	}
	if n == nil {
		n = v.newNode(st)
		v.inodes[key] = n
	}
	n.lookups++
	n.addLink(dir, cname)
	return n
}

// newNode makes a node that no inode number leads to. v.mu is held.
func (v *Volume) newNode(st *unix.Stat_t) *Node {
	n := &Node{v: v, id: v.nextID.Add(1), dev: st.Dev, ino: st.Ino, typ: st.Mode & unix.S_IFMT, dirFD: -1, last: -1}
	v.nodes[n.id] = n
	return n
}

// addLink and dropLink keep links; v.mu is held.
func (n *Node) addLink(dir *Node, cname string) {
	for _, l := range n.links {
		if l.dir == dir && l.cname == cname {
			return
		}
	}
	if n.typ == unix.S_IFDIR {
		for len(n.links) > 0 { // moved behind our back
			n.dropLink(n.links[0].dir, n.links[0].cname)
		}
	}
	n.links = append(n.links, link{dir, cname})
	dir.holds++
}

func (n *Node) dropLink(dir *Node, cname string) {
	for i, l := range n.links {
		if l.dir == dir && l.cname == cname {
			n.links = append(n.links[:i:i], n.links[i+1:]...)
			n.v.unhold(dir)
			return
		}
	}
}

// hold keeps a node while something of it is open; release is its inverse.
func (n *Node) hold() {
	n.v.mu.Lock()
	n.holds++
	n.v.mu.Unlock()
}

func (n *Node) release() {
	n.v.mu.Lock()
	n.v.unhold(n)
	n.v.mu.Unlock()
}

func (v *Volume) unhold(n *Node) {
	n.holds--
	v.dropIfUnknown(n)
}

// Forget takes back count lookups of a node.
func (v *Volume) Forget(id, count uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if n := v.nodes[id]; n != nil && n != v.root {
		n.lookups -= min(count, n.lookups)
		v.dropIfUnknown(n)
	}
}

func (v *Volume) dropIfUnknown(n *Node) {
	if n.lookups > 0 || n.holds > 0 || n == v.root {
		return
	}
	delete(v.nodes, n.id)
	if key := (inodeKey{n.dev, n.ino}); v.inodes[key] == n {
		delete(v.inodes, key)
	}
	for len(n.links) > 0 {
		n.dropLink(n.links[0].dir, n.links[0].cname)
	}
	if n.IsDir() {
		v.closeDir(n)
	}
	if n.last >= 0 {
		v.disk.close(n.last)
		n.last = -1
	}
	if n.leaving {
		n.leaving = false
		v.leaving.Add(-1)
	}
}

// keep opens what st describes, at fd/cname, before its last name goes, if the
// kernel knows it: it goes on asking by number, for a moment after a rename over
// it, and as long as something refers to it. take closes it where the name stays
// after all.
func (v *Volume) keep(st *unix.Stat_t, fd int, cname string) (take func()) {
	v.mu.Lock()
	n := v.inodes[inodeKey{st.Dev, st.Ino}]
	needed := n != nil && n.last < 0 && (n.IsDir() || st.Nlink == 1)
	if needed {
		n.holds++
	}
	v.mu.Unlock()
	if !needed {
		return func() {}
	}
	last, err := v.disk.open(fd, cname, unix.O_PATH, 0)
	v.mu.Lock()
	defer v.mu.Unlock()
	if err == nil {
		n.last = last
	}
	v.unhold(n)
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if n.last >= 0 && !n.gone {
			v.disk.close(n.last)
			n.last = -1
		}
	}
}

// setNamed notes that what was made without a name gets its first one, or does not
// after all. The descriptor stays: somebody may be using it.
func (n *Node) setNamed(named bool) {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	key := inodeKey{n.dev, n.ino}
	if n.gone = !named; named {
		n.v.inodes[key] = n
	} else if n.v.inodes[key] == n {
		delete(n.v.inodes, key)
	}
}

// kept returns the descriptor that keep made, of what has no name any more.
func (n *Node) kept() (fd int, ok bool) {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	return n.last, n.last >= 0 && len(n.links) == 0
}

// unlinked notes that dir/cname, which st described, is gone.
func (v *Volume) unlinked(st *unix.Stat_t, dir *Node, cname string) {
	n := v.forgetName(st, dir, cname)
	// What was to be settled is let go. Nobody is waited for: who has the file will see
	// that it is gone.
	if n == nil || !n.openMu.TryLock() {
		return
	}
	defer n.openMu.Unlock()
	if f := n.file.Load(); f != nil && f.mu.TryLock() {
		defer f.mu.Unlock()
		f.dropIfIdleLocked()
	}
}

// forgetName is unlinked as far as names go, and returns the node that has lost its last
// one, nil if none has.
func (v *Volume) forgetName(st *unix.Stat_t, dir *Node, cname string) (gone *Node) {
	v.mu.Lock()
	defer v.mu.Unlock()
	key := inodeKey{st.Dev, st.Ino}
	n := v.inodes[key]
	if n == nil {
		return nil
	}
	// The filesystem gives the number of what has no name to the next file: no
	// later lookup may find this node by it.
	if st.Nlink <= 1 || n.IsDir() {
		gone = n
		n.gone = true
		delete(v.inodes, key)
		n.leaving = true
		v.leaving.Add(1)
		t := time.Now()
		v.removed.Store(&t)
	}
	n.dropLink(dir, cname)
	v.dropIfUnknown(n)
	return gone
}

// moved notes that what st describes went from one name to another.
func (v *Volume) moved(st *unix.Stat_t, from *Node, old string, to *Node, cname string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if n := v.inodes[inodeKey{st.Dev, st.Ino}]; n != nil {
		n.dropLink(from, old)
		n.addLink(to, cname)
	}
}

// Descriptors of directories, the least recently used of which are closed.

type dirLRU struct{ list list.List } // of *Node; most recently used first

func (l *dirLRU) init() { l.list.Init() }

// closeDirs closes them all.
func (v *Volume) closeDirs() {
	for e := v.dirLRU.list.Front(); e != nil; e = e.Next() {
		v.disk.close(e.Value.(*Node).dirFD)
	}
	v.dirLRU.list.Init()
}

// enter returns a descriptor of a directory, good until leave is called.
func (n *Node) enter() (int, error) {
	v := n.v
	if n == v.root {
		return v.rootD, nil
	}
	v.fdMu.Lock()
	if n.dirFD >= 0 {
		n.dirRefs++
		v.dirLRU.list.MoveToFront(n.dirElem)
		v.fdMu.Unlock()
		return n.dirFD, nil
	}
	v.fdMu.Unlock()
	fd, err := n.open(unix.O_PATH | unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	v.fdMu.Lock()
	defer v.fdMu.Unlock()
	n.dirRefs++
	if n.dirFD >= 0 { // another was faster
		v.disk.close(fd)
		return n.dirFD, nil
	}
	n.dirFD, n.dirElem = fd, v.dirLRU.list.PushFront(n)
	v.closeDirsDownTo(v.fdLimits.cached)
	return n.dirFD, nil
}

func (n *Node) leave() {
	if n == n.v.root {
		return
	}
	n.v.fdMu.Lock()
	n.dirRefs--
	n.v.fdMu.Unlock()
}

func (v *Volume) closeDir(n *Node) {
	v.fdMu.Lock()
	defer v.fdMu.Unlock()
	v.closeDirLocked(n)
}

func (v *Volume) closeDirLocked(n *Node) {
	if n.dirFD >= 0 && n.dirElem != nil && n.dirRefs == 0 {
		v.disk.close(n.dirFD)
		v.dirLRU.list.Remove(n.dirElem)
		n.dirFD, n.dirElem = -1, nil
	}
}

// at calls f with a place of the node: a directory's descriptor and a name in
// it. f must check that it found this node, see is. Where the place is no
// longer right, another is tried.
func (n *Node) at(f func(dir int, name string) error) error {
	v := n.v
	for try := 0; ; try++ {
		settled := v.moving.Load() == 0
		gen := v.moves.Load()
		v.mu.Lock()
		links := append([]link(nil), n.links...)
		v.mu.Unlock()
		err := error(unix.ENOENT)
		for _, l := range links {
			if err = l.visit(f); !errors.Is(err, unix.ENOENT) && !errors.Is(err, errMoved) {
				return err
			}
		}
		// A rename or an unlink under way has changed the disk before the links.
		if settled && v.moves.Load() == gen && v.moving.Load() == 0 || len(links) == 0 || try == maxTries {
			if errors.Is(err, errMoved) {
				err = unix.ESTALE
			}
			return err
		}
		time.Sleep(50 * time.Microsecond)
	}
}

const maxTries = 10000

// moveBegins and moveEnds stand around what changes the place of a node, on the
// disk and in its links.
func (v *Volume) moveBegins() { v.moving.Add(1) }

func (v *Volume) moveEnds() {
	v.moves.Add(1)
	v.moving.Add(-1)
}

func (l link) visit(f func(int, string) error) error {
	fd, err := l.dir.enter()
	if err != nil {
		return err
	}
	defer l.dir.leave()
	return f(fd, l.cname)
}

var errMoved = errors.New("another object is there now")

func (n *Node) is(st *unix.Stat_t) bool { return st.Dev == n.dev && st.Ino == n.ino }

// open opens the object itself, whatever it is called now, and where it has no
// name any more.
func (n *Node) open(flags int) (fd int, err error) {
	fd, err = n.openNamed(flags)
	if errors.Is(err, unix.ENOENT) {
		if last, ok := n.kept(); ok {
			return n.v.disk.reopen(last, flags|fileFlags)
		}
	}
	return fd, err
}

func (n *Node) openNamed(flags int) (fd int, err error) {
	err = n.at(func(dir int, name string) error {
		fd, err = n.v.disk.open(dir, name, flags|fileFlags, 0)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		err = n.v.fstat(fd, &st)
		if err == nil && (!n.is(&st) || st.Mode&unix.S_IFMT != n.typ) {
			err = errMoved
		}
		if err != nil {
			n.v.disk.close(fd)
		}
		return err
	})
	if err != nil {
		return -1, err
	}
	return fd, nil
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
	defer n.v.disk.close(fd)
	return f(fd)
}

// parentID returns the ID of a directory that the node is in, zero if there is none.
func (n *Node) parentID() (id blockcrypt.ID) {
	n.v.mu.Lock()
	var dir *Node
	if len(n.links) > 0 && !n.v.plain {
		dir = n.links[0].dir
	}
	n.v.mu.Unlock()
	if dir != nil {
		dir.dirMu.Lock()
		id = dir.dirID
		dir.dirMu.Unlock()
	}
	return id
}

// where is a ciphertext path of the node below the root, for the log.
func (n *Node) where() string {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	return n.whereLocked()
}

func (n *Node) whereLocked() string {
	p := ""
	for n != n.v.root {
		if len(n.links) == 0 {
			return path.Join("(removed)", p)
		}
		p = path.Join(n.links[0].cname, p)
		n = n.links[0].dir
	}
	if p == "" {
		return "."
	}
	return p
}
