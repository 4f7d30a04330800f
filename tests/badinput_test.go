package tests

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/keystore/keystoretest"
)

// sample returns n bytes, the same each time.
func sample(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*i/7 + n)
	}
	return b
}

// oneClearLine fails the test unless a command has failed with one line of error that has this text.
func oneClearLine(t *testing.T, what, out string, err error, says string) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if err == nil || !strings.HasPrefix(lines[0], "kmsfs: error: ") || !strings.Contains(lines[0], says) ||
		len(lines) > 2 || len(lines) == 2 && !strings.HasPrefix(lines[1], "kmsfs: hint: ") {
		t.Errorf("%s: %v\n%s", what, err, out)
	}
}

// An address that another program has makes the mount fail, before anything was done.
func TestMetricsAddressInUse(t *testing.T) {
	m := newVolume(t)
	m.umount()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	out, err := m.try("mount", "--metrics-addr", l.Addr().String(), m.cipher, m.dir)
	oneClearLine(t, "an address in use", out, err, "address already in use")
	if isMount(m.dir) {
		t.Error("it is mounted")
	}
	if _, err := os.Lstat(filepath.Join(m.cipher, "kmsfs.mounted")); !os.IsNotExist(err) {
		t.Errorf("the marker is there: %v", err)
	}
	l.Close()
	m.kmsfs("mount", "--metrics-addr", l.Addr().String(), m.cipher, m.dir)
}

// A mount whose log has no room goes on, and writes again when there is some.
func TestFullLogDirectory(t *testing.T) {
	needRoot(t)
	m := newVolume(t)
	m.faults = true
	write(t, m.path("f"), sample(10000))
	m.umount()
	state := t.TempDir()
	if err := unix.Mount("tmpfs", state, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if isMount(m.dir) {
			m.umount()
		}
		eventually(t, "the daemon's end", func() error { return unix.Unmount(state, 0) })
	})
	m.env = append(m.env, "XDG_STATE_HOME="+state)
	keys, err := filepath.Glob(filepath.Join(m.base, "config", "kmsfs", "*.key"))
	if err != nil || len(keys) != 1 {
		t.Fatal(keys, err)
	}
	m.kmsfs("mount", "--key", "local:"+keys[0], m.cipher, m.dir)
	fill := filepath.Join(state, "fill")
	if err := os.WriteFile(fill, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	for i := range 50 { // each has a line in the log
		write(t, filepath.Join(m.cipher, fmt.Sprintf("bad%060d", i)), nil)
	}
	if _, err := os.ReadDir(m.dir); err != nil {
		t.Error(err)
	}
	write(t, m.path("g"), sample(20000))
	want(t, m.path("f"), sample(10000))
	if out, err := m.try("mount", m.cipher, t.TempDir()); err == nil {
		t.Errorf("a second mount: %s", out)
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(m.cipher, "afterwards"), nil)
	os.ReadDir(m.dir)
	logs, _ := filepath.Glob(filepath.Join(state, "kmsfs", "*.log"))
	if len(logs) != 1 {
		t.Fatal(logs)
	}
	if b, err := os.ReadFile(logs[0]); err != nil || !strings.Contains(string(b), "afterwards") {
		t.Errorf("the log does not go on: %v\n%s", err, b)
	}
	m.umount()
	m.kmsfs("mount", m.cipher, m.dir)
	want(t, m.path("g"), sample(20000))
}

