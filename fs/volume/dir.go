//go:build linux && !portable

package volume

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

// A Caller is who asks for a new object: a daemon run by root gives it to them.
type Caller struct {
	UID, GID uint32
	Umask    uint32 // applied unless the directory has a default ACL
}

// namespace has the operations on names. crossing is held by a rename from one directory to
// another, see lockDirs.
type namespace struct {
	v        *Volume
	crossing sync.Mutex
	renames  atomic.Uint64 // and links: a walk may have missed what was moved
}

// Lookup finds an entry and counts a lookup of its node; see [Volume.Forget].
// final is false for a file that could not be repaired yet: its size may change,
// so nobody may remember what was told.
func (ns *namespace) Lookup(ctx context.Context, dir *Node,
	name string) (n *Node, st Attr, final bool, err error) {
	n, st, err = ns.find(dir, func() (string, error) {
		e, err := dir.encode(name, false)
		return e.cname, err
	})
	return ns.checked(ctx, n, st, err)
}

func (ns *namespace) find(dir *Node, cname func() (string, error)) (n *Node, st Attr, err error) {
	dir.entries.RLock()
	defer dir.entries.RUnlock()
	c, err := cname()
	if err == nil {
		n, st, err = ns.lookup(dir, c)
	}
	if errors.Is(err, unix.ENOENT) && ns.v.Shared() && dir.otherID() {
		if c, err = cname(); err == nil {
			n, st, err = ns.lookup(dir, c)
		}
	}
	return n, st, err
}

// lookup finds an entry by its ciphertext name; the directory's entries are held.
func (ns *namespace) lookup(dir *Node, cname string) (n *Node, st Attr, err error) {
	if !ns.v.Shared() && dir.absent.is(cname) {
		return nil, st, unix.ENOENT
	}
	fd, err := dir.enter()
	if err != nil {
		return nil, st, err
	}
	defer dir.leave()
	if ns.v.Shared() { // else its names would be those that this host remembers
		if err := dir.fresh(fd); err != nil {
			return nil, st, err
		}
	}
	v, clock := ns.v, ns.v.clock.Load()
	asked, err := v.nodes.statAt(location{dir, cname}, fd, &st)
	if err != nil {
		return nil, st, err
	}
	// Behind the stat, for which the kernel may have looked the name up again.
	n = v.nodes.internHandle(&st, handleOf(v, fd, cname), dir, cname)
	if err := n.fill(&st, fd, cname); err != nil {
		v.Forget(n.id, 1)
		return nil, st, err
	}
	n.lookedUp.Store(time.Now().UnixNano())
	n.statted.Store(asked)
	n.tell(&st, clock)
	return n, st, nil
}

// handleOf is [disk.Disk.Handle] in a shared volume, else 0: a mount that alone writes keeps what the
// kernel knows from being removed behind its back.
func handleOf(v *Volume, fd int, cname string) uint64 {
	if !v.Shared() {
		return 0
	}
	return v.disk.Handle(fd, cname)
}

// checked repairs a file of a session that ended badly at its first lookup,
// before anybody is told its size; a second caller waits. No lock is held: it
// may need a key.
func (ns *namespace) checked(ctx context.Context, n *Node, st Attr, err error) (*Node, Attr, bool, error) {
	if err != nil || n.typ != unix.S_IFREG || !ns.v.repairs() {
		return n, st, err == nil, err
	}
	ok, err := n.checkSession(ctx)
	if err == nil && ok {
		st, err = n.Attr()
	}
	if err != nil {
		ns.v.Forget(n.id, 1)
		return nil, st, false, err
	}
	if !ok { // the next lookup makes another node, with its true size
		ns.v.nodes.mu.Lock()
		n.pending = true
		if key := (inodeKey{n.dev, n.ino.Load()}); ns.v.nodes.byInode[key] == n {
			delete(ns.v.nodes.byInode, key)
		}
		ns.v.nodes.mu.Unlock()
	}
	return n, st, ok, nil
}

