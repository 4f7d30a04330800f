//go:build linux && !portable

package volume

import (
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

// dirIdent returns the directory's ID. One without entries has none yet: ok is false,
// unless create is set, which makes one.
func (d *directory) dirIdent(create bool) (id blockcrypt.ID, ok bool, err error) {
	if d.v.plain {
		return id, true, nil
	}
	d.dirMu.Lock()
	defer d.dirMu.Unlock()
	if create && d.v.Shared() && d.n != d.v.root {
		id, err = d.leaseEntries()
		return id, err == nil, err
	}
	if d.hasID {
		return d.dirID, true, nil
	}
	fd, err := d.enter()
	if err != nil {
		return id, false, err
	}
	defer d.leave()
	id, ok, err = d.readDirID(fd)
	if vanished(err) {
		return id, false, err
	}
	if err != nil {
		d.v.report(d.n.where(), "a directory cannot be read", err)
		return id, false, unix.EIO
	}
	if !ok && create {
		if id, err = layout.NewDirID(&d.v.disk, fd); err != nil {
			return id, false, err
		}
		ok = true
	}
	if ok {
		d.dirID, d.hasID = id, true
	}
	return id, ok, nil
}

// ownID returns the ID that the directory has on the disk; has is false if it has none.
func (d *directory) ownID(fd int) (id blockcrypt.ID, has bool, err error) {
	if d.v.plain {
		return id, false, nil
	}
	d.dirMu.Lock()
	defer d.dirMu.Unlock()
	id, has, err = d.readDirID(fd)
	if vanished(err) {
		return id, false, err
	}
	if err != nil {
		d.v.report(d.n.where(), "a directory cannot be read", err)
		return id, false, unix.EIO
	}
	return id, has, nil
}

// otherID reports whether the directory has another ID by now than is remembered, since another host
// has begun to remove it, and takes that. It reads nothing while this host's lock keeps others from that.
func (d *directory) otherID() bool {
	if d.v.plain || d.n == d.v.root || d.v.locks.keeps(d) {
		return false
	}
	fd, err := d.enter()
	if err != nil {
		return false
	}
	defer d.leave()
	x, err := layout.ReadDirID(&d.v.disk, fd) // as fresh as the lookup that has found nothing
	if err != nil {
		return false
	}
	id, has, _, err := x.Resolve()
	if err != nil {
		return false
	}
	d.dirMu.Lock()
	defer d.dirMu.Unlock()
	if d.hasID == has && d.dirID == id {
		return false
	}
	d.dirID, d.hasID, d.idSynced = id, has, false
	return has
}

// forgetID is called when the directory's ID was removed from the disk.
func (d *directory) forgetID() {
	d.dirMu.Lock()
	defer d.dirMu.Unlock()
	if d.n != d.v.root {
		d.hasID, d.idSynced = false, false
	}
}

// readDirID reads the ID of a directory. A place of it that is lost is made again if the volume
// is writable; the other one is enough to go on.
func (d *directory) readDirID(fd int) (id blockcrypt.ID, ok bool, err error) {
	id, ok, lost, err := d.lookDirID(fd)
	// Of a shared volume it is another host, perhaps, that removes the directory just now.
	if lost && !d.v.o.ReadOnly && !d.v.Shared() {
		if err := layout.MendDirID(&d.v.disk, fd, id); err != nil {
			d.v.log.Warn("one of the two places of a directory's ID is lost and cannot be made again", "error", err)
		}
	}
	return id, ok, err
}

// encode returns the ciphertext name of an entry, and the encoded name in full
// if that is a long one. With create, the directory gets its ID, and a long
// name its symlink; made says that it was made now. Without, an entry of a
// directory that has no ID is ENOENT.
func (d *directory) encode(name string, create bool) (e entryName, err error) {
	if len(name) > 255 {
		return e, unix.ENAMETOOLONG
	}
	v := d.v
	if v.plain {
		if d.n == v.root && layout.IsOwn(name) {
			if create {
				return e, unix.EPERM
			}
			return e, unix.ENOENT
		}
		return entryName{cname: name}, nil
	}
	id, ok, err := d.dirIdent(create)
	if err != nil {
		return e, err
	}
	if !ok {
		return e, unix.ENOENT
	}
	encoded, err := v.vk.EncodeName(id, name)
	if err != nil {
		return e, unix.EINVAL
	}
	hash, long := blockcrypt.LongHash(encoded)
	if !long {
		return entryName{cname: encoded}, nil
	}
	e = entryName{cname: blockcrypt.LongPrefix + hash, name: blockcrypt.LongName + hash}
	if create {
		fd, err := d.enter()
		if err != nil {
			return e, err
		}
		defer d.leave()
		err = v.disk.Symlink(encoded, fd, e.name)
		e.made = err == nil
		return e, disk.Ignore(err, unix.EEXIST)
	}
	return e, nil
}

// entryName is where an entry stands: its ciphertext name and, for a long one,
// the symlink that holds the encoded name.
type entryName struct {
	cname string
	name  string // "" unless long
	made  bool   // name was made by this operation
}

// undo removes the symlink of a long name that this operation made, after it failed.
func (e entryName) undo(d *disk.Disk, fd int) {
	if e.made {
		var st unix.Stat_t
		if d.Stat(fd, e.cname, &st) == unix.ENOENT {
			d.Unlink(fd, e.name, 0) // a leftover is harmless: rmdir takes it along
		}
	}
}

// dropName removes the symlink of a long name whose entry is gone. What a
// failure leaves is harmless.
func (e entryName) dropName(d *disk.Disk, fd int) {
	if e.name != "" {
		d.Unlink(fd, e.name, 0)
	}
}

// decode returns the plaintext name of a ciphertext entry; ok is false for what
// is kmsfs' own. Names that do not decode are an error.
func (d *directory) decode(fd int, id blockcrypt.ID, cname string) (name string, ok bool, err error) {
	v := d.v
	if v.plain {
		return cname, d.n != v.root || !layout.IsOwn(cname), nil
	}
	encoded, err := layout.EncodedName(&v.disk, fd, cname)
	if err != nil || encoded == "" {
		return "", false, err
	}
	name, err = v.vk.DecodeName(id, encoded)
	return name, err == nil, err
}

// emptied reports whether only kmsfs' own entries are in a directory, and
// which: those go with it. Anything foreign is ENOTEMPTY.
func (d *directory) emptied(fd int) (own []string, err error) {
	for end := time.Now().Add(sillyFor); ; time.Sleep(5 * time.Millisecond) {
		own, silly, err := d.ownEntries(fd)
		if err == nil && silly && time.Now().After(end) {
			err = unix.ENOTEMPTY
		}
		if err != nil || !silly {
			return own, err
		}
	}
}

// sillyFor is how long a directory counts as not empty for a removed file that NFS keeps: the kernel closes
// such a file only after the removal was answered.
const sillyFor = 500 * time.Millisecond

// ownEntries returns the entries of a directory, which are kmsfs' own; silly says that NFS keeps removed
// files in it.
func (d *directory) ownEntries(fd int) (own []string, silly bool, err error) {
	err = d.v.disk.Scan(fd, func(e disk.Dirent) error {
		switch {
		case d.v.plain:
			return unix.ENOTEMPTY
		case layout.IsSilly(e.Name):
			silly = true
			return nil
		case layout.IsDirID(e.Name):
		case strings.HasPrefix(e.Name, blockcrypt.LongName) && e.Type&^unix.S_IFLNK == 0:
			// left behind by a crash; its entry would be seen too
		default:
			return unix.ENOTEMPTY
		}
		own = append(own, e.Name)
		return nil
	})
	return own, silly, err
}

// syncIDs makes the IDs of a directory and of all its ancestors durable: an
// fsync of each that is not known to be.
func (d *directory) syncIDs() error {
	var chain []*Node
	for n := d.n; n != nil && n != d.v.root; {
		chain = append(chain, n)
		d.v.nodes.mu.Lock()
		var up *Node
		if len(n.links) > 0 {
			up = n.links[0].dir
		}
		d.v.nodes.mu.Unlock()
		n = up
	}
	// From the top: an fsync can make an entry durable whose directory's ID is not.
	for _, n := range slices.Backward(chain) {
		n.dirMu.Lock()
		has, done := n.hasID, n.idSynced
		n.dirMu.Unlock()
		if done {
			continue
		}
		if err := n.syncDir(); err != nil {
			return err
		}
		n.dirMu.Lock()
		n.idSynced = has && n.hasID
		n.dirMu.Unlock()
	}
	return nil
}

// syncDir makes the entries of a directory durable.
func (d *directory) syncDir() error {
	fd, err := d.enter()
	if err != nil {
		return err
	}
	defer d.leave()
	real, err := d.v.disk.Open(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.v.disk.Close(real)
	return d.v.disk.Fsync(real)
}
