//go:build linux && !portable

package volume_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/fs/volume/check"
)

// A volume with everything in it, closed well: nothing is wrong, with keys or
// without, in both names modes.
func TestFsckClean(t *testing.T) {
	for _, plain := range []bool{false, true} {
		w := newWorldIn(t, t.TempDir(), volume.Options{}, plain)
		w.mkdir("d")
		long := strings.Repeat("n", 240)
		for i, n := range []int{0, 1, 3040, 3041, 7104, 100000} {
			w.write(fmt.Sprint("d/f", i), noise(n))
		}
		w.write("d/"+long, noise(10))
		w.mkdir(long)
		h, err := w.create("sparse")
		w.do("create", err)
		_, err = h.Write(ctx, []byte("x"), 5<<20)
		w.do("write", err)
		w.do("fsync", h.Fsync())
		w.do("close", h.Release())
		_, _, err = w.v.Symlink(ctx, w.v.Root(), "link", "target", volume.Caller{})
		w.do("symlink", err)
		w.must("d/f5").Setxattr("user.x", []byte("y"), 0, false)
		w.close()
		fs, d := w.fsck()
		if len(fs) != 0 || d.Files != 8 || d.Dirs != 3 || d.Bytes == 0 || d.Blocks < 30 {
			t.Errorf("plain names %v: %v, %+v", plain, fs, d)
		}
		if fs := w.fsckNoKeys(); len(fs) != 0 {
			t.Errorf("plain names %v, without keys: %v", plain, fs)
		}
	}
}

// After a crash nothing is worse than never confirmed, and a mount leaves it
// clean.
func TestFsckAfterCrash(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	w.write("old", noise(50000))
	w.reopen(volume.Options{})
	for _, name := range []string{"old", "new"} {
		h, err := w.create(name)
		w.do("create", err)
		_, err = h.Write(ctx, noise(9000), 48000)
		w.do("write", err)
	}
	w.crash()
	for _, fs := range [][]check.Finding{first(w.fsck()), w.fsckNoKeys()} {
		if g := worst(fs); g != check.Unconfirmed {
			t.Errorf("%v", fs)
		}
	}
	w.open(volume.Options{})
	w.do("wait", w.v.Wait(ctx))
	w.close()
	if fs, _ := w.fsck(); len(fs) != 0 {
		t.Errorf("after a mount: %v", fs)
	}
}

// Damage: its range, and the readable part that can be kept beside it.
func TestFsckDamage(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	content := noise(100000)
	w.write("f", content)
	w.close()
	path := w.cipherFile()
	whole, err := os.ReadFile(path)
	w.do("read", err)
	damage := func(f func(b []byte) []byte) []check.Finding {
		t.Helper()
		w.do("write", os.WriteFile(path, f(bytes.Clone(whole)), 0o644))
		fs, _ := w.fsck()
		return fs
	}
	fs := damage(func(b []byte) []byte {
		b[4096*5+100] ^= 1
		b[4096*6+100] ^= 1
		b[4096*9+
			7] ^= 1
		return b
	})
	if len(fs) != 2 || fs[0].Grade != check.Damaged || fs[0].Name != "f" || !fs[0].Confirmed ||
		fs[0].What != string(blockcrypt.BadBlock) ||
		fs[0].From != 5*4064-1024 || fs[0].To != 7*4064-1024 || fs[1].From != 9*4064-1024 ||
		fs[1].To != 10*4064-1024 {
		t.Fatalf("%+v", fs)
	}
	repair := func(fs []check.Finding, yes bool) []check.Repaired {
		t.Helper()
		w.open(volume.Options{})
		defer w.close()
		return check.Repair(ctx, w.v, fs, func(check.Finding) bool { return yes })
	}
	if rs := repair(fs, false); len(rs) != 0 {
		t.Errorf("repaired without a yes: %+v", rs)
	}
	if rs := repair(fs, true); len(rs) != 1 || rs[0].Err != nil || rs[0].Done == "" {
		t.Fatalf("%+v", rs)
	}
	rest := bytes.Clone(content)
	clear(rest[fs[0].From:fs[0].To])
	clear(rest[fs[1].From:fs[1].To])
	w.open(volume.Options{})
	w.want("f"+check.RestSuffix, rest)
	w.do("unlink", w.v.Unlink(w.v.Root(), "f"+check.RestSuffix))
	w.close()
	if now, _ := os.ReadFile(path); len(now) != len(whole) {
		t.Error("the damaged file itself was changed")
	}
	// Cut short: within a page, and at one.
	for _, n := range []int{4096*7 + 50, 4096 * 7} {
		fs = damage(func(b []byte) []byte { return b[:n] })
		if len(fs) != 1 || fs[0].What != string(blockcrypt.BadSize) || fs[0].From != 7*4064-1024 ||
			fs[0].To != 100000 {
			t.Errorf("cut at %d: %+v", n, fs)
		}
		repair(fs, true)
		w.open(volume.Options{})
		w.want("f"+check.RestSuffix, content[:7*4064-1024])
		w.do("unlink", w.v.Unlink(w.v.Root(), "f"+check.RestSuffix))
		w.close()
	}
	// Without keys a page that cannot be a block shows, a flipped bit does not.
	damage(func(b []byte) []byte { b[4096*5] = 0xff; return b })
	if fs := w.fsckNoKeys(); len(fs) != 1 || fs[0].What != string(blockcrypt.BadBlock) {
		t.Errorf("without keys: %+v", fs)
	}
}

