//go:build linux && !portable

package volume

import (
	"context"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/layout"
)

// Tree gives the ciphertext with the volume's keys, while it is open.
func (v *Volume) Tree() Tree {
	now := v.recipients.now.Load()
	return Tree{Disk: &v.disk, Root: v.rootD, Config: now.cfg, Keys: v.vk, Stores: now.stores, unlock: func(ctx context.Context, h *blockcrypt.Header) (*blockcrypt.FileKeys, error) {
		keys, _, err := v.lists.unlock(ctx, h)
		return keys, err
	}}
}

// Unlock unwraps the data key of a file of a volume that is open; see [keystore.Ring.Unlock].
func (t Tree) Unlock(ctx context.Context, h *blockcrypt.Header) (*blockcrypt.FileKeys, error) {
	return t.unlock(ctx, h)
}

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