// ensure prepares dir for a new entry: its ID, its name's symlink.
func (ns *namespace) ensure(dir *Node, name string) (e entryName, fd int, err error) {
	if ns.v.o.ReadOnly {
		return e, -1, unix.EROFS
	}
	if e, err = dir.encode(name, true); err != nil {
		return e, -1, err
	}
	fd, err = dir.enter()
	return e, fd, err
}

// make runs a syscall that makes an entry, gives the object to its user, and
// looks it up. f returns a descriptor of the new object, or -1.
func (ns *namespace) make(dir *Node, name string, c Caller, mode uint32,
	f func(fd int, cname string, mode uint32) (int, error)) (n *Node, st Attr, err error) {
	dir.entries.RLock()
	defer dir.entries.RUnlock()
	unlock, err := ns.v.locks.lockLong(name)
	if err != nil {
		return nil, st, err
	}
	defer unlock()
	e, fd, err := ns.ensure(dir, name)
	if err != nil {
		return nil, st, err
	}
	defer dir.leave()
	mode = dir.masked(fd, mode, c)
	dir.absent.comes(e.cname)
	made, err := f(fd, e.cname, mode)
	if err != nil {
		e.undo(&ns.v.disk, fd)
		return nil, st, err
	}
	if err := ns.give(fd, e.cname, c, mode); err != nil {
		return nil, st, err
	}
	if made < 0 {
		return ns.lookup(dir, e.cname)
	}
	clock := ns.v.clock.Load()
	if err := ns.v.disk.Fstat(made, &st); err != nil {
		return nil, st, err
	}
	n = ns.v.nodes.internHandle(&st, handleOf(ns.v, made, ""), dir, e.cname)
	if err := n.fill(&st, fd, e.cname); err != nil {
		ns.v.Forget(n.id, 1)
		return nil, st, err
	}
	n.tell(&st, clock)
	return n, st, nil
}

// nothing is what a function for make returns that has no descriptor.
func nothing(err error) (int, error) { return -1, err }

// Mkdir makes a directory.
func (ns *namespace) Mkdir(ctx context.Context, dir *Node, name string, mode uint32,
	c Caller) (*Node, Attr, error) {
	return ns.make(dir, name, c, mode, func(fd int, cname string, mode uint32) (int, error) {
		return nothing(ns.v.disk.Mkdir(fd, cname, mode&^unix.S_IFMT))
	})
}

// Mknod makes a file, device, pipe or socket.
func (ns *namespace) Mknod(ctx context.Context, dir *Node, name string,
	n NewNode) (*Node, Attr, error) {
	return ns.make(dir, name, n.Caller, n.Mode, func(fd int, cname string, mode uint32) (int, error) {
		return nothing(ns.v.disk.Mknod(fd, cname, mode, int(n.Rdev)))
	})
}

// Symlink makes a symlink whose target is encrypted.
func (ns *namespace) Symlink(ctx context.Context, dir *Node, name, target string,
	c Caller) (*Node, Attr, error) {
	sealed, err := ns.v.vk.SealTarget(target)
	if err != nil {
		return nil, Attr{}, err
	}
	return ns.make(dir, name, c, unix.S_IFLNK, func(fd int, cname string, _ uint32) (int, error) {
		return nothing(ns.v.disk.Symlink(sealed, fd, cname))
	})
}

// Link makes a further name of a file. One that is still to settle settles
// first.
func (ns *namespace) Link(ctx context.Context, n, dir *Node, name string) (*Node, Attr, error) {
	ns.renames.Add(1)
	defer ns.renames.Add(1) // a scan that began meanwhile looks again
	if err := n.mayLink(dir); err != nil {
		return nil, Attr{}, err
	}
	if f := n.file.Load(); f != nil {
		if err := f.settleNow(); err != nil {
			return nil, Attr{}, err
		}
	}
	return ns.make(dir, name, Caller{}, 0, func(fd int, cname string, _ uint32) (int, error) {
		if last, ok := n.kept(); ok { // made without a name
			// Before the name is there: who looks it up must find this node.
			n.setNamed(true)
			err := ns.v.disk.LinkFD(last, fd, cname)
			if err != nil {
				n.setNamed(false)
			}
			return nothing(err)
		}
		n.linked.Store(true)
		// By a descriptor: the old name may be another file's by now.
		return nothing(n.set(func(old int) error { return ns.v.disk.LinkFD(old, fd, cname) }))
	})
}

