//go:build linux && !portable

package volume_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

func TestNames(t *testing.T) {
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("plain=%v", plain), func(t *testing.T) {
			w := newWorldIn(t, t.TempDir(), volume.Options{}, plain)
			names := []string{"a", " ", "-", "new\nline", "\xff\xfe", "休み", "tab\t", "kmsfs",
				"x.kmsfs", strings.Repeat("x", 159), strings.Repeat("x", 160),
				strings.Repeat("x", 161), strings.Repeat("y", 254), strings.Repeat("z", 255)}
			if !plain {
				names = append(names, "kmsfs.json", "kmsfs.dir", "kmsfs.mounted", "kmsfs.long.x")
			}
			for _, n := range names {
				w.write(n, []byte(n))
			}
			w.mkdir("d")
			for _, n := range names {
				w.write("d/"+n, []byte("d/"+n))
			}
			w.reopen(volume.Options{})
			got := w.list("")
			slices.Sort(got)
			want := append(slices.Clone(names), "d")
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("listed %q, want %q", got, want)
			}
			for _, n := range names {
				w.want(n, []byte(n))
				w.want("d/"+n, []byte("d/"+n))
				if err := w.v.Unlink(w.v.Root(), n); err != nil {
					t.Errorf("unlink %q: %v", n, err)
				}
			}
			if got := w.list(""); len(got) != 1 {
				t.Errorf("left: %q", got)
			}
			_, err := w.create(strings.Repeat("x", 256))
			wantErr(t, "256 bytes", err, unix.ENAMETOOLONG)
			if plain {
				_, err := w.create("kmsfs.json")
				wantErr(t, "a reserved name", err, unix.EPERM)
				_, err = w.node("kmsfs.json")
				wantErr(t, "a reserved name", err, unix.ENOENT)
				w.write("d/kmsfs.json", []byte("below the root it is a name like others"))
			}
			for _, e := range []string{"hello", "x.kmsfs"} {
				if !plain && exists(filepath.Join(w.dir, e)) {
					t.Errorf("the name %s stands in the ciphertext", e)
				}
			}
		})
	}
}

// Long names in every combination of rename.
func TestRenameLong(t *testing.T) {
	w := newWorld(t, volume.Options{})
	root := w.v.Root()
	long, long2, short := strings.Repeat("l", 200), strings.Repeat("m", 255), "s"
	w.write(long, []byte("1"))
	steps := []struct {
		from, to string
		flags    uint32
	}{{long, long2, 0}, {long2, short, 0}, {short, long, 0}, {long, long, 0}}
	for _, s := range steps {
		if err := w.v.Rename(root, s.from, root, s.to, s.flags); err != nil {
			t.Fatalf("%.5s to %.5s: %v", s.from, s.to, err)
		}
		w.want(s.to, []byte("1"))
		if got := w.list(""); len(got) != 1 || got[0] != s.to {
			t.Fatalf("listed %q after %.5s to %.5s", got, s.from, s.to)
		}
	}
	w.write(long2, []byte("2"))
	if err := w.v.Rename(root, long, root, long2, unix.RENAME_EXCHANGE); err != nil {
		t.Fatal(err)
	}
	w.want(long, []byte("2"))
	w.want(long2, []byte("1"))
	wantErr(t, "onto a long name", w.v.Rename(root, long, root, long2, unix.RENAME_NOREPLACE), unix.EEXIST)
	w.want(long2, []byte("1"))
	if err := w.v.Rename(root, long, root, long2, 0); err != nil {
		t.Fatal(err)
	}
	w.want(long2, []byte("2"))
	if err := w.v.Unlink(root, long2); err != nil {
		t.Fatal(err)
	}
	es, _ := os.ReadDir(w.dir)
	for _, e := range es {
		if strings.HasPrefix(e.Name(), "kmsfs.name") || strings.HasPrefix(e.Name(), "kmsfs.long") {
			t.Errorf("left behind: %s", e.Name())
		}
	}
}

