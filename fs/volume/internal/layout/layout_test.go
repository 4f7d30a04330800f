//go:build linux && !portable

package layout

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// directory makes a directory with these entries: "name" is an empty file, "name>target" a
// symlink.
func directory(t *testing.T, entries ...string) (d *disk.Disk, fd int, path string) {
	t.Helper()
	path = t.TempDir()
	for _, e := range entries {
		var err error
		if name, target, link := strings.Cut(e, ">"); link {
			err = os.Symlink(target, filepath.Join(path, name))
		} else {
			err = os.WriteFile(filepath.Join(path, name), nil, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	d = &disk.Disk{}
	fd, err := d.OpenRoot(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close(fd) })
	return d, fd, path
}

// A mount, which reads the ID of a directory, and fsck, which lists the directory, come to the
// same result, whatever is in it.
func TestDirID(t *testing.T) {
	a, b := blockcrypt.NewID().String(), blockcrypt.NewID().String()
	for _, c := range []struct {
		name     string
		entries  []string
		ok, lost bool
		fault    string
	}{
		{"it is empty", nil, false, false, ""},
		{"both places", []string{"kmsfs.dir>" + a, "kmsfs.dir." + a, "x"}, true, false, ""},
		{"the symlink is lost", []string{"kmsfs.dir." + a, "x"}, true, true, ""},
		{"the file is lost", []string{"kmsfs.dir>" + a, "x"}, true, true, ""},
		{"both are lost", []string{"x"}, false, false, "no ID"},
		{"both are lost, of a long name", []string{"kmsfs.long.x"}, false, false, "no ID"},
		{"only names of long entries are left", []string{"kmsfs.name.x>y"}, false, false, ""},
		{"they differ", []string{"kmsfs.dir>" + a, "kmsfs.dir." + b}, false, false, "differ"},
		{"two files", []string{"kmsfs.dir." + a, "kmsfs.dir." + b}, false, false, "differ"},
		{"the symlink is malformed", []string{"kmsfs.dir>x", "kmsfs.dir." + a}, false, false,
			"kmsfs.dir is malformed"},
		{"the file is malformed", []string{"kmsfs.dir.x"}, false, false, "kmsfs.dir.x is malformed"},
		{"the symlink is a file", []string{"kmsfs.dir", "kmsfs.dir." + a}, false, false,
			"kmsfs.dir is malformed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, fd, path := directory(t, c.entries...)
			read, err := ReadDirID(d, fd)
			if err != nil {
				t.Fatal(err)
			}
			var entries []disk.Dirent
			if err := d.Scan(fd,
				func(e disk.Dirent) error { entries = append(entries, e); return nil }); err != nil {
				t.Fatal(err)
			}
			listed := DirIDOf(d, fd, entries)
			for how, x := range map[string]DirID{"read": read, "listed": listed} {
				id, ok, lost, err := x.Resolve()
				if ok != c.ok || lost != c.lost || (err != nil) != (c.fault != "") ||
					err != nil && !strings.Contains(err.Error(), c.fault) {
					t.Errorf("%s: ok %v, lost %v, %v", how, ok, lost, err)
				}
				if ok && id.String() != a {
					t.Errorf("%s: %s, want %s", how, id, a)
				}
				if !lost {
					continue
				}
				if err := MendDirID(d, fd, id); err != nil {
					t.Error(err)
				}
				whole, err := ReadDirID(d, fd)
				if err != nil || len(whole.Places) != 2 {
					t.Errorf("made again in %s: %q, %v", path, whole.Places, err)
				}
			}
		})
	}
}

func TestEncodedName(t *testing.T) {
	encoded := strings.Repeat("n", 300)
	hash, long := blockcrypt.LongHash(encoded)
	if !long {
		t.Fatal("300 bytes are no long name")
	}
	entry, symlink := blockcrypt.LongPrefix+hash, blockcrypt.LongName+hash
	d, fd, path := directory(t, entry, symlink+">"+encoded)
	for cname, want := range map[string]string{"short": "short", entry: encoded, symlink: "",
		"kmsfs.dir": ""} {
		if got, err := EncodedName(d, fd, cname); got != want || err != nil {
			t.Errorf("%s: %q, %v", cname, got, err)
		}
	}
	if e, ok := EntryOf(symlink); e != entry || !ok {
		t.Errorf("the entry of %s: %s, %v", symlink, e, ok)
	}
	if _, ok := EntryOf(entry); ok {
		t.Error("an entry is taken for the symlink of a name")
	}
	if err := os.Remove(filepath.Join(path, symlink)); err != nil {
		t.Fatal(err)
	}
	if _, err := EncodedName(d, fd, entry); !errors.Is(err, ErrNameLost) || !errors.Is(err, unix.ENOENT) {
		t.Errorf("lost: %v", err)
	}
	if err := os.Symlink(encoded+"n", filepath.Join(path, symlink)); err != nil {
		t.Fatal(err)
	}
	if _, err := EncodedName(d, fd, entry); !errors.Is(err, ErrNameAltered) {
		t.Errorf("altered: %v", err)
	}
}

// A first page of zeros is told from damage: the power failed before it was written.
func TestReadHeader(t *testing.T) {
	d, _, path := directory(t)
	g, err := blockcrypt.NewGeometry(blockcrypt.DefaultHeader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		content   []byte
		unwritten bool
	}{
		"zeros":                   {make([]byte, 9000), true},
		"a page of zeros":         {make([]byte, 4096), true},
		"zeros, then other bytes": {append(make([]byte, 4096), "abc"...), true},
		"other bytes":             {[]byte("not a header, but long enough to be read as one"), false},
		"nothing":                 {nil, false},
	} {
		file := filepath.Join(path, name)
		if err := os.WriteFile(file, c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		fd, err := d.OpenPath(file, unix.O_RDONLY)
		if err != nil {
			t.Fatal(err)
		}
		hdr, b, err := ReadHeader(d, fd, g.Header(), false)
		d.Close(fd)
		if hdr != nil || isUnwritten(err) != c.unwritten ||
			blockcrypt.ClassOf(err) != blockcrypt.BadHeader {
			t.Errorf("%s: %v", name, err)
		}
		if !slices.Equal(b, c.content[:min(len(c.content), g.Header())]) {
			t.Errorf("%s: %d bytes were returned", name, len(b))
		}
	}
}
