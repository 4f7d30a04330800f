package tests

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/keystore/keystoretest"
)

// mounted is a volume on a local key, mounted by the program.
type mounted struct {
	t       testing.TB
	base    string
	cipher  string
	dir     string // the mountpoint
	env     []string
	faults  bool // ERROR lines in the log are expected
	options []string
}

func needFUSE(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err == nil {
		f.Close()
	}
	keystoretest.Need(t, "/dev/fuse", err == nil)
}

func needRoot(t testing.TB) {
	t.Helper()
	keystoretest.Need(t, "root", os.Geteuid() == 0)
}

func needTool(t testing.TB, names ...string) {
	t.Helper()
	for _, n := range names {
		_, err := exec.LookPath(n)
		keystoretest.Need(t, n+": make test installs it", err == nil)
	}
}

// newVolume makes a volume and mounts it; the test's end unmounts it and looks
// into the log.
func newVolume(t testing.TB, options ...string) *mounted {
	return newVolumeIn(t, t.TempDir(), options...)
}

func newVolumeIn(t testing.TB, base string, options ...string) *mounted {
	t.Helper()
	needFUSE(t)
	m := &mounted{t: t, base: base, cipher: filepath.Join(base, "cipher"),
		dir: filepath.Join(base, "mnt"), options: options}
	m.env = append(os.Environ(), "XDG_STATE_HOME="+filepath.Join(base, "state"),
		"XDG_CONFIG_HOME="+filepath.Join(base, "config"), "XDG_RUNTIME_DIR="+filepath.Join(base, "run"))
	for _, d := range []string{m.cipher, m.dir} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(m.cleanup)
	m.kmsfs("init", m.cipher)
	m.mount()
	return m
}

// kmsfs runs the program, which must succeed, and returns its output.
func (m *mounted) kmsfs(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		m.t.Fatalf("kmsfs %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (m *mounted) try(args ...string) (string, error) {
	c := exec.Command(binary, args...)
	c.Env = m.env
	out, err := c.CombinedOutput()
	return string(out), err
}

func (m *mounted) mount() {
	m.t.Helper()
	m.kmsfs(append(append([]string{"mount"}, m.options...), m.cipher, m.dir)...)
}

func (m *mounted) umount() {
	m.t.Helper()
	m.kmsfs("umount", m.dir)
}

func (m *mounted) remount() {
	m.t.Helper()
	m.umount()
	m.mount()
}

func (m *mounted) path(elem ...string) string {
	return filepath.Join(append([]string{m.dir}, elem...)...)
}

// pid returns the daemon's process.
func (m *mounted) pid() int {
	m.t.Helper()
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, m.dir, unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st); err != nil {
		m.t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(m.base, "state", "kmsfs", "mounts",
		fmt.Sprintf("%d-%d", st.Dev_major, st.Dev_minor)))
	if err != nil {
		m.t.Fatal(err)
	}
	id, _, _ := strings.Cut(string(b), " ")
	pid, err := strconv.Atoi(id)
	if err != nil {
		m.t.Fatal(err)
	}
	return pid
}

