//go:build linux && !portable

package volume_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// Every rename of short and long names, onto whatever is there, does what it does
// on the backing filesystem.
func TestRenames(t *testing.T) {
	long := func(c string) string { return strings.Repeat(c, 240) }
	kinds := []string{"none", "file", "empty", "full", "same", "symlink"}
	for _, plain := range []bool{false, true} {
		for _, dir := range []string{"d/", "e/"} {
			for _, names := range [][2]string{{"a", "b"}, {long("a"), "b"}, {"a", long("b")},
				{long("a"), long("b")}} {
				w := newWorldIn(t, t.TempDir(), volume.Options{}, plain)
				ref := t.TempDir()
				for _, from := range kinds {
					for _, to := range kinds {
						for _, flags := range []uint32{0, unix.RENAME_NOREPLACE,
							unix.RENAME_EXCHANGE, unix.RENAME_WHITEOUT,
							unix.RENAME_NOREPLACE | unix.RENAME_WHITEOUT} {
							if flags&unix.RENAME_WHITEOUT != 0 && os.Geteuid() != 0 {
								continue
							}
							what := fmt.Sprintf("plain=%v, %s of %.5s to %s%.5s (%s), flags %d",
								plain, from, names[0], dir, names[1], to, flags)
							w.renameBoth(what, ref, "d/"+names[0], dir+names[1], from, to, flags)
							if t.Failed() {
								return
							}
						}
					}
				}
			}
		}
	}
}

// renameBoth makes the same two entries in the volume and in ref, renames one to
// the other, and compares everything.
func (w *world) renameBoth(what, ref, from, to, fromKind, toKind string, flags uint32) {
	t := w.t
	t.Helper()
	w.mkdir("d")
	w.mkdir("e")
	for _, d := range []string{"d", "e"} {
		w.do("mkdir", os.Mkdir(filepath.Join(ref, d), 0o755))
	}
	w.makeBoth(ref, from, fromKind, from)
	w.makeBoth(ref, to, toKind, from)
	fd, fname := w.parent(from)
	td, tname := w.parent(to)
	err := w.v.Rename(fd, fname, td, tname, flags)
	refErr := unix.Renameat2(unix.AT_FDCWD, filepath.Join(ref, from), unix.AT_FDCWD,
		filepath.Join(ref, to), uint(flags))
	if !errors.Is(err, refErr) {
		t.Errorf("%s: %v, but %v there", what, err, refErr)
	}
	if got, want := w.tree(""), treeOf(ref); !slices.Equal(got, want) {
		t.Errorf("%s: %.80q, want %.80q", what, got, want)
	}
	w.tidy(what)
	// And it can all be removed again.
	for _, d := range []string{"d", "e"} {
		w.removeAll("", d)
		w.do("remove", os.RemoveAll(filepath.Join(ref, d)))
	}
	if got := w.list(""); len(got) != 0 {
		t.Errorf("%s: %.80q is left", what, got)
	}
}

func (w *world) makeBoth(ref, path, kind, other string) {
	w.t.Helper()
	real := filepath.Join(ref, path)
	dir, name := w.parent(path)
	switch kind {
	case "file":
		w.write(path, []byte(path[:3]))
		w.do("write", os.WriteFile(real, []byte(path[:3]), 0o644))
	case "empty", "full":
		w.mkdir(path)
		w.do("mkdir", os.Mkdir(real, 0o755))
		if kind == "full" {
			w.write(path+"/x", []byte("x"))
			w.do("write", os.WriteFile(real+"/x", []byte("x"), 0o644))
		}
	case "symlink":
		_, _, err := w.v.Symlink(ctx, dir, name, "target", volume.Caller{})
		w.do("symlink", errors.Join(err, os.Symlink("target", real)))
	case "same": // a further name of the other one, if that is a file
		n, err := w.node(other)
		if err != nil || n.IsDir() || path == other {
			return
		}
		_, _, err = w.v.Link(ctx, n, dir, name)
		w.do("link", errors.Join(err, os.Link(filepath.Join(ref, other), real)))
	}
}

// tree lists all below a path, with types and sizes.
func (w *world) tree(path string) []string {
	var out []string
	for _, name := range w.list(path) {
		p := filepath.Join(path, name)
		n := w.must(p)
		st, err := n.Attr()
		if err != nil {
			w.t.Error(err)
			continue
		}
		out = append(out, entryLine(p, st.Mode, st.Size, uint64(st.Nlink)))
		if n.IsDir() {
			out = append(out, w.tree(p)...)
		}
	}
	slices.Sort(out)
	return out
}

func entryLine(path string, mode uint32, size int64, links uint64) string {
	if mode&unix.S_IFMT == unix.S_IFDIR {
		size, links = 0, 0
	}
	return fmt.Sprintf("%s %o %d %d", path, mode&unix.S_IFMT, size, links)
}

func treeOf(ref string) []string {
	var out []string
	filepath.WalkDir(ref, func(p string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && p != ref && unix.Lstat(p, &st) == nil {
			rel, _ := filepath.Rel(ref, p)
			out = append(out, entryLine(rel, st.Mode, st.Size, uint64(st.Nlink)))
		}
		return err
	})
	slices.Sort(out)
	return out
}

// tidy checks that each long entry has its name, and no name is left over.
func (w *world) tidy(what string) {
	long, names := 0, 0
	filepath.WalkDir(w.dir, func(p string, d fs.DirEntry, err error) error {
		switch b := filepath.Base(p); {
		case strings.HasPrefix(b, "kmsfs.long."):
			long++
		case strings.HasPrefix(b, "kmsfs.name."):
			names++
		}
		return err
	})
	if long != names {
		w.t.Errorf("%s: %d long entries have %d names", what, long, names)
	}
}

func (w *world) removeAll(dir, name string) {
	p := filepath.Join(dir, name)
	n := w.must(p)
	var err error
	if n.IsDir() {
		for _, e := range w.list(p) {
			w.removeAll(p, e)
		}
		err = w.v.Rmdir(w.must(dir), name)
	} else {
		err = w.v.Unlink(w.must(dir), name)
	}
	w.do("remove "+p, err)
}

// A rename of one name of a file to another one, of which nobody has asked yet, does nothing, and loses no
// name.
func TestRenameToUnknownLink(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.mkdir("d")
	a, b := strings.Repeat("a", 200), strings.Repeat("b", 200)
	w.write("d/"+a, noise(100))
	_, _, err := w.v.Link(ctx, w.must("d/"+a), w.must("d"), b)
	w.do("link", err)
	w.reopen(volume.Options{})
	w.must("d/" + a)
	w.do("rename", w.v.Rename(w.must("d"), a, w.must("d"), b, 0))
	w.reopen(volume.Options{})
	if got := slices.Sorted(slices.Values(w.list("d"))); !slices.Equal(got, []string{a, b}) {
		t.Errorf("%.20q", got)
	}
}
