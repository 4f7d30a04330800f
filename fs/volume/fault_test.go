//go:build linux && !portable

package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/local"
)

// Every way to damage a ciphertext file: an error, never other bytes.
func TestTampering(t *testing.T) {
	plain := noise(20000)
	flip := func(at int) func([]byte) []byte {
		return func(b []byte) []byte { b[at] ^= 1; return b }
	}
	for name, f := range map[string]func(b []byte) []byte{
		"header cut short":  func(b []byte) []byte { return b[:700] },
		"one byte":          func(b []byte) []byte { return b[:1] },
		"the header alone":  func(b []byte) []byte { return b[:1024] },
		"magic":             flip(0),
		"volume ID":         flip(20),
		"file ID":           flip(33),
		"commitment":        flip(70),
		"origin":            flip(100),
		"feature bits":      flip(115),
		"state":             flip(130),
		"tag of the state":  flip(180),
		"CRC":               flip(197),
		"a recipient":       flip(220),
		"padding":           flip(1000),
		"first block":       flip(2000),
		"second block":      flip(5000),
		"last block":        func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"length of a block": flip(4097),
		"content key":       flip(4099),
		"nonce":             flip(4100),
		"blocks exchanged": func(b []byte) []byte {
			p := bytes.Clone(b[4096:8192])
			copy(b[4096:], b[8192:12288])
			copy(b[8192:], p)
			return b
		},
		"a block copied over another": func(b []byte) []byte {
			copy(b[4096:8192],
				b[8192:12288])
			return b
		},
		"a page of zeros":              func(b []byte) []byte { clear(b[4096:8192]); return b },
		"all pages but the first zero": func(b []byte) []byte { clear(b[4096:]); return b },
		"cut at a page":                func(b []byte) []byte { return b[:8192] },
		"cut within a page":            func(b []byte) []byte { return b[:9000] },
		"cut by one byte":              func(b []byte) []byte { return b[:len(b)-1] },
		"one byte more":                func(b []byte) []byte { return append(b, 0) },
		"a page more":                  func(b []byte) []byte { return append(b, make([]byte, 4096)...) },
		"a whole page of zeros more": func(b []byte) []byte {
			return append(b,
				make([]byte, 8192-len(b)%4096)...)
		},
		"rubbish":   func(b []byte) []byte { return noise(len(b)) },
		"all zeros": func(b []byte) []byte { clear(b); return b },
	} {
		for _, ro := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/readonly=%v", name, ro), func(t *testing.T) {
				w := newWorld(t, volume.Options{})
				w.quiet = true
				w.write("f", plain)
				w.close()
				path := w.cipherFile()
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, f(b), 0o644); err != nil {
					t.Fatal(err)
				}
				w.open(volume.Options{ReadOnly: ro})
				n := w.must("f")
				h, err := n.Open(ctx, false)
				if err == nil {
					// What does not open is an error, what opens is what was written.
					failed := false
					for off := 0; off < len(plain); off += 100 {
						got := make([]byte, 100)
						m, err := h.Read(ctx, got, int64(off))
						if err != nil {
							failed = true
						} else if !bytes.Equal(got[:m], plain[off:off+m]) || m != min(100, len(plain)-off) {
							t.Fatalf("at %d: %d bytes that were never written there", off, m)
						}
					}
					if !failed {
						t.Error("all of it reads, though it was changed")
					}
					h.Release()
				} else if blockcrypt.ClassOf(err) == "" {
					t.Errorf("opening: %v", err)
				}
				if !strings.Contains(w.log.String(), filepath.Base(path)) {
					t.Errorf("the log does not name the file: %s", w.log)
				}
				if !ro { // damage can be removed
					if err := w.v.Unlink(w.v.Root(), "f"); err != nil {
						t.Errorf("unlink: %v", err)
					}
				}
			})
		}
	}
}

// A damaged file can be emptied and written again.
func TestDamageCanBeReplaced(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	w.write("f", noise(5000))
	w.close()
	if err := os.WriteFile(w.cipherFile(), noise(3000), 0o644); err != nil {
		t.Fatal(err)
	}
	w.open(volume.Options{})
	if _, err := w.must("f").SetAttr(ctx, size(0)); err != nil {
		t.Fatal(err)
	}
	w.write("f", []byte("new"))
	w.want("f", []byte("new"))
}

