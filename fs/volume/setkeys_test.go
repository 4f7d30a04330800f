//go:build linux && !portable

package volume_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

// setKeys gives a directory keys of its own.
func (w *world) setKeys(path string, stores ...keystore.Store) {
	w.t.Helper()
	_, err := w.v.Recipients().SetKeys(ctx, w.must(path), stores)
	w.do("set the keys of "+path, err)
}

// under checks the recipients of a file.
func (w *world) under(path string, stores ...keystore.Store) {
	w.t.Helper()
	h, err := w.must(path).Header()
	w.do("header of "+path, err)
	var got, want []string
	for _, r := range h.Recipients {
		got = append(got, r.URI)
	}
	for _, s := range stores {
		want = append(want, s.URI())
	}
	if !slices.Equal(got, want) {
		w.t.Errorf("%s is under %v, not %v", path, got, want)
	}
}

// tenants is a volume with a directory "a" under a key of its own, and "b" under another.
func tenants(t *testing.T) (w *world, a, b keystore.Store) {
	w = newWorld(t, volume.Options{})
	a, b = newStore(t)[0], newStore(t)[0]
	w.more = []keystore.Store{a, b}
	for _, d := range []string{"a", "b", "c"} {
		w.mkdir(d)
	}
	w.setKeys("a", a)
	w.setKeys("b", b)
	return w, a, b
}

// New files below a directory are under its key alone, also after a mount, and those elsewhere are not.
func TestDirectoryKeys(t *testing.T) {
	w, a, b := tenants(t)
	w.mkdir("a/deep")
	w.mkdir("a/other")
	w.setKeys("a/other", b)
	for range 2 {
		for path, s := range map[string]keystore.Store{"a/f": a, "a/deep/f": a, "a/other/f": b, "b/f": b, "c/f": w.store, "f": w.store} {
			w.write(path, noise(5000))
			w.under(path, s)
		}
		n, _, h, err := w.v.Tmpfile(ctx, w.must("a"), 0o644, volume.Caller{}, true)
		w.do("tmpfile", err)
		_, err = h.Write(ctx, []byte("unnamed"), 0)
		w.do("write", errors.Join(err, h.Release()))
		_, _, err = w.v.Link(ctx, n, w.must("b"), "linked")
		wantErr(t, "link to another directory", err, unix.EXDEV)
		_, _, err = w.v.Link(ctx, n, w.must("a"), "linked")
		w.do("link", err)
		w.under("a/linked", a)
		w.want("a/linked", []byte("unnamed"))
		w.do("unlink", w.v.Unlink(w.must("a"), "linked"))
		w.reopen(volume.Options{})
	}
	if fs, _ := w.fsck(); len(fs) != 0 {
		t.Errorf("%+v", fs)
	}
	// New content after a truncation to nothing is under the directory's key too.
	w.write("c/f", nil)
	w.setKeys("c", a)
	w.write("c/f", []byte("again"))
	w.under("c/f", a)
	// So is that of a file that was removed, and is open.
	w.v.Settle()
	w.reopen(volume.Options{})
	h, n := w.opened("c/f"), w.must("c/f")
	w.do("unlink", w.v.Unlink(w.must("c"), "f"))
	_, err := n.SetAttr(ctx, size(0))
	w.do("truncate", err)
	_, err = h.Write(ctx, []byte("removed"), 0)
	w.do("write", err)
	x, err := n.Header()
	w.do("header", err)
	if len(x.Recipients) != 1 || x.Recipients[0].URI != a.URI() {
		t.Errorf("%+v", x.Recipients)
	}
	w.do("close", h.Release())
}

