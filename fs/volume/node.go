//go:build linux && !portable

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
	v   *Volume
	id  uint64
	dev uint64
	ino atomic.Uint64 // another one after its file was replaced, see Rekey
	typ uint32        // S_IFMT bits

	known // its users, and its names
	attributes
	directory // only of a directory
	content   // only of a file
	programLocks

	moving atomic.Int64  // changes of its places under way
	moves  atomic.Uint64 // changes of its places so far
	linked atomic.Bool   // another name was made in this mount
}

// known is guarded by nodeTable.mu.
type known struct {
	lookups  uint64     // the kernel's
	handle   uint64     // of its file, in a shared volume: another file can have the same inode number later
	holds    int        // of children's links, open files and directories
	links    []location // its names; the root, and an object that was removed, have none
	gone     bool       // the last name went
	vanished bool       // another host removed it
	leaving  bool       // with the space that it took
	last     int        // O_PATH, of what lost its last name or is about to; -1 otherwise
	pending  bool       // a file that is still to be repaired: nobody may remember it
}

// directory is the part of a node that only a directory has.
type directory struct {
	v *Volume
	n *Node

	// entries is held for reading while an entry is looked up or made, for writing while one is
	// removed or renamed: it keeps the links of the entries true. See
	// [Volume.lockDirs].
	entries sync.RWMutex
	absent  absent

	// Guarded by dirFDs.mu.
	dirFD   int // O_PATH, -1 while closed
	dirRefs int
	dirElem *list.Element

	dirMu    sync.Mutex // guards the fields below
	dirID    blockcrypt.ID
	hasID    bool
	acl      aclKnown // whether it has a default ACL
	idSynced bool     // the ID is durable
	leased   bool     // in a shared volume: this host may make entries, see leaseEntries
	leasedAt uint64   // peers.late when it was

	lookedUp     atomic.Int64 // when it was last, in nanoseconds of Unix time
	leaseChecked atomic.Bool  // checkEntries is under way
	leaseUsed    atomic.Int64 // when an entry was made last, in nanoseconds of Unix time
}

// content is the part of a node that only a file has.
type content struct {
	v *Volume
	n *Node

	lost      lost
	immutable atomic.Bool                     // by [Node.SetFlags]
	dirs      atomic.Pointer[[]blockcrypt.ID] // above the file when it had a name last, the nearest first; nil while no directory has keys
	file      atomic.Pointer[file]
	foreign   atomic.Bool // another host has changed the file since the kernel was told

	// openMu is held while the file is loaded, repaired or let go. It guards the fields below.
	openMu   sync.Mutex
	half     *half      // a file whose key is still waited for
	past     cfile.Past // of when it was closed last
	sound    uint64     // no session that ended badly has left it to be repaired, see sessions.sound
	believed int64      // the size that the file had when it broke, which the kernel goes on to believe in
	lastHead []byte     // the header when it was closed last, in a shared volume
	lastSeen version    // and the version of it
}

// newNode returns a node that st describes.
func newNode(v *Volume, id uint64, st *unix.Stat_t) *Node {
	n := &Node{v: v, id: id, dev: st.Dev, typ: st.Mode & unix.S_IFMT}
	n.ino.Store(st.Ino)
	n.attributes.v, n.attributes.n = v, n
	n.directory.v, n.directory.n = v, n
	n.content.v, n.content.n = v, n
	n.programLocks.v, n.programLocks.n = v, n
	n.last, n.dirFD = -1, -1
	return n
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
	n.v.nodes.mu.Lock()
	defer n.v.nodes.mu.Unlock()
	return n.gone
}

// setNamed notes that what was made without a name gets its first one, or does not
// after all. The descriptor stays: somebody may be using it.
func (n *Node) setNamed(named bool) {
	n.v.nodes.mu.Lock()
	defer n.v.nodes.mu.Unlock()
	key := inodeKey{n.dev, n.ino.Load()}
	if n.gone = !named; named {
		n.v.nodes.byInode[key] = n
	} else if n.v.nodes.byInode[key] == n {
		delete(n.v.nodes.byInode, key)
	}
}

