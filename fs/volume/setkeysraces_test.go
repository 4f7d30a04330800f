//go:build linux && !portable

package volume_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"filippo.io/age"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/agestore"
)

// twin is a store of a key that has a replica, which wraps in the replica's name.
type twin struct {
	keystore.Store
	own, replica string
}

func (s twin) URI() string                     { return s.own }
func (s twin) Matches(uri string) bool         { return uri == s.own || uri == s.replica }
func (s twin) named(uri string) keystore.Store { return twin{s.Store, uri, s.own} }

func (s twin) Wrap(ctx context.Context, b keystore.Binding, key []byte) (blockcrypt.Recipient, error) {
	w, err := s.Store.Wrap(ctx, b, key)
	w.URI = s.own
	return w, err
}

// A rewrap by somebody who lacks the keys of a directory leaves no file to an age recipient alone.
func TestRewrapKeepsOpener(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	a := newStore(t)[0]
	id, err := age.GenerateX25519Identity()
	w.do("generate", err)
	safe, err := agestore.New(id.Recipient().String())
	w.do("recipient", err)
	w.mkdir("d")
	w.write("d/f", []byte("content"))
	w.setKeys("d", a, safe)
	w.reopen(volume.Options{})
	if done := w.rewrap(volume.RewrapOptions{}); !slices.Contains(done.Absent, a.URI()) {
		t.Errorf("%+v", done)
	}
	w.under("d/f", safe, w.store)
	w.want("d/f", []byte("content"))
	var failed error
	done, err := w.v.Recipients().Rewrap(ctx, volume.RewrapOptions{From: w.store.URI(), To: safe.URI(),
		Failed: func(_ string, err error) { failed = err }})
	if w.do("rewrap", err); done.Failed != 1 || failed == nil {
		t.Errorf("%+v, %v", done, failed)
	}
	w.want("d/f", []byte("content"))
}

// A former key stays trusted as long as files are under a replica of it.
func TestFormerReplicaStays(t *testing.T) {
	w := newWorld(t, volume.Options{})
	eu := twin{newStore(t)[0], "twin:eu", "twin:us"}
	us, b := eu.named("twin:us"), newStore(t)[0]
	w.mkdir("d")
	w.setKeys("d", eu)
	w.more = []keystore.Store{us, b}
	w.reopen(volume.Options{})
	w.write("d/f", []byte("under the replica"))
	w.under("d/f", us)
	w.setKeys("d", b)
	w.want("d/f", []byte("under the replica"))
	w.reopen(volume.Options{})
	w.want("d/f", []byte("under the replica"))
	if done := w.rewrap(volume.RewrapOptions{}); done.Changed != 1 || done.Record == nil {
		t.Errorf("%+v", done)
	}
	w.under("d/f", b)
}

// New content is under the keys that the directory has now: of a file without a name, of one that is
// empty, and of one whose key was taken before.
func TestSetKeysBesideOpenFiles(t *testing.T) {
	w, a, b := tenants(t)
	tmp, _, h, err := w.v.Tmpfile(ctx, w.must("a"), 0o644, volume.Caller{}, true)
	w.do("tmpfile", err)
	taken, err := w.create("a/taken")
	w.do("create", err)
	both := newStore(t)[0]
	w.more = append(w.more, both)
	w.setKeys("a", b)
	w.setKeys("a", both, b)
	for _, h := range []*volume.Handle{h, taken} {
		_, err := h.Write(ctx, []byte("content"), 0)
		w.do("write", errors.Join(err, h.Release()))
	}
	_, _, err = w.v.Link(ctx, tmp, w.must("a"), "linked")
	w.do("link", err)
	w.under("a/linked", both, b)
	w.under("a/taken", both, b)
	w.setKeys("a", a) // which it had before
	w.write("a/new", []byte("new"))
	w.under("a/new", a)
	w.reopen(volume.Options{})
	w.want("a/linked", []byte("content"))
	w.want("a/new", []byte("new"))
}

// refusesFiles is a store whose service refuses to unwrap keys of files, while it is told so.
type refusesFiles struct {
	keystore.Store
	on    atomic.Bool
	calls atomic.Int64
}

