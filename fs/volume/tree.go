package volume

import (
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// Tree is the ciphertext of a volume, for package check below. The owner of the volume closes it.
type Tree struct {
	Disk   *disk.Disk
	Root   int // descriptor of the ciphertext directory
	Config *blockcrypt.Config
	Keys   *blockcrypt.VolumeKeys // nil before Unlock
	Stores []keystore.Store       // none before Unlock
	Ring   *keystore.Ring         // nil before Open
}

// Tree gives the ciphertext, of which nothing is authenticated.
func (l *Found) Tree() Tree { return Tree{Disk: &l.disk, Root: l.root, Config: l.Config} }

// Tree gives the ciphertext with the volume's keys.
func (u *Unlocked) Tree() Tree {
	return Tree{Disk: &u.disk, Root: u.root, Config: u.Config, Keys: u.keys, Stores: u.stores}
}

// Tree gives the ciphertext with the volume's keys, while it is open.
func (v *Volume) Tree() Tree {
	now := v.recipients.now.Load()
	return Tree{Disk: &v.disk, Root: v.rootD, Config: now.cfg, Keys: v.vk, Stores: now.stores, Ring: v.ring}
}

// Geometry says where the blocks of a file lie.
func (b *base) Geometry() blockcrypt.Geometry { return b.geo }

// Writer is the function [Writer] of this volume.
func (t Tree) Writer() error { return layout.WriterOf(t.Disk, t.Root) }

// Locate returns the node with a path of ciphertext names below the volume. The kernel does not
// know of it: it stays until the volume is closed.
func (ns *namespace) Locate(cpath string) (*Node, error) {
	n := ns.v.root
	for part := range strings.SplitSeq(path.Clean(cpath), "/") {
		if part == "." || part == "" {
			continue
		}
		c, _, err := ns.find(n, func() (string, error) { return part, nil })
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
