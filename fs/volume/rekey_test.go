//go:build linux && !portable

package volume_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore/keystoretest"
)

// rekeyed gives all files new keys, and returns what was done, and why not to a file.
func (w *world) rekeyed() (volume.Rekeyed, []error) {
	w.t.Helper()
	var failed []error
	done, err := w.v.Rekey(ctx, w.v.Root(), volume.RekeyOptions{AtOnce: 4,
		Failed: func(_ string, err error) { failed = append(failed, err) }})
	w.do("rekey", err)
	return done, failed
}

// headerOf returns the ID and the wrapped key of the ciphertext file of a path.
func (w *world) headerOf(path string) (id [16]byte, wrapped string) {
	w.t.Helper()
	dir, name := w.parent(path)
	at := w.v.CipherName(dir, name)
	if d := filepath.Dir(path); d != "." {
		up, name := w.parent(d)
		at = filepath.Join(w.v.CipherName(up, name), at)
	}
	l, err := volume.OpenLone(filepath.Join(w.dir, at))
	w.do("open the ciphertext", err)
	defer l.Close()
	return l.Header.File, string(l.Header.Recipients[0].Wrapped)
}

// A file with a new key is the same file but for its key and its inode.
func TestRekey(t *testing.T) {
	for _, plain := range []bool{false, true} {
		w := newWorldIn(t, t.TempDir(), volume.Options{}, plain)
		w.mkdir("d")
		small, big := noise(100), noise(3<<20)
		w.write("d/small", small)
		w.write("big", big)
		w.write("empty", nil)
		long := strings.Repeat("l", 240)
		w.write(long, small)
		h, err := w.create("sparse")
		w.do("create", err)
		_, err = h.Write(ctx, small, 20<<20)
		w.do("write", errors.Join(err, h.Release()))
		n := w.must("d/small")
		mode, mtime := uint32(0o4751), unix.Timespec{Sec: 1234567, Nsec: 890}
		_, err = n.SetAttr(ctx, volume.SetAttr{Mode: &mode})
		w.do("chmod", err)
		w.do("setxattr", n.Setxattr("user.note", []byte("kept"), 0, false))
		_, err = n.SetAttr(ctx, volume.SetAttr{Mtime: &mtime})
		w.do("utimens", err)
		before, err := n.Attr()
		w.do("stat", err)
		id, wrapped := w.headerOf("d/small")

		done, failed := w.rekeyed()
		if done.Files != 5 || done.Changed != 4 || done.Failed != 0 {
			t.Errorf("%+v, %v", done, failed)
		}
		after, err := n.Attr()
		w.do("stat", err)
		if after.Ino == before.Ino || after.Mode != before.Mode || after.Mtim != before.Mtim ||
			after.Size != before.Size || after.Uid != before.Uid || after.Nlink != 1 {
			t.Errorf("was %+v, is %+v", before, after)
		}
		if v, err := n.Getxattr("user.note"); string(v) != "kept" {
			t.Errorf("%q, %v", v, err)
		}
		inTree, _ := filepath.Glob(filepath.Join(w.dir, "*"))
		for _, path := range inTree {
			if l, err := volume.OpenLone(path); err == nil && l.Header != nil {
				if s := l.Header.State; s.Floor != s.Size || s.Flags&^blockcrypt.Sparse != 0 {
					t.Errorf("%s: %+v", path, s)
				}
				l.Close()
			}
		}
		if newID, newWrapped := w.headerOf("d/small"); newID == id || newWrapped == wrapped {
			t.Error("it has its old key")
		}
		check := func() {
			t.Helper()
			w.want("d/small", small)
			w.want("big", big)
			w.want(long, small)
			w.want("sparse", append(make([]byte, 20<<20), small...))
		}
		check()
		if st, _ := w.must("sparse").Attr(); st.Blocks*512 > 1<<20 {
			t.Errorf("a hole takes %d bytes", st.Blocks*512)
		}
		h = w.opened("big") // the node goes on
		_, err = h.Write(ctx, []byte("new"), 5)
		w.do("write", errors.Join(err, h.Fsync(), h.Release()))
		copy(big[5:], "new")
		w.reopen(volume.Options{})
		check()
		w.close()
		if fs, _ := w.fsck(); len(fs) != 0 {
			t.Errorf("%+v", fs)
		}
	}
}

