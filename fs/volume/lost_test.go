//go:build linux && !portable

package volume_test

import (
	"bytes"
	"errors"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// failing is a volume on a disk that can be made full.
func failing(t *testing.T) (w *world, full *atomic.Bool) {
	full = &atomic.Bool{}
	w = newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		if full.Load() && c.Op == "pwrite" {
			return unix.ENOSPC
		}
		return nil
	}))
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
	for _, c := range []struct{ has, cut int }{{200, 200}, {8192, 8192}, {8192, 9000}, {8192, 100},
		{5000, 4064}, {20, 20}} {
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
	for _, part := range [][2]int64{{0, 299}, {300, 306}, {306, 311}, {500, 600}} {
		_, err := h.Write(ctx, late[part[0]:part[1]], part[0])
		w.do("write again", err)
		wantErr(t, "fsync before all is written again", h.Fsync(), unix.ENOSPC)
	}
	_, err := h.Write(ctx, late[700:701], 700)
	w.do("write again", err)
	w.do("close", errors.Join(h.Fsync(), h.Release()))
	w.want("f", late)
}

// The pages at the ends of a lost range are served from memory: the kernel reads them before it
// lets a program write to a part of them, and so the lost write can be made again.
func TestLostEndsCanBeReadAround(t *testing.T) {
	w, full := failing(t)
	old := noise(40000)
	w.write("f", old)
	h := w.opened("f")
	w.do("fsync", h.Fsync())
	late := noise(100000)
	all := append(bytes.Clone(old), late...)
	full.Store(true)
	fails(t, "the delayed write", h.WriteDelayed(ctx, all[36864:], 36864)) // from the page's beginning
	full.Store(false)
	for _, page := range []int64{36864, 139264} {
		b := make([]byte, 4096)
		n, err := h.Read(ctx, b, page)
		if want := all[page:min(page+4096, int64(len(all)))]; err != nil || !bytes.Equal(b[:n], want) {
			t.Errorf("the page at %d: %d bytes, %v", page, n, err)
		}
	}
	b := make([]byte, 10)
	if _, err := h.Read(ctx, b, 39980); err != nil || !bytes.Equal(b, old[39980:39990]) {
		t.Errorf("durable bytes beside lost ones: %v", err)
	}
	if _, err := h.Read(ctx, b, 50000); err == nil {
		t.Error("lost bytes in the middle are shown")
	}
	w.do("the write again", h.WriteDelayed(ctx, all[36864:], 36864))
	w.do("fsync", h.Fsync())
	w.do("close", h.Release())
	w.want("f", all)
}

// What a volume that is suspended has of lost writes is wiped with the keys.
func TestSuspendWipesLostPages(t *testing.T) {
	w, full := failing(t)
	old := noise(40000)
	w.write("f", old)
	h := w.opened("f")
	w.do("fsync", h.Fsync())
	full.Store(true)
	fails(t, "the delayed write", h.WriteDelayed(ctx, append(bytes.Clone(old[36864:]), noise(100000)...), 36864))
	full.Store(false)
	b := make([]byte, 4096)
	_, err := h.Read(ctx, b, 36864)
	w.do("read around", err)
	w.v.Suspend() // it says that something was lost
	w.v.Resume()
	_, err = h.Read(ctx, b, 36864)
	wantErr(t, "read around what was wiped", err, unix.EIO)
	_, err = h.Read(ctx, b, 0)
	w.do("read beside it", err)
	h.Release()
}
