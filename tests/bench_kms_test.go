package tests

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/keystore/keystoretest"
)

// BenchmarkKMS is what a key service at 20 ms a call costs beside a local key, in
// one run: six rounds of steps on both volumes in turn, of which the medians count.
func BenchmarkKMS(b *testing.B) {
	const (
		files   = 2000
		latency = 20 * time.Millisecond
		ideal   = files * latency / 64 // as many calls at once
	)
	for b.Loop() {
		local := newVolume(b)
		kms := newKMSVolume(b, "--kms-rps", "1000000")
		kms.srv.SetLatency(latency)
		var refs, gots, bad []map[string]time.Duration
		for i := range 6 {
			if i%2 == 0 { // the first one is the faster, whichever it is
				refs = append(refs, kmsSteps(b, local, files))
			}
			gots = append(gots, kmsSteps(b, kms.mounted, files))
			if i%2 == 1 {
				refs = append(refs, kmsSteps(b, local, files))
			}
			kms.srv.Fail(throttle(0.3))
			bad = append(bad, kmsSteps(b, kms.mounted, files))
			kms.srv.Fail(nil)
		}
		ref, got, throttled := medians(refs), medians(gots), medians(bad)
		for _, what := range []string{"create, cold pool", "create, filled pool"} {
			b.Logf("%-20s local %5.0f ms, KMS %5.0f ms: %.2f of the local rate, %.2f of the ideal %v", what, ms(ref[what]), ms(got[what]), float64(ref[what])/float64(got[what]), float64(got[what])/float64(ideal), ideal)
		}
		for _, what := range []string{"cat in order", "grep -r"} {
			b.Logf("%-20s local %5.0f ms, KMS %5.0f ms: the local time and %.2f of the ideal %v",
				what, ms(ref[what]), ms(got[what]), float64(got[what]-ref[what])/float64(ideal), ideal)
		}

		kms.remount()
		calls := kms.srv.Calls("")
		kms.run(`ls -lR "$M/tree" >/dev/null; find "$M/tree" -newer "$M" >/dev/null; du -s "$M/tree" >/dev/null`)
		b.Logf("%-20s %d calls, of which the pool's first 8", "ls -lR, find, du", kms.srv.Calls("")-calls)
		kms.run(`cd "$M/tree"; git init -q; git add -A; git commit -qm x; git status --short`)
		time.Sleep(time.Second)
		calls = kms.srv.Calls("")
		kms.run(`cd "$M/tree"; git status --short`)
		b.Logf("%-20s %d calls", "git status again", kms.srv.Calls("")-calls)

		for what, d := range throttled {
			b.Logf("30%% throttled: %-20s %5.0f ms, %.2f times as long", what, ms(d),
				float64(d)/float64(got[what]))
		}

		one := kms.path("one")
		write(b, one, noise(1<<20))
		kms.remount()
		free := readOver(one, time.Second)
		kms.srv.Fail(func(string) *keystoretest.Failure { return &keystoretest.Failure{Hang: true} })
		var blocked []*exec.Cmd
		for i := range 4 {
			c := exec.Command("cat", kms.path("warm", fmt.Sprint("f", i*97)))
			if err := c.Start(); err != nil {
				b.Fatal(err)
			}
			blocked = append(blocked, c)
		}
		time.Sleep(200 * time.Millisecond)
		beside := readOver(one, time.Second)
		b.Logf("4 opens blocked in KMS: %d reads of a MiB, %d without: %.2f", beside, free,
			float64(beside)/float64(free))
		for _, c := range blocked {
			c.Process.Kill()
			c.Wait()
		}

		kms.srv.Fail(nil)
		kms.remount()
		kms.srv.Fail(func(string) *keystoretest.Failure { return &keystoretest.Failure{Hang: true} })
		kms.faults = true
		begun := time.Now()
		exec.Command("sh", "-c", `cd "$1"; grep -c x f1???`, "sh", kms.path("warm")).Run()
		b.Logf("outage: grep of 1000 cold files ends after %.1f s", time.Since(begun).Seconds())
		kms.srv.Fail(nil)
		eventually(b, "after the outage", readErr(kms.path("warm", "f1"), nil))
		b.Logf("%s", kms.kmsfs("stats", kms.dir))
	}
}

// kmsSteps creates and reads files in a volume of either kind, and says how long
// each step took.
func kmsSteps(b *testing.B, v *mounted, files int) map[string]time.Duration {
	took := map[string]time.Duration{}
	timed := func(what string, f func()) {
		begun := time.Now()
		f()
		took[what] = time.Since(begun)
	}
	data := noise(4096)
	create := func(path func(i int) string) {
		for i := range files {
			write(b, path(i), data)
		}
	}
	v.run(`rm -rf "$M"/*; mkdir "$M/cold" "$M/warm"; for i in $(seq 0 14); do for j in $(seq 0 9); do mkdir -p "$M/tree/$i/$j"; done; done`)
	v.remount()
	timed("create, cold pool",
		func() { create(func(i int) string { return v.path("cold", fmt.Sprint("f", i)) }) })
	time.Sleep(2 * time.Second) // the pause in which the pool fills
	timed("create, filled pool",
		func() { create(func(i int) string { return v.path("warm", fmt.Sprint("f", i)) }) })
	create(func(i int) string {
		return v.path("tree", fmt.Sprint(i%15), fmt.Sprint(i/15%10),
			fmt.Sprint("f", i))
	})
	v.remount()
	timed("cat in order", func() { v.run(`find "$M/warm" -type f -print0 | xargs -0 cat | wc -c`) })
	v.remount()
	timed("grep -r", func() { v.run(`grep -rc xyz "$M/tree" >/dev/null || true`) })
	return took
}

// medians returns the median of each step.
func medians(rounds []map[string]time.Duration) map[string]time.Duration {
	out := map[string]time.Duration{}
	for what := range rounds[0] {
		var ds []time.Duration
		for _, r := range rounds {
			ds = append(ds, r[what])
		}
		slices.Sort(ds)
		out[what] = ds[len(ds)/2]
	}
	return out
}

// readOver reads a file again and again, past the kernel's cache.
func readOver(path string, d time.Duration) (n int) {
	for end := time.Now().Add(d); time.Now().Before(end); n++ {
		f, err := os.Open(path)
		if err != nil {
			return n
		}
		unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		buf := make([]byte, 1<<20)
		_, err = f.ReadAt(buf, 0)
		f.Close()
		if err != nil {
			return n
		}
	}
	return n
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