func TestTree(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.mkdir("a")
	w.mkdir("a/b")
	w.write("a/b/f", []byte("f"))
	root := w.v.Root()
	wantErr(t, "rmdir of a full directory", w.v.Rmdir(root, "a"), unix.ENOTEMPTY)
	wantErr(t, "rmdir of a file", w.v.Rmdir(w.must("a/b"), "f"), unix.ENOTDIR)
	if err := w.v.Unlink(w.must("a/b"), "f"); err != nil {
		t.Fatal(err)
	}
	// Emptied: only what kmsfs keeps is left, and goes along.
	if err := w.v.Rmdir(w.must("a"), "b"); err != nil {
		t.Fatal(err)
	}
	w.mkdir("e")
	w.write("e/x", nil)
	if err := w.v.Unlink(w.must("e"), "x"); err != nil {
		t.Fatal(err)
	}
	w.write("a/y", []byte("y"))
	// A directory over an emptied one.
	if err := w.v.Rename(root, "a", root, "e", 0); err != nil {
		t.Fatal(err)
	}
	w.want("e/y", []byte("y"))
	_, err := w.node("a")
	wantErr(t, "the old name", err, unix.ENOENT)
	w.mkdir("full")
	w.write("full/z", nil)
	wantErr(t, "over a full directory", w.v.Rename(root, "e", root, "full", 0), unix.ENOTEMPTY)
	w.want("e/y", []byte("y"))
	wantErr(t, "NOREPLACE", w.v.Rename(root, "e", root, "full", unix.RENAME_NOREPLACE), unix.EEXIST)
	if err := w.v.Rename(root, "e", root, "full", unix.RENAME_EXCHANGE); err != nil {
		t.Fatal(err)
	}
	w.want("full/y", []byte("y"))
	w.want("e/z", nil)
	w.reopen(volume.Options{})
	w.want("full/y", []byte("y"))
	wantErr(t, "a name that is not there", w.v.Unlink(w.v.Root(), "none"), unix.ENOENT)
}

func TestLinks(t *testing.T) {
	w := newWorld(t, volume.Options{})
	root := w.v.Root()
	w.mkdir("d")
	w.write("f", []byte("content"))
	n := w.must("f")
	_, st, err := w.v.Link(ctx, n, w.must("d"), "g")
	if err != nil || st.Nlink != 2 {
		t.Fatal(st.Nlink, err)
	}
	if w.must("d/g").ID() != n.ID() {
		t.Error("two names of a file are two nodes")
	}
	if err := w.v.Unlink(root, "f"); err != nil {
		t.Fatal(err)
	}
	if n.Gone() {
		t.Error("the node went with one of its names")
	}
	w.want("d/g", []byte("content"))
	if st, err := n.Attr(); err != nil || st.Nlink != 1 {
		t.Error(st.Nlink, err)
	}
	for _, target := range []string{"x", "../a/b", strings.Repeat("t", 3039)} {
		if _, st, err := w.v.Symlink(ctx, root, "sym", target, volume.Caller{}); err != nil ||
			st.Size != int64(len(target)) {
			t.Fatalf("symlink of %d bytes: %d, %v", len(target), st.Size, err)
		}
		if got, err := w.v.Readlink(w.must("sym")); err != nil || got != target {
			t.Errorf("%q, %v", got, err)
		}
		if err := w.v.Unlink(root, "sym"); err != nil {
			t.Fatal(err)
		}
	}
	_, _, err = w.v.Symlink(ctx, root, "sym", strings.Repeat("t", 3040), volume.Caller{})
	wantErr(t, "a target of 3040 bytes", err, unix.ENAMETOOLONG)
}

func TestListingWhileChanging(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.mkdir("d")
	for i := range 500 {
		w.write(fmt.Sprintf("d/stays%d", i), nil)
	}
	d, err := w.must("d").OpenDir()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	seen := map[string]int{}
	last := int64(0)
	for round := 0; ; round++ {
		n := 0
		if err := d.SeekTo(last); err != nil {
			t.Fatal(err)
		}
		if err := d.Next(func(e volume.Entry) bool {
			if n == 7 {
				return false
			}
			n++
			seen[e.Name]++
			last = e.Off
			return true
		}); err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
		w.write(fmt.Sprintf("d/comes%d", round), nil)
		if round > 3 {
			if err := w.v.Unlink(w.must("d"), fmt.Sprintf("comes%d", round-2)); err != nil {
				t.Fatal(err)
			}
		}
		if round > 1000 {
			t.Fatal("the listing does not end")
		}
	}
	for i := range 500 {
		if n := seen[fmt.Sprintf("stays%d", i)]; n != 1 {
			t.Errorf("stays%d was listed %d times", i, n)
		}
	}
}
