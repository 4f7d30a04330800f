//go:build linux && !portable

package volume_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
	"kmsfs/keystore/keystoretest"
	"kmsfs/tests/cutdisk"
)

// BenchmarkPageRule is what rule S of FORMAT.md costs, by which no page is
// rewritten that may be on its way to the disk: overwrites on ext4 with it,
// without it, and without it on a disk of stable pages, where the kernel makes the
// writer wait. The three take turns. A page is written to the disk when the kernel
// likes or, as in a database, at an fsync after so many writes.
func BenchmarkPageRule(b *testing.B) {
	keystoretest.Need(b, "root, for a loop device", os.Geteuid() == 0)
	const writes, rounds, pages = 8000, 5, 16 << 10
	where := map[string]func() int64{
		"random":   func() int64 { return rand.Int64N(pages) },
		"repeated": func() int64 { return rand.Int64N(16) },
	}
	type how struct {
		name         string
		rule, stable bool
	}
	hows := []how{{"with the rule", true, false}, {"without", false, false}, {"stable pages", false, true}}
	for b.Loop() {
		for _, what := range []string{"random", "repeated"} {
			for _, every := range []int{0, 64} {
				took, waits := map[string]time.Duration{}, map[string]int64{}
				for range rounds {
					for _, h := range hows {
						d, n := overwrites(b, h.rule, h.stable, writes, every, pages, where[what])
						took[h.name] += d
						waits[h.name] += n
					}
				}
				for _, h := range hows {
					b.Logf("%-9s fsync every %2d: %-14s %7.1f µs a write, %.2f of without; %d waits in %d writes", what, every, h.name,
						float64(took[h.name].Microseconds())/(rounds*writes),
						float64(took[h.name])/float64(took["without"]), waits[h.name], rounds*writes)
				}
			}
		}
	}
}

// overwrites writes pages of a file on a fresh ext4, and says how long that took.
func overwrites(b *testing.B, rule, stable bool, writes, every int, pages int64,
	next func() int64) (time.Duration, int64) {
	d := cutdisk.New(b, "ext4")
	if stable {
		d.Stable()
	}
	d.Mount()
	defer d.Umount()
	var waits atomic.Int64
	w := newWorldIn(b, d.Mkdir("v"), volume.Options{KernelTimes: true}.Hooked(func(c volume.Call) error {
		if c.Op != "sync_file_range" {
			return nil
		}
		waits.Add(1)
		if !rule {
			return volume.ErrSkip
		}
		return nil
	}), true)
	defer w.close()
	w.write("f", make([]byte, pages*4096))
	h, err := w.must("f").Open(ctx, true)
	if err != nil {
		b.Fatal(err)
	}
	defer h.Release()
	if _, err := h.Write(ctx, []byte("x"), 0); err != nil {
		b.Fatal(err)
	}
	if err := h.Fsync(); err != nil { // all is confirmed: the rule holds for confirmed pages
		b.Fatal(err)
	}
	stop := make(chan struct{})
	defer close(stop)
	if every == 0 { // the kernel's own writeback, at a pace that the test can see
		go func() {
			f, err := os.Open(filepath.Join(w.dir, "f"))
			if err != nil {
				return
			}
			defer f.Close()
			for {
				select {
				case <-stop:
					return
				case <-time.After(50 * time.Millisecond):
					unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
				}
			}
		}()
	}
	buf := noise(4096)
	before := waits.Load()
	begun := time.Now()
	for i := range writes {
		if _, err := h.Write(ctx, buf, next()*4096); err != nil {
			b.Fatal(fmt.Errorf("write %d: %w", i, err))
		}
		if every > 0 && i%every == every-1 {
			if err := h.Fsync(); err != nil {
				b.Fatal(err)
			}
		}
	}
	return time.Since(begun), waits.Load() - before
}
