//go:build linux && !portable

package volume_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/fs/volume/check"
	"kmsfs/keystore"
	"kmsfs/keystore/agestore"
)

// named returns how many files of the volume name each recipient.
func (w *world) named() map[string]int {
	w.t.Helper()
	out := map[string]int{}
	w.do("inventory", volume.Inventory(ctx, w.dir, func(e volume.Inventoried) {
		if e.Err != nil {
			w.t.Errorf("%s: %v", e.Path, e.Err)
		}
		if e.Header != nil {
			for _, r := range e.Header.Recipients {
				out[r.URI]++
			}
		}
	}))
	return out
}

// rewrap fails the test if a file cannot be changed.
func (w *world) rewrap(o volume.RewrapOptions) volume.Rewrapped {
	w.t.Helper()
	o.Failed = func(at string, err error) { w.t.Errorf("%s: %v", at, err) }
	done, err := w.v.Recipients().Rewrap(ctx, o)
	w.do("rewrap", err)
	return done
}

// A volume goes from one key to another while it is in use: at each step every file can be read,
// and at the end the first key opens nothing.
func TestRecipientsChange(t *testing.T) {
	w := newWorld(t, volume.Options{}.Torn())
	a, b := w.store, newStore(t)[0]
	want := map[string]string{}
	for i := range 5 {
		name := fmt.Sprint("f", i)
		want[name] = strings.Repeat(name, 1+i*3000)
		w.write(name, []byte(want[name]))
	}
	w.mkdir("d")
	w.write("d/"+strings.Repeat("long", 50), []byte("under a long name"))
	w.write("empty", nil)
	opened, err := w.create("open")
	w.do("create", err)
	_, err = opened.Write(ctx, []byte("written before"), 0)
	w.do("write", err)
	unwritten, err := w.create("unwritten") // its key is for the first recipient alone
	w.do("create", err)
	rs := w.v.Recipients()

	rec, err := rs.Add(ctx, b)
	w.do("add", err)
	if !slices.Equal(rec.Recipients, []string{a.URI(), b.URI()}) || rec.Generation != 2 ||
		!slices.Equal(rs.List(), rec.Recipients) {
		t.Errorf("%+v, %v", rec, rs.List())
	}
	if _, err := rs.Add(ctx, b); !errors.Is(err, volume.ErrRecipient) {
		t.Errorf("added twice: %v", err)
	}
	only := &volume.OnlyRecipientError{}
	if _, err := rs.Remove(ctx, a.URI()); !errors.As(err, &only) || only.Files != 7 {
		t.Errorf("removed before any file has another: %v", err)
	}
	w.write("new", []byte("made for both"))
	if n := w.named(); n[a.URI()] != 8 || n[b.URI()] != 1 {
		t.Errorf("before: %v", n)
	}
	if done := w.rewrap(volume.RewrapOptions{AtOnce: 3}); done.Changed != 7 || done.Files != 10 {
		t.Errorf("%+v", done)
	}
	if done := w.rewrap(volume.RewrapOptions{}); done.Changed != 0 {
		t.Errorf("done twice: %+v", done)
	}
	if n := w.named(); n[a.URI()] != 8 || n[b.URI()] != 8 {
		t.Errorf("between: %v", n)
	}
	_, err = rs.SetFirst(b.URI())
	w.do("set first", err)
	if got := rs.List(); got[0] != b.URI() || len(got) != 2 {
		t.Error(got)
	}
	_, err = rs.Remove(ctx, a.URI())
	w.do("remove", err)
	if _, err := rs.Remove(ctx, b.URI()); !errors.Is(err, volume.ErrLastRecipient) {
		t.Errorf("the last one: %v", err)
	}
	if _, err := rs.Remove(ctx, a.URI()); !errors.Is(err, volume.ErrNotRecipient) {
		t.Errorf("one that is none: %v", err)
	}
	_, err = unwritten.Write(ctx, []byte("written after"), 0)
	w.do("write", err)
	_, err = opened.Write(ctx, []byte("after"), 8) // with the header's own page
	w.do("write", err)
	w.rewrap(volume.RewrapOptions{})
	if n := w.named(); n[a.URI()] != 0 || n[b.URI()] != 9 {
		t.Errorf("after: %v", n)
	}
	w.do("release", errors.Join(opened.Release(), unwritten.Release()))
	want["open"], want["unwritten"], want["new"] = "written aftere", "written after", "made for both"
	w.store = b // alone
	w.reopen(volume.Options{})
	for name, text := range want {
		if got, err := w.read(name); err != nil || string(got) != text {
			t.Errorf("%s: %.40q, %v", name, got, err)
		}
	}
	fs, _ := w.fsck()
	if len(fs) > 0 {
		t.Errorf("%+v", fs)
	}
	w.store = a
	if _, err := w.unlock(); keystore.KindOf(err) != keystore.Untrusted {
		t.Errorf("by the first key: %v", err)
	}
	w.store = b
}

