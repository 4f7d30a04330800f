package tests

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// BenchmarkRewrap is what it costs to give many files another KMS key at 5 ms a call, beside what
// the calls alone take, and an inventory of them beside find. KMSFS_REWRAP_FILES says how many.
func BenchmarkRewrap(b *testing.B) {
	files := 10_000
	if n, err := strconv.Atoi(cmp.Or(os.Getenv("KMSFS_REWRAP_FILES"), "0")); err == nil && n > 0 {
		files = n
	}
	const (
		latency = 5 * time.Millisecond
		atOnce  = 64
	)
	for b.Loop() {
		v := newKMSVolume(b, "--kms-rps", "1000000")
		next := v.srv.AddKey("alias/next")
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				dir := v.path(fmt.Sprint("d", i))
				if err := os.Mkdir(dir, 0o755); err != nil {
					b.Error(err)
				}
				for n := range files / 8 {
					write(b, filepath.Join(dir, fmt.Sprint("f", n)),
						[]byte("a small file, such as most are"))
				}
			})
		}
		wg.Wait()
		v.umount()
		timed := func(what string, args ...string) time.Duration {
			calls, begun := v.srv.Calls(""), time.Now()
			v.kmsfs(args...)
			d, n := time.Since(begun), v.srv.Calls("")-calls
			ideal := time.Duration(n) * latency / atOnce
			b.Logf("%-28s %7d files %6d calls %8.2f s, %.2f of calls × latency / %d", what, files,
				n, d.Seconds(), float64(d)/float64(max(ideal, 1)), atOnce)
			return d
		}
		copied := filepath.Join(b.TempDir(), "copy")
		run := func(name string, args ...string) string {
			out, err := exec.Command(name, args...).CombinedOutput()
			if err != nil {
				b.Fatalf("%s: %v\n%s", name, err, out)
			}
			return string(out)
		}
		run("rsync", "-a", v.cipher+"/", copied)
		v.srv.SetLatency(latency)
		v.kmsfs("recipients", "add", v.cipher, "alias/next")
		timed("ReEncrypt", "rewrap", "--kms-rps", "1000000", "--from", v.arn, "--to", next, v.cipher)
		out := run("rsync", "-a", "--inplace", "--no-whole-file", "--block-size=4096",
			"--ignore-times", "--stats", v.cipher+"/", copied)
		if m := regexp.MustCompile(`Literal data: ([0-9,]+) bytes`).FindStringSubmatch(out); m != nil {
			n, _ := strconv.Atoi(strings.ReplaceAll(m[1], ",", ""))
			b.Logf("%-28s %d bytes of literal data for each file", "rsync afterwards", n/files)
		}
		v.kmsfs("recipients", "remove", v.cipher, v.arn)
		v.kmsfs("recipients", "add", v.cipher,
			"age1y3wkh86dw442llxpcktunuym3354ph2u48ujrlr49ezup4fzyuysa2n39j")
		timed("an age recipient is added", "rewrap", "--kms-rps", "1000000", "--missing", v.cipher)
		inventory := timed("inventory", "inventory", v.cipher)
		begun := time.Now()
		run("find", v.cipher, "-size", "+0", "-printf", "%s")
		find := time.Since(begun)
		b.Logf("%-28s %.0f files a second, find -size %.0f: %.2f", "inventory beside find",
			float64(files)/inventory.Seconds(), float64(files)/find.Seconds(),
			float64(find)/float64(inventory))
		v.srv.SetLatency(0)
	}
}