// Files and directories do not move to where other keys are used: programs copy them then.
func TestDirectoryKeysKeepNames(t *testing.T) {
	w, a, _ := tenants(t)
	w.write("a/f", []byte("f"))
	w.write("c/g", []byte("g"))
	w.mkdir("a/d")
	w.mkdir("c/own")
	w.setKeys("c/own", a)
	_, _, err := w.v.Symlink(ctx, w.must("a"), "l", "f", volume.Caller{})
	w.do("symlink", err)
	root := w.v.Root()
	rename := func(from, name, to, as string, flags uint32) error {
		return w.v.Rename(w.must(from), name, w.must(to), as, flags)
	}
	long := strings.Repeat("long", 50)
	for what, err := range map[string]error{
		"a file":           rename("a", "f", "b", "f", 0),
		"to a long name":   rename("a", "f", "c", long, 0),
		"out":              rename("a", "f", "", "f", 0),
		"in":               rename("c", "g", "a", "g", 0),
		"a directory":      rename("a", "d", "c", "d", 0),
		"an exchange":      rename("c", "g", "a", "f", unix.RENAME_EXCHANGE),
		"another exchange": rename("a", "d", "c", "g", unix.RENAME_EXCHANGE),
	} {
		wantErr(t, what, err, unix.EXDEV)
	}
	_, _, err = w.v.Link(ctx, w.must("a/f"), root, "f")
	wantErr(t, "a link", err, unix.EXDEV)
	w.do("within", rename("a", "f", "a/d", "f", 0))
	wantErr(t, "a file for a symlink", rename("a", "l", "c", "g", unix.RENAME_EXCHANGE), unix.EXDEV)
	w.do("a symlink", rename("a", "l", "c", "l", 0))
	w.do("a directory with keys of its own", rename("c", "own", "b", "own", 0))
	w.do("one with the same keys", rename("a", "d", "b/own", "d", 0))
	w.do("the directory itself", rename("", "a", "c", "a", 0))
	w.write("c/a/g", []byte("g"))
	w.under("c/a/g", a)
	w.want("b/own/d/f", []byte("f"))
	if fs, _ := w.fsck(); len(fs) != 0 {
		t.Errorf("%+v", fs)
	}
}

// Without the key of a directory the rest of the volume works: the directory is listed, and its files
// can be removed, and neither read nor made.
func TestDirectoryKeyNotAtHand(t *testing.T) {
	w, _, b := tenants(t)
	for _, d := range []string{"a", "b", "c"} {
		w.write(d+"/f", []byte("in "+d))
		w.write(d+"/empty", nil)
	}
	w.more = []keystore.Store{b}
	w.quiet = true
	w.reopen(volume.Options{})
	want := []string{"empty", "f"}
	if got := slices.Sorted(slices.Values(w.list("a"))); !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
	for what, err := range map[string]error{
		"read":     errOf(w.read("a/f")),
		"create":   errOf(w.create("a/new")),
		"append":   errOf(w.must("a/f").Open(ctx, true)),
		"to empty": errOf(w.must("a/empty").Open(ctx, true)),
	} {
		if keystore.KindOf(err) != keystore.Untrusted || !strings.Contains(err.Error(), "the key of the directory is not at hand") {
			t.Errorf("%s: %v", what, err)
		}
	}
	w.want("b/f", []byte("in b"))
	w.want("c/f", []byte("in c"))
	w.write("b/new", []byte("new"))
	w.under("b/new", b)
	st, err := w.must("a/f").Attr()
	if err != nil || st.Size != 4 {
		t.Errorf("%+v, %v", st, err)
	}
	// A recipient that its files do not have can be removed.
	rs, more := w.v.Recipients(), newStore(t)[0]
	_, err = rs.Add(ctx, more)
	w.do("add", err)
	w.rewrap(volume.RewrapOptions{})
	_, err = rs.Remove(ctx, more.URI())
	w.do("remove", err)
	w.do("unlink", w.v.Unlink(w.must("a"), "f"))
	if got := w.list("a"); !slices.Equal(got, []string{"empty"}) {
		t.Errorf("%v", got)
	}
}

func errOf[T any](_ T, err error) error { return err }

