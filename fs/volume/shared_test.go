//go:build linux && !portable

package volume_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/fs/volume/check"
	"kmsfs/keystore"
)

// Two volumes that are open in one process stand for two hosts: their locks are those of different open
// file descriptions. Two kernels are tested by make test-shared.

const beat = 50 * time.Millisecond // a proof holds for three of them

// newHosts makes a shared volume and opens it on n hosts.
func newHosts(t *testing.T, n int) []*world {
	t.Helper()
	stores := newStore(t)
	first := &world{t: t, dir: t.TempDir(), store: stores[0], log: &logBuffer{}}
	if _, err := volume.Init(ctx, first.dir, stores, blockcrypt.NewID(), volume.InitOptions{Shared: true}); err != nil {
		t.Fatal(err)
	}
	hosts := []*world{first}
	for range n - 1 {
		hosts = append(hosts, &world{t: t, dir: first.dir, store: first.store, log: &logBuffer{}})
	}
	for _, w := range hosts {
		w.open(volume.Options{}.Beats(beat).Hooked(w.cutOff))
		t.Cleanup(func() {
			if w.v != nil {
				w.close()
			}
			if s := w.log.String(); !w.quiet && strings.Contains(s, "level=ERROR") {
				t.Errorf("the log has faults:\n%s", s)
			}
		})
	}
	return hosts
}

// cut are the hosts that cannot prove that they live.
var cut sync.Map // *world, true

// cutOff fails the writes of a host's own file while the host is among cut.
func (w *world) cutOff(c volume.Call) error {
	if _, is := cut.Load(w); is && c.Op == "pwrite" && c.Off == 0 && c.Len == 1024 {
		return unix.ETIMEDOUT
	}
	return nil
}

// sound demands that fsck finds nothing, when nobody has the volume open any more.
func sound(t *testing.T, hosts ...*world) {
	t.Helper()
	for _, w := range hosts {
		if w.v != nil {
			w.close()
			w.v = nil
		}
	}
	w := hosts[0]
	u, err := w.unlock()
	w.do("unlock", err)
	defer u.Close()
	var found []check.Finding
	_, err = check.Volume(ctx, u, check.Options{Found: func(f check.Finding) {
		if f.Grade != check.Note { // of a recipient that a rewrap takes out
			found = append(found, f)
		}
	}})
	if err != nil || len(found) > 0 {
		t.Errorf("fsck: %v, %v", found, err)
	}
	if names, _ := os.ReadDir(filepath.Join(w.dir, "kmsfs.hosts")); len(names) > 0 {
		t.Errorf("kmsfs.hosts has %v", names)
	}
}

// toWrite opens a file for writing.
func (w *world) toWrite(p string) *volume.Handle {
	w.t.Helper()
	h, err := w.must(p).Open(ctx, true)
	w.do("open "+p, err)
	return h
}

// text reads a whole file.
func (w *world) text(p string) []byte {
	w.t.Helper()
	b, err := w.read(p)
	w.do("read "+p, err)
	return b
}

func waitFor(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// What one host closed, the other reads at its next open, whatever it knew before.
func TestHostsCloseToOpen(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	for i, n := range []int{1, 5000, 20000, 0, 3039, 3040, 3041, 12, 100000} {
		text := noise(n)
		w, r := a, b
		if i%2 == 1 {
			w, r = b, a
		}
		w.write("f", text)
		r.want("f", text)
		w.want("f", text)
	}
	a.mkdir("d")
	b.write("d/g", []byte("x"))
	a.want("d/g", []byte("x"))
	a.do("remove", a.v.Unlink(a.must("d"), "g"))
	if got := b.list("d"); len(got) != 0 {
		t.Errorf("%v", got)
	}
	b.do("rmdir", b.v.Rmdir(b.v.Root(), "d"))
	if got := a.list(""); len(got) != 1 {
		t.Errorf("%v", got)
	}
	sound(t, hosts...)
}

// A file that was closed is confirmed: its state says so, and a repair after the death of its host cuts
// nothing off, even if it is damaged.
func TestClosedIsConfirmed(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	a.quiet, b.quiet = true, true
	text := map[int][]byte{}
	for _, n := range []int{10, 5000, 200000} {
		p := fmt.Sprint("f", n)
		text[n] = noise(n)
		a.write(p, text[n])
		h, err := b.must(p).Header()
		if err != nil || h.State.Floor != int64(n) || h.State.Size != int64(n) {
			t.Errorf("%d bytes: %+v, %v", n, h, err)
		}
	}
	flipIn(t, a.dir, a.v.CipherName(a.v.Root(), "f200000"))
	a.v.Crash()
	a.v = nil
	b.v.Look()
	b.do("wait", b.v.Wait(ctx))
	if got, err := b.read("f200000"); blockcrypt.ClassOf(err) != blockcrypt.BadBlock {
		t.Errorf("a damaged file: %d bytes, %v", len(got), err)
	}
	b.want("f5000", text[5000])
}

// flipIn changes a byte in the middle of a ciphertext file.
func flipIn(t *testing.T, dir, cname string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, cname), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0x55, 0xaa}, 100000); err != nil {
		t.Fatal(err)
	}
}

