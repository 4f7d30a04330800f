package tests

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var amount = regexp.MustCompile(`\d+ blocks, \d+ KiB`)

// What builds for macOS and Windows (make lint checks that it does) is tried on Linux: it reads a volume
// without one of Linux's own calls, as the program for Linux does.
func TestPortable(t *testing.T) {
	needFUSE(t)
	m := newVolume(t)
	for _, d := range []string{"dir", "dir/deep", "empty"} {
		if err := os.Mkdir(m.path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	long := strings.Repeat("long", 62) + ".txt" // in a symlink
	files := map[string][]byte{"small": []byte("small"), "none": nil, "dir/big": noise(3 << 20), "dir/deep/" + long: noise(5000),
		"altered": noise(50000), "unfinished": noise(20000)}
	for name, b := range files {
		write(t, m.path(name), b)
	}
	sparse, err := os.Create(m.path("sparse"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sparse.WriteAt([]byte("end"), 8<<20); err != nil {
		t.Fatal(err)
	}
	sparse.Close()
	files["sparse"] = append(make([]byte, 8<<20), "end"...)
	if err := os.Symlink("dir/big", m.path("link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(m.path("small"), 0o400); err != nil {
		t.Fatal(err)
	}
	m.remount() // so that all are settled
	old := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	if err := os.Chtimes(m.path("dir"), old, old); err != nil {
		t.Fatal(err)
	}
	// A copy of now has a file that is being written.
	f, err := os.OpenFile(m.path("unfinished"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	more := noise(30000)
	if _, err := f.WriteAt(more, 20000); err != nil {
		t.Fatal(err)
	}
	if err := unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER); err != nil {
		t.Fatal(err)
	}
	files["unfinished"] = append(files["unfinished"], more...)
	backup := filepath.Join(m.base, "backup")
	if out, err := exec.Command("cp", "-a", m.cipher, backup).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}

	program := filepath.Join(t.TempDir(), "kmsfs")
	if out, err := exec.Command("go", "build", "-tags", "portable", "-o", program, "kmsfs/cmd/kmsfs").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	run := func(program string, args ...string) (out string, code int) {
		c := exec.Command(program, args...)
		c.Env = m.env
		b, err := c.CombinedOutput()
		if err != nil && c.ProcessState == nil {
			t.Fatal(err)
		}
		// Findings come as they are found, and how much of a sparse file was read is not known everywhere.
		lines := strings.Split(amount.ReplaceAllString(string(b), "blocks"), "\n")
		if args[0] == "fsck" {
			slices.Sort(lines)
		}
		return strings.Join(lines, "\n"), c.ProcessState.ExitCode()
	}
	same := func(args ...string) string {
		t.Helper()
		linux, code := run(binary, args...)
		out, pcode := run(program, args...)
		if out != linux || code != pcode {
			t.Errorf("%q: exit %d\n%s\non Linux: exit %d\n%s", args, pcode, out, code, linux)
		}
		return out
	}
	out := same("ls", "-lR", backup)
	for _, w := range []string{" 3145728 ", "2001-02-03", "link -> dir/big", "dir/deep/" + long} {
		if !strings.Contains(out, w) {
			t.Errorf("%q is not in the list:\n%s", w, out)
		}
	}
	same("ls", "--json", backup, "dir")
	same("find", "--larger", "1M", "--cipher", backup)
	same("info", backup)
	same("fsck", backup) // names the one that is being written
	cipher := func(p string) string {
		out, code := run(binary, "ls", "--cipher", backup, p)
		_, c, ok := strings.Cut(strings.TrimSpace(out), "\t")
		if code != 0 || !ok {
			t.Fatalf("%s: exit %d, %s", p, code, out)
		}
		return filepath.Join(backup, filepath.FromSlash(c))
	}
	same("info", cipher("dir/big"))
	same("cat", cipher("dir/deep/"+long))
	same("fsck", cipher("sparse"))
	same("cat", cipher("unfinished"))

	exported := filepath.Join(m.base, "exported")
	check := func(but ...string) {
		t.Helper()
		for name, b := range files {
			if slices.Contains(but, name) {
				if _, err := os.Lstat(filepath.Join(exported, name)); !os.IsNotExist(err) {
					t.Errorf("%s is there: %v", name, err)
				}
				continue
			}
			want(t, filepath.Join(exported, name), b)
		}
	}
	if out, code := run(program, "export", backup, exported); code != 8 || !strings.Contains(out, "7 files exported") ||
		!strings.Contains(out, "unfinished: it was being written") {
		t.Errorf("exit %d, %s", code, out)
	}
	check()
	if target, err := os.Readlink(filepath.Join(exported, "link")); target != "dir/big" {
		t.Errorf("the symlink leads to %q, %v", target, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(exported, "small"), &st); err != nil || st.Mode&0o777 != 0o400 {
		t.Errorf("a mode: %o, %v", st.Mode, err)
	}
	if err := unix.Stat(filepath.Join(exported, "dir"), &st); err != nil || !time.Unix(st.Mtim.Unix()).Equal(old) {
		t.Errorf("the time of a directory: %v, %v", time.Unix(st.Mtim.Unix()), err)
	}
	if left, _ := filepath.Glob(filepath.Join(exported, ".kmsfs-*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if out, code := run(program, "export", backup, exported); code != 8 || !strings.Contains(out, "1 files exported") ||
		!strings.Contains(out, "6 were there already") {
		t.Errorf("again: exit %d, %s", code, out)
	}

	// A block that was altered, a name that was lost, and symlinks in the way.
	b, err := os.ReadFile(cipher("altered"))
	if err != nil {
		t.Fatal(err)
	}
	b[30000] ^= 1
	write(t, cipher("altered"), b)
	names, err := filepath.Glob(filepath.Join(filepath.Dir(cipher("dir/deep/"+long)), "kmsfs.name.*"))
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	if err := os.Remove(names[0]); err != nil {
		t.Fatal(err)
	}
	same("fsck", backup)
	same("ls", "-R", backup)
	if err := os.RemoveAll(exported); err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	if err := os.MkdirAll(exported, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(exported, "empty")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(outside, "x"), filepath.Join(exported, "none")); err != nil {
		t.Fatal(err)
	}
	out, code := run(program, "export", backup, exported)
	if code != 1 || !strings.Contains(out, "altered: ") || !strings.Contains(out, "empty: another entry is in the way") ||
		!strings.Contains(out, "3 failed") {
		t.Errorf("damage: exit %d, %s", code, out)
	}
	check("altered", "dir/deep/"+long)
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("a symlink was followed: %v, %v", left, err)
	}

	// Of a path, the directories above have their modes and times, too; nothing that is there is followed or
	// taken for the program's own.
	part := filepath.Join(m.base, "part")
	if err := os.MkdirAll(filepath.Join(part, "real"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(part, ".kmsfs-case"), []byte("mine"))
	if out, code := run(program, "export", backup, part, "dir/big", "dir/big", "dir/"); code != 1 || !strings.Contains(out, "1 files exported") {
		t.Errorf("a path: exit %d, %s", code, out)
	}
	want(t, filepath.Join(part, "dir/big"), files["dir/big"])
	want(t, filepath.Join(part, ".kmsfs-case"), []byte("mine"))
	if err := unix.Stat(filepath.Join(part, "dir"), &st); err != nil || st.Mode&0o777 != 0o755 || !time.Unix(st.Mtim.Unix()).Equal(old) {
		t.Errorf("the directory above: %o, %v, %v", st.Mode, time.Unix(st.Mtim.Unix()), err)
	}
	if err := errors.Join(os.RemoveAll(filepath.Join(part, "dir")), os.Symlink("real", filepath.Join(part, "dir"))); err != nil {
		t.Fatal(err)
	}
	if out, code := run(program, "export", backup, part, "dir/big"); code != 1 || !strings.Contains(out, "dir: another entry is in the way") {
		t.Errorf("a symlink above a path: exit %d, %s", code, out)
	}
	if err := os.Symlink(backup, filepath.Join(m.base, "elsewhere")); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{filepath.Join(backup, "new"), filepath.Join(m.base, "elsewhere", "new")} {
		for _, from := range []string{backup, filepath.Join(m.base, "elsewhere")} {
			if out := same("export", from, to); !strings.Contains(out, "lies in the ciphertext directory") {
				t.Errorf("%s to %s: %s", from, to, out)
			}
		}
	}
	if out, code := run(program, "fsck", "--repair", backup); code != 2 || !strings.Contains(out, "on Linux only") {
		t.Errorf("a repair: exit %d, %s", code, out)
	}
	// A FIFO is not waited for.
	if err := errors.Join(os.Remove(filepath.Join(backup, "kmsfs.json")), unix.Mkfifo(filepath.Join(backup, "kmsfs.json"), 0o600)); err != nil {
		t.Fatal(err)
	}
	same("ls", backup)
	same("cat", filepath.Join(backup, "kmsfs.json"))

	// Files by themselves, through pipes.
	if out, code := run("bash", "-c", `set -e; cd "$1"; echo text >p; "$0" encrypt --key local:k p c; "$2" decrypt --key local:k c -
		"$2" encrypt --key local:k - - <p | "$0" decrypt --key local:k - q; cat q`, program, t.TempDir(), binary); code != 0 ||
		strings.Count(out, "text\n") != 2 {
		t.Errorf("encrypt: exit %d, %s", code, out)
	}
}