// Readlink returns the target of a symlink.
func (ns *namespace) Readlink(n *Node) (target string, err error) {
	// By a descriptor: the name may be another symlink's from one call to the next.
	err = n.withFD(func(fd int) error {
		sealed, err := ns.v.disk.Readlink(fd, "")
		if err == nil {
			target, err = ns.v.vk.OpenTarget(sealed)
		}
		return err
	})
	if blockcrypt.ClassOf(err) != "" {
		ns.v.report(n.where(), "a symlink cannot be read", err)
	}
	return target, err
}

// masked applies the umask, unless the directory has a default ACL.
func (d *directory) masked(fd int, mode uint32, c Caller) uint32 {
	if c.Umask == 0 || d.hasDefaultACL(fd) {
		return mode
	}
	return mode &^ (c.Umask & 0o777)
}

type aclKnown int8

const (
	aclUnknown aclKnown = iota
	aclNone
	aclDefault
)

func (d *directory) hasDefaultACL(fd int) bool {
	d.dirMu.Lock()
	defer d.dirMu.Unlock()
	if d.acl == aclUnknown {
		d.acl = aclNone
		if d.v.disk.Hasxattr(fd, aclDefaultName) {
			d.acl = aclDefault
		}
	}
	return d.acl == aclDefault
}

// owners returns to whom a new entry of the directory fd belongs; ok is false where it
// belongs to whom it should already.
func (ns *namespace) owners(fd int, c Caller) (uid, gid int, ok bool) {
	if !ns.v.super || c.UID == 0 && c.GID == 0 {
		return 0, 0, false
	}
	var parent unix.Stat_t
	if err := ns.v.disk.Fstat(fd, &parent); err == nil && parent.Mode&unix.S_ISGID != 0 {
		return int(c.UID), -1, true
	}
	return int(c.UID), int(c.GID), true
}

// give makes the caller own a new entry, where root made it. The group is the
// directory's where that is setgid. An entry that cannot be given away goes.
func (ns *namespace) give(fd int, cname string, c Caller, mode uint32) (err error) {
	uid, gid, ok := ns.owners(fd, c)
	if !ok {
		return nil
	}
	err = ns.v.disk.ChownAt(fd, cname, uid, gid)
	if err == nil && mode&(unix.S_ISUID|unix.S_ISGID) != 0 && mode&unix.S_IFMT != unix.S_IFLNK {
		err = ns.v.disk.ChmodAt(fd, cname, mode&^unix.S_IFMT) // chown took the bits
	}
	if err != nil {
		if ns.v.disk.Unlink(fd, cname, 0) == unix.EISDIR {
			ns.v.disk.Unlink(fd, cname, unix.AT_REMOVEDIR)
		}
	}
	return err
}

// lockDirs locks the entries of two directories for writing, or of one that is both. The
// order is that of Linux (Documentation/filesystems/directory-locking): a directory comes
// before those below it, and of two that are not one below the other the one that became
// known first. Only renames from one directory to another change what is below what, and
// of those there is one at a time.
func (ns *namespace) lockDirs(a, b *Node) (unlock func()) {
	if a == b {
		a.entries.Lock()
		return a.entries.Unlock
	}
	ns.crossing.Lock()
	if b.above(a) || b.id < a.id && !a.above(b) {
		a, b = b, a
	}
	a.entries.Lock()
	b.entries.Lock()
	return func() {
		b.entries.Unlock()
		a.entries.Unlock()
		ns.crossing.Unlock()
	}
}

