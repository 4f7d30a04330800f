package volume_test

import (
	"bytes"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// failing is a volume on a disk that can be made full.
func failing(t *testing.T) (w *world, full *atomic.Bool) {
	full = &atomic.Bool{}
	w = newWorld(t, volume.Options{Hook: func(c volume.Call) error {
		if full.Load() && c.Op == "pwrite" {
			return unix.ENOSPC
		}
		return nil
	}})
	w.quiet = true
	return w, full
}

func fails(t *testing.T, what string, err error) {
	t.Helper()
	if err == nil {
		t.Errorf("%s does not fail", what)
	}
}

// A delayed write that fails loses what the file lacks, and nothing that it has: the kernel
// writes whole pages. Cutting the file ends it, wherever the cut lies.
func TestCutHealsLostWrites(t *testing.T) {
	for _, c := range []struct{ has, cut int }{{200, 200}, {8192, 8192}, {8192, 9000}, {8192, 100}, {5000, 4064}, {20, 20}} {
		w, full := failing(t)
		old := bytes.Repeat([]byte("k"), c.has)
		w.write("f", old)
		h := w.opened("f")
		w.do("fsync", h.Fsync())
		full.Store(true)
		page := c.has / 4096 * 4096
		late := append(bytes.Clone(old[page:]), noise(100000)...)
		wantErr(t, "the delayed write", h.WriteDelayed(ctx, late, int64(page)), unix.ENOSPC)
		for range 2 {
			wantErr(t, "fsync", h.Fsync(), unix.ENOSPC)
		}
		wantErr(t, "close", h.Flush(), unix.ENOSPC)
		got := make([]byte, c.has)
		if n, err := h.Read(ctx, got, 0); err != nil || !bytes.Equal(got[:n], old) {
			t.Errorf("%d bytes that were on the disk: %v", c.has, err)
		}
		full.Store(false)
		_, err := w.must("f").SetAttr(ctx, size(int64(c.cut)))
		w.do("cut", err)
		w.do("fsync after the cut", h.Fsync())
		_, err = h.Write(ctx, []byte("J"), 0)
		w.do("write", err)
		w.do("close", h.Release())
		want := append(old, make([]byte, max(0, c.cut-c.has))...)[:c.cut]
		want[0] = 'J'
		w.want("f", want)
	}
}

// An error that no fsync or close has told yet is told once after a cut; growing the file
// heals nothing.
func TestUntoldLossIsTold(t *testing.T) {
	w, full := failing(t)
	w.write("f", []byte("kept"))
	h := w.opened("f")
	full.Store(true)
	fails(t, "the delayed write", h.WriteDelayed(ctx, noise(10000), 4))
	full.Store(false)
	_, err := w.must("f").SetAttr(ctx, size(20000))
	w.do("grow", err)
	if _, err := h.Read(ctx, make([]byte, 100), 0); err == nil {
		t.Error("a file that grew shows bytes that were lost")
	}
	_, err = w.must("f").SetAttr(ctx, size(9))
	w.do("cut", err)
	wantErr(t, "the first fsync", h.Fsync(), unix.ENOSPC)
	w.do("the second", h.Fsync())
	w.do("close", h.Release())
	w.want("f", []byte("kept\x00\x00\x00\x00\x00"))
}

// A few bytes in the middle that happen to be equal are lost with those around them.
func TestLostBytes(t *testing.T) {
	w, full := failing(t)
	old := bytes.Repeat([]byte("0123456789"), 100)
	w.write("f", old)
	h := w.opened("f")
	late := bytes.Clone(old)
	late[300], late[310], late[700] = 'x', 'x', 'x'
	full.Store(true)
	fails(t, "the delayed write", h.WriteDelayed(ctx, late, 0))
	full.Store(false)
	for at, ok := range map[int64]bool{0: true, 299: true, 300: false, 305: false, 310: false, 311: true, 699: true, 700: false, 701: true} {
		if _, err := h.Read(ctx, make([]byte, 1), at); (err == nil) != ok {
			t.Errorf("byte %d: %v", at, err)
		}
	}
	_, err := h.Write(ctx, late[300:311], 300)
	w.do("write again", err)
	_, err = h.Write(ctx, late[700:701], 700)
	w.do("write again", err)
	w.do("close", h.Release())
	w.want("f", late)
}