func (s *refusesFiles) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	s.calls.Add(1)
	if s.on.Load() && b.Use == keystore.ForFile {
		return nil, &keystore.Error{Kind: keystore.Denied, URI: s.URI(), Op: "unwrap", Err: errors.New("denied")}
	}
	return s.Store.Unwrap(ctx, b, w)
}

// A file is opened by those of its recipients that its own list has, where lists have one in common.
func TestListsWithOneInCommon(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	shared, a := &refusesFiles{Store: newStore(t)[0]}, newStore(t)[0]
	_, err := w.v.Recipients().Add(ctx, shared)
	w.do("add", err)
	w.more = []keystore.Store{shared, a}
	w.mkdir("d")
	w.mkdir("e")
	w.setKeys("d", a, shared)
	w.setKeys("e", shared)
	w.write("d/f", []byte("under both"))
	w.reopen(volume.Options{})
	shared.on.Store(true)
	w.want("d/f", []byte("under both"))
	uris := map[string]int{}
	for _, s := range w.v.KeyStates() {
		uris[s.URI]++
	}
	if uris[shared.URI()] != 1 || len(uris) != 3 {
		t.Errorf("%v", uris)
	}
}

// A mount without the right to the keys of a directory does not ask for them, and is well.
func TestUnusedDirectoryKeyIsNotAsked(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	a := &refusesFiles{Store: newStore(t)[0]}
	w.more = []keystore.Store{a}
	w.mkdir("d")
	w.setKeys("d", a)
	w.write("d/f", []byte("content"))
	w.reopen(volume.Options{MaxAge: 200 * time.Millisecond})
	a.on.Store(true)
	a.calls.Store(0)
	time.Sleep(1500 * time.Millisecond) // a watch looks each second
	if n := a.calls.Load(); n != 0 {
		t.Errorf("%d calls", n)
	}
	if _, err := w.read("d/f"); keystore.KindOf(err) != keystore.Denied {
		t.Error(err)
	}
	if err := w.v.Vitals().Err; err != nil {
		t.Error(err)
	}
}

// A key that is at hand now is taken, of a list that was there without it.
func TestSetKeysAgain(t *testing.T) {
	w, a, b := tenants(t)
	w.quiet = true
	w.write("a/f", []byte("content"))
	w.more = []keystore.Store{b}
	w.reopen(volume.Options{})
	if _, err := w.read("a/f"); keystore.KindOf(err) != keystore.Untrusted {
		t.Error(err)
	}
	w.setKeys("a", a)
	w.want("a/f", []byte("content"))
	w.write("a/new", []byte("new"))
	w.under("a/new", a)
}

// The keys of a directory that was removed are trusted no more after a rewrap.
func TestKeysOfRemovedDirectory(t *testing.T) {
	w, a, _ := tenants(t)
	w.write("a/f", []byte("moved out"))
	open := w.opened("a/f")
	w.do("unlink", w.v.Unlink(w.must("a"), "f"))
	w.do("rmdir", w.v.Rmdir(w.v.Root(), "a"))
	if done := w.rewrap(volume.RewrapOptions{}); done.Record != nil && done.FormerNeeded == 0 {
		t.Errorf("an open file needs it: %+v", done)
	}
	_, err := open.Write(ctx, []byte("M"), 0)
	w.do("write", errors.Join(err, open.Release()))
	w.reopen(volume.Options{})
	if done := w.rewrap(volume.RewrapOptions{}); done.FormerNeeded != 0 {
		t.Errorf("%+v", done)
	}
	l, err := volume.Find(w.dir)
	w.do("find", err)
	defer l.Close()
	for _, keys := range l.Config.Directories {
		if urisHave(keys.Recipients, a) || urisHave(keys.Former, a) || len(l.Config.Directories) != 1 {
			t.Errorf("%+v", l.Config.Directories)
		}
	}
}

func urisHave(rs []blockcrypt.Recipient, s keystore.Store) bool {
	return slices.ContainsFunc(rs, func(x blockcrypt.Recipient) bool { return x.URI == s.URI() })
}