// above reports whether directory m is below n, or is n.
func (d *directory) above(m *Node) bool {
	d.v.nodes.mu.Lock()
	defer d.v.nodes.mu.Unlock()
	for m != d.n && len(m.links) > 0 {
		m = m.links[0].dir
	}
	return m == d.n
}

// Unlink removes a name of anything but a directory. No key is needed.
func (ns *namespace) Unlink(dir *Node, name string) error {
	return ns.remove(dir, name, func(fd int, cname string) error { return ns.v.disk.Unlink(fd, cname, 0) })
}

// Rmdir removes an empty directory, with what kmsfs keeps in it.
func (ns *namespace) Rmdir(dir *Node, name string) error {
	return ns.remove(dir, name, func(fd int, cname string) error {
		return ns.clearDir(dir, fd, cname, nil, func() error { return ns.v.disk.Unlink(fd, cname, unix.AT_REMOVEDIR) })
	})
}

func (ns *namespace) remove(dir *Node, name string, f func(fd int, cname string) error) error {
	if ns.v.o.ReadOnly {
		return unix.EROFS
	}
	gone, err := func() (*Node, error) {
		dir.entries.Lock()
		defer dir.entries.Unlock()
		unlock, err := ns.v.locks.lockLong(name)
		if err != nil {
			return nil, err
		}
		defer unlock()
		e, err := dir.encode(name, false)
		if err != nil {
			return nil, err
		}
		fd, err := dir.enter()
		if err != nil {
			return nil, err
		}
		defer dir.leave()
		x := ns.v.nodes.part(location{dir, e.cname}, fd)
		if err := f(fd, e.cname); err != nil {
			ns.v.nodes.stays(x)
			return nil, err
		}
		dir.absent.gone(e.cname)
		e.dropName(&ns.v.disk, fd)
		return ns.v.nodes.leaves(x), nil
	}()
	gone.dropIfGone()
	return err
}

// clearDir removes what kmsfs keeps in the directory dir/cname, if nothing else
// is there: ENOTEMPTY before touching anything. Then it calls remove, and puts back what it took away
// if that fails. The entries of dir are held for writing, and of held too if it is not nil.
func (ns *namespace) clearDir(dir *Node, fd int, cname string, held *Node, remove func() error) error {
	var st unix.Stat_t
	if err := ns.v.disk.Stat(fd, cname, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return unix.ENOTDIR
	}
	n := ns.v.nodes.intern(&st, dir, cname)
	defer ns.v.Forget(n.id, 1)
	if held != nil && n.above(held) { // held is in it, or is it and has an entry
		return unix.ENOTEMPTY
	}
	n.entries.Lock()
	defer n.entries.Unlock()
	d, err := n.enter()
	if err != nil {
		return err
	}
	defer n.leave()
	if !ns.v.super && st.Mode&0o700 != 0o700 && int(st.Uid) == unix.Geteuid() {
		// An empty directory can be removed whatever its own mode is.
		if err := ns.v.disk.Chmod(d, st.Mode&0o7777|0o700); err != nil {
			return err
		}
		defer ns.v.disk.Chmod(d, st.Mode&0o7777)
	}
	unlock, err := n.lockForRemoval()
	if err != nil {
		return err
	}
	defer unlock()
	id, has, err := n.ownID(d)
	if vanished(err) {
		return unix.ENOENT // another host was faster
	}
	if err != nil {
		return err
	}
	own, err := n.emptied(d)
	if err != nil {
		return err
	}
	// kmsfs.dir first: who sees it sees the other place, too.
	slices.SortFunc(own, func(a, b string) int { return cmp.Compare(len(a), len(b)) })
	for _, name := range own {
		if err = disk.Ignore(ns.v.disk.Unlink(d, name, 0), unix.ENOENT); err != nil {
			break
		}
	}
	if err == nil {
		if err = remove(); err == nil {
			n.forgetID()
			return nil
		}
	}
	if has { // somebody has made an entry before; it must not be without the ID
		err = errors.Join(err, disk.Ignore(layout.MendDirID(&ns.v.disk, d, id), unix.ENOENT))
	}
	return err
}

