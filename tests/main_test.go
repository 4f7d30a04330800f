package tests

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/keystore/keystoretest"
	"kmsfs/tests/slowdisk"
)

// binary is the program under test, built once.
var binary string

func TestMain(m *testing.M) {
	slowdisk.RunIfChild()
	dir, err := os.MkdirTemp("", "kmsfs-tests-")
	if err != nil {
		panic(err)
	}
	binary = filepath.Join(dir, "kmsfs")
	args := []string{"build", "-o", binary}
	if raceEnabled {
		args = append(args, "-race")
	}
	if out, err := exec.Command("go", append(args, "../cmd/kmsfs")...).CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building kmsfs: %v\n%s", err, out)
		os.RemoveAll(dir)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

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
