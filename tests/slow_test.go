package tests

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/tests/slowdisk"
)

// cloud is the latency of a cloud volume or of NFS.
var cloud = slowdisk.Latency{Read: 2 * time.Millisecond, Write: 2 * time.Millisecond,
	Sync: 5 * time.Millisecond, Meta: time.Millisecond}

// newSlowVolume is newVolume on a slow disk over a filesystem in memory.
func newSlowVolume(t testing.TB, l slowdisk.Latency) (*mounted, *slowdisk.Disk) {
	needRoot(t)
	needFUSE(t)
	d := slowdisk.New(t, shmDir(t), l)
	return newVolumeOn(t, t.TempDir(), d.Dir), d
}

// While the disk is busy for seconds with one request, every other one is answered.
func TestNothingWaitsMounted(t *testing.T) {
	const stall = 4 * time.Second
	m, disk := newSlowVolume(t, cloud)
	for _, d := range []string{"d", "e"} {
		if err := os.Mkdir(m.path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, m.path("d", "file"), noise(10000))
	write(t, m.path("e", "file"), noise(10000))
	m.remount()
	log, err := os.Create(m.path("d", "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	other := 0
	// What a program does elsewhere, and never was done before, so that no cache answers.
	elsewhere := func(what string) {
		t.Helper()
		for end := time.Now().Add(stall / 4); time.Now().Before(end); {
			other++
			begun := time.Now()
			if _, err := os.Stat(m.path("e", fmt.Sprint("none", other))); !os.IsNotExist(err) {
				t.Fatal(err)
			}
			f := m.path("e", fmt.Sprint("new", other))
			write(t, f, noise(100))
			if err := os.Rename(f, f+"x"); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(f + "x"); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(begun); took > stall/2 {
				t.Errorf("%s keeps others waiting: %v", what, took)
			}
		}
	}
	for _, c := range []struct {
		what string
		slow slowdisk.Latency
		f    func() error
	}{
		{"an fsync", slowdisk.Latency{Sync: stall}, func() error {
			if _, err := log.WriteAt(noise(5000), 0); err != nil {
				return err
			}
			return log.Sync()
		}},
		{"an open", slowdisk.Latency{Open: stall}, func() error {
			_, err := os.ReadFile(m.path("d", "file"))
			return err
		}},
		{"a rename", slowdisk.Latency{Meta: stall},
			func() error { return os.Rename(m.path("d", "file"), m.path("d", "file2")) }},
		{"a read", slowdisk.Latency{Read: stall}, func() error {
			_, err := log.ReadAt(make([]byte, 100), 0)
			return err
		}},
	} {
		var wg sync.WaitGroup
		if c.what == "a read" { // of what the kernel has forgotten
			if err := unix.Fadvise(int(log.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
				t.Fatal(err)
			}
		}
		disk.Set(c.slow)
		begun := time.Now()
		wg.Go(func() {
			if err := c.f(); err != nil {
				t.Errorf("%s: %v", c.what, err)
			}
		})
		time.Sleep(stall / 20) // it has begun
		disk.Set(cloud)
		elsewhere(c.what)
		wg.Wait()
		if took := time.Since(begun); took < stall*9/10 {
			t.Errorf("%s took %v only: nothing was tested", c.what, took)
		}
	}
}

// slowRate calls step in a number of threads for two seconds and returns calls a second.
func slowRate(b *testing.B, threads int, step func(thread, i int) error) float64 {
	var n atomic.Int64
	var wg sync.WaitGroup
	begun := time.Now()
	for t := range threads {
		wg.Go(func() {
			for i := 0; time.Since(begun) < 2*time.Second; i++ {
				if err := step(t, i); err != nil {
					b.Error(err)
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(n.Load()) / time.Since(begun).Seconds()
}

// BenchmarkSlowDisk is what many threads get from a disk with latency, beside peers, in one
// run: operations a second, and of the best peer's.
func BenchmarkSlowDisk(b *testing.B) {
	needRoot(b)
	for b.Loop() {
		var names []string
		rates := map[string]map[string]float64{}
		var order []string
		for _, s := range slowSystems(b) {
			names = append(names, s.name)
			for _, threads := range []int{1, 4, 16, 64} {
				slowWorkloads(b, s.dir, threads, func(what string, rate float64) {
					row := fmt.Sprintf("%-28s %3d threads", what, threads)
					if rates[row] == nil {
						rates[row] = map[string]float64{}
						order = append(order, row)
					}
					rates[row][s.name] = rate
				})
			}
			s.stop()
		}
		for _, row := range order {
			line, best := row, 0.0
			for _, n := range names {
				line += fmt.Sprintf("  %s %6.0f", n, rates[row][n])
				if n != "raw" && n != "kmsfs" {
					best = max(best, rates[row][n])
				}
			}
			if best > 0 {
				line += fmt.Sprintf("  %.2f of the best peer", rates[row]["kmsfs"]/best)
			}
			b.Log(line)
		}
	}
}

func slowWorkloads(b *testing.B, dir string, threads int, report func(what string, rate float64)) {
	const small, pages = 1500, 64 << 20 / 4096
	big := filepath.Join(dir, "big")
	if _, err := os.Stat(big); err != nil {
		write(b, big, noise(pages*4096))
		os.Mkdir(filepath.Join(dir, "small"), 0o755)
		for i := range small {
			write(b, filepath.Join(dir, "small", fmt.Sprint(i)), noise(3000))
		}
		time.Sleep(5 * time.Second) // files settle
	}
	in := filepath.Join(dir, fmt.Sprint("threads", threads))
	for t := range threads {
		if err := os.MkdirAll(filepath.Join(in, fmt.Sprint("d", t)), 0o755); err != nil {
			b.Fatal(err)
		}
	}
	files := func(name func(thread int) string, flags int) (out []*os.File) {
		for t := range threads {
			f, err := os.OpenFile(name(t), flags, 0o644)
			if err != nil {
				b.Fatal(err)
			}
			out = append(out, f)
		}
		return out
	}
	closeAll := func(fs []*os.File) {
		for _, f := range fs {
			f.Close()
		}
	}

	forgetAll(b)
	fs := files(func(int) string { return big }, os.O_RDONLY)
	for _, f := range fs {
		unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM)
	}
	bufs := make([][4096]byte, threads)
	report("random read of 4 KiB", slowRate(b, threads, func(t, i int) error {
		// Each thread has pages of its own, and none is read twice.
		_, err := fs[t].ReadAt(bufs[t][:], int64((i*threads+t)*7919%pages)*4096)
		return err
	}))
	closeAll(fs)

	forgetAll(b)
	report("read small files", slowRate(b, threads, func(t, i int) error {
		_, err := os.ReadFile(filepath.Join(dir, "small", fmt.Sprint((t*97+i*31)%small)))
		return err
	}))
	report("create 3 KB", slowRate(b, threads, func(t, i int) error {
		return os.WriteFile(filepath.Join(in, fmt.Sprintf("%d-%d", t, i)), bufs[t][:3000], 0o644)
	}))
	fs = files(func(t int) string { return filepath.Join(in, fmt.Sprint("log", t)) }, os.O_RDWR|os.O_CREATE)
	report("append and fsync", slowRate(b, threads, func(t, i int) error {
		if _, err := fs[t].WriteAt(bufs[t][:512], int64(i)*512); err != nil {
			return err
		}
		return fs[t].Sync()
	}))
	closeAll(fs)
	closeAll(files(func(t int) string { return filepath.Join(in, fmt.Sprint("d", t), "a") },
		os.O_RDWR|os.O_CREATE))
	rename := func(t, i int) error {
		d := filepath.Join(in, fmt.Sprint("d", t))
		return os.Rename(filepath.Join(d, "ab"[i%2:][:1]), filepath.Join(d, "ba"[i%2:][:1]))
	}
	var waits []time.Duration
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			begun := time.Now()
			os.Stat(filepath.Join(dir, "small", fmt.Sprint("none", threads, "-", i)))
			waits = append(waits, time.Since(begun))
		}
	})
	report("rename", slowRate(b, threads, rename))
	close(stop)
	wg.Wait()
	slices.Sort(waits)
	report("lookup beside it, 95th", 1/waits[len(waits)*95/100].Seconds())
}

// forgetAll makes the kernel forget what it has in its caches.
func forgetAll(b *testing.B) {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		b.Fatal(err)
	}
}
