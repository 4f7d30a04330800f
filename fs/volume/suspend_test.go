//go:build linux && !portable

package volume_test

import (
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
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/fs/volume/check"
	"kmsfs/keystore"
)

// service is a store that has to be waited for.
type service struct {
	keystore.Store // of a local key
	wait           atomic.Pointer[chan struct{}]
	waiting        atomic.Int32
}

func (s *service) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	if c := s.wait.Load(); c != nil {
		s.waiting.Add(1)
		select {
		case <-*c:
		case <-ctx.Done():
			return nil, &keystore.Error{Kind: keystore.Canceled, URI: s.URI(), Op: "unwrap", Err: ctx.Err()}
		}
	}
	return s.Store.Unwrap(ctx, b, w)
}

// hidden makes a store's optional interfaces invisible.
type hidden struct{ keystore.Store }

// lockWorld is a volume under a service.
func lockWorld(t *testing.T, o volume.Options) (*world, *service) {
	w := &world{t: t, dir: t.TempDir(), log: &logBuffer{}, quiet: true}
	s := &service{Store: hidden{newStore(t)[0]}}
	w.store = s
	if _, err := volume.Init(ctx, w.dir, []keystore.Store{s}, blockcrypt.NewID(),
		volume.InitOptions{}); err != nil {
		t.Fatal(err)
	}
	w.open(o)
	t.Cleanup(func() {
		if w.v != nil {
			w.close()
		}
	})
	return w, s
}

// kernel is a mount's kernel, which writes what it holds back when it is told to.
type kernel struct {
	mu   sync.Mutex
	held func()
}

func (k *kernel) ForgetAttr(uint64) error { return nil }

func (k *kernel) WriteBack(uint64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if f := k.held; f != nil {
		k.held = nil
		f()
	}
	return nil
}

func refusedLocked(t *testing.T, what string, err error) {
	t.Helper()
	if !refused(err) {
		t.Errorf("%s while it is locked: %v", what, err)
	}
}

// relock wipes all keys and lets them be asked for again.
func (w *world) relock() {
	w.v.Suspend()
	defer w.v.Resume()
}

// A read that waits for its key when the volume is suspended is refused, though the
// key comes.
func TestLockWhileReadWaits(t *testing.T) {
	w, s := lockWorld(t, volume.Options{})
	w.write("f", []byte("secret"))
	h := w.opened("f")
	w.v.Suspend()
	_, err := h.Read(ctx, make([]byte, 6), 0)
	refusedLocked(t, "a read", err)
	w.v.Resume()
	// Its key was asked for again, since it is open for writing; of one that is read
	// only it is when it is read.
	w.do("close", h.Release())
	h, err = w.must("f").Open(ctx, false)
	w.do("open", err)
	defer h.Release()
	w.relock()
	gate := make(chan struct{})
	s.wait.Store(&gate)
	got := make(chan error)
	go func() {
		_, err := h.Read(ctx, make([]byte, 6), 0)
		got <- err
	}()
	for s.waiting.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	w.v.Suspend()
	s.wait.Store(nil)
	close(gate)
	refusedLocked(t, "a read that waited", <-got)
	if h.HasKeys() {
		t.Error("it has its keys while it is locked")
	}
	w.v.Resume()
	b := make([]byte, 6)
	if _, err := h.Read(ctx, b, 0); err != nil || string(b) != "secret" {
		t.Errorf("unlocked: %q, %v", b, err)
	}
	// A waiting call can be canceled.
	w.relock()
	gate = make(chan struct{})
	s.wait.Store(&gate)
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := h.Read(short, b, 0); keystore.KindOf(err) != keystore.Canceled {
		t.Errorf("a reader that went away: %v", err)
	}
	s.wait.Store(nil)
	close(gate)
}

// Of lock and unlock that cross each other, and files in use, the last one counts.
func TestLockAndUnlockCross(t *testing.T) {
	w, _ := lockWorld(t, volume.Options{})
	var k kernel
	w.v.AttachKernel(&k)
	const files = 4
	var nodes []*volume.Node
	for i := range files {
		w.write(fmt.Sprint(i), []byte("content"))
		nodes = append(nodes, w.must(fmt.Sprint(i)))
	}
	for round := range 60 {
		var users, locks sync.WaitGroup
		stop := make(chan struct{})
		for i := range files {
			users.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					h, err := nodes[i].Open(ctx, n%2 == 0)
					if err == nil {
						if n%2 == 0 {
							_, err = h.Write(ctx, []byte("c"), 0)
						} else {
							_, err = h.Read(ctx, make([]byte, 7), 0)
						}
						err = errors.Join(err, h.Release())
					}
					if err != nil && !refused(err) {
						t.Errorf("file %d: %v", i, err)
						return
					}
				}
			})
		}
		for range 3 {
			locks.Go(func() {
				if err := w.v.Suspend(); err != nil {
					t.Errorf("lock: %v", err)
				}
			})
			locks.Go(w.v.Resume)
		}
		locks.Wait()
		close(stop)
		users.Wait()
		locked := w.v.Suspended() != nil
		for i, n := range nodes {
			if b, err := readNode(n); refused(err) != locked || !locked && string(b) != "content" {
				t.Fatalf("round %d: locked: %v, file %d: %q, %v", round, locked, i, b, err)
			}
		}
		w.v.Resume()
	}
}

func refused(err error) bool { return keystore.KindOf(err) == keystore.Credentials }

// What the kernel holds back is written, also where the file's key was wiped before
// and nothing has asked for it since.
func TestLockTwice(t *testing.T) {
	w, _ := lockWorld(t, volume.Options{})
	k := &kernel{}
	w.v.AttachKernel(k)
	w.write("f", []byte("old content"))
	h := w.opened("f")
	w.relock()
	k.held = func() { w.do("what was held back", h.WriteDelayed(ctx, []byte("new"), 0)) }
	w.relock()
	w.do("close", h.Release())
	w.want("f", []byte("new content"))
}

// A disk that does not answer keeps neither the volume from being suspended nor the keys
// of other files in memory; its own file's go when it lets it go.
func TestLockBehindStalledDisk(t *testing.T) {
	t.Run("unlocked when it has answered", func(t *testing.T) { lockBehindStalledDisk(t, false) })
	t.Run("unlocked before", func(t *testing.T) { lockBehindStalledDisk(t, true) })
}

func lockBehindStalledDisk(t *testing.T, early bool) {
	stalled, at := make(chan struct{}), make(chan struct{}, 9)
	var stall atomic.Bool
	w, _ := lockWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		if stall.Load() && (c.Op == "pwrite" || c.Op == "syncfs") {
			at <- struct{}{}
			<-stalled
		}
		return nil
	}))
	w.v.SealWithin(time.Second)
	w.write("a", noise(5000))
	w.write("b", noise(5000))
	a, b := w.opened("a"), w.opened("b")
	stall.Store(true)
	wrote := make(chan error)
	go func() {
		_, err := a.Write(ctx, noise(5000), 0)
		wrote <- err
	}()
	<-at
	begun := time.Now()
	if err := w.v.Suspend(); err == nil {
		t.Error("all is said to be written")
	}
	if d := time.Since(begun); d > 10*time.Second {
		t.Errorf("it took %v", d)
	}
	_, err := b.Read(ctx, make([]byte, 10), 0)
	refusedLocked(t, "a read beside", err)
	if b.HasKeys() {
		t.Error("another file's keys are in memory")
	}
	stall.Store(false)
	if early {
		w.v.Resume()
		close(stalled)
		<-wrote
		time.Sleep(300 * time.Millisecond) // in which what was given up comes to its end
		w.do("fsync", a.Fsync())
		w.do("close", errors.Join(a.Release(), b.Release()))
		return
	}
	close(stalled)
	<-wrote
	for until := time.Now().Add(10 * time.Second); a.HasKeys(); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("the file's keys are in memory though the disk answered")
		}
	}
	w.v.Resume()
	if _, err := a.Read(ctx, make([]byte, 10), 0); err != nil {
		t.Error("unlocked:", err)
	}
	w.do("close", errors.Join(a.Release(), b.Release()))
}

// What an empty file was given between two locks is written.
func TestLockWithEmptyFile(t *testing.T) {
	w, _ := lockWorld(t, volume.Options{})
	k := &kernel{}
	w.v.AttachKernel(k)
	h, err := w.create("f")
	w.do("create", err)
	w.relock()
	k.held = func() { w.do("what was held back", h.WriteDelayed(ctx, []byte("content"), 0)) }
	w.do("lock", w.v.Suspend())
	w.v.Resume()
	w.do("close", h.Release())
	w.want("f", []byte("content"))
}

// Where something was lost, lock says so.
func TestLockTellsOfLoss(t *testing.T) {
	var full atomic.Bool
	w, _ := lockWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		if full.Load() && c.Op == "pwrite" {
			return unix.ENOSPC
		}
		return nil
	}))
	k := &kernel{}
	w.v.AttachKernel(k)
	w.write("f", []byte("content"))
	h := w.opened("f")
	full.Store(true)
	k.held = func() { h.WriteDelayed(ctx, noise(9000), 0) }
	if err := w.v.Suspend(); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("lock says %v", err)
	}
	full.Store(false)
	w.v.Resume()
	h.Release() // which tells it too
}

// Data that is fsynced while the volume is suspended is confirmed: growth announces itself.
func TestFsyncWhileLocked(t *testing.T) {
	var ops []string
	w, _ := lockWorld(t,
		volume.Options{}.Hooked(func(c volume.Call) error { ops = append(ops, c.Op); return nil }))
	h, err := w.create("f")
	w.do("create", err)
	_, err = h.Write(ctx, noise(5000), 0)
	w.do("write", err)
	w.v.Suspend()
	w.do("fsync", h.Fsync())
	w.v.Resume()
	ops = nil
	_, err = h.Write(ctx, noise(5000), 5000)
	w.do("write", err)
	if !slices.Contains(ops, "fdatasync") || !slices.Contains(ops, "ftruncate") {
		t.Errorf("a confirmed file grows by %v", ops)
	}
	w.do("close", h.Release())
}

// A file without a name is one node, also for who looks its name up as it gets it.
func TestLinkIsOneNode(t *testing.T) {
	var w *world
	var seen uint64
	w = newWorld(t, volume.Options{}.Done(func(c volume.Call, err error) {
		if c.Op == "linkat" && err == nil {
			n, _, _, err := w.v.Lookup(ctx, w.v.Root(), "f")
			w.do("lookup", err)
			seen = n.ID()
		}
	}))
	n, _, h, err := w.v.Tmpfile(ctx, w.v.Root(), 0o644, volume.Caller{}, true)
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("the backing filesystem has no O_TMPFILE")
	}
	w.do("O_TMPFILE", err)
	linked, _, err := w.v.Link(ctx, n, w.v.Root(), "f")
	w.do("link", err)
	if seen != n.ID() || linked != n {
		t.Errorf("node %d, looked up as %d", n.ID(), seen)
	}
	w.do("close", h.Release())
}

// What cannot be walked keeps nobody waiting, and can be mended.
func TestWalkThatCannot(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	w.mkdir("d")
	w.write("d/f", []byte("x"))
	w.mkdir("empty")
	w.write("empty/f", nil)
	w.do("unlink", w.v.Unlink(w.must("empty"), "f"))
	empty := filepath.Join(w.dir, w.v.CipherName(w.v.Root(), "empty"))
	d := filepath.Join(w.dir, w.v.CipherName(w.v.Root(), "d"))
	w.crash()
	for _, dir := range []string{d, empty} {
		id, err := os.Readlink(dir + "/kmsfs.dir")
		w.do("readlink", err)
		w.do("remove", os.Remove(dir+"/kmsfs.dir"))
		if dir == d {
			w.do("remove", os.Remove(dir+"/kmsfs.dir."+id))
		}
	}
	w.do("setxattr", unix.Setxattr(d, "user.foreign", []byte("x"), 0)) // a mount does not show it
	fs, _ := w.fsck()
	if got := summary(fs); !strings.Contains(got, "damaged/directory-id") ||
		!strings.Contains(got, "mendable/directory-id") || strings.Contains(got, "value") {
		t.Fatal(got)
	}
	w.open(volume.Options{})
	short, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	w.do("wait", w.v.Wait(short))
	for _, r := range check.Repair(ctx, w.v, fs, func(check.Finding) bool { return false }) {
		w.do("repair "+r.Path, r.Err)
	}
	w.close()
	w.reopenWell()
	if fs, _ := w.fsck(); len(fs) != 0 {
		t.Errorf("afterwards: %+v", fs)
	}
}
