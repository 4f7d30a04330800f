//go:build linux && !portable

package volume_test

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/fs/volume/check"
	"kmsfs/keystore"
	"kmsfs/keystore/local"
)

// A whole ciphertext file, opened and read: it is an error, or what was written;
// nothing crashes, and nothing is allocated because the input says so.
func FuzzFile(f *testing.F) {
	key := sha256.Sum256([]byte("the key of the fuzz tests"))
	store, err := local.New(key[:])
	if err != nil {
		f.Fatal(err)
	}
	dir := f.TempDir()
	id := blockcrypt.ID{1, 2, 3}
	if _, err := volume.Init(ctx, dir, []keystore.Store{store}, id,
		volume.InitOptions{PlainNames: true}); err != nil {
		f.Fatal(err)
	}
	w := &world{t: f, dir: dir, store: store, log: &logBuffer{}, quiet: true}
	w.open(volume.Options{})
	// Files whose every byte says where it is: bytes that were read can be told from bytes that
	// were never written.
	for _, n := range []int{1, 3040, 3041, 20000} {
		w.write("seed", pattern(n))
		b, err := os.ReadFile(filepath.Join(dir, "seed"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(b[:len(b)-1])
		x := bytes.Clone(b)
		x[len(x)-3] ^= 4
		f.Add(x)
	}
	h, err := w.create("seed")
	w.do("create", err)
	_, err = h.Write(ctx, pattern(100), 2<<20)
	w.do("write", err)
	sparse, err := os.ReadFile(filepath.Join(dir, "seed"))
	w.do("read", err)
	f.Add(sparse[:20480]) // sparse, and dirty
	w.do("close", h.Release())
	w.close()
	w.open(volume.Options{ReadOnly: true})
	defer w.close()
	all := pattern(2<<20 + 5000)
	f.Fuzz(func(t *testing.T, b []byte) {
		w.log = &logBuffer{}
		if err := os.WriteFile(filepath.Join(dir, "fuzzed"), b, 0o644); err != nil {
			t.Fatal(err)
		}
		n, err := w.node("fuzzed")
		if err != nil {
			t.Fatal(err)
		}
		defer w.v.Forget(n.ID(), 1)
		if l, err := volume.OpenLone(filepath.Join(dir, "fuzzed")); err == nil {
			if l.Header != nil {
				check.File(ctx, l, "fuzzed", []keystore.Store{store},
					check.Options{Found: func(check.Finding) {}})
				l.PlainSize()
			}
			l.Close()
		}
		h, err := n.Open(ctx, false)
		if err != nil {
			return
		}
		defer h.Release()
		buf := make([]byte, 8192)
		for off := int64(0); off < 3<<20; off += int64(len(buf)) {
			k, err := h.Read(ctx, buf, off)
			if err != nil {
				continue
			}
			if k == 0 {
				break
			}
			for i, c := range buf[:k] {
				// Of the sparse seed a hole is zeros; its content begins behind it.
				if at := int(off) + i; c != all[at%len(all)] && c != 0 && c != all[max(0, at-2<<20)] {
					t.Fatalf("byte %d is %d, which was never written", at, c)
				}
			}
		}
		h.Seek(0, unix.SEEK_HOLE)
		h.Seek(0, unix.SEEK_DATA)
	})
}