// A directory's ID is found again by what its files remember.
func TestFsckDirID(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	w.mkdir("d")
	w.write("d/"+strings.Repeat("long", 60), []byte("one"))
	w.write("d/f", []byte("two"))
	w.close()
	dirs, _ := filepath.Glob(filepath.Join(w.dir, "*", "kmsfs.dir"))
	if len(dirs) != 1 {
		t.Fatal(dirs)
	}
	id, err := os.Readlink(dirs[0])
	w.do("readlink", err)
	file := dirs[0] + "." + id
	wrong := strings.Repeat("0", 32)
	for what, f := range map[string]func() error{
		"the symlink is lost": func() error { return os.Remove(dirs[0]) },
		"the file is lost":    func() error { return os.Remove(file) },
		"both are lost":       func() error { return os.Remove(dirs[0]) },
		"the symlink is another": func() error {
			os.Remove(dirs[0])
			return os.Symlink(wrong, dirs[0])
		},
		"the file is another": func() error { return os.Rename(file, dirs[0]+"."+wrong) },
	} {
		w.do(what, f())
		if what == "both are lost" {
			w.do(what, os.Remove(file))
		}
		fs, _ := w.fsck()
		found := false
		for _, x := range fs {
			found = found || x.What == check.FoundDirID
		}
		if !found {
			t.Errorf("%s: %v", what, fs)
		}
		w.open(volume.Options{})
		for _, r := range check.Repair(ctx, w.v, fs, func(check.Finding) bool { return false }) {
			if r.Err != nil {
				t.Errorf("%s: %v", what, r.Err)
			}
		}
		w.close()
		if fs, _ := w.fsck(); len(fs) != 0 {
			t.Errorf("%s, repaired: %v", what, fs)
		}
		if now, _ := os.Readlink(dirs[0]); now != id || !exists(file) {
			t.Errorf("%s: the ID is %s now", what, now)
		}
	}
}

// A directory's ID is found again though one of the names in it was altered.
func TestFsckDirIDBesideAlteredName(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	w.mkdir("dir")
	for _, name := range []string{"a", "b", "c"} {
		w.write("dir/"+name, []byte("content"))
	}
	dir := filepath.Join(w.dir, w.v.CipherName(w.v.Root(), "dir"))
	cname := w.v.CipherName(w.must("dir"), "b")
	w.close()
	for _, place := range append(globbed(t, filepath.Join(dir, "kmsfs.dir*")), filepath.Join(dir, cname)) {
		to := filepath.Join(w.dir, "..", filepath.Base(place))
		if strings.HasSuffix(place, cname) {
			to = filepath.Join(dir, "zz"+cname[2:]) // the last one in most orders
		}
		w.do("rename", os.Rename(place, to))
	}
	fs, _ := w.fsck()
	w.open(volume.Options{})
	for _, r := range check.Repair(ctx, w.v, fs, func(check.Finding) bool { return false }) {
		if r.Err != nil {
			t.Error(r.Err)
		}
	}
	if got := w.list("dir"); len(got) != 2 {
		t.Errorf("%q", got)
	}
}

func globbed(t *testing.T, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil || len(names) == 0 {
		t.Fatalf("%s: %v, %v", pattern, names, err)
	}
	return names
}

