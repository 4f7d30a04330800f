package volume

import (
	"context"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// Tree is the ciphertext of a volume, for package check, which stands above. The owner of the volume closes it.
type Tree struct {
	Disk   *disk.Disk
	Root   int // descriptor of the ciphertext directory
	Config *blockcrypt.Config
	Keys   *blockcrypt.VolumeKeys // nil before Unlock
	Stores []keystore.Store       // none before Unlock
	lists  *lists                 // nil before Open
}

// Tree gives the ciphertext, of which nothing is authenticated.
func (l *Found) Tree() Tree { return Tree{Disk: &l.disk, Root: l.root, Config: l.Config} }

// Tree gives the ciphertext with the volume's keys.
func (u *Unlocked) Tree() Tree {
	return Tree{Disk: &u.disk, Root: u.root, Config: u.Config, Keys: u.keys, Stores: slices.Concat(u.stores, u.ofDirectories)}
}

// Tree gives the ciphertext with the volume's keys, while it is open.
func (v *Volume) Tree() Tree {
	now := v.recipients.now.Load()
	return Tree{Disk: &v.disk, Root: v.rootD, Config: now.cfg, Keys: v.vk, Stores: now.stores, lists: &v.lists}
}

// Unlock unwraps the data key of a file of a volume that is open; see [keystore.Ring.Unlock].
func (t Tree) Unlock(ctx context.Context, h *blockcrypt.Header) (*blockcrypt.FileKeys, error) {
	keys, _, err := t.lists.unlock(ctx, h)
	return keys, err
}

// Sizes says how large the headers of files are, and so where their blocks lie.
func (t Tree) Sizes() (layout.Sizes, error) { return layout.SizesOf(t.Config) }

// Writer is the function [Writer] of this volume.
func (t Tree) Writer() error { return layout.WriterOf(t.Disk, t.Root) }

// Locate returns the node with a path of ciphertext names below the volume, with a lookup that the
// caller takes back by [Volume.Forget].
func (ns *namespace) Locate(cpath string) (*Node, error) {
	n := ns.v.root
	for part := range strings.SplitSeq(path.Clean(cpath), "/") {
		if part == "." || part == "" {
			continue
		}
		c, _, err := ns.find(n, func() (string, error) { return part, nil })
		ns.v.Forget(n.id, 1) // the entry below holds it
		if err != nil {
			return nil, err
		}
		n = c
	}
	return n, nil
}

// PlainName returns the plaintext name of an entry of a directory with this ciphertext name; EINVAL
// if it does not decode.
func (dir *Node) PlainName(cname string) (string, error) {
	fd, err := dir.enter()
	if err != nil {
		return "", err
	}
	defer dir.leave()
	id, _, err := dir.dirIdent(false)
	if err != nil {
		return "", err
	}
	name, ok, err := dir.decode(fd, id, cname)
	if err == nil && !ok {
		err = unix.EINVAL
	}
	return name, err
}

// PlainPath returns a plaintext path of the node below the root, or its ciphertext path if that cannot be
// decoded.
func (n *Node) PlainPath() string {
	p := ""
	for x := n; x != x.v.root; {
		at, ok := x.place()
		if !ok {
			return n.where()
		}
		name, err := at.dir.PlainName(at.cname)
		if err != nil {
			return n.where()
		}
		p, x = path.Join(name, p), at.dir
	}
	return p
}

// CipherPath returns a ciphertext path of the node below the root.
func (n *Node) CipherPath() string { return n.where() }

// Header returns what the header of a file says now; nil of an empty file, which has none.
func (n *Node) Header() (*blockcrypt.Header, error) {
	if !n.IsFile() {
		return nil, unix.EINVAL
	}
	return n.header()
}

// headerAt reads the header of a file with a path of ciphertext names, whatever its mode is.
func (ns *namespace) headerAt(cpath string) (*blockcrypt.Header, error) {
	n, err := ns.Locate(cpath)
	if err != nil {
		return nil, err
	}
	defer ns.v.Forget(n.id, 1)
	return n.Header()
}

// Names gives the plaintext paths of ciphertext paths. It remembers directories; it is for one
// goroutine.
type Names struct {
	t    Tree
	dirs map[string]namedDir // by ciphertext path
}

type namedDir struct {
	id   blockcrypt.ID
	path string // of plaintext
	err  error
}

// Names begins one. The volume must stay open.
func (u *Unlocked) Names() *Names {
	return &Names{u.Tree(), map[string]namedDir{".": {id: u.Config.Volume}}}
}

// Path returns the plaintext path of a ciphertext path below the volume.
func (n *Names) Path(cpath string) (string, error) {
	dir, cname := path.Split(cpath)
	d := n.dir(path.Clean(dir))
	if d.err != nil {
		return "", d.err
	}
	if n.t.Config.Names == blockcrypt.NamesPlain {
		return path.Join(d.path, cname), nil
	}
	fd, err := n.t.Disk.OpenBelow(n.t.Root, path.Clean(dir), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return "", err
	}
	defer n.t.Disk.Close(fd)
	encoded, err := layout.EncodedName(n.t.Disk, fd, cname)
	if err != nil {
		return "", err
	}
	name, err := n.t.Keys.DecodeName(d.id, encoded)
	return path.Join(d.path, name), err
}

// dir returns a directory's ID and its plaintext path.
func (n *Names) dir(cpath string) (d namedDir) {
	d, known := n.dirs[cpath]
	if known {
		return d
	}
	defer func() { n.dirs[cpath] = d }()
	if d.path, d.err = n.Path(cpath); d.err != nil || n.t.Config.Names == blockcrypt.NamesPlain {
		return d
	}
	fd, err := n.t.Disk.OpenBelow(n.t.Root, cpath, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		d.err = err
		return d
	}
	defer n.t.Disk.Close(fd)
	x, err := layout.ReadDirID(n.t.Disk, fd)
	if err == nil {
		d.id, _, _, err = x.Resolve()
	}
	d.err = err
	return d
}