// Rename moves an entry; flags are those of renameat2: RENAME_NOREPLACE,
// RENAME_EXCHANGE, RENAME_WHITEOUT.
func (ns *namespace) Rename(from *Node, oldName string, to *Node, newName string, flags uint32) error {
	if ns.v.o.ReadOnly {
		return unix.EROFS
	}
	unlock := ns.lockDirs(from, to)
	ns.renames.Add(1)
	defer ns.renames.Add(1) // a scan that began meanwhile looks again
	gone, err := ns.renameLocked(from, oldName, to, newName, flags)
	unlock()
	gone.dropIfGone()
	return err
}

// renameLocked is Rename with the entries of both directories held. It returns the node
// that has lost its last name, if one has.
func (ns *namespace) renameLocked(from *Node, oldName string, to *Node, newName string,
	flags uint32) (gone *Node, err error) {
	unlock, err := ns.v.locks.lockLong(oldName, newName)
	if err != nil {
		return nil, err
	}
	defer unlock()
	old, err := from.encode(oldName, false)
	if err != nil {
		return nil, err
	}
	ofd, err := from.enter()
	if err != nil {
		return nil, err
	}
	defer from.leave()
	now, nfd, err := ns.ensure(to, newName)
	if err != nil {
		return nil, err
	}
	defer to.leave()
	a, b := location{from, old.cname}, location{to, now.cname}
	exchange := flags&unix.RENAME_EXCHANGE != 0
	err = ns.mayMove(a, to)
	if err == nil && exchange {
		err = ns.mayMove(b, from)
	}
	if err != nil {
		now.undo(&ns.v.disk, nfd)
		return nil, err
	}
	n, m := ns.v.nodes.at(a), ns.v.nodes.at(b)
	if n != nil {
		n.moving.Add(1)
		defer n.moving.Add(-1)
	}
	var x parting
	switch {
	case exchange && m != nil:
		m.moving.Add(1)
		defer m.moving.Add(-1)
	case !exchange && m != n:
		x = ns.v.nodes.part(b, nfd)
	}
	to.absent.comes(now.cname)
	err = ns.v.disk.Rename(ofd, old.cname, nfd, now.cname, flags)
	if flags&(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) == 0 &&
		(errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST)) {
		err = ns.clearDir(to, nfd, now.cname, from, func() error {
			return ns.v.disk.Rename(ofd, old.cname, nfd, now.cname, flags)
		})
	}
	if err != nil {
		ns.v.nodes.stays(x)
		now.undo(&ns.v.disk, nfd)
		return nil, err
	}
	if n == nil || n.IsDir() || exchange && (m == nil || m.IsDir()) || ns.v.repairs() {
		ns.v.walker.moves.Add(1)
	}
	if a == b || n != nil && n == m && !exchange {
		ns.v.nodes.stays(x)
		return nil, nil // rename of a hard link onto another of the same file does nothing
	}
	if exchange {
		ns.v.nodes.moved(n, a, b)
		ns.v.nodes.moved(m, b, a)
		return nil, nil
	}
	gone = ns.v.nodes.leaves(x)
	ns.v.nodes.moved(n, a, b)
	var st unix.Stat_t
	if old.name != "" && ns.v.disk.Stat(ofd, old.cname, &st) == nil {
		return gone, nil // another name of the same file was there, of which nothing was known: it did nothing
	}
	if flags&unix.RENAME_WHITEOUT == 0 {
		from.absent.gone(old.cname)
		old.dropName(&ns.v.disk, ofd)
	}
	return gone, nil
}

// mayMove is [Node.mayMove] of the node at a place.
func (ns *namespace) mayMove(at location, to *Node) error {
	if at.dir == to || len(ns.v.lists.now().byDir) == 0 {
		return nil
	}
	n, _, err := ns.lookup(at.dir, at.cname)
	if err != nil {
		return err
	}
	defer ns.v.Forget(n.id, 1)
	return n.mayMove(at.dir, to)
}
