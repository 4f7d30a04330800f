//go:build linux && !portable

package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/keystoretest"
)

func TestSizesOnDisk(t *testing.T) {
	w := newWorld(t, volume.Options{})
	for n, c := range map[int]int64{0: 0, 1: 1057, 3039: 4095, 3040: 4096, 3041: 4129, 4064: 5152,
		5000: 6088, 7104: 8192, 7105: 8225} {
		w.write("f", noise(n))
		st, err := os.Stat(w.cipherFile())
		if err != nil || st.Size() != c {
			t.Errorf("%d bytes take %d, want %d: %v", n, st.Size(), c, err)
		}
		if a, err := w.must("f").Attr(); err != nil || a.Size != int64(n) {
			t.Errorf("%d bytes are %d in stat: %v", n, a.Size, err)
		}
	}
}

func TestNewContentNewKey(t *testing.T) {
	w := newWorld(t, volume.Options{})
	id := func() blockcrypt.ID {
		l, err := volume.OpenLone(w.cipherFile())
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Header.File
	}
	w.write("f", []byte("one"))
	a := id()
	w.write("f", []byte("two"))
	if a == id() {
		t.Error("the new content is under the old key")
	}
}

func TestBigAndSparse(t *testing.T) {
	w := newWorld(t, volume.Options{})
	h, err := w.create("big")
	if err != nil {
		t.Fatal(err)
	}
	at := []int64{0, 3 << 20, 5<<30 + 17, 6 << 30}
	for _, off := range at {
		if _, err := h.Write(ctx, fmt.Appendf(nil, "at %d", off), off); err != nil {
			t.Fatal(err)
		}
	}
	check := func() {
		t.Helper()
		h, err := w.must("big").Open(ctx, false)
		if err != nil {
			t.Fatal(err)
		}
		defer h.Release()
		for _, off := range at {
			want := fmt.Sprintf("at %d", off)
			b := make([]byte, len(want))
			if _, err := h.Read(ctx, b, off); err != nil || string(b) != want {
				t.Errorf("%q, %v", b, err)
			}
		}
		b := make([]byte, 1<<20)
		if n, err := h.Read(ctx, b, 1<<30); err != nil || n != len(b) || !blockcrypt.IsHole(b) {
			t.Errorf("a hole reads as %d bytes, %v", n, err)
		}
	}
	check()
	if err := h.Fsync(); err != nil {
		t.Fatal(err)
	}
	if err := h.Release(); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if unix.Stat(w.cipherFile(), &st); st.Blocks > 1000 {
		t.Errorf("the sparse file takes %d blocks", st.Blocks)
	}
	w.reopen(volume.Options{})
	check()
	if a, _ := w.must("big").Attr(); a.Size != 6<<30+int64(len("at 6442450944")) {
		t.Errorf("%d bytes", a.Size)
	}
}

// A file that was unlinked while it is open goes on.
func TestUnlinkedOpen(t *testing.T) {
	w := newWorld(t, volume.Options{})
	h, err := w.create("f")
	if err != nil {
		t.Fatal(err)
	}
	want := noise(10000)
	if _, err := h.Write(ctx, want[:5000], 0); err != nil {
		t.Fatal(err)
	}
	if err := w.v.Unlink(w.v.Root(), "f"); err != nil {
		t.Fatal(err)
	}
	w.write("f", []byte("another, with the same inode number perhaps"))
	if w.must("f").ID() == h.Node().ID() {
		t.Fatal("a new file has the node of an old one")
	}
	if _, err := h.Write(ctx, want[5000:], 5000); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 20000)
	if n, err := h.Read(ctx, got, 0); err != nil || !bytes.Equal(got[:n], want) {
		t.Error(n, err)
	}
	if _, err := h.Node().SetAttr(ctx, size(7)); err != nil {
		t.Error(err)
	}
	mode := uint32(0o600)
	st, err := h.Node().SetAttr(ctx, volume.SetAttr{Mode: &mode})
	if err != nil || st.Size != 7 || st.Nlink != 0 || st.Mode&0o777 != 0o600 {
		t.Error(st.Size, st.Nlink, err)
	}
	if err := h.Node().Setxattr("user.x", []byte("y"), 0, false); err != nil &&
		!errors.Is(err, unix.EOPNOTSUPP) {
		t.Error(err)
	}
	if err := errors.Join(h.Fsync(), h.Release()); err != nil {
		t.Error(err)
	}
	w.want("f", []byte("another, with the same inode number perhaps"))
}