// Files of another volume, and under keys that nobody named.
func TestPlanted(t *testing.T) {
	a, b := newWorld(t, volume.Options{}), newWorld(t, volume.Options{})
	a.quiet = true
	a.write("f", []byte("mine"))
	b.write("f", []byte("theirs"))
	a.close()
	b.close()
	ours, err := os.ReadFile(a.cipherFile())
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := os.ReadFile(b.cipherFile())
	if err != nil {
		t.Fatal(err)
	}
	open := func(content []byte) error {
		if err := os.WriteFile(a.cipherFile(), content, 0o644); err != nil {
			t.Fatal(err)
		}
		a.open(volume.Options{})
		defer a.close()
		_, err := a.read("f")
		return err
	}
	if err := open(theirs); blockcrypt.ClassOf(err) != blockcrypt.BadVolume {
		t.Errorf("another volume's file: %v", err)
	}
	h, err := blockcrypt.ParseHeader(ours)
	if err != nil {
		t.Fatal(err)
	}
	h.Recipients[0].URI = "aws-kms:arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	head, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := open(append(head, ours[1024:]...)); keystore.KindOf(err) != keystore.Untrusted {
		t.Errorf("a key that nobody named: %v", err)
	}
	if err := open(ours); err != nil {
		t.Errorf("our own again: %v", err)
	}
	key, _ := local.New(make([]byte, 32))
	l, err := volume.Find(a.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := l.Unlock(ctx, []keystore.Store{key},
		volume.UnlockOptions{}); keystore.KindOf(err) != keystore.Untrusted {
		t.Errorf("a volume under a key that nobody named: %v", err)
	}
}

