package volume

import (
	"container/list"
	"errors"
	"path"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/disk"
)

// Node is an object of the tree as long as the kernel, or something open, knows it.
type Node struct {
	v        *Volume
	id       uint64
	dev, ino uint64
	typ      uint32 // S_IFMT bits

	// entries, of a directory, is held for reading while an entry is looked up or made, for
	// writing while one is removed or renamed: it keeps links true. See [Volume.lockDirs].
	entries sync.RWMutex

	// Guarded by Volume.mu.
	lookups uint64     // the kernel's
	holds   int        // of children's links, open files and directories
	links   []location // its names; the root, and an object that was removed, have none
	gone    bool       // the last name went
	leaving bool       // with the space that it took
	last    int        // O_PATH, of what lost its last name or is about to; -1 otherwise
	pending bool       // a file that is still to be repaired: nobody may remember it

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
	past   cfile.Past // guarded by openMu
	sound  bool       // guarded by openMu: no earlier session has left it to be repaired

	// half is a file whose key is still waited for. Guarded by openMu.
	half *half

	believed int64       // guarded by openMu: the size that a file had when it broke, which the kernel goes on to believe in
	linked   atomic.Bool // another name was made in this mount

	moving atomic.Int64  // changes of its places under way
	moves  atomic.Uint64 // changes of its places so far

	told    atomic.Pointer[told] // of a file
	changed atomic.Uint64        // the value of Volume.clock at the last change of its attributes
}

