package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// Stored is the tree of a volume as it lies on the disk. It is for listing and for restoring, also on
// systems that cannot mount: nothing is repaired, and no key is kept. Several goroutines can use it.
type Stored struct {
	t     Tree
	sizes layout.Sizes
}

// StoredEntry is an entry of a directory of a [Stored].
type StoredEntry struct {
	Path   string // of plaintext, below the volume; of an entry whose name cannot be read, its directory's and Cipher's last name
	Cipher string // path of ciphertext names
	Info          // of the ciphertext: Size is another one
	Err    error  // why the name cannot be read
}

// Info is what is known of an object on the disk.
type Info = disk.Info

// Stored begins one. The volume must stay open.
func (u *Unlocked) Stored() (*Stored, error) {
	s := &Stored{t: u.Tree()}
	var err error
	s.sizes, err = s.t.Sizes()
	return s, err
}

// Root returns the root directory.
func (s *Stored) Root() (StoredEntry, error) {
	info, err := s.t.Disk.Info(s.t.Root)
	return StoredEntry{Path: ".", Cipher: ".", Info: info}, err
}

// List returns the entries of a directory in the order of their names, those whose names cannot be
// read with an error. Entries of kmsfs' own are left out.
func (s *Stored) List(dir StoredEntry) ([]StoredEntry, error) {
	d := s.t.Disk
	fd, err := d.OpenDir(s.t.Root, dir.Cipher)
	if err != nil {
		return nil, err
	}
	defer d.Close(fd)
	var entries []disk.Dirent
	if err := d.Scan(fd, func(e disk.Dirent) error { entries = append(entries, e); return nil }); err != nil {
		return nil, err
	}
	id, err := s.dirID(fd, dir, entries)
	if err != nil {
		return nil, err
	}
	var out []StoredEntry
	for _, e := range entries {
		x := StoredEntry{Cipher: path.Join(dir.Cipher, e.Name)}
		name, own, err := s.name(fd, dir, id, e.Name)
		if own {
			continue
		}
		if x.Err = err; err != nil {
			name = e.Name
		}
		x.Path = path.Join(dir.Path, name)
		if x.Info, err = d.InfoAt(fd, e.Name); errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		x.Err = errors.Join(x.Err, err)
		out = append(out, x)
	}
	slices.SortFunc(out, func(a, b StoredEntry) int { return strings.Compare(a.Path, b.Path) })
	return out, nil
}

// dirID returns the ID of a directory that was listed.
func (s *Stored) dirID(fd int, dir StoredEntry, entries []disk.Dirent) (id blockcrypt.ID, err error) {
	switch {
	case s.plain():
	case dir.Cipher == ".":
		id = s.t.Config.Volume
	default:
		x := layout.DirIDOf(s.t.Disk, fd, entries)
		id, _, _, err = x.Resolve()
	}
	return id, err
}

func (s *Stored) plain() bool { return s.t.Config.Names == blockcrypt.NamesPlain }

// name returns the plaintext name of an entry; own says that it is kmsfs' own.
func (s *Stored) name(fd int, dir StoredEntry, id blockcrypt.ID, cname string) (name string, own bool, err error) {
	if s.plain() {
		return cname, dir.Cipher == "." && layout.IsOwn(cname), nil
	}
	encoded, err := layout.EncodedName(s.t.Disk, fd, cname)
	if err != nil || encoded == "" {
		return "", err == nil, err
	}
	name, err = s.t.Keys.DecodeName(id, encoded)
	return name, false, err
}

// Find returns the entry with a plaintext path below the volume.
func (s *Stored) Find(p string) (StoredEntry, error) {
	at, err := s.Root()
	for part := range strings.SplitSeq(path.Clean(p), "/") {
		if err != nil {
			return at, fmt.Errorf("%s: %w", p, err)
		}
		if part != "." && part != "" {
			at, err = s.lookup(at, part)
		}
	}
	return at, err
}

func (s *Stored) lookup(dir StoredEntry, name string) (StoredEntry, error) {
	if name == ".." {
		return StoredEntry{}, fs.ErrNotExist
	}
	d := s.t.Disk
	fd, err := d.OpenDir(s.t.Root, dir.Cipher)
	if err != nil {
		return StoredEntry{}, err
	}
	defer d.Close(fd)
	cname := name
	if s.plain() {
		if dir.Cipher == "." && layout.IsOwn(name) {
			return StoredEntry{}, fs.ErrNotExist
		}
	} else {
		id := s.t.Config.Volume
		if dir.Cipher != "." {
			x, err := layout.ReadDirID(d, fd)
			if err != nil {
				return StoredEntry{}, err
			}
			var ok bool
			if id, ok, _, err = x.Resolve(); err == nil && !ok {
				err = fs.ErrNotExist
			}
			if err != nil {
				return StoredEntry{}, err
			}
		}
		if cname, err = s.t.Keys.EncodeName(id, name); err != nil {
			return StoredEntry{}, err
		}
		if hash, long := blockcrypt.LongHash(cname); long {
			cname = blockcrypt.LongPrefix + hash
		}
	}
	x := StoredEntry{Path: path.Join(dir.Path, name), Cipher: path.Join(dir.Cipher, cname)}
	x.Info, err = d.InfoAt(fd, cname)
	return x, err
}

// Readlink returns the target of a symlink.
func (s *Stored) Readlink(e StoredEntry) (string, error) {
	fd, err := s.t.Disk.OpenDir(s.t.Root, path.Dir(e.Cipher))
	if err != nil {
		return "", err
	}
	defer s.t.Disk.Close(fd)
	sealed, err := s.t.Disk.Readlink(fd, path.Base(e.Cipher))
	if err != nil {
		return "", err
	}
	return s.t.Keys.OpenTarget(sealed)
}

// Open opens a file, without its key: see [Lone]. Its header is checked to be of this volume.
func (s *Stored) Open(e StoredEntry) (*Lone, error) {
	fd, err := s.t.Disk.OpenDir(s.t.Root, path.Dir(e.Cipher))
	if err != nil {
		return nil, err
	}
	defer s.t.Disk.Close(fd)
	l := &Lone{disk: s.t.Disk}
	if l.fd, err = l.disk.OpenFile(fd, path.Base(e.Cipher)); err != nil {
		return nil, err
	}
	if err = l.readHeader(s.sizes.Most()); err == nil && l.Header != nil {
		err = layout.CheckHeader(l.Header, s.sizes, s.t.Config.Volume, s.t.Keys)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Unlock unwraps the data key of a file, which is [Lone.Unlock]'s then. Of an empty file it does nothing.
func (s *Stored) Unlock(ctx context.Context, l *Lone) (incomplete bool, err error) {
	if l.Header == nil {
		return false, nil
	}
	key, err := keystore.UnwrapFirst(ctx, s.t.Stores, l.Binding(), l.Header.Recipients)
	if err != nil {
		return false, err
	}
	defer clear(key)
	return l.Unlock(key)
}