// Keys that are set while the volume is being locked are locked with it.
func TestSetKeysBesideSuspend(t *testing.T) {
	w, a, _ := tenants(t)
	w.write("a/f", []byte("content"))
	slow := &entered{Store: newStore(t)[0], in: make(chan struct{}), out: make(chan struct{})}
	w.more = append(w.more, slow)
	h := w.opened("a/f")
	set := make(chan error)
	go func() {
		_, err := w.v.Recipients().SetKeys(ctx, w.must("a"), []keystore.Store{slow, a})
		set <- err
	}()
	<-slow.in
	w.do("suspend", w.v.Suspend())
	close(slow.out)
	if err := <-set; err != nil {
		t.Error(err)
	}
	if _, err := h.Write(ctx, []byte("C"), 0); keystore.KindOf(err) != keystore.Credentials {
		t.Errorf("%v", err)
	}
	if n := w.v.KeyCounts().Cached; n != 0 {
		t.Errorf("%d keys are in memory", n)
	}
	w.v.Resume()
	_, err := h.Write(ctx, []byte("C"), 0)
	w.do("write", errors.Join(err, h.Release()))
	w.want("a/f", []byte("Content"))
}

// entered is a store that waits at the first wrapping.
type entered struct {
	keystore.Store
	once    atomic.Bool
	in, out chan struct{}
}

func (s *entered) Wrap(ctx context.Context, b keystore.Binding, key []byte) (blockcrypt.Recipient, error) {
	if !s.once.Swap(true) {
		close(s.in)
		<-s.out
	}
	return s.Store.Wrap(ctx, b, key)
}

// A kmsfs.json is never larger than one that can be read.
func TestTooManyDirectoryKeys(t *testing.T) {
	cfg := &blockcrypt.Config{Format: 1, Volume: blockcrypt.NewID(), Generation: 1, Header: 1024,
		Names:       blockcrypt.NamesEncrypted,
		Recipients:  []blockcrypt.Recipient{{URI: "local:a"}},
		Directories: map[blockcrypt.ID]blockcrypt.DirectoryKeys{}}
	for range 100 {
		cfg.Directories[blockcrypt.NewID()] = blockcrypt.DirectoryKeys{
			Recipients: []blockcrypt.Recipient{{URI: "local:b", Wrapped: make([]byte, 60000)}}}
	}
	vk, err := blockcrypt.NewVolumeKeys(make([]byte, 32), cfg.Volume)
	if err == nil {
		_, err = cfg.Encode(vk)
	}
	if blockcrypt.ClassOf(err) != blockcrypt.BadConfig || !strings.Contains(err.Error(), "more than") {
		t.Error(err)
	}
}

// Files of a directory one of whose keys is broken are opened by the other one, also when both are
// former keys, and rewrapped.
func TestBrokenFormerKey(t *testing.T) {
	for _, kept := range []bool{false, true} {
		w := newWorld(t, volume.Options{})
		w.quiet = true
		k1, k2, k3 := &refusesFiles{Store: newStore(t)[0]}, newStore(t)[0], newStore(t)[0]
		w.more = []keystore.Store{k1, hidden{k2}, k3}
		w.mkdir("d")
		w.setKeys("d", k1, hidden{k2})
		w.write("d/f", []byte("content"))
		w.reopen(volume.Options{})
		k1.on.Store(true)
		w.want("d/f", []byte("content"))
		keys := []keystore.Store{k3}
		if kept {
			keys = append(keys, hidden{k2})
		}
		w.setKeys("d", keys...)
		w.want("d/f", []byte("content"))
		w.reopen(volume.Options{})
		w.want("d/f", []byte("content"))
		if done := w.rewrap(volume.RewrapOptions{}); done.Changed != 1 || done.FormerNeeded != 0 {
			t.Errorf("%+v", done)
		}
		w.under("d/f", keys...)
		w.want("d/f", []byte("content"))
	}
}

// A file that is opened long after the mount waits for a proof of a key that nobody used before.
func TestProofOfUnusedKey(t *testing.T) {
	w := newWorld(t, volume.Options{})
	a := hidden{newStore(t)[0]}
	w.more = []keystore.Store{a}
	w.mkdir("d")
	w.setKeys("d", a)
	w.write("d/empty", nil)
	w.reopen(volume.Options{MaxAge: time.Second})
	time.Sleep(1100 * time.Millisecond)
	short, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	h, err := w.must("d/empty").Open(short, false)
	w.do("open", err)
	w.do("close", h.Release())
}