// Below a directory whose name does not decode no plaintext path is told: the rest of it would look
// like a path from the root.
func TestFsckBelowUnknownName(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	w.mkdir("dir")
	w.write("dir/file", bytes.Repeat([]byte("content"), 2000))
	cname := w.v.CipherName(w.v.Root(), "dir")
	w.close()
	altered := "A" + cname[1:]
	if altered == cname {
		altered = "B" + cname[1:]
	}
	w.do("rename", os.Rename(filepath.Join(w.dir, cname), filepath.Join(w.dir, altered)))
	file := w.cipherFile()
	b, err := os.ReadFile(file)
	w.do("read", err)
	b[5000] ^= 1
	w.do("write", os.WriteFile(file, b, 0o600))
	fs, _ := w.fsck()
	if len(fs) != 2 || fs[0].What != string(blockcrypt.BadName) ||
		fs[1].What != string(blockcrypt.BadBlock) || fs[1].Name != "" {
		t.Errorf("%+v", fs)
	}
}

// Leftovers and foreign things.
func TestFsckLeftovers(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	long := strings.Repeat("n", 240)
	w.write(long, []byte("x"))
	w.close()
	names, _ := filepath.Glob(filepath.Join(w.dir, "kmsfs.name.*"))
	if len(names) != 1 {
		t.Fatal(names)
	}
	entry := strings.Replace(names[0], "kmsfs.name.", "kmsfs.long.", 1)
	w.do("write", os.WriteFile(filepath.Join(w.dir, "kmsfs.json.new"), []byte("half"), 0o644))
	w.do("write", os.WriteFile(filepath.Join(w.dir, "kmsfs.foreign"), nil, 0o644))
	w.do("write", os.WriteFile(filepath.Join(w.dir, "foreign.txt"), []byte("hello"), 0o644))
	w.do("symlink",
		os.Symlink(strings.Repeat("A", 300), filepath.Join(w.dir, "kmsfs.name."+strings.Repeat("A", 43))))
	fs, _ := w.fsck()
	got := map[string]int{}
	for _, f := range fs {
		got[f.Grade.String()+" "+f.What]++
	}
	want := map[string]int{"mendable leftover": 1, "note foreign": 1, "mendable orphan": 1,
		"damaged name": 1, "damaged header": 1}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v, want %v: %+v", got, want, fs)
	}
	w.open(volume.Options{})
	check.Repair(ctx, w.v, fs, func(check.Finding) bool { return false })
	w.close()
	w.do("remove", os.Remove(filepath.Join(w.dir, "foreign.txt")))
	if fs, _ := w.fsck(); summary(fs) != "note/foreign" {
		t.Errorf("repaired: %+v", fs)
	}
	w.do("remove", os.Remove(names[0])) // the name of a long entry
	if fs, _ := w.fsck(); !strings.Contains(summary(fs), "damaged/name") || exists(entry) == false {
		t.Errorf("a lost name: %+v", fs)
	}
}

// A copy of a file that was being written.
func TestFsckCopiedWhileWritten(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	content := noise(50000)
	w.write("f", content)
	w.reopen(volume.Options{})
	h := w.opened("f")
	_, err := h.Write(ctx, content[:20000], 50000)
	w.do("write", err)
	copied, err := os.ReadFile(w.cipherFile())
	w.do("copy", err)
	w.do("close", h.Release())
	path := w.cipherFile()
	w.close()
	w.do("write", os.WriteFile(path, copied, 0o644))
	fs, _ := w.fsck()
	if len(fs) != 1 || fs[0].What != check.FoundCopied || fs[0].Grade != check.Unconfirmed {
		t.Fatalf("%+v", fs)
	}
	w.open(volume.Options{})
	rs := check.Repair(ctx, w.v, fs, func(check.Finding) bool { return true })
	if len(rs) != 1 || rs[0].Err != nil {
		t.Fatalf("%+v", rs)
	}
	w.want("f"+check.RestSuffix, append(content, content[:20000]...))
}

// A disk that cannot read.
func TestFsckWithoutRights(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root may read everything")
	}
	w := newWorld(t, volume.Options{})
	w.write("f", []byte("x"))
	w.close()
	w.do("chmod", os.Chmod(w.cipherFile(), 0))
	if fs, _ := w.fsck(); len(fs) != 1 || fs[0].Grade != check.Unchecked {
		t.Errorf("%+v", fs)
	}
}