func TestTrustRecord(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.close()
	unlock := func(r *volume.Record, older bool) error {
		l, err := volume.Find(w.dir)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		u, err := l.Unlock(ctx, []keystore.Store{w.store},
			volume.UnlockOptions{Record: r, AcceptOlder: older})
		if err == nil {
			u.Close()
		}
		return err
	}
	u, err := w.unlock()
	if err != nil {
		t.Fatal(err)
	}
	rec := *u.Record
	u.Close()
	if !rec.Trusts(w.store.URI()) || rec.Trusts("local:x") || (*volume.Record)(nil).Trusts(w.store.URI()) {
		t.Error("the record trusts others than its own")
	}
	if err := unlock(&rec, false); err != nil {
		t.Error(err)
	}
	newer := rec
	newer.Generation++
	wantErr(t, "an older kmsfs.json", unlock(&newer, false), volume.ErrOlder)
	wantErr(t, "accepted", unlock(&newer, true), nil)
	other := rec
	other.Commitment = strings.Repeat("0", 64)
	wantErr(t, "another volume key", unlock(&other, true), volume.ErrOtherKey)
	path := filepath.Join(w.dir, blockcrypt.ConfigName)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path,
		bytes.Replace(b, []byte(`"generation":1`), []byte(`"generation":7`), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unlock(&rec, false); blockcrypt.ClassOf(err) != blockcrypt.BadConfigMAC {
		t.Errorf("an altered kmsfs.json: %v", err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// Directories: an undecodable name is left out and logged, its neighbours stay;
// IDs are found in either place, and two that differ are an error.
func TestDirectoryDamage(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	w.mkdir("d")
	w.write("d/f", []byte("x"))
	w.write("d/"+strings.Repeat("l", 200), []byte("y"))
	w.close()
	dir := ""
	es, _ := os.ReadDir(w.dir)
	for _, e := range es {
		if e.IsDir() {
			dir = filepath.Join(w.dir, e.Name())
		}
	}
	id, err := os.Readlink(filepath.Join(dir, "kmsfs.dir"))
	if err != nil {
		t.Fatal(err)
	}
	read := func() (string, error) {
		w.open(volume.Options{})
		defer w.close()
		b, err := w.read("d/f")
		return string(b), err
	}
	ok := func(what string) {
		t.Helper()
		if got, err := read(); err != nil || got != "x" {
			t.Errorf("%s: %q, %v", what, got, err)
		}
		if !exists(filepath.Join(dir, "kmsfs.dir")) || !exists(filepath.Join(dir, "kmsfs.dir."+id)) {
			t.Errorf("%s: a lost place was not made again", what)
		}
	}
	remove := func(name string) {
		t.Helper()
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	ok("as it was")
	remove("kmsfs.dir")
	ok("without the symlink")
	remove("kmsfs.dir." + id)
	ok("without the file")
	remove("kmsfs.dir")
	if err := os.Symlink(strings.Repeat("0", 32), filepath.Join(dir, "kmsfs.dir")); err != nil {
		t.Fatal(err)
	}
	if _, err := read(); !errors.Is(err, unix.EIO) {
		t.Errorf("two IDs that differ: %v", err)
	}
	remove("kmsfs.dir")
	remove("kmsfs.dir." + id)
	if _, err := read(); !errors.Is(err, unix.EIO) {
		t.Errorf("entries without an ID: %v", err)
	}
	if err := os.Symlink(id, filepath.Join(dir, "kmsfs.dir")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"nonsense", "lost+found", strings.Repeat("A", 43), "kmsfs.long.AAAA"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	w.open(volume.Options{})
	if got := w.list("d"); len(got) != 2 {
		t.Errorf("listed %q", got)
	}
	if !strings.Contains(w.log.String(), "nonsense") {
		t.Errorf("the log does not name it: %s", w.log)
	}
}

// fault makes the n-th call from now on fail, or all from it on.
type fault struct {
	left atomic.Int64
	all  atomic.Bool
	err  error
	hit  atomic.Bool
	op   atomic.Value // string: of the call that failed
}

func (f *fault) hook(c volume.Call) error {
	if n := f.left.Add(-1); n == 0 || n < 0 && f.all.Load() && f.hit.Load() {
		f.hit.Store(true)
		f.op.Store(c.Op)
		return f.err
	}
	return nil
}

func (f *fault) after(n int64) { f.hit.Store(false); f.left.Store(n) }
func (f *fault) never()        { f.left.Store(1 << 60) }

// An operation that fails once, at any of its syscalls, leaves the file what it
// was, or what it was to become, block by block; and the next one works.
func TestFaults(t *testing.T) {
	sizes := []int64{0, 1, 3000, 3040, 3041, 7104, 7105, 30000}
	for _, confirmed := range []bool{false, true} {
		for _, from := range sizes {
			for name, op := range operations(sizes) {
				t.Run(fmt.Sprintf("confirmed=%v/%d/%s", confirmed, from, name), func(t *testing.T) {
					for n := int64(1); n < 40; n++ {
						if !faultOnce(t, confirmed, from, op, n) {
							return
						}
					}
				})
			}
		}
	}
}

// operation changes a file and returns what it should have become.
type operation func(h *volume.Handle, old []byte) (now []byte, err error)

func operations(sizes []int64) map[string]operation {
	ops := map[string]operation{
		"fsync": func(h *volume.Handle, old []byte) ([]byte, error) { return old, h.Fsync() },
	}
	for _, to := range sizes {
		ops[fmt.Sprintf("truncate %d", to)] = func(h *volume.Handle, old []byte) ([]byte, error) {
			_, err := h.Node().SetAttr(ctx, size(to))
			now := make([]byte, to)
			copy(now, old)
			return now, err
		}
	}
	const keep = unix.FALLOC_FL_KEEP_SIZE
	for _, mode := range []uint32{0, keep, unix.FALLOC_FL_PUNCH_HOLE | keep, unix.FALLOC_FL_ZERO_RANGE} {
		ops[fmt.Sprintf("fallocate %x", mode)] = func(h *volume.Handle, old []byte) ([]byte, error) {
			const from, n = 3000, 20000
			now := bytes.Clone(old)
			if mode > keep {
				clear(now[min(from, len(now)):min(from+n, len(now))])
			}
			if mode&keep == 0 && len(now) < from+n {
				now = append(now, make([]byte, from+n-len(now))...)
			}
			return now, h.Fallocate(ctx, mode, from, n)
		}
	}
	for _, at := range []int64{0, 3039, 5000, 29999, 40000, 2 << 20} {
		data := bytes.Repeat([]byte{0xee}, 9000)
		ops[fmt.Sprintf("write at %d", at)] = func(h *volume.Handle, old []byte) ([]byte, error) {
			now := make([]byte, max(int64(len(old)), at+9000))
			copy(now, old)
			copy(now[at:], data)
			_, err := h.Write(ctx, data, at)
			return now, err
		}
	}
	return ops
}

func faultOnce(t *testing.T, confirmed bool, from int64, op operation, n int64) (hit bool) {
	t.Helper()
	f := &fault{err: unix.ENOSPC}
	if n%3 == 0 {
		f.err = unix.EIO
	}
	f.never()
	w := newWorldIn(t, filepath.Join(t.TempDir()), volume.Options{}.Hooked(f.hook), false)
	w.quiet = true
	old := noise(int(from))
	h, err := w.create("f")
	if err != nil {
		t.Fatal(err)
	}
	if from > 0 {
		if _, err := h.Write(ctx, old, 0); err != nil {
			t.Fatal(err)
		}
	}
	if confirmed {
		if err := h.Fsync(); err != nil {
			t.Fatal(err)
		}
	}
	f.after(n)
	now, err := op(h, old)
	hit = f.hit.Load()
	f.never()
	if hit && err == nil && !strings.Contains(w.log.String(), "level=ERROR") {
		t.Fatalf("call %d failed, and nobody was told", n)
	}
	got, rerr := readNode(h.Node())
	if rerr != nil {
		t.Fatalf("after a failure of call %d (%v): %v", n, err, rerr)
	}
	if !between(got, old, now, err == nil) {
		t.Fatalf("after a failure of call %d: %d bytes, neither the old %d nor the new %d", n,
			len(got), len(old), len(now))
	}
	if op, _ := f.op.Load().(string); hit && op != "" &&
		strings.Contains("fsync fdatasync syncfs sync_file_range", op) {
		// Data that could not be synced is never called synced; data that the disk has
		// is looked at when the file is opened again.
		for range 2 {
			if err := h.Fsync(); err == nil {
				t.Fatalf("after a failure of call %d, %s, fsync says yes", n, op)
			}
		}
		h.Release()
		got, rerr = readNode(w.must("f"))
		if rerr != nil || !between(got, old, now, false) {
			t.Fatalf("opened again after a failure of call %d, %s: %d bytes, %v", n, op, len(got), rerr)
		}
		h = w.opened("f")
		// The kernel believes in the size of before; a program that goes on cuts the file.
		if _, err := h.Node().SetAttr(ctx, size(int64(len(got)))); err != nil {
			t.Fatalf("cutting after a failure of call %d, %s: %v", n, op, err)
		}
	}
	// And it goes on.
	if _, err := h.Write(ctx, []byte("end"), int64(len(got))); err != nil {
		t.Fatalf("writing after the failure of call %d, %v: %v\n%s", n, f.op.Load(), err, w.log)
	}
	got = append(got, "end"...)
	if err := errors.Join(h.Fsync(), h.Release()); err != nil {
		t.Fatalf("after the failure of call %d, %v: %v", n, f.op.Load(), err)
	}
	w.want("f", got)
	if n%2 == 0 {
		w.crash()
		w.open(volume.Options{})
	} else {
		w.reopen(volume.Options{})
	}
	w.want("f", got)
	w.close()
	return hit
}

// between reports whether got is old or now, or block for block one of them.
func between(got, old, now []byte, done bool) bool {
	if done {
		return bytes.Equal(got, now)
	}
	if len(got) != len(old) && len(got) != len(now) {
		return false
	}
	for i, c := range got {
		if !(i < len(old) && old[i] == c) && !(i < len(now) && now[i] == c) {
			return false
		}
	}
	return true
}