func (m *mounted) kill() {
	m.t.Helper()
	daemon, err := unix.PidfdOpen(m.pid(), 0)
	if err == nil {
		defer unix.Close(daemon)
		err = unix.PidfdSendSignal(daemon, unix.SIGKILL, nil, 0)
	}
	if err != nil {
		m.t.Fatal(err)
	}
	// A daemon can be stuck in the kernel: see cmd/kmsfs. Then a command that we begin
	// would be too, since exec closes our files on the mount.
	if os.Geteuid() == 0 {
		unix.Unmount(m.dir, unix.MNT_FORCE)
	}
	// It may answer once more, and has the ciphertext's files, before it is dead.
	eventually(m.t, "the daemon", func() error {
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(daemon), Events: unix.POLLIN}}, 0); n != 1 {
			return fmt.Errorf("it is still there: %v", err)
		}
		return nil
	})
	eventually(m.t, "the mount outlives its daemon", func() error {
		if !isMount(m.dir) {
			return nil
		}
		out, err := m.try("umount", m.dir)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// ciphertexts are the n files of the volume's topmost directory, as stored. An
// encrypted name may begin with any letter: only kmsfs's own have the prefix.
func (m *mounted) ciphertexts(n int) []string {
	m.t.Helper()
	es, err := os.ReadDir(m.cipher)
	var files []string
	for _, e := range es {
		if !strings.HasPrefix(e.Name(), "kmsfs.") {
			files = append(files, filepath.Join(m.cipher, e.Name()))
		}
	}
	if err != nil || len(files) != n {
		m.t.Fatalf("%d files are wanted, these are there: %q, %v", n, files, err)
	}
	return files
}

func (m *mounted) log() string {
	logs, _ := filepath.Glob(filepath.Join(m.base, "state", "kmsfs", "*.log"))
	var out []byte
	for _, l := range logs {
		b, _ := os.ReadFile(l)
		out = append(out, b...)
	}
	return string(out)
}

func (m *mounted) cleanup() {
	if isMount(m.dir) {
		if out, err := m.try("umount", m.dir); err != nil {
			m.t.Errorf("umount: %v\n%s", err, out)
			unix.Unmount(m.dir, unix.MNT_DETACH)
		}
	}
	log := m.log()
	if strings.Contains(log, "level=ERROR") && !m.faults || strings.Contains(log, "DATA RACE") ||
		strings.Contains(log, "panic") {
		m.t.Errorf("the log has faults:\n%s", log)
	}
}

func isMount(dir string) bool {
	b, _ := os.ReadFile("/proc/self/mounts")
	return bytes.Contains(b, []byte(" "+dir+" fuse.kmsfs "))
}

// run runs a shell script with $M as the mountpoint, which must succeed.
func (m *mounted) run(script string) string {
	m.t.Helper()
	c := exec.Command("bash", "-euo", "pipefail", "-c", script)
	c.Env = append(m.env, "M="+m.dir, "B="+m.base, "C="+m.cipher, "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.org", "GIT_COMMITTER_NAME=a",
		"GIT_COMMITTER_EMAIL=a@example.org")
	out, err := c.CombinedOutput()
	if err != nil {
		m.t.Fatalf("%v\n%s\n%s", err, script, out)
	}
	return string(out)
}

func write(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

func want(t testing.TB, path string, b []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, b) {
		t.Fatalf("%s: %d bytes, want %d: %v", path, len(got), len(b), err)
	}
}

// kmsVolume is a volume under a key of a KMS server of the test's own.
type kmsVolume struct {
	*mounted
	srv *keystoretest.Server
	arn string
}

func newKMSVolume(t testing.TB, options ...string) *kmsVolume {
	t.Helper()
	needFUSE(t)
	base := t.TempDir()
	srv := keystoretest.Start(t)
	v := &kmsVolume{&mounted{t: t, base: base, cipher: filepath.Join(base, "cipher"),
		dir: filepath.Join(base, "mnt"), options: options}, srv, srv.AddKey("alias/k")}
	v.env = append(os.Environ(), "XDG_STATE_HOME="+filepath.Join(base, "state"),
		"XDG_CONFIG_HOME="+filepath.Join(base, "config"), "XDG_RUNTIME_DIR="+filepath.Join(base, "run"))
	for k, x := range keystoretest.Env(srv.URL) {
		v.env = append(v.env, k+"="+x)
	}
	for _, d := range []string{v.cipher, v.dir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(v.cleanup)
	v.kmsfs("init", "--key", "alias/k", v.cipher)
	v.mount()
	return v
}

// eventually wants f to succeed within some seconds.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	var err error
	for until := time.Now().Add(20 * time.Second); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

func readErr(path string, want error) func() error {
	return func() error {
		_, err := os.ReadFile(path)
		if want == nil && err == nil || want != nil && errors.Is(err, want) {
			return nil
		}
		return fmt.Errorf("%s: %v, want %v", filepath.Base(path), err, want)
	}
}

func statErr(path string) error { _, err := os.Stat(path); return err }

func listErr(path string) error { _, err := os.ReadDir(path); return err }

func noise(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func rss(t testing.TB, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	kib, err := strconv.Atoi(string(regexp.MustCompile(`VmRSS:\s+(\d+)`).FindSubmatch(b)[1]))
	if err != nil {
		t.Fatal(err)
	}
	return kib
}

// loopDisk makes a filesystem in a file and mounts it, for what a test does to
// the ciphertext's own filesystem. It needs root.
func loopDisk(t *testing.T, base, size string, mkfs ...string) (dir string) {
	t.Helper()
	needRoot(t)
	needTool(t, mkfs[0])
	img := filepath.Join(base, "disk")
	dir = filepath.Join(base, "disk.mnt")
	for _, c := range [][]string{{"truncate", "-s", size, img}, append(mkfs, img), {"mkdir", dir},
		{"mount", "-o", "loop", img, dir}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", c, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	return dir
}

// newVolumeOn is newVolumeIn with the ciphertext in another directory.
func newVolumeOn(t testing.TB, base, cipherIn string, options ...string) *mounted {
	t.Helper()
	if err := os.Mkdir(filepath.Join(cipherIn, "cipher"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(cipherIn, "cipher"), filepath.Join(base, "cipher")); err != nil {
		t.Fatal(err)
	}
	return newVolumeIn(t, base, options...)
}

// openBase is a directory that other users may look into.
func openBase(t testing.TB) string {
	t.Helper()
	base, err := os.MkdirTemp("", "kmsfs-posix-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	if err := os.Chmod(base, 0o755); err != nil {
		t.Fatal(err)
	}
	return base
}

func open(t testing.TB, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// fill takes all the space that there is.
func fill(t testing.TB, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for n := 1 << 20; n >= 512; {
		if _, err := f.Write(make([]byte, n)); err != nil {
			n /= 2
		}
	}
	if err := f.Sync(); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
}

// runs runs a shell script, which may fail.
func (m *mounted) runs(script string) error {
	c := exec.Command("bash", "-c", script)
	c.Env = append(m.env, "M="+m.dir, "B="+m.base, "C="+m.cipher)
	return c.Run()
}

// throttle lets a part of the calls fail as throttled.
func throttle(part float64) func(string) *keystoretest.Failure {
	var mu sync.Mutex
	r := mrand.New(mrand.NewPCG(3, 4))
	return func(string) *keystoretest.Failure {
		mu.Lock()
		defer mu.Unlock()
		if r.Float64() < part {
			return &keystoretest.Failure{Status: 400, Code: "ThrottlingException"}
		}
		return nil
	}
}

func errno(err error) unix.Errno {
	if e, ok := errors.AsType[unix.Errno](err); ok {
		return e
	}
	if err != nil {
		return unix.EIO
	}
	return 0
}

// on calls f with an open file.
func on(path string, flags int, f func(*os.File) ([]byte, error)) ([]byte, error) {
	fd, err := os.OpenFile(path, flags, 0o644)
	if err != nil {
		return nil, err
	}
	out, err := f(fd)
	return out, errors.Join(err, fd.Close())
}

func grep(text, pattern string) string {
	return strings.Join(regexp.MustCompile(`(?m)^.*(`+pattern+`).*$`).FindAllString(text, -1), "\n")
}

func glob(t testing.TB, pattern string) []string {
	t.Helper()
	out, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// overwrite writes a file in its place, or makes it.
func overwrite(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	return errors.Join(err, f.Truncate(int64(len(b))), f.Close())
}

func dropCaches(t testing.TB, m *mounted) {
	t.Helper()
	if os.Geteuid() == 0 {
		m.run(`echo 3 >/proc/sys/vm/drop_caches`)
	}
}

func ino(st os.FileInfo) uint64 { return st.Sys().(*syscall.Stat_t).Ino }

// Long runs of other people's programs: part of make soak.
func needSoak(t *testing.T) {
	t.Helper()
	if os.Getenv("KMSFS_SOAK") == "" {
		t.Skip("KMSFS_SOAK is not set; make soak sets it")
	}
}

// shmDir returns a new directory on a filesystem in memory.
func shmDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "kmsfs-tests-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