// Two hosts that have one file open write parts of the same pages, one after the other: no byte is lost.
func TestHostsShareAPage(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	a.write("f", make([]byte, 10000))
	ha, hb := a.toWrite("f"), b.toWrite("f")
	want := make([]byte, 10000)
	for i := range 60 {
		h := []*volume.Handle{ha, hb}[i%2]
		part := bytes.Repeat([]byte{byte(i + 1)}, 100)
		at := i * 150
		copy(want[at:], part)
		if _, err := h.Write(ctx, part, int64(at)); err != nil {
			t.Fatal(err)
		}
		if err := h.Fsync(); err != nil {
			t.Fatal(err)
		}
	}
	a.do("close", ha.Release())
	b.do("close", hb.Release())
	a.want("f", want)
	b.want("f", want)
	sound(t, hosts...)
}

// Writers of one file without a word between them: it always opens, and no append is lost.
func TestHostsAppend(t *testing.T) {
	hosts := newHosts(t, 3)
	hosts[0].write("f", nil)
	const n = 40
	line := func(id, i int) string { return fmt.Sprintf("%d.%d %s\n", id, i, strings.Repeat("x", i*7)) }
	var wg sync.WaitGroup
	for id, w := range hosts {
		wg.Go(func() {
			h := w.toWrite("f")
			defer h.Release()
			for i := range n {
				if _, _, err := h.Append(ctx, []byte(line(id, i))); err != nil {
					t.Errorf("append: %v", err)
					return
				}
				if i%5 == 0 {
					if err := h.Fsync(); err != nil {
						t.Errorf("fsync: %v", err)
					}
				}
			}
		})
	}
	wg.Wait()
	text := string(hosts[1].text("f"))
	for id := range hosts {
		for i := range n {
			if strings.Count(text, line(id, i)) != 1 {
				t.Errorf("the line %d.%d is not there once", id, i)
			}
		}
	}
	sound(t, hosts...)
}

// A host that dies takes only unconfirmed data with it; another one repairs its files.
func TestHostDies(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	a.quiet = true
	old := noise(9000)
	a.write("f", old)
	if _, err := a.toWrite("f").Write(ctx, noise(30000), 9000); err != nil { // unconfirmed
		t.Fatal(err)
	}
	a.v.Crash()
	a.v = nil
	// The file is read only when it is in order.
	got := b.text("f")
	if len(got) < len(old) || !bytes.Equal(got[:len(old)], old) {
		t.Errorf("%d bytes, not beginning with the %d confirmed ones", len(got), len(old))
	}
	waitFor(t, "the host's file to go", func() bool {
		names, _ := os.ReadDir(filepath.Join(b.dir, "kmsfs.hosts"))
		return len(names) == 1
	})
	b.write("f", []byte("goes on"))
	sound(t, b)
}

// The files of a host that lives are not repaired, whatever another host does: it is waited for.
func TestLivingHostIsNotRepaired(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	a.write("f", noise(9000))
	h := a.toWrite("f")
	if _, err := h.Write(ctx, noise(20000), 9000); err != nil {
		t.Fatal(err)
	}
	b.v.Look()
	if got := b.text("f"); len(got) != 29000 { // once the other has given the lease back
		t.Errorf("%d bytes", len(got))
	}
	a.do("close", h.Release())
	sound(t, hosts...)
}

