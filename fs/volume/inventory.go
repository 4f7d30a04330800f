//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"path"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

// Inventoried is a ciphertext file that an inventory has found.
type Inventoried struct {
	Path   string             // below the root
	Length int64              // of the ciphertext
	Change time.Time          // of the inode, the last one: its keys were wrapped then or before
	Header *blockcrypt.Header // nil: an empty file, or one whose header cannot be read
	Err    error              // why it cannot
}

// Inventory reads the headers of all ciphertext files in a directory and below, a volume or a part
// or a copy of one. No key is needed, and nothing is authenticated. Files with several names
// come once for each.
func Inventory(ctx context.Context, dir string, found func(Inventoried)) error {
	d := &disk.Disk{}
	root, err := layout.OpenRoot(d, dir)
	if err != nil {
		return err
	}
	defer d.Close(root)
	cfg, err := layout.ReadConfig(d, root) // a part of a volume has none
	return headersBelow(ctx, d, root, err == nil && cfg.Names == blockcrypt.NamesPlain, found)
}

// headersBelow is Inventory of the tree below a descriptor. With plain names only the root has entries
// of kmsfs' own.
func headersBelow(ctx context.Context, d *disk.Disk, root int, plain bool, found func(Inventoried)) error {
	fd, err := d.Open(root, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.Close(fd)
	return (&headerScan{d, plain, found}).in(ctx, fd, "")
}

// headerScan reads the headers of a tree.
type headerScan struct {
	d     *disk.Disk
	plain bool
	found func(Inventoried)
}

// in reads those of an open directory and below.
func (h *headerScan) in(ctx context.Context, fd int, at string) error {
	d, found := h.d, h.found
	var dirs, files []string
	err := d.Scan(fd, func(e disk.Dirent) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		typ := e.Type
		if typ == 0 {
			var st unix.Stat_t
			if err := d.Stat(fd, e.Name, &st); err != nil {
				return disk.Ignore(err, unix.ENOENT)
			}
			typ = st.Mode & unix.S_IFMT
		}
		own := layout.IsOwn(e.Name) && (h.plain && at == "" ||
			!h.plain && !strings.HasPrefix(e.Name, blockcrypt.LongPrefix))
		switch {
		case typ == unix.S_IFDIR && at == "" && e.Name == layout.HostsName:
		case typ == unix.S_IFDIR:
			dirs = append(dirs, e.Name)
		case typ == unix.S_IFREG && !own:
			if files = append(files, e.Name); len(files) == filesAtOnce {
				headersOf(d, fd, at, files, found)
				files = files[:0]
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	headersOf(d, fd, at, files, found)
	for _, name := range dirs {
		sub, err := d.Open(fd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err == nil {
			err = h.in(ctx, sub, path.Join(at, name))
			d.Close(sub)
		} else {
			found(Inventoried{Path: path.Join(at, name), Err: err})
			err = nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// filesAtOnce is how many names of a directory are collected before their headers are read.
const filesAtOnce = 4096

// headersOf reads the headers of these files of a directory: several at the same time, since a disk
// with latency takes as long for one as for many.
func headersOf(d *disk.Disk, fd int, at string, names []string, found func(Inventoried)) {
	var mu sync.Mutex
	sideBySide(names, func(_ int, name string) {
		x, there := inventoried(d, fd, name)
		if !there {
			return
		}
		x.Path = path.Join(at, name)
		mu.Lock()
		defer mu.Unlock()
		found(x)
	})
}

// inventoried reads one header; there is false if the file went meanwhile.
func inventoried(d *disk.Disk, dir int, name string) (x Inventoried, there bool) {
	fd, err := d.Open(dir, name, unix.O_RDONLY|disk.FileFlags, 0)
	if errors.Is(err, unix.ENOENT) {
		return x, false
	}
	if err != nil {
		x.Err = err
		return x, true
	}
	defer d.Close(fd)
	var st unix.Stat_t
	if x.Err = d.Fstat(fd, &st); x.Err != nil {
		return x, true
	}
	x.Change = time.Unix(st.Ctim.Unix())
	if x.Length = st.Size; st.Size > 0 {
		n := blockcrypt.PageSize // most headers are shorter
		hdr, b, err := layout.ReadHeader(d, fd, n, false)
		if h, herr := blockcrypt.HeaderSize(b); herr == nil && h > n {
			hdr, _, err = layout.ReadHeader(d, fd, h, false)
		}
		x.Header, x.Err = hdr, err
		if err != nil {
			x.Header = nil
		}
	}
	return x, true
}
