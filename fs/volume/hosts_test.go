//go:build linux && !portable

package volume_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
	"kmsfs/fs/volume/check"
)

// otherHost holds the lock that a mount on another host holds: on kmsfs.lock alone, since
// flock on a directory can be that host's own matter.
func otherHost(t *testing.T, dir string) (end func()) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "kmsfs.lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: 1 << 62, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(f.Name(),
		fmt.Appendf(nil, "%-511s\n",
			`{"host":"alpha","pid":4711,"since":"2026-11-29T10:00:00Z","boot":"another"}`), 0); err != nil {
		t.Fatal(err)
	}
	return func() { f.Close() }
}

// A mount on another host is seen, is named, and is not disturbed.
func TestOtherHostWrites(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.write("f", []byte("content"))
	w.close()
	end := otherHost(t, w.dir)
	u, err := w.unlock()
	w.do("unlock", err)
	defer u.Close()
	_, err = u.Open(volume.Options{})
	wantErr(t, "a second writer", err, volume.ErrLocked)
	locked, ok := errors.AsType[*volume.LockedError](err)
	if !ok || !locked.Elsewhere() || !strings.Contains(err.Error(), "alpha") ||
		!strings.Contains(err.Error(), "4711") {
		t.Errorf("the refusal does not name the other host: %v", err)
	}
	wantErr(t, "Writer", volume.Writer(w.dir), volume.ErrLocked)
	if exists(filepath.Join(w.dir, "kmsfs.mounted")) {
		t.Error("the refused mount left a marker")
	}
	v, err := u.Open(volume.Options{ReadOnly: true})
	w.do("a reader beside it", err)
	v.Close()
	end()
	if err := volume.Writer(w.dir); err != nil {
		t.Errorf("after its end: %v", err)
	}
	w.open(volume.Options{})
	w.want("f", []byte("content"))
}

// The writer is named to another process of the same host too.
func TestOwnHostWrites(t *testing.T) {
	w := newWorld(t, volume.Options{})
	locked, ok := errors.AsType[*volume.LockedError](volume.Writer(w.dir))
	host, _ := os.Hostname()
	if !ok || locked.Elsewhere() || locked.PID != os.Getpid() || locked.Host != host {
		t.Errorf("the writer is %v", volume.Writer(w.dir))
	}
}

// SMB answers EACCES where another host has the lock; a filesystem without locks is refused
// with the reason.
func TestLockAnswers(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.close()
	answer := error(nil)
	try := func() error {
		u, err := w.unlock()
		w.do("unlock", err)
		defer u.Close()
		v, err := u.Open(volume.Options{}.Hooked(func(c volume.Call) error {
			if c.Op == "fcntl" {
				return answer
			}
			return nil
		}))
		if err == nil {
			v.Close()
		}
		return err
	}
	answer = unix.EACCES
	wantErr(t, "EACCES", try(), volume.ErrLocked)
	answer = unix.EAGAIN
	wantErr(t, "EAGAIN", try(), volume.ErrLocked)
	answer = unix.ENOLCK
	if err := try(); !errors.Is(err, unix.ENOLCK) || errors.Is(err, volume.ErrLocked) ||
		!strings.Contains(err.Error(), "cannot lock kmsfs.lock") {
		t.Errorf("ENOLCK: %v", err)
	}
	answer = nil
	w.do("afterwards", try())
}

// Something else under the name of kmsfs.lock is refused, and not followed.
func TestLockFileIsAFile(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.close()
	path, outside := filepath.Join(w.dir, "kmsfs.lock"), w.dir+".outside"
	t.Cleanup(func() { os.Remove(outside) })
	w.do("write", os.WriteFile(outside, []byte("not ours"), 0o644))
	for what, put := range map[string]func() error{
		"a symlink":   func() error { return os.Symlink(outside, path) },
		"a directory": func() error { return os.Mkdir(path, 0o755) },
		"a pipe":      func() error { return unix.Mkfifo(path, 0o644) },
		"a hard link": func() error { return os.Link(outside, path) },
	} {
		w.do("remove", os.Remove(path))
		w.do(what, put())
		u, err := w.unlock()
		w.do("unlock", err)
		if _, err := u.Open(volume.Options{}); !errors.Is(err, volume.ErrLockFile) {
			t.Errorf("%s: %v", what, err)
		}
		u.Close()
		if fs, _ := w.fsck(); len(fs) != 1 || fs[0].Grade != check.Damaged {
			t.Errorf("%s: fsck finds %v", what, fs)
		}
	}
	if b, err := os.ReadFile(outside); string(b) != "not ours" {
		t.Errorf("a file outside was written: %q, %v", b, err)
	}
	w.do("remove", os.Remove(path))
	w.open(volume.Options{})
}