// kept returns the descriptor that part made, if the node has no name any more.
func (n *Node) kept() (fd int, ok bool) {
	n.v.nodes.mu.Lock()
	defer n.v.nodes.mu.Unlock()
	return n.last, n.last >= 0 && len(n.links) == 0
}

// find calls f with a place of the node: a directory's descriptor and a name in
// it. f must check that it found this node, see is. Where the place is no
// longer right, another is tried.
func (n *Node) find(f func(dir int, name string) error) error {
	v := n.v
	for try := 0; ; try++ {
		settled := n.moving.Load() == 0
		moves := n.moves.Load()
		v.nodes.mu.Lock()
		links := slices.Clone(n.links)
		v.nodes.mu.Unlock()
		err := error(unix.ENOENT)
		for _, l := range links {
			if err = l.visit(f); !errors.Is(err, unix.ENOENT) && !errors.Is(err, errMoved) {
				return err
			}
		}
		// A rename or an unlink under way has changed the disk before the links.
		if settled && n.moves.Load() == moves && n.moving.Load() == 0 || len(links) == 0 ||
			try == maxTries {
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

// sameHandle reports whether a descriptor is of the node itself, and not of another object that has got its
// inode number.
func sameHandle(n *Node, fd int) bool {
	if !n.v.Shared() {
		return true
	}
	n.v.nodes.mu.Lock()
	handle := n.handle
	n.v.nodes.mu.Unlock()
	if handle == 0 {
		return true
	}
	now := n.v.disk.Handle(fd, "")
	return now == 0 || now == handle
}

func (n *Node) is(st *unix.Stat_t) bool { return st.Dev == n.dev && st.Ino == n.ino.Load() }

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
		if err == nil && (!n.is(st) || st.Mode&unix.S_IFMT != n.typ || !sameHandle(n, fd)) {
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

// parentID returns the ID of a directory that the node is in, zero if there is none.
func (n *Node) parentID() (id blockcrypt.ID) {
	n.v.nodes.mu.Lock()
	var dir *Node
	if len(n.links) > 0 && !n.v.plain {
		dir = n.links[0].dir
	}
	n.v.nodes.mu.Unlock()
	if dir != nil {
		dir.dirMu.Lock()
		id = dir.dirID
		dir.dirMu.Unlock()
	}
	return id
}

// where is a ciphertext path of the node below the root, for the log.
func (n *Node) where() string {
	n.v.nodes.mu.Lock()
	defer n.v.nodes.mu.Unlock()
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

// foldIno folds the device into the inode number, if the tree spans several.
func (v *Volume) foldIno(dev, ino uint64) uint64 {
	x := dev ^ v.root.dev
	return ino ^ (x<<40 | x>>24)
}

// enter returns a descriptor of a directory, good until leave is called.
func (d *directory) enter() (int, error) {
	v := d.v
	if d.n == v.root {
		return v.rootD, nil
	}
	v.dirFDs.mu.Lock()
	if d.dirFD >= 0 {
		d.dirRefs++
		v.dirFDs.list.MoveToFront(d.dirElem)
		v.dirFDs.mu.Unlock()
		return d.dirFD, nil
	}
	v.dirFDs.mu.Unlock()
	fd, err := d.n.open(unix.O_PATH | unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	v.dirFDs.mu.Lock()
	d.dirRefs++
	unneeded := []int{fd}
	if d.dirFD < 0 { // or another was faster
		d.dirFD, d.dirElem = fd, v.dirFDs.list.PushFront(d.n)
		unneeded = v.dirFDs.takeDownTo(v.dirFDs.most)
	}
	fd = d.dirFD
	v.dirFDs.mu.Unlock()
	for _, fd := range unneeded {
		v.disk.Close(fd)
	}
	return fd, nil
}

func (d *directory) leave() {
	if d.n == d.v.root {
		return
	}
	d.v.dirFDs.mu.Lock()
	d.dirRefs--
	d.v.dirFDs.mu.Unlock()
}

// place returns where the node is.
func (n *Node) place() (location, bool) {
	n.v.nodes.mu.Lock()
	defer n.v.nodes.mu.Unlock()
	if len(n.links) == 0 {
		return location{}, false
	}
	return n.links[0], true
}
