//go:build linux && !portable

package volume_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/fs/volume/check"
	"kmsfs/keystore"
	"kmsfs/keystore/agestore"
	"kmsfs/keystore/local"
)

var ctx = context.Background()

// world is a volume in a temporary directory, with paths instead of nodes.
type world struct {
	t     testing.TB
	dir   string
	store keystore.Store
	more  []keystore.Store // that are trusted too
	ro    bool             // it was opened read-only last
	v     *volume.Volume
	log   *logBuffer
	quiet bool // a warning in the log is no failure
}

// logBuffer is a log that tests read.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newWorld(t testing.TB, o volume.Options) *world { return newWorldIn(t, t.TempDir(), o, false) }

func newStore(t testing.TB) []keystore.Store {
	t.Helper()
	key := make([]byte, 32)
	rand.Read(key)
	store, err := local.New(key)
	if err != nil {
		t.Fatal(err)
	}
	return []keystore.Store{store}
}

func newWorldIn(t testing.TB, dir string, o volume.Options, plainNames bool) *world {
	t.Helper()
	store := newStore(t)[0]
	w := &world{t: t, dir: dir, store: store, log: &logBuffer{}}
	if _, err := volume.Init(ctx, w.dir, []keystore.Store{store}, blockcrypt.NewID(),
		volume.InitOptions{PlainNames: plainNames, Shared: os.Getenv("KMSFS_TEST_SHARED") != ""}); err != nil {
		t.Fatal(err)
	}
	w.open(o)
	t.Cleanup(func() {
		if w.v != nil {
			w.close()
		}
		if s := w.log.String(); !w.quiet && (strings.Contains(s, "level=ERROR") ||
			strings.Contains(s, "level=WARN")) {
			t.Errorf("the log has faults:\n%s", s)
		}
	})
	return w
}

func (w *world) unlock() (*volume.Unlocked, error) {
	l, err := volume.Find(w.dir)
	if err != nil {
		return nil, err
	}
	return l.Unlock(ctx, append([]keystore.Store{w.store}, w.more...), volume.UnlockOptions{More: w.sealer, ReadOnly: w.ro})
}

// sealer opens a recipient that only wraps.
func (w *world) sealer(_ context.Context, r blockcrypt.Recipient) (keystore.Store, error) {
	if !strings.HasPrefix(r.URI, agestore.Scheme) {
		return nil, errors.New("its key is not here")
	}
	return agestore.Open(r.URI, r.Branch, nil)
}

// unlockWith unlocks against a trust record.
func (w *world) unlockWith(rec *volume.Record) (*volume.Unlocked, error) {
	l, err := volume.Find(w.dir)
	if err != nil {
		return nil, err
	}
	u, err := l.Unlock(ctx, append([]keystore.Store{w.store}, w.more...), volume.UnlockOptions{Record: rec})
	if err != nil {
		l.Close()
	}
	return u, err
}

func (w *world) open(o volume.Options) {
	w.t.Helper()
	w.ro = o.ReadOnly
	u, err := w.unlock()
	if err != nil {
		w.t.Fatal(err)
	}
	o.Logger = slog.New(slog.NewTextHandler(w.log, nil))
	if w.v, err = u.Open(o.Beats(beat)); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) close() {
	w.t.Helper()
	if err := w.v.Close(); err != nil && !w.quiet {
		w.t.Error(err)
	}
	if n := w.v.Descriptors(); n != 0 {
		w.t.Errorf("%d descriptors are open after the volume was closed", n)
	}
	w.v = nil
}

func (w *world) reopen(o volume.Options) {
	w.t.Helper()
	w.close()
	w.open(o)
}

func (w *world) crash() {
	w.v.Crash()
	w.v = nil
}

// node looks a path up. Its lookups stay until the volume is closed.
func (w *world) node(path string) (*volume.Node, error) {
	n := w.v.Root()
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			continue
		}
		c, _, _, err := w.v.Lookup(ctx, n, name)
		if err != nil {
			return nil, err
		}
		n = c
	}
	return n, nil
}

func (w *world) must(path string) *volume.Node {
	w.t.Helper()
	n, err := w.node(path)
	if err != nil {
		w.t.Fatalf("%s: %v", path, err)
	}
	return n
}

func (w *world) parent(path string) (*volume.Node, string) {
	w.t.Helper()
	dir, name := filepath.Split(path)
	return w.must(dir), name
}

func (w *world) mkdir(path string) {
	w.t.Helper()
	d, name := w.parent(path)
	if _, _, err := w.v.Mkdir(ctx, d, name, 0o755, volume.Caller{}); err != nil {
		w.t.Fatalf("mkdir %s: %v", path, err)
	}
}