// An age recipient gets every file, wraps without its identity, and opens with it alone.
func TestAgeRecipient(t *testing.T) {
	w := newWorld(t, volume.Options{})
	id, err := age.GenerateX25519Identity()
	w.do("generate", err)
	s, err := agestore.New(id.Recipient().String())
	w.do("recipient", err)
	w.write("before", []byte("made before"))
	_, err = w.v.Recipients().Add(ctx, s)
	w.do("add", err)
	w.write("after", []byte("made after"))
	w.reopen(volume.Options{}) // only the public key is known
	w.write("later", []byte("made later"))
	if done := w.rewrap(volume.RewrapOptions{Missing: true}); done.Changed != 1 {
		t.Errorf("%+v", done)
	}
	if n := w.named(); n[s.URI()] != 3 {
		t.Errorf("%v", n)
	}
	if _, err := w.v.Recipients().Remove(ctx, w.store.URI()); !errors.Is(err, volume.ErrLastRecipient) {
		t.Errorf("nothing that opens would be left: %v", err)
	}
	w.close()
	first := w.store
	w.store, err = agestore.Open(s.URI(), s.Branch(), []age.Identity{id})
	w.do("open", err)
	w.open(volume.Options{ReadOnly: true})
	for name, text := range map[string]string{"before": "made before", "after": "made after",
		"later": "made later"} {
		if got, err := w.read(name); err != nil || string(got) != text {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	w.close()
	// The first key is lost: the identity gives the volume to another one.
	next := newStore(t)[0]
	w.more = []keystore.Store{first}
	w.open(volume.Options{})
	_, err = w.v.Recipients().Add(ctx, next)
	w.do("add", err)
	w.rewrap(volume.RewrapOptions{From: first.URI(), To: next.URI()})
	if n := w.named(); n[first.URI()] != 0 || n[next.URI()] != 3 || n[s.URI()] != 3 {
		t.Errorf("%v", n)
	}
}

// A header that is too small for another recipient is refused before anything is changed.
func TestNoRoom(t *testing.T) {
	w := newWorld(t, volume.Options{})
	id, err := age.GenerateHybridIdentity()
	w.do("generate", err)
	s, err := agestore.New(id.Recipient().String())
	w.do("recipient", err)
	if _, err := w.v.Recipients().Add(ctx, s); !errors.Is(err, volume.ErrNoRoom) {
		t.Errorf("%v", err)
	}
	if got := w.v.Recipients().List(); len(got) != 1 {
		t.Error(got)
	}
	w.reopen(volume.Options{ReadOnly: true})
	if _, err := w.v.Recipients().Add(ctx, newStore(t)[0]); !errors.Is(err, unix.EROFS) {
		t.Errorf("read only: %v", err)
	}
	if _, err := w.v.Recipients().Rewrap(ctx, volume.RewrapOptions{}); !errors.Is(err, unix.EROFS) {
		t.Errorf("read only: %v", err)
	}
}

// replaceHeader changes the header of a closed ciphertext file behind the volume's back.
func replaceHeader(t *testing.T, path string, change func(*blockcrypt.Header)) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := blockcrypt.ParseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	change(h)
	head, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(head, b[len(head):]...), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A recipient that somebody plants in a header is never given a key, and goes. One of the volume's
// whose wrapped key was damaged does not make the good one go.
func TestPlantedRecipient(t *testing.T) {
	w := newWorld(t, volume.Options{})
	a, b, evil := w.store, newStore(t)[0], newStore(t)[0]
	w.write("f", []byte("the content"))
	w.write("g", []byte("the other content"))
	path := func(name string) string { return filepath.Join(w.dir, w.v.CipherName(w.v.Root(), name)) }
	f, g := path("f"), path("g")
	w.close()
	key := make([]byte, 32)
	planted, err := evil.Wrap(ctx, keystore.Binding{Use: keystore.ForFile}, key)
	w.do("wrap", err)
	replaceHeader(t, f, func(h *blockcrypt.Header) {
		h.Recipients = append(h.Recipients, blockcrypt.Recipient{URI: evil.URI(), Wrapped: planted.Wrapped})
	})
	replaceHeader(t, g, func(h *blockcrypt.Header) {
		h.Recipients = append(h.Recipients, blockcrypt.Recipient{URI: b.URI(), Wrapped: planted.Wrapped})
	})
	w.open(volume.Options{})
	_, err = w.v.Recipients().Add(ctx, b)
	w.do("add", err)
	failed := map[string]error{}
	done, err := w.v.Recipients().Rewrap(ctx,
		volume.RewrapOptions{From: evil.URI(), To: b.URI(),
			Failed: func(at string, err error) { failed[at] = err }})
	if err != nil || done.Changed != 1 || done.Failed != 0 {
		t.Errorf("%+v, %v, %v", done, err, failed)
	}
	if n := w.named(); n[evil.URI()] != 0 {
		t.Errorf("the planted one stays: %v", n)
	}
	// In g the recipient b is there, and damaged: a must not go for it.
	done, err = w.v.Recipients().Rewrap(ctx,
		volume.RewrapOptions{From: a.URI(), To: b.URI(),
			Failed: func(at string, err error) { failed[at] = err }})
	if err != nil || done.Failed != 1 || keystore.KindOf(failed[filepath.Base(g)]) != keystore.Damaged {
		t.Errorf("%+v, %v, %v", done, err, failed)
	}
	if _, err := w.v.Recipients().Rewrap(ctx,
		volume.RewrapOptions{From: b.URI(), To: evil.URI()}); !errors.Is(err, volume.ErrNotRecipient) {
		t.Errorf("to a recipient that kmsfs.json does not name: %v", err)
	}
	for name, text := range map[string]string{"f": "the content", "g": "the other content"} {
		if got, err := w.read(name); err != nil || string(got) != text {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	w.quiet = true // the log has the damaged key
}

// Times, modes and capabilities of a file stay when its recipients change, also while it is open.
func TestRewrapKeepsAttributes(t *testing.T) {
	w := newWorld(t, volume.Options{})
	mode, old := uint32(0o4751), unix.Timespec{Sec: 1_000_000_000, Nsec: 5}
	for _, name := range []string{"closed", "open"} {
		w.write(name, []byte(name))
		n := w.must(name)
		_, err := n.SetAttr(ctx, volume.SetAttr{Mode: &mode, Mtime: &old})
		w.do("setattr", err)
	}
	capable := os.Geteuid() == 0
	capability := []byte{1, 0, 0, 2, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
		0} // cap_net_raw, as linux/capability.h has it
	if capable {
		w.do("setxattr", w.must("closed").Setxattr("security.capability", capability, 0, false))
	}
	h, err := w.must("open").Open(ctx, true)
	w.do("open", err)
	_, err = w.v.Recipients().Add(ctx, newStore(t)[0])
	w.do("add", err)
	if done := w.rewrap(volume.RewrapOptions{}); done.Changed != 2 {
		t.Errorf("%+v", done)
	}
	w.do("release", h.Release())
	for _, name := range []string{"closed", "open"} {
		st, err := w.must(name).Attr()
		if err != nil || st.Mode&0o7777 != mode || st.Mtim != old {
			t.Errorf("%s: mode %o, %v, %v", name, st.Mode, st.Mtim, err)
		}
	}
	if got, err := w.must("closed").Getxattr("security.capability"); capable &&
		(err != nil || !bytes.Equal(got, capability)) {
		t.Errorf("%x, %v", got, err)
	}
}

// A Rewrap that ends in the middle goes on where it was; programs write meanwhile.
func TestRewrapInterrupted(t *testing.T) {
	w := newWorld(t, volume.Options{})
	const files = 60
	for i := range files {
		w.write(fmt.Sprint("f", i), []byte(fmt.Sprint("content ", i)))
	}
	b := newStore(t)[0]
	_, err := w.v.Recipients().Add(ctx, b)
	w.do("add", err)
	var stop atomic.Bool
	var writers sync.WaitGroup
	for i := range 4 {
		writers.Go(func() {
			for n := 0; !stop.Load(); n++ {
				name := fmt.Sprint("busy", i, n%3)
				h, err := w.create(name)
				if err == nil {
					_, err = h.Write(ctx, []byte("busy"), int64(n%5000))
				}
				if err == nil {
					err = h.Release()
				}
				if err == nil && n%4 == 0 {
					err = w.v.Unlink(w.v.Root(), name)
				}
				if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENOENT) {
					t.Error(err)
				}
			}
		})
	}
	rounds := 0
	for ; w.named()[b.URI()] < files; rounds++ {
		c, cancel := context.WithCancel(ctx)
		_, err := w.v.Recipients().Rewrap(c, volume.RewrapOptions{AtOnce: 4, Progress: func(d volume.Rewrapped) {
			if d.Changed >= 10 {
				cancel()
			}
		}, Failed: func(at string, err error) { t.Errorf("%s: %v", at, err) }})
		cancel()
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if rounds > files {
			t.Fatal("it does not end")
		}
	}
	if rounds < 3 {
		t.Errorf("interrupted only %d times", rounds)
	}
	stop.Store(true)
	writers.Wait()
	w.rewrap(volume.RewrapOptions{AtOnce: 4})
	_, err = w.v.Recipients().Remove(ctx, w.store.URI())
	w.do("remove", err)
	w.store = b
	w.reopen(volume.Options{})
	for i := range files {
		if got, err := w.read(fmt.Sprint("f", i)); err != nil || string(got) != fmt.Sprint("content ", i) {
			t.Errorf("%d: %q, %v", i, got, err)
		}
	}
	fs, _ := w.fsck()
	if worst(fs) > check.Note {
		t.Errorf("%+v", fs)
	}
}

// A call that fails leaves the file as it was, or with its new recipients, and is told.
func TestRewrapFaults(t *testing.T) {
	for _, op := range []string{"sync_file_range", "pwrite", "utimensat", "openat", "syncfs"} {
		t.Run(op, func(t *testing.T) {
			var fail atomic.Bool
			w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
				if fail.Load() && c.Op == op && (op != "openat" || c.Mode&unix.O_RDWR != 0) {
					return unix.EIO
				}
				return nil
			}).Torn())
			w.quiet = true
			w.write("f", []byte("the content"))
			w.v.Settle()
			_, err := w.v.Recipients().Add(ctx, newStore(t)[0])
			w.do("add", err)
			fail.Store(true)
			done, err := w.v.Recipients().Rewrap(ctx, volume.RewrapOptions{})
			if (err != nil) != (op == "syncfs") || (done.Failed == 1) != (op != "syncfs") {
				t.Errorf("%+v, %v", done, err)
			}
			fail.Store(false)
			if got, err := w.read("f"); err != nil || string(got) != "the content" {
				t.Errorf("%q, %v", got, err)
			}
			if done, err := w.v.Recipients().Rewrap(ctx, volume.RewrapOptions{}); err != nil ||
				done.Failed > 0 {
				t.Errorf("afterwards: %+v, %v", done, err)
			}
			for uri, n := range w.named() {
				if n != 1 {
					t.Errorf("%s: %d", uri, n)
				}
			}
		})
	}
}