// A lock takes the keys of a file that gets new content, of other keys, just then.
func TestSuspendBetweenDomains(t *testing.T) {
	w, a, _ := tenants(t)
	w.write("c/f", []byte("under the volume's"))
	w.setKeys("c", a)
	h := w.opened("c/f")
	_, err := h.Node().SetAttr(ctx, size(0))
	w.do("truncate", err)
	w.do("write", h.WriteDelayed(ctx, []byte("new"), 0))
	w.do("suspend", w.v.Suspend())
	if h.HasKeys() {
		t.Error("its keys are in memory")
	}
	w.v.Resume()
	w.do("close", h.Release())
	w.want("c/f", []byte("new"))
	w.under("c/f", a)
}

// A file of which only a part of the header was on the disk when the power failed is an empty one.
func TestHeaderCutByPowerFailure(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	_, err := w.v.Recipients().SetHeaderSize(8192)
	w.do("set the size", err)
	_, _, err = w.v.Recipients().Reheader(ctx, volume.RekeyOptions{})
	w.do("reheader", err)
	for range 45 {
		w.more = append(w.more, newStore(t)...)
	}
	w.mkdir("d")
	w.setKeys("d", w.more...)
	w.write("d/f", []byte("never synced"))
	w.crash()
	w.do("walk", filepath.WalkDir(w.dir, func(path string, e fs.DirEntry, err error) error {
		if fi, ferr := e.Info(); err == nil && ferr == nil && fi.Mode().IsRegular() && fi.Size() > 8000 && e.Name() != blockcrypt.ConfigName {
			return os.Truncate(path, 4096)
		}
		return err
	}))
	w.open(volume.Options{})
	w.want("d/f", nil)
	w.reopen(volume.Options{})
	if fs, _ := w.fsck(); len(fs) != 0 {
		t.Errorf("%+v", fs)
	}
}

// revocable is a store of a service whose key can be revoked.
type revocable struct {
	keystore.Store
	revoked atomic.Bool
}

func (s *revocable) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	if s.revoked.Load() {
		return nil, &keystore.Error{Kind: keystore.Revoked, URI: s.URI(), Op: "unwrap", Err: errors.New("revoked")}
	}
	return s.Store.Unwrap(ctx, b, w)
}

// A file that is open goes on by another of its keys when one is revoked, though each is a former key of
// its own. When that one is revoked too it is dark.
func TestOpenFileOutlivesOneKey(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	k1, k2, k3 := &revocable{Store: newStore(t)[0]}, &revocable{Store: newStore(t)[0]}, newStore(t)[0]
	w.more = []keystore.Store{k1, k2, k3}
	w.mkdir("d")
	w.setKeys("d", k1, k2)
	w.write("d/f", []byte("content"))
	w.setKeys("d", k3)
	w.reopen(volume.Options{MaxAge: time.Second})
	h, err := w.must("d/f").Open(ctx, false)
	w.do("open", err)
	read := func() error { return errOf(h.Read(ctx, make([]byte, 7), 0)) }
	for _, s := range []*revocable{k1, k2} { // it does not matter which one opened it
		w.do("read", read())
		s.revoked.Store(true)
		for until := time.Now().Add(3 * time.Second); s == k1 && time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
			if err := read(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for until := time.Now().Add(10 * time.Second); keystore.KindOf(read()) != keystore.Revoked; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("it can be read though both of its keys are revoked")
		}
	}
	w.do("close", h.Release())
}