func TestXattrs(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.write("f", []byte("x"))
	n := w.must("f")
	if err := n.Setxattr("user.note", []byte("secret value"), 0, false); errors.Is(err, unix.EOPNOTSUPP) {
		keystoretest.Need(t, "user attributes on the temporary directory's filesystem", false)
	} else if err != nil {
		t.Fatal(err)
	}
	if err := n.Setxattr("user.empty", nil, 0, false); err != nil {
		t.Fatal(err)
	}
	w.reopen(volume.Options{})
	n = w.must("f")
	if v, err := n.Getxattr("user.note"); err != nil || string(v) != "secret value" {
		t.Errorf("%q, %v", v, err)
	}
	if l, err := n.Listxattr(); err != nil || len(l) != len("user.note\x00user.empty\x00") {
		t.Errorf("%q, %v", l, err)
	}
	raw := make([]byte, 4096)
	m, err := unix.Listxattr(w.cipherFile(), raw)
	if err != nil || bytes.Contains(raw[:m], []byte("note")) {
		t.Errorf("%q, %v", raw[:m], err)
	}
	wantErr(t, "CREATE", n.Setxattr("user.note", nil, unix.XATTR_CREATE, false), unix.EEXIST)
	if err := n.Removexattr("user.note"); err != nil {
		t.Error(err)
	}
	_, err = n.Getxattr("user.note")
	wantErr(t, "removed", err, unix.ENODATA)
	wantErr(t, "security.selinux", n.Setxattr("security.selinux", []byte("x"), 0, false), unix.EOPNOTSUPP)
}