// A directory goes from the volume's keys to its own, to others, and back. At each step all can be
// read, and the key of before is forgotten when no file needs it.
func TestDirectoryKeysChange(t *testing.T) {
	w, a, b := tenants(t)
	for _, f := range []string{"c/f", "c/g"} {
		w.write(f, []byte(f))
	}
	opened := w.opened("c/g")
	for _, step := range []struct {
		name   string
		before []keystore.Store
		keys   []keystore.Store
		after  []keystore.Store
	}{
		{"its own", []keystore.Store{w.store}, []keystore.Store{a}, []keystore.Store{a}},
		{"two", []keystore.Store{a}, []keystore.Store{b, a}, []keystore.Store{b, a}},
		{"another", []keystore.Store{b, a}, []keystore.Store{newStore(t)[0]}, nil},
		{"the volume's", nil, nil, []keystore.Store{w.store}},
	} {
		if step.before == nil {
			step.before = w.more[2:]
		}
		if step.after == nil {
			step.after = step.keys
			w.more = append(w.more, step.keys...)
		}
		w.setKeys("c", step.keys...)
		w.under("c/f", step.before...)
		_, err := opened.Write(ctx, []byte("C"), 0)
		w.do(step.name, err)
		w.want("c/f", []byte("c/f"))
		if done := w.rewrap(volume.RewrapOptions{}); done.Changed != 2 || done.FormerNeeded != 0 || (done.Record == nil) != (step.name != "the volume's") {
			t.Errorf("%s: %+v", step.name, done)
		}
		w.under("c/f", step.after...)
		w.under("c/g", step.after...)
		l, err := volume.Find(w.dir)
		w.do("find", err)
		for id, keys := range l.Config.Directories {
			if len(keys.Former) > 0 {
				t.Errorf("%s: %s has former keys", step.name, id)
			}
		}
		l.Close()
	}
	w.do("close", opened.Release())
	w.reopen(volume.Options{})
	w.want("c/g", []byte("C/g"))
	l, err := volume.Find(w.dir)
	w.do("find", err)
	defer l.Close()
	if len(l.Config.Directories) != 2 {
		t.Errorf("%+v", l.Config.Directories)
	}
	if fs, _ := w.fsck(); len(fs) != 0 {
		t.Errorf("%+v", fs)
	}
}

// A key that files still have stays trusted, through mounts, until they are rewrapped.
func TestFormerKeyStays(t *testing.T) {
	w, a, b := tenants(t)
	w.write("a/f", []byte("under a"))
	w.setKeys("a", b)
	// A former key can be used for new files again.
	w.setKeys("a", a)
	w.write("a/again", []byte("under a again"))
	w.under("a/again", a)
	w.do("unlink", w.v.Unlink(w.must("a"), "again"))
	w.setKeys("a", b)
	w.write("a/new", []byte("under b"))
	w.under("a/new", b)
	for range 2 {
		w.under("a/f", a)
		w.want("a/f", []byte("under a"))
		w.reopen(volume.Options{})
	}
	fs, _ := w.fsck()
	if len(fs) != 2 || fs[0].Path != fs[1].Path {
		t.Errorf("%+v", fs)
	}
	// A file that cannot be rewrapped keeps it.
	w.more = []keystore.Store{b}
	w.quiet = true
	w.reopen(volume.Options{})
	done, err := w.v.Recipients().Rewrap(ctx, volume.RewrapOptions{})
	if w.do("rewrap", err); done.Failed != 1 || done.FormerNeeded != 1 {
		t.Errorf("%+v", done)
	}
	w.more = []keystore.Store{a, b}
	w.reopen(volume.Options{})
	if done := w.rewrap(volume.RewrapOptions{}); done.Changed != 1 || done.FormerNeeded != 0 || done.Record == nil {
		t.Errorf("%+v", done)
	}
	w.more = []keystore.Store{b}
	w.reopen(volume.Options{})
	w.want("a/f", []byte("under a"))
	w.under("a/f", b)
}

// What cannot have keys of its own.
func TestSetKeysRefuses(t *testing.T) {
	w, a, _ := tenants(t)
	w.write("f", []byte("f"))
	rs := w.v.Recipients()
	set := func(n *volume.Node, s ...keystore.Store) error { return errOf(rs.SetKeys(ctx, n, s)) }
	wantErr(t, "the root", set(w.v.Root(), a), volume.ErrRootKeys)
	wantErr(t, "a file", set(w.must("f"), a), unix.ENOTDIR)
	wantErr(t, "only sealing", set(w.must("c"), onlySeals{a}), volume.ErrSealsOnly)
	denied := &counting{Store: newStore(t)[0]}
	denied.deny.Store(true)
	if err := set(w.must("c"), denied); keystore.KindOf(err) != keystore.Denied {
		t.Error(err)
	}
	w.do("suspend", w.v.Suspend())
	if err := set(w.must("c"), a); keystore.KindOf(err) != keystore.Credentials {
		t.Error(err)
	}
	w.v.Resume()
	var many []keystore.Store
	for range 40 {
		many = append(many, newStore(t)[0])
	}
	wantErr(t, "no room", set(w.must("c"), many...), volume.ErrNoRoom)
	w.write("c/f", []byte("f"))
	w.under("c/f", w.store)

	p := newWorldIn(t, t.TempDir(), volume.Options{}, true)
	p.mkdir("d")
	_, err := p.v.Recipients().SetKeys(ctx, p.must("d"), []keystore.Store{a})
	wantErr(t, "plain names", err, volume.ErrPlainNames)
}