// No file is written under a key that is forgotten at that moment.
func TestWriteWhileKeyIsForgotten(t *testing.T) {
	var replaced atomic.Int32
	var write func()
	w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		if strings.HasPrefix(c.Op, "rename") && write != nil && replaced.Add(1) == 2 {
			write()
		}
		return nil
	}))
	w.quiet = true
	a, b := newStore(t)[0], &counting{Store: newStore(t)[0]}
	w.more = []keystore.Store{a, b}
	w.mkdir("d")
	w.setKeys("d", a)
	h, err := w.create("d/f") // with a key that is wrapped for a
	w.do("create", err)
	var wrote error
	write = func() {
		b.deny.Store(true)
		_, wrote = h.Write(ctx, []byte("content"), 0)
	}
	w.setKeys("d", b)
	if replaced.Load() < 2 {
		t.Fatal("the former key was not forgotten")
	}
	write = nil
	b.deny.Store(false)
	w.do("release", h.Release())
	w.reopen(volume.Options{})
	if got, err := w.read("d/f"); err != nil || (wrote == nil) != (string(got) == "content") {
		t.Errorf("the write said %v; there is %q, %v", wrote, got, err)
	}
}

// Keys of a list that is no more are wiped at once, and those of a file that was being opened by it with
// the others.
func TestDroppedListKeepsNoKeys(t *testing.T) {
	w := newWorld(t, volume.Options{})
	slow := &service{Store: hidden{newStore(t)[0]}}
	b := newStore(t)[0]
	w.more = []keystore.Store{slow, b}
	w.mkdir("d")
	w.setKeys("d", slow)
	w.write("d/f", []byte("content"))
	w.write("d/g", []byte("content"))
	w.reopen(volume.Options{})
	w.want("d/g", []byte("content"))
	if n := w.v.KeyCounts().Cached; n == 0 {
		t.Fatal("no key is in memory")
	}
	wait := make(chan struct{})
	slow.wait.Store(&wait)
	opened := make(chan *volume.Handle)
	n := w.must("d/f")
	go func() {
		h, err := n.Open(ctx, false)
		if err != nil {
			t.Error(err)
		}
		opened <- h
	}()
	for slow.waiting.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	w.setKeys("d", slow, b)
	if n := w.v.KeyCounts().Cached; n != 0 {
		t.Errorf("%d keys are in memory", n)
	}
	slow.wait.Store(nil)
	close(wait)
	h := <-opened
	w.do("suspend", w.v.Suspend())
	if h.HasKeys() {
		t.Error("its keys are in memory")
	}
	w.v.Resume()
	w.do("close", h.Release())
}

// A former key of KMS that is not at hand is not forgotten: which files are under its replicas cannot be
// told.
func TestAbsentFormerKeyOfKMS(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	eu := twin{newStore(t)[0], "aws-kms:eu", "aws-kms:us"}
	us, b := eu.named("aws-kms:us"), newStore(t)[0]
	w.mkdir("d")
	w.setKeys("d", eu)
	w.more = []keystore.Store{us}
	w.reopen(volume.Options{})
	w.write("d/f", []byte("under the replica"))
	w.close()
	w.more = []keystore.Store{b}
	w.open(volume.Options{})
	w.setKeys("d", b)
	if done, err := w.v.Recipients().Rewrap(ctx, volume.RewrapOptions{}); err != nil || done.FormerKept == "" {
		t.Errorf("%+v, %v", done, err)
	}
	w.more = []keystore.Store{us, b}
	w.reopen(volume.Options{})
	w.want("d/f", []byte("under the replica"))
}

// A file that was emptied is of the keys of its new content: that those of the old content are revoked
// does not keep it from being written.
func TestEmptiedFileOfRevokedKey(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	old, a := &revocable{Store: newStore(t)[0]}, newStore(t)[0]
	w.more = []keystore.Store{old, a}
	w.mkdir("d")
	w.setKeys("d", old)
	w.write("d/f", []byte("old"))
	w.write("d/g", []byte("old"))
	w.reopen(volume.Options{MaxAge: time.Second})
	w.setKeys("d", a)
	h := w.opened("d/f")
	_, err := h.Node().SetAttr(ctx, size(0))
	w.do("truncate", err)
	g := w.opened("d/g")
	old.revoked.Store(true)
	for until := time.Now().Add(10 * time.Second); keystore.KindOf(errOf(g.Read(ctx, make([]byte, 3), 0))) != keystore.Revoked; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("the other file can be read though its key is revoked")
		}
	}
	_, err = h.Write(ctx, []byte("new"), 0)
	w.do("write", errors.Join(err, h.Release(), g.Release()))
	w.want("d/f", []byte("new"))
}