// A service that is stopped while KMS is away ends in time, and nothing is lost.
func TestStopDuringOutage(t *testing.T) {
	v := newKMSVolume(t)
	write(t, v.path("old"), sample(30000))
	v.remount()
	for i := range 20 { // keys for these were made ahead
		write(t, v.path(fmt.Sprint("new", i)), sample(5000+i))
	}
	f, err := os.OpenFile(v.path("old"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("changed"), 100); err != nil {
		t.Fatal(err)
	}
	v.srv.Fail(func(string) *keystoretest.Failure { return &keystoretest.Failure{Hang: true} })
	if _, err := f.WriteAt([]byte("again"), 20000); err != nil {
		t.Fatal(err)
	}
	pid := v.pid()
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	eventually(t, "SIGTERM during an outage", func() error {
		if err := syscall.Kill(pid, 0); err == nil || isMount(v.dir) {
			return errors.New("the daemon is still there")
		}
		return nil
	})
	t.Logf("it took %v", time.Since(begun))
	if _, err := os.Lstat(filepath.Join(v.cipher, "kmsfs.mounted")); !os.IsNotExist(err) {
		t.Errorf("it did not end well: %v", err)
	}
	v.srv.Fail(nil)
	v.mount()
	old := sample(30000)
	copy(old[100:], "changed")
	copy(old[20000:], "again")
	want(t, v.path("old"), old)
	for i := range 20 {
		want(t, v.path(fmt.Sprint("new", i)), sample(5000+i))
	}
}

// With --bg a mount that finds no key service returns, says what it waits for, and mounts when there is one;
// or ends at SIGTERM. A refusal is no reason to wait.
func TestMountInBackground(t *testing.T) {
	v := newKMSVolume(t)
	write(t, v.path("f"), sample(10000))
	v.umount()
	v.srv.Fail(func(string) *keystoretest.Failure { return &keystoretest.Failure{Status: 503} })
	c := exec.Command(binary, "mount", "--bg", "--foreground", "--read-only", v.cipher, t.TempDir())
	c.Env = v.env
	var shown bytes.Buffer
	c.Stderr = &shown
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	out := v.kmsfs("mount", "-o", "bg", v.cipher, v.dir)
	if !strings.Contains(out, "The key service cannot be reached; "+v.dir+" is mounted when it can, by process ") || isMount(v.dir) {
		t.Errorf("%s", out)
	}
	if log := v.log(); !strings.Contains(log, `msg="waiting for the key service"`) {
		t.Errorf("the log does not say what it waits for:\n%s", log)
	}
	time.Sleep(500 * time.Millisecond) // the one in the foreground waits, too
	c.Process.Signal(syscall.SIGTERM)
	if err := c.Wait(); err == nil || c.ProcessState.ExitCode() != 6 || !strings.Contains(shown.String(), "kmsfs: error: ended before it was mounted: ") {
		t.Errorf("SIGTERM while it waits: %v\n%s", err, shown.String())
	}
	v.srv.Fail(nil)
	eventually(t, "the mount", func() error {
		if !isMount(v.dir) {
			return errors.New(v.log())
		}
		return nil
	})
	want(t, v.path("f"), sample(10000))
	v.umount()

	v.srv.Deny("Decrypt")
	out, err := v.try("mount", "--bg", v.cipher, v.dir)
	oneClearLine(t, "a refusal", out, err, "AccessDenied")
	v.srv.Deny()
}

// A tree that changes while it is imported: each file is whole, at some moment, and what went is told or
// left out. A second call brings what is there then.
func TestImportOfChangingTree(t *testing.T) {
	m := newVolume(t)
	m.umount()
	src := t.TempDir()
	for i := range 300 {
		write(t, filepath.Join(src, fmt.Sprint("dir", i%10, "-", i)), sample(20000))
	}
	long := strings.Repeat("x", 255)
	write(t, filepath.Join(src, long), sample(100))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; !isClosed(stop); i = (i + 1) % 300 {
			name := filepath.Join(src, fmt.Sprint("dir", i%10, "-", i))
			switch i % 3 {
			case 0:
				os.Remove(name)
			case 1:
				os.Truncate(name, int64(i))
			case 2:
				os.Rename(name, name+"moved")
				os.Rename(name+"moved", name)
			}
		}
	})
	out, err := m.try("import", src, m.cipher)
	close(stop)
	wg.Wait()
	if strings.Contains(out, "panic") || strings.Count(out, "kmsfs: error:") > 1 {
		t.Errorf("%v: %s", err, out)
	}
	m.kmsfs("import", src, m.cipher)
	m.kmsfs("fsck", m.cipher)
	m.mount()
	entries, err := os.ReadDir(src)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(src, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		want(t, m.path(e.Name()), b)
	}
	want(t, m.path(long), sample(100))
}
