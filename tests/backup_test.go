package tests

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// backupTools are the tools that docs/backups.md names: how each backs the directory $SRC up into
// $REPO, again and again, and restores the last state to $DST.
var backupTools = []struct{ name, needs, backup, restore string }{
	{"rsync", "rsync", `rsync -aHAX --delete "$SRC/" "$REPO/"`, `rsync -aHAX "$REPO/" "$DST/"`},
	{"tar", "tar", `tar -C "$SRC" --xattrs -cf "$REPO/all.tar" . || [ $? = 1 ]`,
		`tar -C "$DST" --xattrs -xf "$REPO/all.tar"`}, // 1: a file changed as it was read
	{"cp", "cp", `rm -rf "$REPO/c"; cp -a "$SRC" "$REPO/c"`, `cp -a "$REPO/c/." "$DST/"`},
	{"restic", "restic",
		`[ -e "$REPO/config" ] || restic -q -r "$REPO" init; cd "$SRC" && restic -q -r "$REPO" backup . || [ $? = 3 ]`, `restic -q -r "$REPO" restore latest --target "$DST"`}, // 3: a file went as it was read
	{"borg", "borg",
		`[ -e "$REPO/config" ] || borg init -e none "$REPO"; cd "$SRC" && borg create "$REPO::$(date +%s%N)" . || [ $? = 1 ]`, `cd "$DST" && borg extract "$REPO::$(borg list --last 1 --short "$REPO")"`},
	{"rclone", "rclone",
		`rclone -q sync --links "$SRC" "$REPO" || rclone -q sync --links "$SRC" "$REPO"`,
		`rclone -q copy --links "$REPO" "$DST"`},
	{"rdiff-backup", "rdiff-backup",
		`sleep 1; rdiff-backup --api-version 201 backup "$SRC" "$REPO" || rdiff-backup backup "$SRC" "$REPO"`, `rdiff-backup restore --at now "$REPO" "$DST"`},
}

// A volume that is in use is backed up with each tool, and restored elsewhere: files that rest are
// there, and a file that was being written says so or is whole. A second backup when nothing is
// written gives all of it.
func TestBackupTools(t *testing.T) {
	for _, tool := range backupTools {
		t.Run(tool.name, func(t *testing.T) {
			needTool(t, tool.needs)
			v := newVolume(t)
			rest := restingTree(t, v)
			repo := filepath.Join(v.base, "repo")
			if err := os.Mkdir(repo, 0o755); err != nil {
				t.Fatal(err)
			}
			sh := func(script, dst string) {
				t.Helper()
				c := exec.Command("sh", "-ec", script)
				c.Env = append(os.Environ(), "SRC="+v.cipher, "REPO="+repo, "DST="+dst,
					"RESTIC_PASSWORD=x", "HOME="+v.base,
					"BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes",
					"BORG_RELOCATED_REPO_ACCESS_IS_OK=yes",
					"RCLONE_CONFIG="+filepath.Join(v.base, "rclone.conf"))
				if out, err := c.CombinedOutput(); err != nil {
					t.Fatalf("%s: %v\n%s", script, err, out)
				}
			}
			stop := writeOn(t, v)
			sh(tool.backup, "")
			stop()
			// In the middle of writes.
			first := filepath.Join(v.base, "first")
			if err := os.Mkdir(first, 0o755); err != nil {
				t.Fatal(err)
			}
			sh(tool.restore, first)
			out, err := v.try("fsck", "--json", first)
			if code := exitOf(err); code != 0 && code != 3 && code != 8 {
				t.Errorf("fsck of a backup made in the middle of writes: %v\n%s", err, out)
			}
			for _, m := range regexp.MustCompile(`"name": "([^"]*)",\s*"grade": "(damaged|unchecked)"`).FindAllStringSubmatch(out, -1) {
				if !strings.HasPrefix(m[1], "busy") {
					t.Errorf("%s is %s in a backup made while others were written", m[1], m[2])
				}
			}
			restored(t, v, first, rest)

			// When nothing is written.
			v.umount()
			sh(tool.backup, "")
			second := filepath.Join(v.base, "second")
			if err := os.Mkdir(second, 0o755); err != nil {
				t.Fatal(err)
			}
			sh(tool.restore, second)
			v.kmsfs("fsck", second)
			v.mount()
			for i := range busyFiles {
				b, err := os.ReadFile(v.path(fmt.Sprint("busy", i)))
				if err != nil {
					t.Fatal(err)
				}
				rest[fmt.Sprint("busy", i)] = b
			}
			v.umount()
			restored(t, v, second, rest)
			v.mount()
		})
	}
}

// A snapshot of the ciphertext's filesystem is what a power cut at that moment would leave: everything that
// fsync had confirmed is there, and nothing is damaged.
func TestSnapshot(t *testing.T) {
	needRoot(t)
	needFUSE(t)
	needTool(t, "btrfs")
	base := t.TempDir()
	disk := loopDisk(t, base, "600M", "mkfs.btrfs", "-q")
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	sub := filepath.Join(disk, "sub")
	run("btrfs", "subvolume", "create", sub)
	v := newVolumeOn(t, base, sub)
	rest := restingTree(t, v)
	log, err := os.Create(v.path("log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	for round := range 5 {
		stop := writeOn(t, v)
		var lines []byte
		for i := range 20 { // confirmed before the snapshot
			lines = fmt.Appendf(lines, "round %d, line %d\n", round, i)
		}
		if _, err := log.Write(lines); err != nil {
			t.Fatal(err)
		}
		if err := log.Sync(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(v.path("log"))
		if err != nil {
			t.Fatal(err)
		}
		rest["log"] = b
		snapshot := filepath.Join(disk, fmt.Sprint("snapshot", round))
		run("btrfs", "subvolume", "snapshot", "-r", sub, snapshot)
		stop()
		at := filepath.Join(base, fmt.Sprint("at", round))
		if err := os.Symlink(filepath.Join(snapshot, "cipher"), at); err != nil {
			t.Fatal(err)
		}
		out, err := v.try("fsck", at)
		if code := exitOf(err); code != 0 && code != 8 || !strings.Contains(out, " 0 damaged, 0 unchecked") && !strings.Contains(out, "nothing is wrong") {
			t.Errorf("fsck of a snapshot: %v\n%s", err, out)
		}
		restored(t, v, at, rest)
	}
}

// restingTree makes files that nobody writes afterwards, and returns their contents by path.
func restingTree(t *testing.T, v *mounted) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for i, name := range []string{"small", "empty", "d/large",
		"d/e/" + strings.Repeat("a long name ", 18), "d/linked"} {
		if err := os.MkdirAll(filepath.Dir(v.path(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		out[name] = noise([]int{100, 0, 3_000_000, 5000, 70_000}[i])
		write(t, v.path(name), out[name])
	}
	if err := os.Symlink("d/large", v.path("link")); err != nil {
		t.Fatal(err)
	}
	out["link"] = out["d/large"]
	v.run(`sync "$M"/small "$M"/d/large`)
	time.Sleep(5 * time.Second) // until the files have settled
	return out
}

const busyFiles = 3

// writeOn appends to some files and rewrites others, until stop is called.
func writeOn(t *testing.T, v *mounted) (stop func()) {
	var end atomic.Bool
	var wg sync.WaitGroup
	for i := range busyFiles {
		f, err := os.Create(v.path(fmt.Sprint("busy", i)))
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer f.Close()
			for n := int64(0); !end.Load(); n++ {
				if _, err := f.WriteAt(noise(5000), n*3000%400_000); err != nil {
					t.Error(err)
					return
				}
				if n%50 == 0 {
					f.Sync()
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	time.Sleep(300 * time.Millisecond)
	return func() {
		end.Store(true)
		wg.Wait()
	}
}

// restored mounts a copy read-only and compares its files.
func restored(t *testing.T, v *mounted, cipher string, want map[string][]byte) {
	t.Helper()
	dir := cipher + ".mnt"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	v.kmsfs("mount", "--read-only", "--accept-older", cipher, dir)
	defer v.kmsfs("umount", dir)
	for name, text := range want {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !bytes.Equal(got, text) {
			t.Errorf("%.40s: %d bytes, want %d: %v", name, len(got), len(text), err)
		}
	}
	if to, err := os.Readlink(filepath.Join(dir, "link")); err != nil || to != "d/large" {
		t.Errorf("the symlink leads to %q, %v", to, err)
	}
}

// exitOf returns the exit code of a command.
func exitOf(err error) int {
	if err == nil {
		return 0
	}
	if e, ok := err.(*exec.ExitError); ok {
		return e.ExitCode()
	}
	return -1
}

// One byte that changes in a large file costs a backup tool that works with blocks three pages at
// most: the block, the header, and perhaps the end.
func TestBackupOfOneByte(t *testing.T) {
	needTool(t, "rsync")
	v := newVolume(t)
	const size = 256 << 20
	v.run(fmt.Sprintf(`head -c %d /dev/zero | openssl enc -aes-128-ctr -nosalt -K 0 -iv 0 >"$M/large" 2>/dev/null || head -c %d /dev/urandom >"$M/large"`, size, size))
	v.umount()
	copied := filepath.Join(v.base, "copy")
	rsync := func() int64 {
		t.Helper()
		out, err := exec.Command("rsync", "-a", "--inplace", "--no-whole-file", "--block-size=4096",
			"--stats", v.cipher+"/", copied).CombinedOutput()
		m := regexp.MustCompile(`Literal data: ([0-9,]+) bytes`).FindSubmatch(out)
		if err != nil || m == nil {
			t.Fatalf("%v\n%s", err, out)
		}
		n, err := strconv.ParseInt(strings.ReplaceAll(string(m[1]), ",", ""), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := rsync(); n < size {
		t.Fatalf("the first copy has %d bytes", n)
	}
	v.mount()
	f, err := os.OpenFile(v.path("large"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{1}, size/2); err != nil {
		t.Fatal(err)
	}
	f.Close()
	v.umount()
	if n := rsync(); n == 0 || n > 3*4096 {
		t.Errorf("%d bytes are copied again", n)
	}
	v.mount()
}