// Keys that are unwrapped by a service cost one call for each file.
func TestRewrapCalls(t *testing.T) {
	w := newWorld(t, volume.Options{})
	for i := range 20 {
		w.write(fmt.Sprint("f", i), []byte("content"))
	}
	w.close()
	s := &counting{Store: hidden{w.store}}
	w.store = s
	w.open(volume.Options{NoPrefetch: true})
	before := s.asked.Load()
	_, err := w.v.Recipients().Add(ctx, newStore(t)[0])
	w.do("add", err)
	w.rewrap(volume.RewrapOptions{AtOnce: 8})
	if n := s.asked.Load() - before; n > 21 {
		t.Errorf("%d calls for 20 files and the volume key", n)
	}
}

// counting is a store that counts how often it is asked to unwrap.
type counting struct {
	keystore.Store
	asked atomic.Int32
	deny  atomic.Bool // new keys
}

func (s *counting) Wrap(ctx context.Context, b keystore.Binding, key []byte) (blockcrypt.Recipient, error) {
	if s.deny.Load() {
		return blockcrypt.Recipient{}, &keystore.Error{Kind: keystore.Denied, URI: s.URI(),
			Op: "wrap", Err: errors.New("denied")}
	}
	return s.Store.Wrap(ctx, b, key)
}