// Files that must not be replaced keep their keys, and say why.
func TestRekeyRefuses(t *testing.T) {
	w := newWorld(t, volume.Options{})
	for _, name := range []string{"open", "written", "linked"} {
		w.write(name, []byte(name))
	}
	_, _, err := w.v.Link(ctx, w.must("linked"), w.v.Root(), "again")
	w.do("link", err)
	r, err := w.must("open").Open(ctx, false)
	w.do("open", err)
	h := w.opened("written")
	done, failed := w.rekeyed()
	if done.Changed != 0 || done.Failed != 4 {
		t.Errorf("%+v", done)
	}
	for what, want := range map[error]int{volume.ErrInUse: 2, volume.ErrLinks: 2} {
		n := 0
		for _, err := range failed {
			if errors.Is(err, what) {
				n++
			}
		}
		if n != want {
			t.Errorf("%v: %d times", what, n)
		}
	}
	w.do("close", errors.Join(r.Release(), h.Release()))
	if done, failed = w.rekeyed(); done.Changed != 2 {
		t.Errorf("%+v, %v", done, failed)
	}
	w.want("open", []byte("open"))
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	_, err = w.v.Rekey(canceled, w.v.Root(), volume.RekeyOptions{})
	wantErr(t, "interrupted", err, context.Canceled)
	w.noLeftover()
	w.reopen(volume.Options{ReadOnly: true})
	_, err = w.v.Rekey(ctx, w.v.Root(), volume.RekeyOptions{})
	wantErr(t, "read-only", err, unix.EROFS)
}

func (w *world) noLeftover() {
	w.t.Helper()
	if left, _ := filepath.Glob(filepath.Join(w.dir, "kmsfs.rekey.*")); len(left) > 0 {
		w.t.Errorf("left behind: %q", left)
	}
}

// Whichever call fails, the file is there with its content, and nothing is left behind.
func TestRekeyFaults(t *testing.T) {
	content := noise(10000)
	for at := 0; ; at++ {
		calls, armed := 0, false
		op := ""
		w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
			if !armed {
				return nil
			}
			if calls++; calls == at+1 {
				op = c.Op
				return unix.EIO
			}
			return nil
		}))
		w.quiet = true
		w.mkdir("d")
		w.write("d/f", content)
		n := w.must("d/f")
		w.do("setxattr", n.Setxattr("user.note", []byte("kept"), 0, false))
		w.v.Settle()
		armed = true
		done, err := w.v.Rekey(ctx, w.must("d"), volume.RekeyOptions{})
		armed = false
		if op == "" && (err != nil || done.Changed != 1) {
			t.Fatalf("without a fault: %+v, %v", done, err)
		}
		if op != "" && done.Failed == 0 && err == nil && done.Changed == 0 {
			t.Errorf("%s: nobody was told", op)
		}
		w.want("d/f", content)
		if v, err := n.Getxattr("user.note"); string(v) != "kept" {
			t.Errorf("%s: %q, %v", op, v, err)
		}
		w.reopen(volume.Options{})
		w.want("d/f", content)
		w.noLeftover()
		w.close()
		if op == "" {
			return
		}
	}
}

// What a crash leaves is removed by the next mount, or by fsck.
func TestRekeyLeftover(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	w.write("f", []byte("content"))
	left := filepath.Join(w.dir, "kmsfs.rekey.0123456789abcdef")
	w.close()
	w.do("write", os.WriteFile(left, bytes.Repeat([]byte("x"), 5000), 0o600))
	if s := summary(first(w.fsck())); s != "mendable/leftover" {
		t.Error(s)
	}
	w.open(volume.Options{})
	w.noLeftover()
	w.want("f", []byte("content"))
}

// Flags that chattr(1) sets stay.
func TestRekeyKeepsFlags(t *testing.T) {
	const noDump = 0x40
	w := newWorld(t, volume.Options{})
	w.write("f", noise(100))
	n := w.must("f")
	flags, err := n.Flags()
	if err == nil {
		err = n.SetFlags(flags | noDump)
	}
	keystoretest.Need(t, "a temporary directory with inode flags", !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EOPNOTSUPP))
	w.do("set the flag", err)
	if done, failed := w.rekeyed(); done.Changed != 1 {
		t.Fatalf("%+v, %v", done, failed)
	}
	if now, err := n.Flags(); err != nil || now&noDump == 0 {
		t.Errorf("%x, %v", now, err)
	}
}