func (w *world) create(path string) (*volume.Handle, error) {
	w.t.Helper()
	d, name := w.parent(path)
	_, _, h, err := w.v.Create(ctx, d, name, volume.NewFile{NewNode: volume.NewNode{Mode: 0o644}, Write: true})
	return h, err
}

func (w *world) write(path string, b []byte) {
	w.t.Helper()
	h, err := w.create(path)
	if err != nil {
		w.t.Fatalf("create %s: %v", path, err)
	}
	zero := int64(0)
	if _, err := h.Node().SetAttr(ctx, volume.SetAttr{Size: &zero}); err != nil {
		w.t.Fatalf("truncate %s: %v", path, err)
	}
	if _, err := h.Write(ctx, b, 0); err != nil {
		w.t.Fatalf("write %s: %v", path, err)
	}
	if err := h.Release(); err != nil {
		w.t.Fatalf("close %s: %v", path, err)
	}
}

func (w *world) read(path string) ([]byte, error) {
	n, err := w.node(path)
	if err != nil {
		return nil, err
	}
	return readNode(n)
}

func readNode(n *volume.Node) ([]byte, error) {
	h, err := n.Open(ctx, false)
	if err != nil {
		return nil, err
	}
	defer h.Release()
	st, err := n.Attr()
	if err != nil {
		return nil, err
	}
	b := make([]byte, st.Size)
	m, err := h.Read(ctx, b, 0)
	if err == nil && int64(m) != st.Size {
		err = io.ErrUnexpectedEOF
	}
	return b[:m], err
}

func (w *world) want(path string, b []byte) {
	w.t.Helper()
	got, err := w.read(path)
	if err != nil || !bytes.Equal(got, b) {
		w.t.Fatalf("%s: %d bytes, want %d, first difference at %d: %v", path, len(got), len(b),
			difference(got, b), err)
	}
}

func difference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

func (w *world) list(path string) []string {
	w.t.Helper()
	d, err := w.must(path).OpenDir()
	if err != nil {
		w.t.Fatal(err)
	}
	defer d.Close()
	var out []string
	if err := d.Next(func(e volume.Entry) bool {
		if e.Name != "." && e.Name != ".." {
			out = append(out, e.Name)
		}
		return true
	}); err != nil {
		w.t.Fatal(err)
	}
	return out
}

// cipherFile returns the path of the only ciphertext file that holds content,
// below the volume's root.
func (w *world) cipherFile() string {
	w.t.Helper()
	found := ""
	err := filepath.WalkDir(w.dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && !strings.HasPrefix(d.Name(), "kmsfs.") {
			if found != "" {
				return errors.New("there are several files")
			}
			found = p
		}
		return err
	})
	if err != nil || found == "" {
		w.t.Fatal("no ciphertext file:", err)
	}
	return found
}

func noise(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func wantErr(t testing.TB, what string, err error, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

func size(n int64) volume.SetAttr { return volume.SetAttr{Size: &n} }

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

// fsck checks the closed volume and returns what it finds.
func (w *world) fsck() (fs []check.Finding, d check.Counts) {
	w.t.Helper()
	u, err := w.unlock()
	if err != nil {
		w.t.Fatal(err)
	}
	defer u.Close()
	d, err = check.Volume(ctx, u, check.Options{Found: func(f check.Finding) { fs = append(fs, f) }})
	if err != nil {
		w.t.Fatal(err)
	}
	return fs, d
}

// fsckNoKeys checks the structure alone.
func (w *world) fsckNoKeys() (fs []check.Finding) {
	w.t.Helper()
	l, err := volume.Find(w.dir)
	if err != nil {
		w.t.Fatal(err)
	}
	defer l.Close()
	if _, err := check.Structure(ctx, l,
		check.Options{Found: func(f check.Finding) { fs = append(fs, f) }}); err != nil {
		w.t.Fatal(err)
	}
	return fs
}

func summary(fs []check.Finding) string {
	var s []string
	for _, f := range fs {
		s = append(s, fmt.Sprintf("%s/%s", f.Grade, f.What))
	}
	return strings.Join(s, " ")
}

func worst(fs []check.Finding) (g check.Grade) {
	for _, f := range fs {
		g = max(g, f.Grade)
	}
	return g
}

func first(fs []check.Finding, _ check.Counts) []check.Finding { return fs }

func (w *world) opened(path string) *volume.Handle {
	w.t.Helper()
	h, err := w.must(path).Open(ctx, true)
	if err != nil {
		w.t.Fatal(err)
	}
	return h
}

func (w *world) do(what string, err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
}

func (w *world) killed() {
	w.t.Helper()
	w.quiet = true
	w.crash()
	w.open(volume.Options{})
}

// reopenWell mounts once more, and ends well.
func (w *world) reopenWell() {
	w.t.Helper()
	w.open(volume.Options{})
	w.do("wait", w.v.Wait(ctx))
	w.close()
}
