//go:build linux && !portable

package volume_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
	"kmsfs/keystore/keystoretest"
)

// After an fsync that failed the kernel takes the pages for written. Another fsync must not
// say yes to them, though the kernel has forgotten the node in between: the file is read
// from the disk again, which shows what the disk has.
func TestFailedSyncIsRemembered(t *testing.T) {
	var broken, forgot atomic.Bool
	w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		switch {
		case broken.Load() && (c.Op == "fsync" || c.Op == "fdatasync") && c.Name == "":
			return unix.EIO
		case c.Op == "fadvise":
			forgot.Store(true)
		}
		return nil
	}))
	w.quiet = true
	w.write("f", noise(5000))
	n := w.must("f")
	h := w.opened("f")
	w.do("fsync", h.Fsync())
	_, err := h.Write(ctx, noise(9000), 0)
	w.do("write", err)
	broken.Store(true)
	wantErr(t, "fsync", h.Fsync(), unix.EIO)
	wantErr(t, "and again", h.Fsync(), unix.EIO)
	h.Release()
	broken.Store(false)
	id := n.ID()
	w.v.Forget(id, 1000)
	if w.v.Node(id) != nil {
		t.Fatal("the node is still known")
	}
	h, err = w.must("f").Open(ctx, true)
	w.do("open", err)
	defer h.Release()
	if !forgot.Load() {
		t.Error("the file was not read from the disk again")
	}
	forgot.Store(false)
	w.do("fsync of what the disk has", h.Fsync())
	w.write("g", []byte("another"))
	if _, err := w.read("g"); err != nil || forgot.Load() {
		t.Errorf("a file without doubt: %v, read again %v", err, forgot.Load())
	}
}

// A file that a failed sync has left in disorder keeps the marker, until it was repaired by a load or has no
// name any more.
func TestDisorderEnds(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(w *world)
		well bool
	}{
		{"nothing", func(*world) {}, false},
		{"a load", func(w *world) {
			if _, err := w.read("f"); err != nil {
				w.t.Error(err)
			}
		}, true},
		{"a removal", func(w *world) { w.do("unlink", w.v.Unlink(w.v.Root(), "f")) }, true},
		{"a rename over it", func(w *world) { w.do("rename", w.v.Rename(w.v.Root(), "other", w.v.Root(), "f", 0)) }, true},
		{"another name that goes", func(w *world) { w.do("unlink", w.v.Unlink(w.v.Root(), "link")) }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var broken atomic.Bool
			w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
				if broken.Load() && (c.Op == "fsync" || c.Op == "fdatasync") && c.Name == "" {
					return unix.EIO
				}
				return nil
			}))
			w.quiet = true
			w.write("other", noise(10))
			w.write("f", noise(5000))
			_, _, err := w.v.Link(ctx, w.must("f"), w.v.Root(), "link")
			w.do("link", err)
			if c.name == "a removal" || c.name == "a rename over it" {
				w.do("unlink", w.v.Unlink(w.v.Root(), "link"))
			}
			h := w.opened("f")
			_, err = h.Write(ctx, noise(9000), 0)
			w.do("write", err)
			broken.Store(true)
			wantErr(t, "fsync", h.Fsync(), unix.EIO)
			h.Release()
			broken.Store(false)
			c.end(w)
			err = w.v.Close()
			if (err == nil) != c.well || err != nil && !strings.Contains(err.Error(), "brought into order") {
				t.Errorf("the end of the session: %v", err)
			}
			w.v = nil
			if exists(filepath.Join(w.dir, "kmsfs.mounted")) == c.well {
				t.Error("the marker is there, or it is not, against what Close says")
			}
		})
	}
}

// A syncfs that failed does not say whose data is lost: every file is doubted from then on,
// and no session leaves the marker, so that the next mount looks at all.
func TestFailedSyncfs(t *testing.T) {
	var broken atomic.Bool
	var forgot atomic.Int32
	w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		switch {
		case broken.Load() && c.Op == "syncfs":
			return unix.EIO
		case c.Op == "fadvise":
			forgot.Add(1)
		}
		return nil
	}))
	w.quiet = true
	w.write("closed", noise(5000))
	broken.Store(true)
	wantErr(t, "a new session", w.v.NextSession(), unix.EIO)
	broken.Store(false)
	w.do("the next one", w.v.NextSession())
	if _, err := w.read("closed"); err != nil || forgot.Load() == 0 {
		t.Errorf("a file that was closed when the sync failed: %v, read again %d times", err, forgot.Load())
	}
	if err := w.v.Close(); err == nil || !strings.Contains(err.Error(), "brought into order") {
		t.Errorf("the end of the session: %v", err)
	}
	w.v = nil
	if !exists(filepath.Join(w.dir, "kmsfs.mounted")) {
		t.Error("the marker went")
	}
}

