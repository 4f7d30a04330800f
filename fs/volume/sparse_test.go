//go:build linux && !portable

package volume_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/fs/volume/check"
)

const huge = 1 << 40

// hugeFile makes a file of 1 TiB with two pages of data, and returns the calls that read.
func hugeFile(t *testing.T) (w *world, reads *atomic.Int64) {
	t.Helper()
	reads = &atomic.Int64{}
	w = newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		if c.Op == "pread" {
			reads.Add(1)
		}
		return nil
	}))
	h, err := w.create("f")
	w.do("create", err)
	_, err = h.Write(ctx, []byte("begin"), 0)
	w.do("write", err)
	w.do("fsync", h.Fsync())
	_, err = h.Node().SetAttr(ctx, size(huge))
	w.do("grow", err)
	_, err = h.Write(ctx, []byte("end"), huge-3)
	w.do("write", err)
	w.do("fsync", h.Fsync())
	_, err = h.Write(ctx, []byte("middle"), huge/2)
	w.do("write", err)
	w.do("close", h.Release())
	return w, reads
}

func (w *world) wantHuge(path string, middle bool) {
	w.t.Helper()
	n := w.must(path)
	st, err := n.Attr()
	h, oerr := n.Open(ctx, false)
	w.do("open", errors.Join(err, oerr))
	defer h.Release()
	if st.Size != huge || st.Blocks*512 > 1<<20 {
		w.t.Errorf("%s has %d bytes, %d on the disk", path, st.Size, st.Blocks*512)
	}
	parts := map[int64]string{0: "begin\x00", huge - 3: "end", huge / 4: "\x00\x00"}
	if middle {
		parts[huge/2] = "middle\x00"
	}
	for at, want := range parts {
		b := make([]byte, len(want))
		if _, err := h.Read(ctx, b, at); err != nil || string(b) != want {
			w.t.Errorf("%s at %d: %q, %v", path, at, b, err)
		}
	}
}

// Each operation on a file costs by its data, not by its size.
func TestSparseCosts(t *testing.T) {
	w, reads := hugeFile(t)
	few := func(what string) {
		t.Helper()
		if n := reads.Swap(0); n > 200 {
			t.Errorf("%s: %d reads", what, n)
		}
	}
	w.v.Settle()
	few("settling")
	w.close()
	if fs, d := w.fsck(); len(fs) > 0 || d.Bytes > 10<<20 {
		t.Errorf("fsck: %v, %d bytes", fs, d.Bytes)
	}

	// A repair.
	w, reads = hugeFile(t)
	h := w.opened("f")
	_, err := h.Write(ctx, noise(200000), 4<<20)
	w.do("write", err)
	w.quiet = true
	w.crash()
	if fs, _ := w.fsck(); worst(fs) > check.Unconfirmed {
		t.Errorf("fsck before the repair: %v", fs)
	}
	w.open(volume.Options{}.Hooked(func(c volume.Call) error {
		if c.Op == "pread" {
			reads.Add(1)
		}
		return nil
	}))
	reads.Store(0)
	w.wantHuge("f", true)
	few("repair")

	// A copy in the daemon, over a file that has data where there is a hole.
	out, err := w.create("copy")
	w.do("create", err)
	_, err = out.Write(ctx, noise(3<<20), 8<<20)
	w.do("write", err)
	in, err := w.must("f").Open(ctx, false)
	w.do("open", err)
	n, err := out.CopyFrom(ctx, in, 0, 0, huge)
	if err != nil || n != huge {
		t.Errorf("copied %d: %v", n, err)
	}
	w.do("close", errors.Join(in.Release(), out.Release()))
	few("copy")
	w.wantHuge("copy", true)
	b := make([]byte, 100)
	h, err = w.must("copy").Open(ctx, false)
	w.do("open", err)
	if _, err := h.Read(ctx, b, 9<<20); err != nil || !bytes.Equal(b, make([]byte, 100)) {
		t.Errorf("old data at the place of a hole: %x, %v", b, err)
	}
	h.Release()
}

