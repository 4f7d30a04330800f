package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/keystore/keystoretest"
)

// A key that is switched off makes open files unreadable too, and what the
// kernel knows of them; data that was written before is there when it is on again.
func TestRevocation(t *testing.T) {
	v := newKMSVolume(t, "--key-max-age", "2s")
	v.faults = true
	b := noise(100000)
	write(t, v.path("f"), b)
	write(t, v.path("mapped"), b)
	f := open(t, v.path("f"), os.O_RDWR)
	if _, err := f.WriteAt([]byte("written before"), 100); err != nil { // in the kernel's cache
		t.Fatal(err)
	}
	copy(b[100:], "written before")
	got := make([]byte, 200)
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	m := open(t, v.path("mapped"), os.O_RDWR)
	mem, err := unix.Mmap(int(m.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	copy(mem[10:], "through a map")
	v.srv.SetState(v.arn, "Disabled")
	begun := time.Now()
	eventually(t, "reads of open handles", func() error {
		if _, err := f.ReadAt(got, 0); !errors.Is(err, syscall.EKEYREVOKED) {
			return fmt.Errorf("%v", err)
		}
		return nil
	})
	if d := time.Since(begun); d > 10*time.Second {
		t.Errorf("it took %v", d)
	}
	for _, name := range []string{"f", "mapped"} {
		eventually(t, "opening "+name, readErr(v.path(name), syscall.EKEYREVOKED))
	}
	if err := os.WriteFile(v.path("new"), b, 0o644); !errors.Is(err, syscall.EKEYREVOKED) {
		t.Error("a new file:", err)
	}
	if _, err := os.Stat(v.path("f")); err != nil { // names and sizes need no data key
		t.Error(err)
	}
	v.srv.SetState(v.arn, "Enabled")
	eventually(t, "when it is enabled again", readErr(v.path("f"), nil))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, b[:200]) {
		t.Error("the open handle:", err)
	}
	if _, err := f.WriteAt([]byte("and after"), 300); err != nil {
		t.Error(err)
	}
	copy(b[300:], "and after")
	if err := errors.Join(f.Sync(), f.Close(), unix.Munmap(mem), m.Close()); err != nil {
		t.Error(err)
	}
	want(t, v.path("f"), b)
	v.remount()
	want(t, v.path("f"), b)
	if got, err := os.ReadFile(v.path("mapped")); err != nil ||
		!bytes.Contains(got, []byte("through a map")) {
		t.Error("what was mapped:", err)
	}
}

// kmsfs lock: everything answers at once, nothing of the keys is in memory.
func TestLock(t *testing.T) {
	needRoot(t)
	v := newKMSVolume(t)
	v.srv.KeepKeys()
	b := noise(50000)
	for i := range 40 {
		write(t, v.path(fmt.Sprint(i)), b)
	}
	f := open(t, v.path("0"), os.O_RDWR)
	if _, err := f.WriteAt([]byte("held back"), 7); err != nil {
		t.Fatal(err)
	}
	copy(b[7:], "held back")
	keys := v.srv.Keys()
	if len(keys) < 40 {
		t.Fatalf("%d keys were made", len(keys))
	}
	if n := inMemory(t, v.pid(), keys); n == 0 {
		t.Error("the keys cannot be found even while they are in use: this test sees nothing")
	}
	v.kmsfs("lock", v.dir)
	for name, err := range map[string]error{
		"stat": statErr(v.path("1")), "open": readErr(v.path("1"), nil)(), "list": listErr(v.dir),
		"create": os.WriteFile(v.path("new"), nil, 0o644), "mkdir": os.Mkdir(v.path("d"), 0o755),
	} {
		if err == nil || name != "open" && !errors.Is(err, syscall.EKEYEXPIRED) {
			t.Errorf("%s while it is locked: %v", name, err)
		}
	}
	if _, err := f.ReadAt(make([]byte, 10), 0); !errors.Is(err, syscall.EKEYEXPIRED) {
		t.Error("an open handle:", err)
	}
	if n := inMemory(t, v.pid(), keys); n != 0 {
		t.Errorf("%d data keys are still in the daemon's memory", n)
	}
	if out := v.kmsfs("stats", v.dir); !strings.Contains(out, "is locked") {
		t.Error(out)
	}
	v.kmsfs("unlock", v.dir)
	want(t, v.path("0"), b)
	if _, err := f.WriteAt([]byte("more"), 0); err != nil {
		t.Error(err)
	}
	copy(b, "more")
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	v.remount()
	want(t, v.path("0"), b)
	// And in no file beside the volume.
	filepath.WalkDir(v.base, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && !strings.HasPrefix(p, v.dir) {
			c, _ := os.ReadFile(p)
			for _, k := range keys {
				if bytes.Contains(c, k) {
					t.Errorf("%s holds a data key", p)
				}
			}
		}
		return err
	})
}