// A young file that is opened again while a new session begins is no fresh one: its state
// is of the old session, which leaves the marker. Its blocks are settled before they are
// overwritten.
func TestSessionChangeEndsFreshness(t *testing.T) {
	var inSync func()
	var settled atomic.Int32
	w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		switch {
		case c.Op == "syncfs" && inSync != nil:
			f := inSync
			inSync = nil
			f()
		case c.Op == "sync_file_range" && c.Mode&unix.SYNC_FILE_RANGE_WRITE != 0:
			settled.Add(1)
		}
		return nil
	}).Torn())
	content := noise(20000)
	w.write("f", content)
	var h *volume.Handle
	inSync = func() { h = w.opened("f") } // after restamp, before the old session leaves the marker
	w.do("a new session", w.v.NextSession())
	if h == nil {
		t.Fatal("no sync")
	}
	settled.Store(0)
	_, err := h.Write(ctx, []byte("overwritten"), 10000)
	w.do("overwrite", err)
	if settled.Load() == 0 {
		t.Error("a page was overwritten without being settled before")
	}
	copy(content[10000:], "overwritten")
	w.do("close", h.Release())
	w.want("f", content)

	// One that stays open is fresh on: its state was written again for the new session.
	h, err = w.create("g")
	w.do("create", err)
	_, err = h.Write(ctx, content, 0)
	w.do("write", err)
	w.do("a new session", w.v.NextSession())
	settled.Store(0)
	_, err = h.Write(ctx, []byte("x"), 5000)
	w.do("overwrite", errors.Join(err, h.Release()))
	if settled.Load() > 0 {
		t.Error("a fresh file is taken for a confirmed one")
	}
	content[5000] = 'x'
	w.want("g", content)
}

// readlink answers for the symlink that was asked, whatever its name is exchanged with.
func TestReadlinkRace(t *testing.T) {
	w := newWorld(t, volume.Options{})
	for _, name := range []string{"a", "b"} {
		if _, _, err := w.v.Symlink(ctx, w.v.Root(), name, "of "+name, volume.Caller{}); err != nil {
			t.Fatal(err)
		}
	}
	a, b := w.must("a"), w.must("b")
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := w.v.Rename(w.v.Root(), "a", w.v.Root(), "b", unix.RENAME_EXCHANGE); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for range 5000 {
		for n, want := range map[*volume.Node]string{a: "of a", b: "of b"} {
			if got, err := w.v.Readlink(n); err != nil || got != want {
				t.Errorf("readlink says %q (%v), want %q", got, err, want)
				break
			}
		}
	}
	close(stop)
	<-done
}

// A whiteout of a directory may replace one that had entries once: what kmsfs keeps in it
// goes.
func TestWhiteoutOverEmptied(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.mkdir("d")
	w.write("d/f", []byte("moves"))
	w.mkdir("e")
	long := string(bytes.Repeat([]byte("n"), 240))
	w.write("e/"+long, []byte("goes"))
	w.do("unlink", w.v.Unlink(w.must("e"), long))
	wantErr(t, "NOREPLACE",
		w.v.Rename(w.v.Root(), "d", w.v.Root(), "e", unix.RENAME_NOREPLACE|unix.RENAME_WHITEOUT),
		unix.EEXIST)
	err := w.v.Rename(w.v.Root(), "d", w.v.Root(), "e", unix.RENAME_WHITEOUT)
	keystoretest.Need(t, "the right to make devices, for a whiteout", !errors.Is(err, unix.EPERM))
	w.do("whiteout", err)
	w.want("e/f", []byte("moves"))
	if st, err := w.must("d").Attr(); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("the whiteout: mode %o, device %d, %v", st.Mode, st.Rdev, err)
	}
}