func (s *counting) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	s.asked.Add(1)
	return s.Store.Unwrap(ctx, b, w)
}

// A file without a name gets the recipients too, and keeps one from being removed.
func TestRecipientsOfUnnamed(t *testing.T) {
	w := newWorld(t, volume.Options{})
	a, b := w.store, newStore(t)[0]
	n, _, h, err := w.v.Tmpfile(ctx, w.v.Root(), 0o644, volume.Caller{}, true)
	w.do("tmpfile", err)
	_, err = h.Write(ctx, []byte("without a name"), 0)
	w.do("write", err)
	rs := w.v.Recipients()
	_, err = rs.Add(ctx, b)
	w.do("add", err)
	only := &volume.OnlyRecipientError{}
	if _, err := rs.Remove(ctx, a.URI()); !errors.As(err, &only) || only.Files != 1 {
		t.Errorf("%v", err)
	}
	if done := w.rewrap(volume.RewrapOptions{}); done.Changed != 1 {
		t.Errorf("%+v", done)
	}
	_, err = rs.Remove(ctx, a.URI())
	w.do("remove", err)
	_, _, err = w.v.Link(ctx, n, w.v.Root(), "named")
	w.do("link", err)
	w.do("release", h.Release())
	w.store = b
	w.reopen(volume.Options{})
	if got, err := w.read("named"); err != nil || string(got) != "without a name" {
		t.Errorf("%q, %v", got, err)
	}
}

