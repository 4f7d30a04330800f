//go:build linux && !portable

package volume

import (
	"context"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// EntryNotShown is what the log says of an entry whose name cannot be decoded.
const EntryNotShown = "an entry is not shown"

// Dir is an open directory. Its methods are for one caller at a time.
type Dir struct {
	n    *Node
	fd   int
	buf  []byte
	next []disk.Dirent
	off  int64 // the position of next[0], or of fd where next is empty
	id   blockcrypt.ID
	ok   bool
}

// An Entry of a directory. Off is the position behind it.
type Entry struct {
	Name string
	Ino  uint64
	Type uint32 // S_IFMT bits, 0 if the filesystem does not say
	Off  int64

	cname string
}

// OpenDir opens a directory for listing.
func (n *Node) OpenDir() (*Dir, error) {
	if !n.IsDir() {
		return nil, unix.ENOTDIR
	}
	if err := n.v.descriptors.roomForDir(); err != nil {
		return nil, err
	}
	fd, err := n.enter()
	if err != nil {
		return nil, err
	}
	defer n.leave()
	d := &Dir{n: n}
	if d.fd, err = n.v.disk.Open(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		return nil, err
	}
	n.hold()
	return d, nil
}

// Close ends it.
func (d *Dir) Close() {
	d.n.v.disk.Close(d.fd)
	d.n.release()
}

// Sync makes the directory's entries, and that it is where it is, durable.
func (d *Dir) Sync() error {
	if d.n.v.o.ReadOnly {
		return nil
	}
	if err := d.n.syncIDs(); err != nil {
		return err
	}
	return d.n.v.disk.Fsync(d.fd)
}

// SeekTo goes to a position that an Entry gave, or to 0, the start.
func (d *Dir) SeekTo(off int64) error {
	if off == d.off && off != 0 {
		return nil
	}
	if _, err := d.n.v.disk.Seek(d.fd, off, unix.SEEK_SET); err != nil {
		return err
	}
	d.next, d.off, d.ok = nil, off, false
	return nil
}

// Next calls f with the entries from here on, until it returns false: that
// entry comes again. An entry that cannot be decoded is logged and left out, its
// neighbours unharmed.
func (d *Dir) Next(f func(Entry) bool) error {
	v := d.n.v
	if !d.ok {
		if v.Shared() {
			d.n.fresh(d.fd) // if it fails, the listing does
			d.n.otherID()
		}
		var err error
		if d.id, _, err = d.n.dirIdent(false); err != nil {
			return err
		}
		d.ok = true
	}
	for {
		if len(d.next) == 0 {
			if d.buf == nil {
				d.buf = make([]byte, 32<<10)
			}
			var err error
			if d.next, err = v.disk.Dirents(d.fd, d.buf); err != nil || len(d.next) == 0 {
				return err
			}
		}
		for len(d.next) > 0 {
			e := d.next[0]
			out := Entry{Name: e.Name, Ino: v.foldIno(d.n.dev, e.Ino), Type: e.Type, Off: e.Off,
				cname: e.Name}
			show := true
			if e.Name != "." && e.Name != ".." {
				var err error
				if out.Name, show, err = d.n.decode(d.fd, d.id, e.Name); err != nil {
					v.report(d.n.where()+"/"+e.Name, EntryNotShown, err)
				}
			}
			if show && !f(out) {
				return nil
			}
			d.next, d.off = d.next[1:], e.Off
		}
	}
}

// Lookup is [Volume.Lookup] of an entry that Next gave.
func (d *Dir) Lookup(ctx context.Context, e Entry) (*Node, Attr, bool, error) {
	n, st, err := d.n.v.find(d.n, func() (string, error) { return e.cname, nil })
	return d.n.v.checked(ctx, n, st, err)
}