// A kmsfs.lock that is exchanged while it is being locked does not count.
func TestLockFileExchanged(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.close()
	path, once := filepath.Join(w.dir, "kmsfs.lock"), false
	u, err := w.unlock()
	w.do("unlock", err)
	v, err := u.Open(volume.Options{}.Hooked(func(c volume.Call) error {
		if c.Op == "fcntl" && !once {
			once = true
			return errors.Join(os.Rename(path, path+".away"), os.WriteFile(path, nil, 0o644))
		}
		return nil
	}))
	w.do("open", err)
	defer v.Close()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	w.do("open the new one", err)
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: 1 << 62, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("the new file is not locked: %v", err)
	}
}

// A volume of an earlier version has neither kmsfs.lock nor kmsfs.links: a mount makes them.
// One that has the first and lacks the second was copied without symlinks, and says so.
func TestCopyWithoutLinks(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	lock, links := filepath.Join(w.dir, "kmsfs.lock"), filepath.Join(w.dir, "kmsfs.links")
	w.close()
	w.do("remove", errors.Join(os.Remove(lock), os.Remove(links)))
	w.open(volume.Options{})
	if !exists(lock) || !exists(links) {
		t.Error("a mount does not make them")
	}
	w.close()
	if fs, _ := w.fsck(); len(fs) > 0 {
		t.Errorf("fsck finds %v", fs)
	}
	w.do("remove", os.Remove(links))
	w.open(volume.Options{})
	w.close()
	if exists(links) || !strings.Contains(w.log.String(), "without symlinks") {
		t.Errorf("a copy without symlinks is not told from others:\n%s", w.log)
	}
	if fs, _ := w.fsck(); len(fs) != 1 || fs[0].Grade != check.Damaged || fs[0].What != check.FoundLinks {
		t.Errorf("fsck finds %v", fs)
	}
	w.open(volume.Options{})
	for _, r := range check.Repair(ctx, w.v, []check.Finding{{What: check.FoundLinks}}, nil) {
		w.do("repair", r.Err)
	}
	w.close()
	if fs, _ := w.fsck(); len(fs) > 0 {
		t.Errorf("after it was accepted fsck finds %v", fs)
	}
}

// What a backing filesystem must have is tested, and nothing of the test stays.
func TestCheckBacking(t *testing.T) {
	dir := t.TempDir()
	if notes, err := volume.CheckBacking(dir, false); err != nil {
		t.Errorf("%v %v", notes, err)
	}
	if es, err := os.ReadDir(dir); err != nil || len(es) > 0 {
		t.Errorf("it leaves %v (%v)", es, err)
	}
	for op, says := range map[string]string{"symlinkat": "has no symlinks",
		"mknodat": "has no mknod", "renameat2": "does not rename", "pwrite": "behind the end",
		"fcntl": "cannot lock"} {
		_, err := volume.CheckBackingWith(dir, func(c volume.Call) error {
			if c.Op == op {
				return unix.EPERM
			}
			return nil
		})
		if err == nil || !strings.Contains(err.Error(), says) || !errors.Is(err, unix.EPERM) {
			t.Errorf("without %s: %v", op, err)
		}
		if es, _ := os.ReadDir(dir); len(es) > 0 {
			t.Fatalf("without %s it leaves %v", op, es)
		}
	}
	_, err := volume.CheckBackingWith(dir, func(c volume.Call) error {
		if c.Op == "openat" && c.Mode&unix.O_CREAT != 0 {
			return unix.EROFS
		}
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), "is read-only") {
		t.Errorf("read-only: %v", err)
	}
}

// The times that are shown are those that the disk keeps.
func TestTimeGranularity(t *testing.T) {
	w := newWorld(t, volume.Options{})
	if g := w.v.TimeGranularity(); g != 1 {
		t.Errorf("the granularity is %d ns", g)
	}
	for _, g := range []int64{1, 100, 1000, 1e9} {
		at := time.Unix(1e9, 123456789/g*g)
		if got := volume.GranularityOf(at); int64(got) != g {
			t.Errorf("%d ns: %d", g, got)
		}
	}
}
