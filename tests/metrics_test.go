package tests

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// get returns the status and the body of a page.
func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// The metrics count requests and faults, /healthz says whether the volume can be
// used, and the alert rules and the dashboard ask for metrics that there are.
func TestMetrics(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	v := newKMSVolume(t, "--metrics-addr", addr, "--key-max-age", "1s")
	v.faults = true
	text := func() string {
		t.Helper()
		code, body := get(t, "http://"+addr+"/metrics")
		if code != http.StatusOK {
			t.Fatalf("%d: %s", code, body)
		}
		return body
	}
	value := func(body, metric string) float64 {
		t.Helper()
		m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(metric) +
			` ([0-9.e+-]+)$`).FindStringSubmatch(body)
		if m == nil {
			return 0
		}
		x, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	write(t, v.path("f"), noise(100_000))
	write(t, v.path("g"), noise(50_000))
	v.remount()
	for range 2 {
		if b, err := os.ReadFile(v.path("f")); err != nil || len(b) != 100_000 {
			t.Fatal(len(b), err)
		}
	}
	write(t, v.path("h"), noise(10_000))
	v.run(`sync "$M/h"`)
	if _, err := os.Stat(v.path("missing")); err == nil {
		t.Fatal("a file that is not there")
	}
	body := text()
	for metric, least := range map[string]float64{
		`kmsfs_healthy`:                                       1,
		`kmsfs_read_bytes_total`:                              100_000,
		`kmsfs_written_bytes_total`:                           10_000,
		`kmsfs_request_duration_seconds_count{op="read"}`:     1,
		`kmsfs_request_duration_seconds_count{op="fsync"}`:    1,
		`kmsfs_key_lookups_total{answer="asked"}`:             1,
		`kmsfs_recipient_usable{uri="aws-kms:` + v.arn + `"}`: 1,
		`kmsfs_key_call_duration_seconds_count`:               2,
		`go_goroutines`:                                       1,
		`process_resident_memory_bytes`:                       1,
	} {
		if got := value(body, metric); got < least {
			t.Errorf("%s is %v, at least %v", metric, got, least)
		}
	}
	for _, none := range []string{`kmsfs_locked`, `kmsfs_requests_in_flight`} {
		if got := value(body, none); got != 0 {
			t.Errorf("%s is %v", none, got)
		}
	}
	if out := v.kmsfs("stats", "--prometheus", v.dir); value(out, "kmsfs_healthy") != 1 {
		t.Errorf("by the command: %.300s", out)
	}
	if code, body := get(t, "http://"+addr+"/healthz"); code != http.StatusOK || body != "ok\n" {
		t.Errorf("%d %q", code, body)
	}
	if code, _ := get(t, "http://"+addr+"/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("profiles over TCP: %d", code)
	}

	// A damaged block is a fault, and EIO for the program.
	v.umount()
	damage(t, v.cipher, 50_000)
	v.mount()
	if _, err := os.ReadFile(v.path("g")); err == nil {
		t.Error("a damaged file is read")
	}
	body = text()
	if value(body, `kmsfs_request_errors_total{errno="EIO",op="read"}`) == 0 ||
		value(body, `kmsfs_faults_total{kind="damage-block"}`) == 0 || value(body, "kmsfs_healthy") != 1 {
		t.Errorf("a damaged block: %s", grep(body, "EIO|faults|healthy"))
	}
	known := regexp.MustCompile(`(?m)^([a-z_]+)[{ ]`)
	names := map[string]bool{"up": true}
	for _, m := range known.FindAllStringSubmatch(body, -1) {
		names[m[1]] = true
	}
	for _, file := range []string{"alerts.yml", "dashboard.json"} {
		b, err := os.ReadFile("../docs/deploy/" + file)
		if err != nil {
			t.Fatal(err)
		}
		asked := regexp.MustCompile(`\bkmsfs_[a-z_]+\b`).FindAllString(string(b), -1)
		if len(asked) < 8 {
			t.Errorf("%s asks for %d metrics", file, len(asked))
		}
		for _, name := range asked {
			if !names[name] {
				t.Errorf("%s asks for %s, which is not there", file, name)
			}
		}
	}

	// The key is switched off: the volume is not well until it is on again.
	v.srv.SetState(v.arn, "Disabled")
	eventually(t, "not well", func() error {
		if code, body := get(t, "http://"+addr+"/healthz"); code != http.StatusServiceUnavailable ||
			!strings.Contains(body, "disabled") {
			return fmt.Errorf("%d %q", code, body)
		}
		return nil
	})
	body = text()
	if value(body, "kmsfs_healthy") != 0 || value(body,
		`kmsfs_recipient_usable{uri="aws-kms:`+v.arn+`"}`) != 0 {
		t.Errorf("%s", grep(body, "healthy|usable"))
	}
	v.srv.SetState(v.arn, "Enabled")
	eventually(t, "well again", func() error {
		if code, body := get(t, "http://"+addr+"/healthz"); code != http.StatusOK {
			return fmt.Errorf("%d %q", code, body)
		}
		return nil
	})
	// Locked on purpose is no illness.
	v.kmsfs("lock", v.dir)
	body = text()
	if value(body, "kmsfs_locked") != 1 || value(body, "kmsfs_healthy") != 1 {
		t.Errorf("locked: %s", grep(body, "healthy|locked"))
	}
	v.kmsfs("unlock", v.dir)

	v.umount()
	if out, err := v.try("mount", "--metrics-addr", "0.0.0.0:9", v.cipher, v.dir); err == nil ||
		!strings.Contains(out, "only an address of loopback") {
		t.Errorf("for everybody: %v %s", err, out)
	}
}