// inMemory counts which of the keys stand in a process's memory.
func inMemory(t testing.TB, pid int, keys [][]byte) (n int) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	found := map[int]bool{}
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var perms string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &perms); err != nil ||
			perms[0] != 'r' || strings.Contains(line, "[v") {
			continue
		}
		for at := from; at < to; at += 16 << 20 {
			b := make([]byte, min(16<<20+64, to-at))
			k, _ := mem.ReadAt(b, at)
			for i, key := range keys {
				if !found[i] && bytes.Contains(b[:k], key) {
					found[i] = true
				}
			}
		}
	}
	return len(found)
}

// Without KMS: known keys go on, the pool too, unknown ones fail
// after one deadline and then at once; it recovers by itself.
func TestOutage(t *testing.T) {
	v := newKMSVolume(t)
	v.faults = true
	for i := range 1000 {
		write(t, v.path(fmt.Sprint(i)), []byte("content"))
	}
	v.remount()
	want(t, v.path("0"), []byte("content"))
	write(t, v.path("new"), []byte("x")) // from here on keys are made ahead
	made := v.srv.Calls("GenerateDataKey")
	eventually(t, "keys made ahead", func() error {
		if n := v.srv.Calls("GenerateDataKey"); n < made+8 {
			return fmt.Errorf("%d", n-made)
		}
		return nil
	})
	v.srv.Fail(func(string) *keystoretest.Failure {
		return &keystoretest.Failure{Status: 503, Body: "<html>away</html>"}
	})
	begun := time.Now()
	out, err := exec.Command("grep", "-rl", "content", v.dir).CombinedOutput()
	d := time.Since(begun)
	if err == nil || !bytes.Contains(out, []byte("Connection timed out")) || d > 20*time.Second {
		t.Errorf("grep took %v, %v: %.200s", d, err, out)
	}
	want(t, v.path("0"), []byte("content"))
	begun = time.Now()
	if err := readErr(v.path("999"), syscall.ETIMEDOUT)(); err != nil ||
		time.Since(begun) > 5*time.Second { // a deadline is 15 s
		t.Errorf("the next open, after %v: %v", time.Since(begun), err)
	}
	if err := os.WriteFile(v.path("from the pool"), []byte("x"), 0o644); err != nil {
		t.Error("creating from the pool:", err)
	}
	v.srv.Fail(nil)
	eventually(t, "when it is back", readErr(v.path("999"), nil))
	v.run(`test "$(grep -rl content "$M" | wc -l)" = 1000`)
}

// The time of a write stays, though the volume is locked before the file is closed.
func TestLockKeepsTimes(t *testing.T) {
	v := newKMSVolume(t)
	write(t, v.path("f"), noise(100))
	long := time.Unix(1e9, 0)
	if err := os.Chtimes(v.path("f"), long, long); err != nil {
		t.Fatal(err)
	}
	f := open(t, v.path("f"), os.O_RDWR)
	if _, err := f.WriteAt([]byte("new"), 0); err != nil {
		t.Fatal(err)
	}
	v.kmsfs("lock", v.dir)
	if err := f.Close(); err != nil {
		t.Error("close:", err)
	}
	v.kmsfs("unlock", v.dir)
	v.remount()
	if st, err := os.Stat(v.path("f")); err != nil || st.ModTime().Before(time.Unix(15e8, 0)) {
		t.Errorf("the file is of %v: %v", st.ModTime(), err)
	}
}