func TestTimes(t *testing.T) {
	w := newWorld(t, volume.Options{KernelTimes: true})
	h, err := w.create("f")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Write(ctx, noise(9000), 0); err != nil {
		t.Fatal(err)
	}
	at, mt := unix.Timespec{Sec: 100, Nsec: 5}, unix.Timespec{Sec: 1234567890, Nsec: 987654321}
	if _, err := h.Node().SetAttr(ctx, volume.SetAttr{Atime: &at, Mtime: &mt}); err != nil {
		t.Fatal(err)
	}
	check := func(when string) {
		t.Helper()
		st, err := w.must("f").Attr()
		if err != nil || st.Mtim != mt || st.Size != 9000 {
			t.Errorf("%s: %v, %d bytes, %v", when, st.Mtim, st.Size, err)
		}
		var raw unix.Stat_t
		if unix.Stat(w.cipherFile(), &raw); when != "written" && raw.Mtim != mt {
			t.Errorf("%s: the ciphertext has %v", when, raw.Mtim)
		}
	}
	// Writes that the kernel counts as no change of the time it has told.
	if _, err := h.Write(ctx, []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	check("written")
	if err := h.Fsync(); err != nil {
		t.Fatal(err)
	}
	check("synced")
	if _, err := h.Write(ctx, []byte("x"), 8999); err != nil {
		t.Fatal(err)
	}
	if err := h.Release(); err != nil {
		t.Fatal(err)
	}
	check("closed")
	w.v.Settle()
	check("settled")
	w.reopen(volume.Options{KernelTimes: true})
	check("mounted again")
}

func TestModesAndOwners(t *testing.T) {
	w := newWorld(t, volume.Options{})
	root := w.v.Root()
	_, st, err := w.v.Mkdir(ctx, root, "d", 0o777, volume.Caller{Umask: 0o027})
	if err != nil || st.Mode&0o777 != 0o750 {
		t.Errorf("%o, %v", st.Mode, err)
	}
	keystoretest.Need(t, "root, for owners", os.Getuid() == 0)
	c := volume.Caller{UID: 1234, GID: 5678}
	n, st, h, err := w.v.Create(ctx, root, "f", volume.NewFile{NewNode: volume.NewNode{Mode: 0o4755, Caller: c}, Excl: true, Write: true})
	if err != nil || st.Uid != 1234 || st.Gid != 5678 || st.Mode&0o7777 != 0o4755 {
		t.Fatalf("%d:%d %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
	if err := h.Release(); err != nil {
		t.Fatal(err)
	}
	if st, err := n.SetAttr(ctx, volume.SetAttr{KillPriv: true}); err != nil || st.Mode&0o7777 != 0o755 {
		t.Errorf("%o, %v", st.Mode, err)
	}
	sgid := uint32(0o2755)
	if _, err := w.must("d").SetAttr(ctx, volume.SetAttr{Mode: &sgid}); err != nil {
		t.Fatal(err)
	}
	if _, st, err := w.v.Mknod(ctx, w.must("d"), "p",
		volume.NewNode{Mode: unix.S_IFIFO | 0o600, Caller: c}); err != nil || st.Gid != 0 || st.Uid != 1234 || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		t.Errorf("in a setgid directory: %d:%d %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
}

func TestForget(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.mkdir("a")
	w.mkdir("a/b")
	w.write("a/b/f", []byte("x"))
	w.reopen(volume.Options{})
	base := w.v.KnownNodes()
	a, _, _, _ := w.v.Lookup(ctx, w.v.Root(), "a")
	b, _, _, _ := w.v.Lookup(ctx, a, "b")
	f, _, _, err := w.v.Lookup(ctx, b, "f")
	if err != nil {
		t.Fatal(err)
	}
	w.v.Forget(a.ID(), 1) // its child keeps it
	if w.v.Node(a.ID()) == nil {
		t.Error("a directory was forgotten below which a file is known")
	}
	w.v.Forget(b.ID(), 1)
	if got, err := readNode(f); err != nil || string(got) != "x" {
		t.Error(got, err)
	}
	w.v.Forget(f.ID(), 1)
	if n := w.v.KnownNodes(); n != base {
		t.Errorf("%d nodes are left, there were %d", n, base)
	}
}

func TestLock(t *testing.T) {
	w := newWorld(t, volume.Options{})
	u, err := w.unlock()
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	_, err = u.Open(volume.Options{})
	wantErr(t, "a second writer", err, volume.ErrLocked)
	v, err := u.Open(volume.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	for what, err := range map[string]error{
		"mkdir":  second(v.Mkdir(ctx, v.Root(), "d", 0o755, volume.Caller{})),
		"unlink": v.Unlink(v.Root(), "x"),
		"rename": v.Rename(v.Root(), "x", v.Root(), "y", 0),
		"chmod":  second2(v.Root().SetAttr(ctx, size(0))),
		"xattr":  v.Root().Setxattr("user.x", nil, 0, false),
	} {
		wantErr(t, what, err, unix.EROFS)
	}
}

func second(_ *volume.Node, _ volume.Attr, err error) error { return err }
func second2(_ volume.Attr, err error) error                { return err }

// Many goroutines on few files: nothing is torn, nothing races.
func TestConcurrent(t *testing.T) {
	w := newWorld(t, volume.Options{})
	const files, blocks, per = 3, 40, 500
	var wg sync.WaitGroup
	for i := range files {
		name := fmt.Sprintf("f%d", i)
		w.write(name, bytes.Repeat([]byte{1}, blocks*per))
		for g := range 4 {
			wg.Go(func() {
				n, err := w.node(name)
				if err != nil {
					t.Error(err)
					return
				}
				for j := range 60 {
					h, err := n.Open(ctx, g%2 == 0)
					if err != nil {
						t.Error(err)
						return
					}
					if k := int64((j*7 + g) % blocks); g%2 == 0 {
						_, err = h.Write(ctx, bytes.Repeat([]byte{byte(j + 2)}, per), k*per)
						if j%9 == 0 {
							err = errors.Join(err, h.Fsync())
						}
					} else {
						b := make([]byte, per)
						if _, err = h.Read(ctx, b, k*per); err == nil && bytes.Count(b, b[:1]) != per {
							err = fmt.Errorf("a write was torn: %v", b[:10])
						}
					}
					if err = errors.Join(err, h.Release()); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
	}
	wg.Go(func() {
		for range 20 {
			w.v.Settle()
			if err := w.v.NextSession(); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
}

func TestConcurrentTree(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.mkdir("a")
	w.mkdir("b")
	a, b := w.must("a"), w.must("b")
	w.write("a/f", []byte("f"))
	f := w.must("a/f")
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 3 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if got, err := readNode(f); err != nil || string(got) != "f" {
					t.Errorf("while it moves: %q, %v", got, err)
					return
				}
			}
		})
	}
	for range 300 {
		if err := errors.Join(w.v.Rename(a, "f", b, "g", 0),
			w.v.Rename(w.v.Root(), "b", w.v.Root(), "c", 0),
			w.v.Rename(w.v.Root(), "c", w.v.Root(), "b", 0), w.v.Rename(b, "g", a, "f", 0)); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	wg.Wait()
}

func TestInitBad(t *testing.T) {
	w := newWorld(t, volume.Options{})
	id := blockcrypt.NewID()
	_, err := volume.Init(ctx, w.dir, []keystore.Store{w.store}, id, volume.InitOptions{})
	wantErr(t, "a directory that is not empty", err, volume.ErrNotEmpty)
	for _, dir := range []string{"/nonexistent", "/dev/null"} {
		if _, err := volume.Init(ctx, dir, []keystore.Store{w.store}, id,
			volume.InitOptions{}); err == nil {
			t.Errorf("%s became a volume", dir)
		}
	}
	_, err = volume.Find(t.TempDir())
	wantErr(t, "no volume", err, volume.ErrNotVolume)
}