// A host that cannot prove that it lives writes nothing. When it can again, it goes on with the files that
// nobody has changed.
func TestHostCutOff(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	a.quiet, b.quiet = true, true
	a.write("f", noise(9000))
	a.write("g", noise(9000))
	f, g := a.toWrite("f"), a.toWrite("g")
	for _, h := range []*volume.Handle{f, g} {
		if _, err := h.Write(ctx, []byte("mine"), 20000); err != nil {
			t.Fatal(err)
		}
	}
	cut.Store(a, true)
	waitFor(t, "EIO", func() bool {
		_, _, err := a.v.Mkdir(ctx, a.v.Root(), "d", 0o755, volume.Caller{})
		return errors.Is(err, unix.EIO) || err == nil && a.v.Rmdir(a.v.Root(), "d") != nil
	})
	written := make(chan error, 1)
	go func() { // it is waited for, as for a server that does not answer
		_, err := f.Write(ctx, []byte("in time"), 0)
		written <- err
	}()
	select {
	case err := <-written:
		t.Errorf("it was written without a proof: %v", err)
	case <-time.After(4 * beat):
	}
	cut.Delete(a)
	a.do("write", <-written)
	a.do("fsync", f.Fsync())
	if got := b.text("f"); !bytes.HasPrefix(got, []byte("in time")) {
		t.Errorf("%q", got[:8])
	}
	a.do("close", f.Release())
	a.do("close", g.Release())
	sound(t, hosts...)
}

// A host that was taken for dead writes nothing any more, even if it still has its locks.
func TestHostFenced(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	a.quiet, b.quiet = true, true
	a.write("f", noise(9000))
	h := a.toWrite("f")
	if _, err := h.Write(ctx, noise(20000), 9000); err != nil {
		t.Fatal(err)
	}
	a.v.LoseLocks() // as a filesystem that does not hear of a host takes them
	if got := b.text("f"); len(got) < 9000 {
		t.Errorf("%d bytes", len(got))
	}
	b.write("f", []byte("newer"))
	waitFor(t, "EIO", func() bool {
		_, err := h.Write(ctx, []byte("older"), 0)
		return errors.Is(err, unix.EIO)
	})
	h.Release()
	a.v.Close()
	a.v = nil
	b.want("f", []byte("newer"))
	waitFor(t, "the host's file to go", func() bool {
		names, _ := os.ReadDir(filepath.Join(b.dir, "kmsfs.hosts"))
		return len(names) == 1
	})
	sound(t, b)
}

// Directories that one host removes and the other fills keep their IDs: every name decodes.
func TestHostsRmdirAgainstCreate(t *testing.T) {
	hosts := newHosts(t, 2)
	long := strings.Repeat("l", 200)
	gone := func(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) }
	var wg sync.WaitGroup
	end := time.Now().Add(3 * time.Second)
	for id, w := range hosts {
		wg.Go(func() {
			for i := 0; time.Now().Before(end); i++ {
				root := w.v.Root()
				n, _, err := w.v.Mkdir(ctx, root, "d", 0o755, volume.Caller{})
				if errors.Is(err, unix.EEXIST) {
					n, _, _, err = w.v.Lookup(ctx, root, "d")
				}
				if gone(err) {
					continue
				}
				if err != nil {
					t.Errorf("mkdir: %v", err)
					continue
				}
				name := fmt.Sprint(id)
				if i%3 == 0 {
					name = long
				}
				c, _, h, err := w.v.Create(ctx, n, name, volume.NewFile{NewNode: volume.NewNode{Mode: 0o644}, Write: true})
				if err == nil {
					h.Release()
					w.v.Forget(c.ID(), 1)
					err = w.v.Unlink(n, name)
				}
				if err != nil && !gone(err) {
					t.Errorf("%s: %v", name, err)
				}
				err = w.v.Rmdir(root, "d")
				if err != nil && !gone(err) && !errors.Is(err, unix.ENOTEMPTY) {
					t.Errorf("rmdir: %v", err)
				}
				w.v.Forget(n.ID(), 1)
			}
		})
	}
	wg.Wait()
	sound(t, hosts...)
}

// A mount that cannot make its host known fails, and closes only its own descriptors.
func TestHostRefused(t *testing.T) {
	hosts := newHosts(t, 1)
	a := hosts[0]
	a.close()
	a.v = nil
	u, err := a.unlock()
	a.do("unlock", err)
	defer u.Close()
	_, err = u.Open(volume.Options{}.Hooked(func(c volume.Call) error {
		if c.Op == "pwrite" && c.Len == 1024 {
			return unix.ENOSPC
		}
		return nil
	}))
	wantErr(t, "begin", err, unix.ENOSPC)
	var st unix.Stat_t
	for fd := range 3 {
		if err := unix.Fstat(fd, &st); err != nil {
			t.Errorf("descriptor %d of the process: %v", fd, err)
		}
	}
	sound(t, a)
}