// A repair of a large file does not keep the volume from being closed: the next mount does it.
func TestRepairEndsWithTheVolume(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	h, err := w.create("f")
	w.do("create", err)
	content := noise(4064 * 3000)
	_, err = h.Write(ctx, content, 0)
	w.do("write", err)
	w.crash()
	u, err := w.unlock()
	w.do("unlock", err)
	begun, closing := make(chan struct{}), make(chan struct{})
	var once, reads atomic.Int32
	v, err := u.Open(volume.Options{}.Hooked(func(c volume.Call) error {
		if c.Op == "pread" && c.Len == blockcrypt.PageSize {
			if once.Add(1) == 1 {
				close(begun)
				<-closing
			}
			reads.Add(1)
		}
		return nil
	}))
	w.do("open", err)
	<-begun // the walk has come to the file
	ended := make(chan error, 1)
	go func() { ended <- v.Close() }()
	for !v.Closing() {
	}
	close(closing)
	w.do("close", <-ended)
	if n := reads.Load(); n > 1000 {
		t.Errorf("%d blocks were read after the volume was to be closed", n)
	}
	w.open(volume.Options{})
	w.do("wait", w.v.Wait(ctx))
	w.want("f", content)
}

// encrypt keeps the holes of a file, and decrypt and cat make them again.
func TestLoneSparse(t *testing.T) {
	dir := t.TempDir()
	stores := newStore(t)
	in, err := os.Create(filepath.Join(dir, "in"))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	const size = 1 << 36
	text := make([]byte, 10000)
	rand.Read(text)
	for _, at := range []int64{0, 5 << 20, size / 2, size - 10000} {
		if _, err := in.WriteAt(text, at); err != nil {
			t.Fatal(err)
		}
	}
	for _, length := range []int64{size, size + 1<<30} { // the second ends in a hole
		if err := in.Truncate(length); err != nil {
			t.Fatal(err)
		}
		in.Seek(0, io.SeekStart)
		sealed, err := os.Create(filepath.Join(dir, "sealed"))
		if err != nil {
			t.Fatal(err)
		}
		if err := volume.Encrypt(ctx, sealed, in, stores); err != nil {
			t.Fatal(err)
		}
		small(t, sealed)
		sealed.Close()
		l, err := volume.OpenLone(sealed.Name())
		if err != nil {
			t.Fatal(err)
		}
		rc := l.Header.Recipients[0]
		key, err := stores[0].Unwrap(context.Background(), l.Binding(), rc)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Unlock(key); err != nil {
			t.Fatal(err)
		}
		out, err := os.Create(filepath.Join(dir, "out"))
		if err != nil {
			t.Fatal(err)
		}
		if err := l.CopyTo(out,
			func(n int64) error { _, err := out.Seek(n, io.SeekCurrent); return err }); err != nil {
			t.Fatal(err)
		}
		small(t, out)
		if st, _ := out.Stat(); st.Size() != length {
			t.Errorf("%d bytes, want %d", st.Size(), length)
		}
		for _, at := range []int64{0, 5 << 20, size / 2, size - 10000, 1 << 30, length - 10000} {
			a, b := make([]byte, 10000), make([]byte, 10000)
			in.ReadAt(a, at)
			out.ReadAt(b, at)
			if !bytes.Equal(a, b) {
				t.Errorf("at %d the copy differs", at)
			}
		}
		found := 0
		if _, err := check.File(ctx, l, "sealed", stores,
			check.Options{Found: func(f check.Finding) { found++; t.Log(f) }}); err != nil || found > 0 {
			t.Errorf("fsck finds %d: %v", found, err)
		}
		l.Close()
		out.Close()
	}
}

func small(t *testing.T, f *os.File) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Blocks*512 > 4<<20 {
		t.Errorf("%s takes %d bytes of the disk: %v", filepath.Base(f.Name()), st.Blocks*512, err)
	}
}

// Zeros of a hole are written where the output cannot have one.
func TestLoneSparseToPipe(t *testing.T) {
	dir := t.TempDir()
	stores := newStore(t)
	in, err := os.Create(filepath.Join(dir, "in"))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	want := append(append([]byte("begin"), make([]byte, 5<<20)...), "end"...)
	if _, err := in.WriteAt([]byte("begin"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := in.WriteAt([]byte("end"), 5+5<<20); err != nil {
		t.Fatal(err)
	}
	sealed, err := os.Create(filepath.Join(dir, "sealed"))
	if err != nil {
		t.Fatal(err)
	}
	defer sealed.Close()
	if err := volume.Encrypt(ctx, sealed, in, stores); err != nil {
		t.Fatal(err)
	}
	l, err := volume.OpenLone(sealed.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if l.Header.State.Flags&blockcrypt.Sparse == 0 {
		t.Error("it has no hole")
	}
	key, err := stores[0].Unwrap(ctx, l.Binding(), l.Header.Recipients[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Unlock(key); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := l.CopyTo(&out, nil); err != nil || !bytes.Equal(out.Bytes(), want) {
		t.Errorf("%d bytes, want %d: %v", out.Len(), len(want), err)
	}
}
