package layout

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// DirLink is the symlink whose target is the ID of the directory that it lies in. The ID also
// stands in the name of an empty file, DirLink.ID: both places are metadata, and either can be
// made again from the other.
const DirLink = "kmsfs.dir"

// IsDirID reports whether an entry is one of the places of its directory's ID.
func IsDirID(cname string) bool {
	return cname == DirLink || strings.HasPrefix(cname, DirLink+".")
}

// DirID is what the entries of a directory say about its ID.
type DirID struct {
	IDs    []blockcrypt.ID // the different ones in its places
	Places []string        // entries that are to hold it

	malformed string // one of Places that holds no ID
	others    bool   // there are entries whose names need it
}

// Resolve returns the ID. ok is false for a directory that has none yet, since it has no
// entries. lost is true if one of its two places is lost: see [MendDirID].
func (x *DirID) Resolve() (id blockcrypt.ID, ok, lost bool, err error) {
	switch {
	case len(x.Places) == 0 && x.others:
		return id, false, false, errors.New("the directory has entries but no ID; restore kmsfs.dir from a backup")
	case len(x.Places) == 0:
		return id, false, false, nil
	case x.malformed != "":
		return id, false, false, fmt.Errorf("%s is malformed", x.malformed)
	case len(x.IDs) > 1:
		return id, false, false, fmt.Errorf("the directory has %d IDs that differ", len(x.IDs))
	}
	return x.IDs[0], true, len(x.Places) == 1, nil
}

// ReadDirID reads the ID of an open directory. It lists the directory only if a place is lost.
func ReadDirID(d *disk.Disk, fd int) (x DirID, err error) {
	target, err := d.Readlink(fd, DirLink)
	if err == nil {
		if id, ok := blockcrypt.ParseID(target); ok {
			name := DirLink + "." + target
			if d.Has(fd, name) {
				return DirID{IDs: []blockcrypt.ID{id}, Places: []string{DirLink, name}}, nil
			}
		}
	} else if !errors.Is(err, fs.ErrNotExist) && !disk.NotSymlink(err) {
		return x, err
	}
	var entries []disk.Dirent
	if err := d.Scan(fd,
		func(e disk.Dirent) error { entries = append(entries, e); return nil }); err != nil {
		return x, err
	}
	return DirIDOf(d, fd, entries), nil
}

// DirIDOf is ReadDirID of a directory that was listed.
func DirIDOf(d *disk.Disk, fd int, entries []disk.Dirent) (x DirID) {
	add := func(place, s string) {
		x.Places = append(x.Places, place)
		id, ok := blockcrypt.ParseID(s)
		if !ok {
			x.malformed = place
		} else if len(x.IDs) == 0 || x.IDs[0] != id {
			x.IDs = append(x.IDs, id)
		}
	}
	for _, e := range entries {
		s, named := strings.CutPrefix(e.Name, DirLink+".")
		switch {
		case e.Name == DirLink:
			t, _ := d.Readlink(fd, DirLink) // if it fails the place is malformed
			add(e.Name, t)
		case named:
			add(e.Name, s)
		case IsSilly(e.Name):
		case !IsOwn(e.Name), strings.HasPrefix(e.Name, blockcrypt.LongPrefix):
			x.others = true
		}
	}
	return x
}