// A recipient that one host adds is used by the other for its new files; one that is removed goes when all
// hosts use the list.
func TestHostsFollowRecipients(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	second := newStore(t)[0]
	b.close()
	u, err := b.unlock()
	b.do("unlock", err)
	b.v, err = u.Open(volume.Options{Stores: func(_ context.Context, r blockcrypt.Recipient) (keystore.Store, error) {
		if r.URI == second.URI() {
			return second, nil
		}
		return nil, errors.New("its key is not here")
	}}.Beats(beat))
	b.do("open", err)
	_, err = a.v.Recipients().Add(ctx, second)
	a.do("add", err)
	waitFor(t, "the other host", func() bool { return len(b.v.Recipients().List()) == 2 })
	b.write("f", []byte("x"))
	h, err := b.must("f").Header()
	b.do("header", err)
	if len(h.Recipients) != 2 {
		t.Errorf("%d recipients", len(h.Recipients))
	}
	if _, err = b.v.Recipients().Remove(ctx, a.store.URI()); err != nil {
		t.Error(err)
	}
	waitFor(t, "the first host", func() bool { return len(a.v.Recipients().List()) == 1 })
	a.more = append(a.more, second)
	a.want("f", []byte("x"))
	sound(t, hosts...)
}

// A shared volume that is mounted has no room for work that needs it alone, and a volume that is not
// shared none for a second writer.
func TestAloneOfHosts(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	a.write("f", noise(5000))
	unshare := func() error {
		u, err := a.unlock()
		a.do("unlock", err)
		defer u.Close()
		v, err := u.Open(volume.Options{Alone: true})
		if err == nil {
			_, serr := v.Recipients().Share(ctx, false)
			err = errors.Join(serr, v.Close())
		}
		return err
	}
	wantErr(t, "beside hosts", unshare(), volume.ErrLocked)
	if _, err := a.v.Rekey(ctx, a.v.Root(), volume.RekeyOptions{}); !errors.Is(err, volume.ErrOtherHosts) {
		t.Errorf("rekey: %v", err)
	}
	b.close()
	b.v = nil
	if done, err := a.v.Rekey(ctx, a.v.Root(), volume.RekeyOptions{}); err != nil || done.Changed != 1 {
		t.Errorf("rekey: %v, %v", done, err)
	}
	a.close()
	a.v = nil
	a.do("end to share", unshare())
	a.do("remove kmsfs.hosts", volume.Unshared(a.dir))
	a.open(volume.Options{})
	u, err := b.unlock()
	b.do("unlock", err)
	defer u.Close()
	_, err = u.Open(volume.Options{})
	wantErr(t, "a second writer", err, volume.ErrLocked)
}

// A host removes a name that another host has given to another file. The data that it wrote to the former
// file is not lost.
func TestHostsRemoveWhatWasReplaced(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	b.write("f", noise(100))
	b.write("x", noise(7))
	text := noise(5000)
	h := b.toWrite("f")
	_, err := h.Write(ctx, text, 0)
	b.do("write", err)
	a.do("rename", a.v.Rename(a.v.Root(), "f", a.v.Root(), "g", 0))
	a.do("rename", a.v.Rename(a.v.Root(), "x", a.v.Root(), "f", 0))
	b.do("remove", b.v.Unlink(b.v.Root(), "f"))
	b.do("close", h.Release())
	for _, w := range hosts {
		w.want("g", text)
		if got := w.list(""); len(got) != 1 {
			t.Errorf("%v", got)
		}
	}
	sound(t, hosts...)
}

// A host goes on to use an open file that another host moves, and sees its present length.
func TestHostsOpenWhatMoves(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	for _, d := range []string{"d", "e"} {
		a.mkdir(d)
	}
	a.write("d/f", noise(100))
	n := a.must("d/f")
	h := a.toWrite("d/f")
	text := noise(20000)
	b.write("d/f", text)
	waitFor(t, "the size that another host has made", func() bool {
		_, st, _, err := a.v.Lookup(ctx, a.must("d"), "f")
		a.do("lookup", err)
		return st.Size == int64(len(text))
	})
	b.do("rename", b.v.Rename(b.must("d"), "f", b.must("e"), "g", 0))
	b.do("rmdir", b.v.Rmdir(b.v.Root(), "d"))
	size := int64(50)
	_, err := n.SetAttr(ctx, volume.SetAttr{Size: &size})
	a.do("truncate", err)
	_, err = h.Write(ctx, noise(10), 0)
	a.do("write", err)
	a.do("close", h.Release())
	a.want("e/g", b.text("e/g"))
	mode := uint32(0o600)
	_, err = a.must("e/g").SetAttr(ctx, volume.SetAttr{Mode: &mode})
	a.do("chmod", err)
	sound(t, hosts...)
}
