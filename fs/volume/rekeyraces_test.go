//go:build linux && !portable

package volume_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
	"kmsfs/keystore/keystoretest"
)

// interrupted is a volume in which something else is done once, just before the next call of a name.
func interrupted(t *testing.T, plain bool) (w *world, before func(op string, f func())) {
	var mu sync.Mutex
	var op string
	var other func()
	w = newWorldIn(t, t.TempDir(), volume.Options{}.Hooked(func(c volume.Call) error {
		mu.Lock()
		f := other
		if c.Op != op || f == nil {
			mu.Unlock()
			return nil
		}
		other = nil
		mu.Unlock()
		f()
		return nil
	}), plain)
	w.quiet = true
	return w, func(o string, f func()) {
		mu.Lock()
		defer mu.Unlock()
		op, other = o, f
	}
}

// A recipient that is taken out while a file gets a new key is not in the new file either.
func TestRekeyBesideRecipients(t *testing.T) {
	for _, rewrapped := range []bool{false, true} {
		w, before := interrupted(t, false)
		a, b := w.store, newStore(t)[0]
		rs := w.v.Recipients()
		_, err := rs.Add(ctx, b)
		w.do("add", err)
		w.write("f", noise(5000))
		w.v.Settle()
		before("fsync", func() {
			_, err := rs.Remove(ctx, a.URI())
			w.do("remove", err)
			if rewrapped {
				w.rewrap(volume.RewrapOptions{})
			}
		})
		if done, failed := w.rekeyed(); done.Changed != 1 {
			t.Fatalf("%+v, %v", done, failed)
		}
		h, err := w.must("f").Header()
		if err != nil || len(h.Recipients) != 1 || h.Recipients[0].URI != b.URI() {
			t.Errorf("%+v, %v", h, err)
		}
	}
}

// A file keeps its key rather than lose a recipient that cannot be wrapped for now.
func TestRekeyKeepsRecipients(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	s := &counting{Store: newStore(t)[0]}
	_, err := w.v.Recipients().Add(ctx, s)
	w.do("add", err)
	w.write("f", noise(100))
	w.v.Settle()
	s.deny.Store(true)
	done, failed := w.rekeyed()
	if done.Failed != 1 || len(failed) != 1 || !errors.Is(failed[0], volume.ErrAbsent) {
		t.Errorf("%+v, %v", done, failed)
	}
	if h, err := w.must("f").Header(); err != nil || len(h.Recipients) != 2 {
		t.Errorf("%+v, %v", h, err)
	}
	w.noLeftover()
}

// A change of a file after its content was read, or just before it is replaced, is not lost: the file
// keeps its key then, or is tried again.
func TestRekeyBesideChanges(t *testing.T) {
	for what, change := range map[string]func(w *world, n *volume.Node){
		"chmod": func(w *world, n *volume.Node) {
			mode := uint32(0o600)
			_, err := n.SetAttr(ctx, volume.SetAttr{Mode: &mode})
			w.do("chmod", err)
		},
		"setxattr": func(w *world, n *volume.Node) { w.do("setxattr", n.Setxattr("user.x", []byte("v"), 0, false)) },
		"write": func(w *world, n *volume.Node) {
			h, err := n.Open(ctx, true)
			w.do("open", err)
			_, err = h.Write(ctx, []byte("new"), 0)
			w.do("write", errors.Join(err, h.Release()))
		},
		"link": func(w *world, n *volume.Node) {
			_, _, err := w.v.Link(ctx, n, w.must("d"), "again")
			w.do("link", err)
		},
		"session": func(w *world, _ *volume.Node) { w.do("session", w.v.NextSession()) },
	} {
		for _, op := range []string{"fdatasync", "fsync"} {
			w, before := interrupted(t, false)
			w.mkdir("d")
			w.write("f", []byte("old content"))
			n := w.must("f")
			mtime := unix.Timespec{Sec: 1234567, Nsec: 890}
			_, err := n.SetAttr(ctx, volume.SetAttr{Mtime: &mtime})
			w.do("utimens", err)
			before(op, func() { change(w, n) })
			w.rekeyed()
			st, err := n.Attr()
			w.do("stat", err)
			switch what {
			case "chmod":
				if st.Mode&0o777 != 0o600 {
					t.Errorf("%s before %s: the mode is %o", what, op, st.Mode)
				}
			case "setxattr":
				if v, err := n.Getxattr("user.x"); string(v) != "v" {
					t.Errorf("%s before %s: %q, %v", what, op, v, err)
				}
			case "write":
				w.want("f", []byte("new content"))
			case "link":
				if again := w.must("d/again"); again != n || st.Nlink != 2 {
					t.Errorf("%s before %s: %d links, one node: %v", what, op, st.Nlink, again == n)
				}
			case "session":
				if st.Mtim != mtime {
					t.Errorf("%s before %s: modified at %v", what, op, st.Mtim)
				}
			}
			w.noLeftover()
		}
	}
}