// What reading costs: one call a file at most, none for looking, and scans do
// not wait for each file in turn.
func TestPrefetch(t *testing.T) {
	v := newKMSVolume(t, "--kms-rps", "100000")
	const files, dirs = 600, 40
	for i := range files {
		d := v.path(fmt.Sprint("d", i%dirs))
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(d, fmt.Sprint("f", i)), []byte("content\n"))
	}
	v.srv.SetLatency(20 * time.Millisecond)
	for what, script := range map[string]string{
		"grep -r":      `test "$(grep -rl content "$M" | wc -l)" = 600`,
		"tar":          `tar -cf - -C "$M" . | wc -c >/dev/null`,
		"cp -a":        `cp -a "$M" "$B/copy"; rm -rf "$B/copy"`,
		"find -exec":   `find "$M" -type f -exec cat {} + | wc -l | grep -qx 600`,
		"cat, by name": `for d in "$M"/*; do cat "$d"/* >/dev/null; done`,
	} {
		v.remount()
		before := v.srv.Calls("Decrypt")
		v.srv.MostAtOnce()
		v.run(script)
		calls, most := v.srv.Calls("Decrypt")-before, v.srv.MostAtOnce()
		if calls > files+70 {
			t.Errorf("%s: %d calls for %d files", what, calls, files)
		}
		// Without a scan the files are opened one after another: 1 call at a time.
		if most < 16 {
			t.Errorf("%s: at most %d calls at once", what, most)
		}
		t.Logf("%s: %d calls, %d at once", what, calls, most)
		before = v.srv.Calls("")
		v.run(script)
		if n := v.srv.Calls("") - before; n > 2 {
			t.Errorf("%s a second time: %d calls", what, n)
		}
	}
	v.remount()
	before := v.srv.Calls("")
	v.run(`ls -lR "$M" >/dev/null; find "$M" -size +1 >/dev/null; du -s "$M" >/dev/null`)
	if n := v.srv.Calls("") - before; n > 2 { // a proof at most
		t.Errorf("looking costs %d calls", n)
	}
	// Random opens: hardly a wrong guess.
	before = v.srv.Calls("Decrypt")
	r := rand.New(rand.NewPCG(1, 2))
	opened := map[int]bool{}
	for range 150 {
		i := r.IntN(files)
		opened[i] = true
		want(t, v.path(fmt.Sprint("d", i%dirs), fmt.Sprint("f", i)), []byte("content\n"))
	}
	if n := v.srv.Calls("Decrypt") - before; n > 2*len(opened) {
		t.Errorf("%d calls for %d files opened at random", n, len(opened))
	}
	agents := strings.Join(v.srv.Agents(), "\n")
	for _, purpose := range []string{"open", "prefetch", "pool"} {
		if !strings.Contains(agents, "app/kmsfs-"+purpose) {
			t.Errorf("no call says that it is for %s", purpose)
		}
	}
	v.options = append(v.options, "--audit", "strict")
	v.remount()
	before = v.srv.Calls("Decrypt")
	v.run(`cat "$(find "$M/d1" -type f | head -1)" "$(find "$M/d1" -type f | head -2 | tail -1)" "$(find "$M/d1" -type f | head -3 | tail -1)" >/dev/null`)
	if n := v.srv.Calls("Decrypt") - before; n > 4 {
		t.Errorf("with --audit strict, 3 files cost %d calls", n)
	}
}

// Many at once want one file: one call.
func TestManyOpenOne(t *testing.T) {
	v := newKMSVolume(t)
	write(t, v.path("f"), []byte("x"))
	v.remount()
	v.srv.SetLatency(50 * time.Millisecond)
	before := v.srv.Calls("Decrypt")
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() { exec.Command("cat", v.path("f")).Run() })
	}
	wg.Wait()
	if n := v.srv.Calls("Decrypt") - before; n != 1 {
		t.Errorf("%d calls", n)
	}
}

// A third of the calls throttled: no error reaches anybody.
func TestThrottled(t *testing.T) {
	v := newKMSVolume(t)
	v.srv.Fail(throttle(0.3))
	for i := range 400 {
		write(t, v.path(fmt.Sprint(i)), []byte("content"))
	}
	v.remount()
	v.run(`test "$(grep -rl content "$M" | wc -l)" = 400`)
	var s struct {
		Calls []struct {
			Verdict string
			Count   int
		}
	}
	if err := json.Unmarshal([]byte(v.kmsfs("stats", "--json", v.dir)), &s); err != nil {
		t.Fatal(err)
	}
	n := map[string]int{}
	for _, c := range s.Calls {
		n[c.Verdict] += c.Count
	}
	if n["outage"] < 40 || n["ok"] < 400 {
		t.Errorf("stats counts %v", n)
	}
}

