package volume

import (
	"context"
	"path"
	"slices"

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

	// unlock unwraps the data key of a file; nil before Open.
	unlock func(context.Context, *blockcrypt.Header) (*blockcrypt.FileKeys, error)
}

// Tree gives the ciphertext, of which nothing is authenticated.
func (l *Found) Tree() Tree { return Tree{Disk: &l.disk, Root: l.root, Config: l.Config} }

// Tree gives the ciphertext with the volume's keys.
func (u *Unlocked) Tree() Tree {
	return Tree{Disk: &u.disk, Root: u.root, Config: u.Config, Keys: u.keys, Stores: slices.Concat(u.stores, u.ofDirectories)}
}

// Sizes says how large the headers of files are, and so where their blocks lie.
func (t Tree) Sizes() (layout.Sizes, error) { return layout.SizesOf(t.Config) }

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
	fd, err := n.t.Disk.OpenDir(n.t.Root, path.Clean(dir))
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
	fd, err := n.t.Disk.OpenDir(n.t.Root, cpath)
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