// A default ACL of the root is not given to files below other directories.
func TestRekeyACL(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	w.mkdir("d")
	w.write("d/f", []byte("content"))
	acl := []byte{2, 0, 0, 0}
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 7, ^uint32(0)}, {2, 7, 12345}, {4, 5, ^uint32(0)}, {16, 7, ^uint32(0)}, {32, 0, ^uint32(0)}} {
		acl = append(acl, byte(e.tag), 0, byte(e.perm), 0, byte(e.id), byte(e.id>>8), byte(e.id>>16), byte(e.id>>24))
	}
	err := w.v.Root().Setxattr("system.posix_acl_default", acl, 0, false)
	keystoretest.Need(t, "ACLs on the temporary directory", !errors.Is(err, unix.EOPNOTSUPP))
	w.do("set the ACL", err)
	if done, failed := w.rekeyed(); done.Changed != 1 {
		t.Fatalf("%+v, %v", done, failed)
	}
	if v, err := w.must("d/f").Getxattr("system.posix_acl_access"); !errors.Is(err, unix.ENODATA) {
		t.Errorf("it has the ACL %x, %v", v, err)
	}
}

// A file that has no name for now, and that nothing has open, keeps the former size from being forgotten.
func TestReheaderOfUnnamed(t *testing.T) {
	w := newWorld(t, volume.Options{})
	n, _, h, err := w.v.Tmpfile(ctx, w.v.Root(), 0o644, volume.Caller{}, true)
	w.do("tmpfile", err)
	_, err = h.Write(ctx, []byte("unnamed"), 0)
	w.do("write", errors.Join(err, h.Release()))
	rs := w.v.Recipients()
	_, err = rs.SetHeaderSize(2048)
	w.do("set the size", err)
	if _, rec, err := rs.Reheader(ctx, volume.RekeyOptions{}); rec != nil || err == nil ||
		!strings.Contains(err.Error(), "1 files have headers of 1024 bytes yet") {
		t.Errorf("%v, %v", rec, err)
	}
	_, _, err = w.v.Link(ctx, n, w.v.Root(), "named")
	w.do("link", err)
	if done, rec, err := rs.Reheader(ctx, volume.RekeyOptions{}); rec == nil || err != nil || done.Changed != 1 {
		t.Errorf("%+v, %v, %v", done, rec, err)
	}
	w.want("named", []byte("unnamed"))
}

// One who cannot change all files goes back to the former size.
func TestReheaderBack(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.write("f", []byte("content"))
	_, _, err := w.v.Link(ctx, w.must("f"), w.v.Root(), "again")
	w.do("link", err)
	rs := w.v.Recipients()
	_, err = rs.SetHeaderSize(2048)
	w.do("set the size", err)
	w.write("g", []byte("new"))
	if done, rec, err := rs.Reheader(ctx, volume.RekeyOptions{}); rec != nil || err != nil || done.Failed != 2 {
		t.Errorf("%+v, %v, %v", done, rec, err)
	}
	_, err = rs.SetHeaderSize(1024)
	w.do("go back", err)
	if done, rec, err := rs.Reheader(ctx, volume.RekeyOptions{}); rec == nil || err != nil || done.Changed != 1 {
		t.Errorf("%+v, %v, %v", done, rec, err)
	}
	w.reopen(volume.Options{})
	w.want("again", []byte("content"))
	w.want("g", []byte("new"))
}

// With plain names only the root has names of kmsfs' own: below it they are files like any other.
func TestPlainFilesLikeOwn(t *testing.T) {
	w := newWorldIn(t, t.TempDir(), volume.Options{}, true)
	w.mkdir("d")
	w.write("d/kmsfs.note", []byte("content"))
	w.v.Settle()
	rs := w.v.Recipients()
	_, err := rs.Add(ctx, newStore(t)[0])
	w.do("add", err)
	only := &volume.OnlyRecipientError{}
	if _, err := rs.Remove(ctx, w.store.URI()); !errors.As(err, &only) || only.First != "d/kmsfs.note" {
		t.Errorf("%v", err)
	}
	found := 0
	w.do("inventory", volume.Inventory(ctx, w.dir, func(e volume.Inventoried) { found++ }))
	if _, err := os.Stat(filepath.Join(w.dir, "d", "kmsfs.note")); found != 1 || err != nil {
		t.Errorf("%d files, %v", found, err)
	}
}
