//go:build linux && !portable

package volume_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

// stalls is a disk on which one call does not return before it is let.
type stalls struct {
	mu    sync.Mutex
	match func(volume.Call) bool // of the next call that stalls
	met   chan struct{}          // closed when it does
	held  chan struct{}
}

func (s *stalls) hook(c volume.Call) error {
	s.mu.Lock()
	stall := s.match != nil && s.match(c)
	if stall {
		s.match = nil
		close(s.met)
	}
	s.mu.Unlock()
	if stall {
		<-s.held
	}
	return nil
}

// stall lets the next call that matches wait.
func (s *stalls) stall(match func(volume.Call) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.match, s.met, s.held = match, make(chan struct{}), make(chan struct{})
}

// within fails if f takes long: it waits for what stalls.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Errorf("%s waits for what stalls", what)
	}
}

// Operations on different directories do not meet, whatever call of one stalls; nor does an
// operation on one file wait for another's, nor who asks for attributes for anything.
func TestNothingWaitsForAnother(t *testing.T) {
	op := func(names ...string) func(volume.Call) bool {
		return func(c volume.Call) bool { return slices.Contains(names, c.Op) }
	}
	for _, c := range []struct {
		what    string
		stalled func(volume.Call) bool
		do      func(w *world) error
		beside  []string // in the same directory
		grown   bool     // d/a is to settle
	}{
		{"rename", op("renameat2"),
			func(w *world) error { return w.v.Rename(w.must("d"), "a", w.must("d"), "b", 0) }, nil, false},
		{"rename to another directory", op("renameat2"),
			func(w *world) error { return w.v.Rename(w.must("d"), "a", w.must("d2"), "b", 0) }, nil, false},
		{"unlink", op("unlinkat"), func(w *world) error { return w.v.Unlink(w.must("d"), "a") },
			nil, false},
		{"rmdir", op("unlinkat"), func(w *world) error { return w.v.Rmdir(w.must("d"), "sub") },
			nil, false},
		{"create", func(c volume.Call) bool {
			return c.Op == "openat" &&
				c.Mode&unix.O_CREAT != 0
		}, func(w *world) error {
			h, err := w.create("d/new")
			if err == nil {
				err = h.Release()
			}
			return err
		}, []string{"lookup", "attr"}, false},
		{"mkdir", op("mkdirat"), func(w *world) error {
			_, _, err := w.v.Mkdir(ctx, w.must("d"), "newdir", 0o755, volume.Caller{})
			return err
		}, []string{"lookup", "attr"}, false},
		{"open", op("pread"), func(w *world) error { _, err := w.read("d/cold"); return err },
			[]string{"lookup", "attr", "create"}, false},
		{"write", op("pwrite"), func(w *world) error {
			h := w.opened("d/a")
			_, err := h.Write(ctx, noise(100000), 0)
			h.Release()
			return err
		}, []string{"lookup", "attr", "create"}, false},
		{"growth of a settled file", op("fdatasync"), func(w *world) error {
			h := w.opened("d/a")
			_, err := h.Write(ctx, noise(100), 3000)
			h.Release()
			return err
		}, []string{"lookup", "attr", "create"}, false},
		{"fsync", op("fsync"), func(w *world) error {
			h := w.opened("d/a")
			h.Write(ctx, noise(100), 0)
			err := h.Fsync()
			h.Release()
			return err
		}, []string{"lookup", "attr", "create", "write"}, false},
		{"settling", op("ftruncate"), func(w *world) error {
			w.v.Settle()
			return nil
		}, []string{"lookup", "attr", "create"}, true},
	} {
		t.Run(c.what, func(t *testing.T) {
			var s stalls
			w := newWorld(t, volume.Options{KernelTimes: true}.Hooked(s.hook).Torn())
			for _, d := range []string{"d", "d/sub", "d2", "e"} {
				w.mkdir(d)
			}
			for _, f := range []string{"d/a", "d/cold", "e/a", "e/sub"} {
				w.write(f, noise(3000))
			}
			w.write("d2/x", nil)
			w.write("d/sub/x", nil)
			w.do("unlink", w.v.Unlink(w.must("d/sub"), "x"))
			h := w.opened("d/a")
			w.do("fsync", h.Fsync()) // all of it is confirmed
			if c.grown {
				_, err := h.Write(ctx, noise(100), 3000)
				w.do("write", err)
			}
			w.do("close", h.Release())
			d, e, a := w.must("d"), w.must("e"), w.must("d/a")
			s.stall(c.stalled)
			done := make(chan error, 1)
			go func() { done <- c.do(w) }()
			select {
			case <-s.met:
			case err := <-done:
				t.Fatalf("it ends without the call that stalls: %v", err)
			case <-time.After(20 * time.Second):
				t.Fatal("it never comes to the call that stalls")
			}
			open := func(path string) {
				h := w.opened(path)
				_, err := h.Write(ctx, noise(5000), 0)
				w.do("write", err)
				w.do("fsync", h.Fsync())
				w.do("close", h.Release())
			}
			within(t, "a lookup elsewhere", func() { w.v.Lookup(ctx, e, "none") })
			within(t, "a write elsewhere", func() { open("e/a") })
			within(t, "a creation elsewhere", func() { w.write("e/new", noise(10)) })
			within(t, "a rename elsewhere", func() { w.do("rename", w.v.Rename(e, "new", e, "newer", 0)) })
			within(t, "an unlink elsewhere", func() { w.do("unlink", w.v.Unlink(e, "newer")) })
			for _, b := range c.beside {
				within(t, "beside it, "+b, func() {
					switch b {
					case "lookup":
						if _, st, _, err := w.v.Lookup(ctx, d, "a"); err != nil || st.Size < 3000 {
							t.Errorf("lookup: %d bytes, %v", st.Size, err)
						}
					case "attr":
						if st, err := a.Attr(); err != nil || st.Size < 3000 {
							t.Errorf("attributes: %d bytes, %v", st.Size, err)
						}
					case "create":
						w.write("d/other", noise(10))
					case "write":
						h := w.opened("d/a")
						_, err := h.Write(ctx, noise(10), 0)
						w.do("write", err)
						w.do("fsync", h.Fsync())
						w.do("close", h.Release())
					}
				})
			}
			close(s.held)
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

// A file whose key is waited for is neither opened nor read again when the key has come, by
// however many.
func TestNothingIsReadTwice(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.write("f", noise(3000))
	w.close()
	var c calls
	w.store = distant{hidden{w.store}, new(atomic.Int32)}
	w.open(volume.Options{NoPrefetch: true}.Seeing(c.see))
	n := w.must("f")
	c.take()
	handles := make([]*volume.Handle, 8)
	var wg sync.WaitGroup
	for i := range handles {
		wg.Go(func() {
			var err error
			if handles[i], err = n.Open(ctx, false); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := c.take(); got != "openat fstat pread fstat" { // the last one sees that the file is as it was
		t.Errorf("opened by %s", got)
	}
	for i, h := range handles {
		if h == nil {
			continue
		}
		m, err := h.Read(ctx, make([]byte, 4096), 0)
		if err != nil || m != 3000 {
			t.Errorf("%d bytes, %v", m, err)
		}
		if got := c.take(); (got == "") != (i == 0) {
			t.Errorf("read %d by %q", i, got)
		}
		w.do("close", h.Release())
	}
	fds := w.v.Descriptors()

	// A refusal leaves nothing behind.
	w.close()
	far := w.store
	w.store = refusing{far, keystore.Denied}
	w.quiet = true
	w.open(volume.Options{NoPrefetch: true}.Seeing(c.see))
	n = w.must("f")
	if _, err := n.Open(ctx, false); keystore.KindOf(err) != keystore.Denied {
		t.Errorf("opened with a key that is refused: %v", err)
	}
	if now := w.v.Descriptors(); now != fds {
		t.Errorf("%d descriptors are open, want %d", now, fds)
	}
	w.close()
	w.store = far
	w.open(volume.Options{})
	if b, err := w.read("f"); err != nil || len(b) != 3000 {
		t.Errorf("read afterwards: %d bytes, %v", len(b), err)
	}
}

// refusing is a store that unwraps no data key.
type refusing struct {
	keystore.Store
	kind keystore.Kind
}

func (s refusing) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	if b.Use == keystore.ForFile {
		return nil, &keystore.Error{Kind: s.kind, Op: "unwrap", Err: errors.New("refused")}
	}
	return s.Store.Unwrap(ctx, b, w)
}

// A read or a write that waits for another write of the same file says so, and no other does.
func TestToldBehind(t *testing.T) {
	var s stalls
	w := newWorld(t, volume.Options{}.Hooked(s.hook))
	w.write("f", noise(3000))
	h := w.opened("f")
	for what, do := range map[string]func(context.Context) error{
		"read":  func(ctx context.Context) error { _, err := h.Read(ctx, make([]byte, 10), 0); return err },
		"write": func(ctx context.Context) error { _, err := h.Write(ctx, []byte("x"), 0); return err },
	} {
		told := make(chan struct{}, 10)
		asked := context.WithValue(ctx, volume.WaitsKey{}, toldBehind(told))
		w.do(what, do(asked))
		if len(told) > 0 {
			t.Errorf("a %s alone is behind another", what)
		}
		s.stall(func(c volume.Call) bool { return c.Op == "pwrite" })
		first, second := make(chan error, 1), make(chan error, 1)
		go func() {
			_, err := h.Write(ctx, noise(100), 0)
			first <- err
		}()
		<-s.met
		go func() { second <- do(asked) }()
		within(t, "a "+what+" that should tell that it", func() { <-told })
		close(s.held)
		w.do("the first write", <-first)
		w.do(what, <-second)
	}
	w.do("close", h.Release())
}

// A file that was being written when the daemon was killed, and whose wrapped key is damaged,
// has a name and can be removed, though it cannot be repaired.
func TestDamagedKeyOfUnfinishedFile(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	w.write("f", noise(3000))
	h := w.opened("f")
	w.do("fsync", h.Fsync())
	if _, err := h.Write(ctx, noise(5000), 3000); err != nil {
		t.Fatal(err)
	}
	w.crash()
	store := w.store
	w.store = refusing{hidden{store}, keystore.Damaged}
	w.open(volume.Options{})
	if _, err := w.node("f"); err != nil { // as rm looks it up first
		t.Errorf("lookup: %v", err)
	}
	if _, err := w.read("f"); keystore.KindOf(err) != keystore.Damaged {
		t.Errorf("read: %v", err)
	}
	w.do("unlink", w.v.Unlink(w.v.Root(), "f"))
	if l := w.list(""); len(l) != 0 {
		t.Errorf("there is %q", l)
	}
}

// A lookup that cannot wait for the key of an unfinished file gives its node up: a call that waits for
// the same key does not repair the file by that node, since the next lookup makes another one.
func TestAbandonedNodeRepairsNothing(t *testing.T) {
	var changes atomic.Int32
	hook := func(c volume.Call) error {
		if c.Op == "pwrite" || c.Op == "ftruncate" {
			changes.Add(1)
		}
		return nil
	}
	w := newWorld(t, volume.Options{})
	w.quiet = true
	text := noise(8000)
	w.write("f", text[:3000])
	h := w.opened("f")
	w.do("fsync", h.Fsync())
	if _, err := h.Write(ctx, text[3000:], 3000); err != nil {
		t.Fatal(err)
	}
	w.crash()
	come := make(chan struct{})
	w.store = late{hidden{w.store}, come}
	w.open(volume.Options{NoPrefetch: true}.Hooked(hook)) // the walk waits for the key
	wait := func(n int) {
		for end := time.Now().Add(20 * time.Second); w.v.WaitingForKeys() != n; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d calls wait for a key, want %d", w.v.WaitingForKeys(), n)
			}
		}
	}
	wait(1)
	canceled, cancel := context.WithCancel(ctx)
	gone := make(chan bool)
	go func() {
		_, _, final, err := w.v.Lookup(canceled, w.v.Root(), "f")
		gone <- err == nil && !final
	}()
	wait(2)
	cancel()
	if !<-gone {
		t.Error("a lookup that was given up says that its attributes are final")
	}
	changes.Store(0)
	close(come)
	w.do("wait for the walk", w.v.Wait(ctx))
	if n := changes.Load(); n != 0 {
		t.Errorf("the file was changed by %d calls through the node that was given up", n)
	}
	w.want("f", text)
	if changes.Load() == 0 {
		t.Error("the next lookup has not repaired it: nothing was tested")
	}
}

// The header that was read before the key came is read again if the file has changed.
func TestChangedBeforeTheKeyCame(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.write("f", noise(3000))
	w.close()
	var c calls
	come := make(chan struct{})
	w.store = late{hidden{w.store}, come}
	w.open(volume.Options{NoPrefetch: true}.Seeing(c.see))
	n := w.must("f")
	done := make(chan error, 1)
	c.take()
	go func() {
		h, err := n.Open(ctx, false)
		if err == nil {
			err = h.Release()
		}
		done <- err
	}()
	for c.count("pread") == 0 {
		time.Sleep(time.Millisecond)
	}
	w.do("chtimes", os.Chtimes(w.cipherFile(), time.Now(), time.Unix(1e9, 0)))
	close(come)
	w.do("open", <-done)
	if n := c.count("pread"); n != 2 {
		t.Errorf("the header was read %d times, want 2", n)
	}
}

// late is a store that unwraps data keys when it is let.
type late struct {
	keystore.Store
	come chan struct{}
}

func (s late) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	if b.Use == keystore.ForFile {
		<-s.come
	}
	return s.Store.Unwrap(ctx, b, w)
}

// A file that is being written has attributes, even if no name that is known leads to it.
func TestAttrOfUnnamedBesideWrite(t *testing.T) {
	var s stalls
	w := newWorld(t, volume.Options{}.Hooked(s.hook))
	w.write("a", noise(3000))
	_, _, err := w.v.Link(ctx, w.must("a"), w.v.Root(), "b")
	w.do("link", err)
	w.reopen(volume.Options{}.Hooked(s.hook)) // and b was never looked up
	h := w.opened("a")
	w.do("unlink", w.v.Unlink(w.v.Root(), "a"))
	s.stall(func(c volume.Call) bool { return c.Op == "pwrite" })
	wrote, told := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := h.Write(ctx, noise(100), 0)
		wrote <- err
	}()
	<-s.met
	go func() {
		st, err := h.Node().Attr()
		if err == nil && st.Size != 3000 {
			t.Errorf("%d bytes, want 3000", st.Size)
		}
		told <- err
	}()
	select {
	case err := <-told:
		t.Errorf("told before the write ended: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(s.held)
	w.do("write", <-wrote)
	w.do("attributes", <-told)
	w.do("close", h.Release())
}

// Closed files are settled side by side: a disk with latency takes as long for one as for many.
func TestSettlesSideBySide(t *testing.T) {
	const together = 8
	var on atomic.Bool
	var arrived atomic.Int32
	met := make(chan struct{})
	hook := func(c volume.Call) error {
		if !on.Load() || c.Op != "pwrite" {
			return nil
		}
		if arrived.Add(1) == together {
			close(met)
		}
		select {
		case <-met:
			return nil
		case <-time.After(20 * time.Second):
			return errors.New("no other file is settled meanwhile")
		}
	}
	w := newWorld(t, volume.Options{KernelTimes: true}.Hooked(hook))
	text := noise(100000)
	for i := range 4 * together {
		w.write(fmt.Sprint("f", i), text)
		h := w.opened(fmt.Sprint("f", i))
		if err := h.Fsync(); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Write(ctx, []byte("more"),
			int64(len(text))); err != nil { // it has grown: it is to be settled
			t.Fatal(err)
		}
		if err := h.Release(); err != nil {
			t.Fatal(err)
		}
	}
	on.Store(true)
	w.v.Settle()
	on.Store(false)
	select {
	case <-met:
	default:
		t.Errorf("%d writes in all", arrived.Load())
	}
	w.reopen(volume.Options{})
	for i := range 4 * together {
		w.want(fmt.Sprint("f", i), append(slices.Clone(text), "more"...))
	}
}

// toldBehind is told of waits for another call of the same file.
type toldBehind chan struct{}

func (toldBehind) ForKey()   {}
func (toldBehind) ForDisk()  {}
func (t toldBehind) Behind() { t <- struct{}{} }
