package tests

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkKMS is what a key service at 20 ms a call costs, beside a local key on
// the same machine in the same run: see issue figures in README.md.
func BenchmarkKMS(b *testing.B) {
	const files = 2000
	flat := `i=0; while [ $i -lt 2000 ]; do head -c 4096 /dev/zero >"$M/flat/f$i"; i=$((i+1)); done`
	_ = flat
	tree := func(root string) {
		for i := range files {
			d := filepath.Join(root, fmt.Sprint("t", i%15), fmt.Sprint("s", i%150))
			if err := os.MkdirAll(d, 0o755); err != nil {
				b.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(d, fmt.Sprint("f", i)), noise(2000), 0o644); err != nil {
				b.Fatal(err)
			}
		}
	}
	create := func(root, dir string) {
		d := filepath.Join(root, dir)
		if err := os.Mkdir(d, 0o755); err != nil {
			b.Fatal(err)
		}
		data := noise(4096)
		for i := range files {
			if err := os.WriteFile(filepath.Join(d, fmt.Sprint("f", i)), data, 0o644); err != nil {
				b.Fatal(err)
			}
		}
	}
	type volume interface {
		remount()
		run(string) string
	}
	measure := func(v volume, root string, rest time.Duration) map[string]time.Duration {
		out := map[string]time.Duration{}
		timed := func(what string, f func()) {
			begun := time.Now()
			f()
			out[what] = time.Since(begun)
		}
		v.remount()
		timed("create, cold pool", func() { create(root, "cold") })
		time.Sleep(rest)
		timed("create, filled pool", func() { create(root, "warm") })
		tree(filepath.Join(root, "tree"))
		v.remount()
		timed("cat in order", func() { v.run(`find "$M/warm" -type f -print0 | xargs -0 cat | wc -c`) })
		v.remount()
		timed("grep -r", func() { v.run(`grep -rc xyz "$M/tree" >/dev/null || true`) })
		v.remount()
		timed("ls -lR", func() { v.run(`ls -lR "$M/tree" >/dev/null`) })
		return out
	}
	for b.Loop() {
		local := newVolume(b)
		ref := measure(local, local.dir, 0)
		kms := newKMSVolume(b, "--kms-rps", "1000000")
		kms.srv.SetLatency(20 * time.Millisecond)
		got := measure(kms, kms.dir, 2*time.Second)
		ideal := files * 20 * time.Millisecond / 64
		for what, d := range got {
			b.Logf("%-20s local %7.0f ms, KMS %7.0f ms, ratio %.2f, without the local part %.2f of the ideal %v", what, ms(ref[what]), ms(d), float64(ref[what])/float64(d), float64(d-ref[what])/float64(ideal), ideal)
		}
		b.Logf("%s", kms.kmsfs("stats", kms.dir))
	}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