// damage changes a bit in the middle of the ciphertext file that holds about this many bytes.
func damage(t *testing.T, cipher string, size int64) {
	t.Helper()
	done := false
	err := filepath.WalkDir(cipher, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		st, err := d.Info()
		if err != nil || st.Size() < size || st.Size() > size+size/20+2000 {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		b[len(b)/2] ^= 1
		done = true
		return os.WriteFile(path, b, 0o600)
	})
	if err != nil || !done {
		t.Fatal("no file was damaged:", err)
	}
}

// A mount that nobody uses is unmounted; not while something of it is open, or asked for.
func TestIdle(t *testing.T) {
	v := newVolume(t, "--idle", "700ms")
	mounted := func() bool {
		b, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(b), " "+v.dir+" ")
	}
	f, err := os.Create(v.path("f"))
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(1500 * time.Millisecond)
	if !mounted() {
		t.Error("unmounted while a file is open")
	}
	if _, err := f.WriteString("content"); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	for n := range 30 { // each is asked of the daemon
		if os.WriteFile(v.path(fmt.Sprint("g", n)), nil, 0o644) != nil || !mounted() {
			t.Fatal("unmounted while it is used")
		}
		time.Sleep(50 * time.Millisecond)
	}
	eventually(t, "unmounted", func() error {
		if mounted() {
			return errors.New("it is mounted")
		}
		return nil
	})
	v.mount()
	if b, err := os.ReadFile(v.path("f")); err != nil || string(b) != "content" {
		t.Errorf("%q, %v", b, err)
	}
}

// systemd hears when the mount can be used, and when it ends.
func TestNotify(t *testing.T) {
	v := newVolume(t)
	v.umount()
	path := filepath.Join(v.base, "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	hear := func() string {
		t.Helper()
		l.SetReadDeadline(time.Now().Add(20 * time.Second))
		b := make([]byte, 100)
		n, err := l.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	c := exec.Command(binary, "mount", "--foreground", v.cipher, v.dir)
	c.Env = append(slices.Clone(v.env), "NOTIFY_SOCKET="+path, "WATCHDOG_USEC=200000")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if got := hear(); got != "READY=1" {
		t.Errorf("%q", got)
	}
	write(t, v.path("f"), []byte("it can be used"))
	for range 3 {
		if got := hear(); got != "WATCHDOG=1" {
			t.Errorf("%q", got)
		}
	}
	// A daemon that answers no requests says nothing.
	if err := c.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	l.SetReadDeadline(time.Now().Add(400 * time.Millisecond))
	for heard := 0; ; heard++ {
		if _, err := l.Read(make([]byte, 100)); err != nil {
			break
		}
		if heard > 2 {
			t.Fatal("it goes on while it is stopped")
		}
	}
	if err := errors.Join(c.Process.Signal(unix.SIGCONT), c.Process.Signal(unix.SIGTERM)); err != nil {
		t.Fatal(err)
	}
	got := hear()
	for got == "WATCHDOG=1" {
		got = hear()
	}
	if got != "STOPPING=1" {
		t.Errorf("%q", got)
	}
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
}