// location is where a node is, or could be: one of its names.
type location struct {
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

// at returns the node that was found at a place, nil if none was or the kernel has
// forgotten it. The directory's entries are held, so that it is still there.
func (v *Volume) at(p location) *Node {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.places[p]
}

// unlock unlocks mu, and closes what nobody needs any more: closing can wait for the disk.
func (v *Volume) unlock() {
	fds, left := v.unneeded, v.left
	v.unneeded, v.left = nil, 0
	v.mu.Unlock()
	for _, fd := range fds {
		v.disk.Close(fd)
	}
	v.disk.Left(left)
}

// intern returns the node of what st describes, found at dir/cname, counting a
// lookup.
func (v *Volume) intern(st *unix.Stat_t, dir *Node, cname string) *Node {
	v.mu.Lock()
	defer v.unlock()
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
	n.addLink(location{dir, cname})
	return n
}

// newNode makes a node that no inode number leads to. v.mu is held.
func (v *Volume) newNode(st *unix.Stat_t) *Node {
	n := &Node{v: v, id: v.nextID.Add(1), dev: st.Dev, ino: st.Ino, typ: st.Mode & unix.S_IFMT, dirFD: -1, last: -1}
	v.nodes[n.id] = n
	return n
}

// addLink and dropLink keep links and Volume.places; v.mu is held.
func (n *Node) addLink(p location) {
	if slices.Contains(n.links, p) {
		n.v.places[p] = n
		return
	}
	if n.typ == unix.S_IFDIR {
		for len(n.links) > 0 { // moved behind our back
			n.dropLink(n.links[0])
		}
	}
	n.v.places[p] = n
	n.links = append(n.links, p)
	p.dir.holds++
}

func (n *Node) dropLink(p location) {
	if n.v.places[p] == n {
		delete(n.v.places, p)
	}
	if i := slices.Index(n.links, p); i >= 0 {
		n.links = append(n.links[:i:i], n.links[i+1:]...)
		n.v.unhold(p.dir)
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
	defer n.v.unlock()
	n.v.unhold(n)
}

// unhold takes back one hold; v.mu is held.
func (v *Volume) unhold(n *Node) {
	n.holds--
	v.dropIfUnknown(n)
}

// Forget takes back count lookups of a node.
func (v *Volume) Forget(id, count uint64) {
	v.mu.Lock()
	defer v.unlock()
	if n := v.nodes[id]; n != nil && n != v.root {
		n.lookups -= min(count, n.lookups)
		v.dropIfUnknown(n)
	}
}

// dropIfUnknown lets go of a node that neither the kernel nor anything open knows; v.mu is
// held.
func (v *Volume) dropIfUnknown(n *Node) {
	if n.lookups > 0 || n.holds > 0 || n == v.root {
		return
	}
	delete(v.nodes, n.id)
	if key := (inodeKey{n.dev, n.ino}); v.inodes[key] == n {
		delete(v.inodes, key)
	}
	for len(n.links) > 0 {
		n.dropLink(n.links[0])
	}
	if n.IsDir() {
		v.fdMu.Lock()
		if fd := v.takeDirFD(n); fd >= 0 {
			v.unneeded = append(v.unneeded, fd)
		}
		v.fdMu.Unlock()
	}
	if n.last >= 0 {
		v.unneeded = append(v.unneeded, n.last)
		n.last = -1
	}
	if n.leaving {
		n.leaving = false
		v.left++
	}
}

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
func (v *Volume) part(p location, fd int) parting {
	v.mu.Lock()
	n := v.places[p]
	if n == nil {
		v.mu.Unlock()
		return parting{at: p, fd: -1}
	}
	n.holds++
	last := n.last
	v.mu.Unlock()
	n.moving.Add(1)
	x := parting{at: p, n: n, fd: last}
	if last < 0 {
		var err error
		x.fd, err = v.disk.Open(fd, p.cname, unix.O_PATH, 0)
		x.ours = err == nil
	}
	if x.fd >= 0 {
		v.disk.Fstat(x.fd, &x.st)
	} else {
		v.disk.Stat(fd, p.cname, &x.st) // if it fails too, the removal will
	}
	return x
}

// stays ends a removal that was not made.
func (v *Volume) stays(x parting) {
	if x.n == nil {
		return
	}
	v.mu.Lock()
	defer v.unlock()
	if x.ours {
		v.unneeded = append(v.unneeded, x.fd)
	}
	x.n.moving.Add(-1)
	v.unhold(x.n)
}

// leaves ends a removal that was made. It returns the node if that was its last name.
func (v *Volume) leaves(x parting) (gone *Node) {
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
		last = v.disk.Fstat(x.fd, &now) != nil || now.Nlink == 0
	}
	v.mu.Lock()
	defer v.unlock()
	if !same {
		last = len(n.links) <= 1
	}
	if last && !n.gone {
		gone = n
		n.gone = true
		// The filesystem gives the inode number of a removed file to the next file: no
		// later lookup may find this node by it.
		if key := (inodeKey{n.dev, n.ino}); v.inodes[key] == n {
			delete(v.inodes, key)
		}
		n.leaving = true
		v.disk.Leaves()
	}
	if x.ours && last && same && n.last < 0 {
		n.last = x.fd
	} else if x.ours {
		v.unneeded = append(v.unneeded, x.fd)
	}
	n.dropLink(x.at)
	n.moves.Add(1)
	n.moving.Add(-1)
	n.change()
	v.unhold(n)
	return gone
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

// kept returns the descriptor that part made, if the node has no name any more.
func (n *Node) kept() (fd int, ok bool) {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	return n.last, n.last >= 0 && len(n.links) == 0
}

// dropIfGone closes the file of a node that has lost its last name, if no program has it
// open: a removed file needs no settling. It waits for no lock: the holder of the lock will
// see that the file is gone.
func (n *Node) dropIfGone() {
	if n == nil || !n.openMu.TryLock() {
		return
	}
	defer n.openMu.Unlock()
	if f := n.file.Load(); f != nil && f.mu.TryLock() {
		defer f.unlock()
		f.dropIfIdleLocked()
	}
}

// moved notes that a node went from one place to another.
func (v *Volume) moved(n *Node, from, to location) {
	if n == nil {
		return
	}
	v.mu.Lock()
	defer v.unlock()
	n.holds++
	n.dropLink(from)
	n.addLink(to)
	n.moves.Add(1)
	v.unhold(n)
}

// find calls f with a place of the node: a directory's descriptor and a name in
// it. f must check that it found this node, see is. Where the place is no
// longer right, another is tried.
func (n *Node) find(f func(dir int, name string) error) error {
	v := n.v
	for try := 0; ; try++ {
		settled := n.moving.Load() == 0
		moves := n.moves.Load()
		v.mu.Lock()
		links := slices.Clone(n.links)
		v.mu.Unlock()
		err := error(unix.ENOENT)
		for _, l := range links {
			if err = l.visit(f); !errors.Is(err, unix.ENOENT) && !errors.Is(err, errMoved) {
				return err
			}
		}
		// A rename or an unlink under way has changed the disk before the links.
		if settled && n.moves.Load() == moves && n.moving.Load() == 0 || len(links) == 0 || try == maxTries {
			if errors.Is(err, errMoved) {
				err = unix.ESTALE
			}
			return err
		}
		time.Sleep(50 * time.Microsecond)
	}
}

const maxTries = 10000

func (p location) visit(f func(int, string) error) error {
	fd, err := p.dir.enter()
	if err != nil {
		return err
	}
	defer p.dir.leave()
	return f(fd, p.cname)
}

var errMoved = errors.New("another object is there now")

func (n *Node) is(st *unix.Stat_t) bool { return st.Dev == n.dev && st.Ino == n.ino }

// open opens the object itself, whatever it is called now, and where it has no
// name any more.
func (n *Node) open(flags int) (fd int, err error) {
	var st unix.Stat_t
	return n.openStat(flags, &st)
}

// openStat is open that also says what fstat says of the object.
func (n *Node) openStat(flags int, st *unix.Stat_t) (fd int, err error) {
	fd, err = n.openNamed(flags, st)
	if !errors.Is(err, unix.ENOENT) {
		return fd, err
	}
	if last, ok := n.kept(); ok {
		if fd, err = n.v.disk.Reopen(last, flags|disk.FileFlags); err != nil {
			return -1, err
		}
		if err = n.v.disk.Fstat(fd, st); err != nil {
			n.v.disk.Close(fd)
			return -1, err
		}
	}
	return fd, err
}

func (n *Node) openNamed(flags int, st *unix.Stat_t) (fd int, err error) {
	err = n.find(func(dir int, name string) error {
		fd, err = n.v.disk.Open(dir, name, flags|disk.FileFlags, 0)
		if err != nil {
			return err
		}
		err = n.v.disk.Fstat(fd, st)
		if err == nil && (!n.is(st) || st.Mode&unix.S_IFMT != n.typ) {
			err = errMoved
		}
		if err != nil {
			n.v.disk.Close(fd)
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
	defer n.v.disk.Close(fd)
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