// A recipient that only wraps here is not enough to let the other one go.
func TestRemoveLeavesWhatOpens(t *testing.T) {
	w := newWorld(t, volume.Options{})
	id, err := age.GenerateX25519Identity()
	w.do("generate", err)
	s, err := agestore.New(id.Recipient().String())
	w.do("recipient", err)
	rs := w.v.Recipients()
	_, err = rs.Add(ctx, s)
	w.do("add", err)
	w.write("f", []byte("for the first key and the safe"))
	b := newStore(t)[0]
	_, err = rs.Add(ctx, b)
	w.do("add", err)
	if _, err := rs.Remove(ctx, w.store.URI()); !errors.As(err, new(*volume.OnlyRecipientError)) {
		t.Errorf("only the key in the safe would open f: %v", err)
	}
	w.write("g", []byte("made after that"))
	if n := w.named(); n[w.store.URI()] != 2 {
		t.Errorf("a refused removal has changed what new files get: %v", n)
	}
	for _, o := range []volume.RewrapOptions{{From: b.URI(), To: b.URI()},
		{From: w.store.URI(), To: w.store.URI()}} {
		if _, err := rs.Rewrap(ctx, o); !errors.Is(err, volume.ErrSameRecipient) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// An accepted write is not lost since the recipients were changed and no new key can be had: the old
// one serves.
func TestWriteWithOldKey(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.close()
	s := &counting{Store: hidden{w.store}}
	w.store = s
	w.open(volume.Options{NoPrefetch: true})
	h, err := w.create("f")
	w.do("create", err)
	id, err := age.GenerateX25519Identity()
	w.do("generate", err)
	r, err := agestore.New(id.Recipient().String())
	w.do("recipient", err)
	_, err = w.v.Recipients().Add(ctx, r)
	w.do("add", err)
	s.deny.Store(true)
	w.quiet = true // the log has the denial
	if err := h.WriteDelayed(ctx, []byte("accepted"), 0); err != nil {
		t.Error(err)
	}
	w.do("fsync", h.Fsync())
	w.do("release", h.Release())
	s.deny.Store(false)
	w.reopen(volume.Options{})
	if got, err := w.read("f"); err != nil || string(got) != "accepted" {
		t.Errorf("%q, %v", got, err)
	}
}

// Files whose headers do not lie in one page are encrypted again for other recipients.
func TestRewrapLargeHeaders(t *testing.T) {
	w := newWorld(t, volume.Options{})
	rs := w.v.Recipients()
	_, err := rs.SetHeaderSize(8192)
	w.do("set the size", err)
	_, _, err = rs.Reheader(ctx, volume.RekeyOptions{})
	w.do("reheader", err)
	var all []keystore.Store
	for range 45 {
		all = append(all, newStore(t)...)
	}
	w.mkdir("d")
	w.setKeys("d", all...)
	w.write("d/f", noise(20000))
	want, err := w.read("d/f")
	w.do("read", err)
	h, err := w.must("d/f").Header()
	if err != nil || blockcrypt.RecipientsFit(h.Recipients) <= 4096 {
		t.Fatalf("%+v, %v", h, err)
	}
	w.more = all
	for step, keys := range [][]keystore.Store{all[1:], all, all[:2]} {
		w.setKeys("d", keys...)
		missing := step == 1
		if done := w.rewrap(volume.RewrapOptions{Missing: missing}); done.Changed != 1 || done.FormerNeeded != 0 {
			t.Errorf("step %d: %+v", step, done)
		}
		if done := w.rewrap(volume.RewrapOptions{Missing: missing}); done.Changed != 0 {
			t.Errorf("step %d again: %+v", step, done)
		}
		w.under("d/f", keys...)
		w.want("d/f", want)
	}
	from, to := all[0].URI(), all[1].URI()
	var failed error
	done, err := rs.Rewrap(ctx, volume.RewrapOptions{From: from, To: to, Failed: func(_ string, err error) { failed = err }})
	if w.do("rewrap", err); done.Failed != 1 || !errors.Is(failed, volume.ErrLargeHeader) {
		t.Errorf("%+v, %v", done, failed)
	}
}