// --kms-rps holds for a mount: a burst of twice as many, then so many a second, and
// nobody sees more of it than that it takes longer.
func TestRateLimit(t *testing.T) {
	v := newKMSVolume(t)
	for i := range 100 {
		write(t, v.path(fmt.Sprint(i)), []byte("content"))
	}
	v.options = append(v.options, "--kms-rps", "20")
	v.remount()
	before, begun := v.srv.Calls(""), time.Now()
	v.run(`cat "$M"/* | wc -c | grep -qx 700`)
	calls, took := v.srv.Calls("")-before, time.Since(begun)
	if most := 40 + 20*took.Seconds() + 1; float64(calls) > most || calls < 100 {
		t.Errorf("%d calls in %v", calls, took)
	}
}

// The key server is restarted in the middle of the work: calls under way are
// tried again, and no error reaches anybody.
func TestServerRestarts(t *testing.T) {
	v := newKMSVolume(t)
	const files = 300
	for i := range files {
		write(t, v.path(fmt.Sprint(i)), []byte("content"))
	}
	v.remount()
	v.srv.SetLatency(20 * time.Millisecond)
	before := v.srv.Calls("Decrypt")
	read := make(chan error)
	go func() {
		for i := range files {
			if b, err := os.ReadFile(v.path(fmt.Sprint(i))); err != nil || string(b) != "content" {
				read <- fmt.Errorf("file %d: %q, %v", i, b, err)
				return
			}
			if err := os.WriteFile(v.path(fmt.Sprint("new", i)), []byte("x"), 0o644); err != nil {
				read <- err
				return
			}
		}
		read <- nil
	}()
	eventually(t, "the first calls", func() error {
		if v.srv.Calls("Decrypt")-before < 20 {
			return errors.New("too few")
		}
		return nil
	})
	v.srv.Restart(t, time.Second)
	if err := <-read; err != nil {
		t.Error(err)
	}
	if n := v.srv.Calls("Decrypt") - before; n < files {
		t.Errorf("%d calls: the restart came too late to be noticed", n)
	}
}

// Credentials that expire while mounted, and are renewed.
func TestCredentialsRenewed(t *testing.T) {
	v := newKMSVolume(t, "--audit", "strict")
	v.faults = true
	for i := range 3 {
		write(t, v.path(fmt.Sprint(i)), []byte("content"))
	}
	v.umount()
	creds := filepath.Join(v.base, "credentials")
	put := func(id string) {
		write(t, creds,
			fmt.Appendf(nil, "[default]\naws_access_key_id=%s\naws_secret_access_key=secret\n", id))
	}
	put("AKIDTEST")
	v.env = append(v.env, "AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY=",
		"AWS_SHARED_CREDENTIALS_FILE="+creds)
	v.mount()
	want(t, v.path("0"), []byte("content"))
	// Old ones are refused, and new ones lie there: one look, by itself.
	v.srv.Refuse("AKIDTEST", "ExpiredTokenException")
	put("AKIDNEW")
	want(t, v.path("1"), []byte("content"))
	// Refused, and none there: an error; then kmsfs reload, or SIGHUP.
	v.srv.Refuse("AKIDNEW", "ExpiredTokenException")
	if err := readErr(v.path("2"), syscall.EKEYEXPIRED)(); err != nil {
		t.Error(err)
	}
	put("AKIDTHIRD")
	v.kmsfs("reload", v.dir)
	eventually(t, "after reload", readErr(v.path("2"), nil))
}

// With --key-lease file a file that its policy forbids becomes unreadable while
// it is open, and others stay.
func TestFileLease(t *testing.T) {
	v := newKMSVolume(t, "--key-lease", "file", "--key-max-age", "2s")
	v.faults = true
	b := noise(20000)
	write(t, v.path("a"), b)
	v.umount()
	id := regexp.MustCompile(`"kmsfs:file": "([0-9a-f]{32})"`).FindStringSubmatch(v.kmsfs("info",
		"--json", v.ciphertexts(1)[0]))
	if id == nil {
		t.Fatal("info names no file ID")
	}
	v.mount()
	write(t, v.path("b"), b)
	fa, fb := open(t, v.path("a"), os.O_RDONLY), open(t, v.path("b"), os.O_RDONLY)
	got := make([]byte, 10)
	v.srv.DenyFile(id[1])
	eventually(t, "the forbidden file", func() error {
		if _, err := fa.ReadAt(got, 0); !errors.Is(err, syscall.EKEYREJECTED) {
			return fmt.Errorf("%v", err)
		}
		return nil
	})
	if _, err := fb.ReadAt(got, 0); err != nil {
		t.Error("the other:", err)
	}
	v.srv.DenyFile("")
	eventually(t, "allowed again", func() error { _, err := fa.ReadAt(got, 0); return err })
}