// onlySeals is a store that cannot unwrap.
type onlySeals struct{ keystore.Store }

func (onlySeals) OnlySeals() bool { return true }

// Rekey and reheader put files under the keys of their directories.
func TestDirectoryKeysRekey(t *testing.T) {
	w, a, _ := tenants(t)
	w.write("c/f", noise(5000))
	w.setKeys("c", a)
	if done, failed := w.rekeyed(); done.Changed != 1 || len(failed) > 0 {
		t.Errorf("%+v, %v", done, failed)
	}
	w.under("c/f", a)
}

// Locking darkens the files of all directories, and unlocking gives all back.
func TestDirectoryKeysSuspend(t *testing.T) {
	w, a, _ := tenants(t)
	w.write("a/f", []byte("old"))
	w.write("f", []byte("old"))
	h, root := w.opened("a/f"), w.opened("f")
	w.do("suspend", w.v.Suspend())
	for _, h := range []*volume.Handle{h, root} {
		if _, err := h.Write(ctx, []byte("new"), 0); keystore.KindOf(err) != keystore.Credentials {
			t.Errorf("%v", err)
		}
	}
	w.v.Resume()
	for _, h := range []*volume.Handle{h, root} {
		_, err := h.Write(ctx, []byte("new"), 0)
		w.do("write", errors.Join(err, h.Release()))
	}
	w.want("a/f", []byte("new"))
	w.want("f", []byte("new"))
	w.under("a/f", a)
}

// The directory's ID is on the disk before kmsfs.json names it.
func TestDirectoryIDIsDurableFirst(t *testing.T) {
	var mu sync.Mutex
	syncs, before := 0, -1
	w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case c.Op == "fsync":
			syncs++
		case strings.HasPrefix(c.Op, "rename") && before < 0:
			before = syncs
		}
		return nil
	}))
	w.mkdir("d")
	mu.Lock()
	syncs, before = 0, -1
	mu.Unlock()
	w.setKeys("d", w.store)
	if before != 2 { // the directory, and the new kmsfs.json
		t.Errorf("%d syncs before kmsfs.json is replaced", before)
	}
}

// plantedDirectoryKeys are in a kmsfs.json that somebody made who does not have the volume key.
func (m *tamperer) plantedDirectoryKeys() {
	v := m.victim()
	own, theirs := newStore(v.t)[0], newStore(v.t)[0]
	v.more = []keystore.Store{own, theirs}
	v.setKeys("d", own)
	v.seal()
	for what, uris := range map[string][2]string{"in the place of its own": {theirs.URI(), ""}, "as a former one": {own.URI(), theirs.URI()}} {
		l, err := volume.Find(v.dir)
		v.do("find", err)
		cfg := *l.Config
		l.Close()
		for id := range cfg.Directories {
			keys := blockcrypt.DirectoryKeys{Recipients: []blockcrypt.Recipient{{URI: uris[0]}}}
			if uris[1] != "" {
				keys.Former = []blockcrypt.Recipient{{URI: uris[1]}}
			}
			cfg.Directories[id] = keys
		}
		vk, err := blockcrypt.NewVolumeKeys(make([]byte, 32), cfg.Volume)
		v.do("other keys", err)
		text, err := cfg.Encode(vk)
		v.do("encode", err)
		m.on(v, filepath.Join(v.dir, blockcrypt.ConfigName), what, func([]byte) []byte { return text })
	}
}

// exchangedDirectories have their ciphertext directories renamed: a new file is never under a key that
// kmsfs.json does not name.
func (m *tamperer) exchangedDirectories() {
	v := m.victim()
	a, b := newStore(v.t)[0], newStore(v.t)[0]
	v.more = []keystore.Store{a, b}
	v.setKeys("d", a)
	v.setKeys("e", b)
	d, e := v.path("d"), v.path("e")
	v.seal()
	v.do("exchange", unix.Renameat2(unix.AT_FDCWD, d, unix.AT_FDCWD, e, unix.RENAME_EXCHANGE))
	m.one("by their names", v.with(func() string {
		v.world.write("d/new", []byte("new"))
		h, err := v.must("d/new").Header()
		if err != nil || len(h.Recipients) != 1 || h.Recipients[0].URI != b.URI() {
			return fmt.Sprint(h, err)
		}
		return "new files get the other one's keys; not noticed"
	}))
}
