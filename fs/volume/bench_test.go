//go:build linux && !portable

package volume_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"kmsfs/fs/volume"
)

// On a tmpfs where there is one, so that it is the volume that is timed.
func benchWorld(b *testing.B) *world {
	dir, err := os.MkdirTemp("/dev/shm", "kmsfs-bench-")
	if err != nil {
		dir = b.TempDir()
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	return newWorldIn(b, dir, volume.Options{KernelTimes: true}, false)
}

func BenchmarkSequentialWrite(b *testing.B) {
	w := benchWorld(b)
	h, err := w.create("f")
	if err != nil {
		b.Fatal(err)
	}
	defer h.Release()
	data := noise(1 << 20)
	b.SetBytes(1 << 20)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, err := h.Write(ctx, data, int64(i%256)<<20); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRandomRead4K(b *testing.B) {
	w := benchWorld(b)
	w.write("f", noise(64<<20))
	h, err := w.must("f").Open(ctx, false)
	if err != nil {
		b.Fatal(err)
	}
	defer h.Release()
	buf := make([]byte, 4096)
	b.SetBytes(4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.Read(ctx, buf, rand.Int64N(16<<10)*4096); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRandomWrite4K(b *testing.B) {
	w := benchWorld(b)
	w.write("f", noise(64<<20))
	h, err := w.must("f").Open(ctx, true)
	if err != nil {
		b.Fatal(err)
	}
	defer h.Release()
	buf := noise(4096)
	b.SetBytes(4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.Write(ctx, buf, rand.Int64N(16<<10)*4096); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCreate4K(b *testing.B) {
	w := benchWorld(b)
	data := noise(4096)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		h, err := w.create(fmt.Sprint("f", i))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := h.Write(ctx, data, 0); err != nil {
			b.Fatal(err)
		}
		if err := h.Release(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpenRead4K(b *testing.B) {
	w := benchWorld(b)
	w.write("f", noise(4096))
	n := w.must("f")
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		h, err := n.Open(ctx, false)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := h.Read(ctx, buf, 0); err != nil {
			b.Fatal(err)
		}
		if err := h.Release(); err != nil {
			b.Fatal(err)
		}
	}
}
