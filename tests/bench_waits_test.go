package tests

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/tests/slowdisk"
)

// BenchmarkLookupsBeside is how long lookups of names that no cache knows take on a disk with
// latency: alone, and beside what keeps the disk or the volume busy in another directory.
func BenchmarkLookupsBeside(b *testing.B) {
	needRoot(b)
	needFUSE(b)
	backing := b.TempDir()
	if err := unix.Mount("tmpfs", backing, "tmpfs", 0, "size=64m"); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unix.Unmount(backing, 0) })
	disk := slowdisk.New(b, backing, cloud)
	m := newVolumeOn(b, b.TempDir(), disk.Dir)
	m.faults = true
	for _, d := range []string{"calm", "busy"} {
		if err := os.Mkdir(m.path(d), 0o755); err != nil {
			b.Fatal(err)
		}
		write(b, m.path(d, "file"), noise(10000))
	}
	m.remount()
	looked := 0
	lookups := func() []time.Duration {
		var took []time.Duration
		for end := time.Now().Add(900 * time.Millisecond); time.Now().Before(end); looked++ {
			begun := time.Now()
			if _, err := os.Stat(m.path("calm", fmt.Sprint("none", looked))); !os.IsNotExist(err) {
				b.Fatal(err)
			}
			took = append(took, time.Since(begun))
		}
		slices.Sort(took)
		return took
	}
	of := func(took []time.Duration, share int) time.Duration { return took[(len(took)-1)*share/100] }

	renames := func(n int) func(stop chan struct{}) {
		return func(stop chan struct{}) {
			var wg sync.WaitGroup
			for t := range n {
				a, z := m.path("busy", fmt.Sprint(t)), m.path("busy", fmt.Sprint(t, "z"))
				write(b, a, nil)
				wg.Go(func() {
					for !isClosed(stop) {
						os.Rename(a, z)
						a, z = z, a
					}
				})
			}
			wg.Wait()
		}
	}
	slow := func(l slowdisk.Latency, f func() error) func(stop chan struct{}) {
		return func(stop chan struct{}) {
			disk.Set(l)
			time.AfterFunc(20*time.Millisecond, func() { disk.Set(cloud) })
			if err := f(); err != nil {
				b.Error(err)
			}
		}
	}
	for b.Loop() {
		log, err := os.Create(m.path("busy", "log"))
		if err != nil {
			b.Fatal(err)
		}
		usual := lookups()
		b.Logf("%-28s  median %v, 95th %v, longest %v", "alone", of(usual, 50), of(usual, 95), of(usual, 100))
		for _, c := range []struct {
			beside string
			run    func(stop chan struct{})
		}{
			{"4 renames at a time", renames(4)},
			{"16 renames at a time", renames(16)},
			{"an fsync of 1 s", slow(slowdisk.Latency{Sync: time.Second}, func() error {
				if _, err := log.WriteAt(noise(5000), 0); err != nil {
					return err
				}
				return log.Sync()
			})},
			{"an open of 10 s", slow(slowdisk.Latency{Open: 10 * time.Second}, func() error {
				_, err := os.ReadFile(m.path("busy", "file"))
				return err
			})},
			{"creates on a full disk", func(stop chan struct{}) {
				fill := filepath.Join(backing, "fill")
				full := false
				for f, _ := os.Create(fill); ; {
					if _, err := f.Write(make([]byte, 1<<16)); err != nil {
						f.Close()
						break
					}
				}
				for i := 0; !isClosed(stop); i++ {
					if os.WriteFile(m.path("busy", fmt.Sprint("full", i)), noise(100), 0o644) != nil {
						full = true
					}
				}
				if !full {
					b.Error("the disk was not full")
				}
				os.Remove(fill)
			}},
		} {
			stop := make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() { c.run(stop) })
			time.Sleep(100 * time.Millisecond) // it has begun
			took := lookups()
			close(stop)
			wg.Wait()
			b.Logf("%-28s  median %v, 95th %v, longest %v: %.2f, %.2f, %.2f of the usual", c.beside,
				of(took, 50), of(took, 95), of(took, 100), ratio(of(took, 50), of(usual, 50)),
				ratio(of(took, 95), of(usual, 95)), ratio(of(took, 100), of(usual, 100)))
		}
		log.Close()
	}
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }
