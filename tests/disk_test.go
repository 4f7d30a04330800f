package tests

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A backing filesystem that becomes read-only after an error, and writable again when it is
// mounted again. While a volume on it is mounted for writing nobody can remount it read-only.
func TestBackingReadOnly(t *testing.T) {
	base := t.TempDir()
	disk := loopDisk(t, base, "64M", "mkfs.ext4", "-q", "-e", "remount-ro")
	m := newVolumeOn(t, base, disk)
	m.faults = true
	b := noise(50000)
	write(t, m.path("f"), b)
	m.run(`sync $M/f $M`)
	if err := unix.Mount("", disk, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); !errors.Is(err, unix.EBUSY) {
		t.Errorf("remounting it read-only: %v", err)
	}
	time.Sleep(5 * time.Second) // until the file has settled
	m.run(`d=$(findmnt -no SOURCE ` + disk + `); echo 1 >/sys/fs/ext4/$(basename $d)/trigger_fs_error; grep " ` + disk + ` " /proc/mounts | grep -qE ' (ro|emergency_ro|shutdown)|[ ,](ro|emergency_ro)[, ]'`)
	want(t, m.path("f"), b)
	for name, err := range map[string]error{"create": os.WriteFile(m.path("new"), b, 0o644),
		"mkdir": os.Mkdir(m.path("d"), 0o755), "unlink": os.Remove(m.path("f")),
		"chmod": os.Chmod(m.path("f"), 0o600),
		"append": func() error {
			_, err := os.OpenFile(m.path("f"), os.O_APPEND|os.O_WRONLY,
				0)
			return err
		}()} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v", name, err)
		}
	}
	want(t, m.path("f"), b)
	if out, err := m.try("umount", m.dir); err == nil ||
		!strings.Contains(out, "not everything is known to be on the disk") {
		t.Errorf("umount: %v, %s", err, out)
	}
	m.run(`umount ` + disk + `; e2fsck -fy $B/disk >/dev/null || test $? = 1; mount -o loop $B/disk ` + disk)
	m.mount()
	write(t, m.path("new"), b)
	m.remount()
	want(t, m.path("f"), b)
	want(t, m.path("new"), b)
}

// Ciphertext that somebody changes, cuts, replaces or removes under the mount: an
// error, never other bytes; and the others go on.
func TestBackingChanged(t *testing.T) {
	m := newVolume(t)
	m.faults = true
	b := noise(60000)
	for _, n := range []string{"f", "other"} {
		write(t, m.path(n), b)
	}
	m.remount()
	cipher := func(name string) string { // by its inode number, which is the ciphertext's
		st, err := os.Stat(m.path(name))
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range glob(t, filepath.Join(m.cipher, "*")) {
			if x, err := os.Lstat(p); err == nil && ino(x) == ino(st) {
				return p
			}
		}
		t.Fatal("no ciphertext file for " + name)
		return ""
	}
	path := cipher("f")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for what, f := range map[string]func() error{
		"a bit":   func() error { x := bytes.Clone(whole); x[30000] ^= 1; return overwrite(path, x) },
		"cut":     func() error { return os.Truncate(path, 20000) },
		"emptied": func() error { return os.Truncate(path, 0) },
		"replaced": func() error {
			os.WriteFile(path+".x", noise(60000),
				0o644)
			return os.Rename(path+".x", path)
		},
		"removed": func() error { return os.Remove(path) },
	} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
		dropCaches(t, m)
		got, err := os.ReadFile(m.path("f"))
		if err == nil && !bytes.Equal(got, b) && !(what == "emptied" && len(got) == 0) {
			t.Errorf("%s: %d bytes that were never written", what, len(got))
		}
		want(t, m.path("other"), b)
		if err := overwrite(path, whole); err != nil {
			t.Fatal(err)
		}
		m.remount()
		want(t, m.path("f"), b)
		path = cipher("f")
	}
	// Append-only: nothing can be changed, nothing is lost, and it goes on when it is
	// not so any more.
	if os.Geteuid() != 0 || exec.Command("chattr", "+a", path).Run() != nil {
		return
	}
	defer exec.Command("chattr", "-a", path).Run()
	if f, err := os.OpenFile(m.path("f"), os.O_WRONLY, 0); err == nil {
		_, err = f.Write([]byte("x"))
		if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
			t.Error("an append-only file was overwritten")
		}
	}
	want(t, m.path("f"), b)
	if err := exec.Command("chattr", "-a", path).Run(); err != nil {
		t.Fatal(err)
	}
	m.remount()
	write(t, m.path("f"), b[:100])
	want(t, m.path("f"), b[:100])
}
