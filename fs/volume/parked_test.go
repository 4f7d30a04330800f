//go:build linux && !portable

package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
)

// Files whose descriptors were given up behave as all others do.

// pressed gives up every descriptor that can be.
func (w *world) pressed() { w.v.GiveUp() }

// A file of which the disk does not have all keeps its descriptor: that one hears of a failed
// writeback.
func TestUnsyncedIsNotParked(t *testing.T) {
	w := newWorld(t, volume.Options{}.Torn())
	content := noise(20000)
	w.write("f", content)
	w.reopen(volume.Options{}.Torn())
	h := w.opened("f")
	if !w.v.Park(h) {
		t.Error("it is not parked as it was found")
	}
	_, err := h.Write(ctx, []byte("overwritten"), 9000)
	w.do("write", errors.Join(err, h.Flush()))
	if w.v.Park(h) {
		t.Error("it is parked with a change that no sync has covered")
	}
	w.do("fsync", h.Fsync())
	if !w.v.Park(h) {
		t.Error("it is not parked after a sync")
	}
	copy(content[9000:], "overwritten")
	w.do("close", h.Release())
	w.want("f", content)
}

// A descriptor that an fsync is using is not given up.
func TestSyncingIsNotParked(t *testing.T) {
	var during func()
	w := newWorld(t, volume.Options{})
	w.write("f", noise(20000))
	w.reopen(volume.Options{}.Hooked(func(c volume.Call) error {
		if c.Op == "fsync" && during != nil {
			f := during
			during = nil
			f()
		}
		return nil
	}))
	h := w.opened("f")
	parked := false
	during = func() { parked = w.v.Park(h) }
	w.do("fsync", h.Fsync())
	if during != nil || parked {
		t.Errorf("parked during an fsync: %v", parked)
	}
	w.do("close", h.Release())
}

// A parked file is found whatever happens to its names, and shows all that it is asked.
func TestParkedFile(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	content := noise(20000)
	for _, name := range []string{"moved", "removed", "replaced", "linked"} {
		w.write(name, content)
	}
	w.write("other", []byte("other"))
	if _, _, err := w.v.Link(ctx, w.must("linked"), w.v.Root(), "second"); err != nil {
		t.Fatal(err)
	}
	w.reopen(volume.Options{})
	handles := map[string]*volume.Handle{}
	for _, name := range []string{"moved", "removed", "replaced", "linked"} {
		handles[name] = w.opened(name)
	}
	w.pressed()
	root := w.v.Root()
	w.do("rename", w.v.Rename(root, "moved", root, "elsewhere", 0))
	w.do("unlink", w.v.Unlink(root, "removed"))
	w.do("replace", w.v.Rename(root, "other", root, "replaced", 0))
	w.do("unlink", w.v.Unlink(root, "linked"))
	for name, h := range handles {
		b := make([]byte, len(content))
		if n, err := h.Read(ctx, b, 0); err != nil || !bytes.Equal(b[:n], content) {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
		w.pressed()
		if _, err := h.WriteThrough(ctx, []byte("new"), 0); err != nil {
			t.Errorf("%s: write: %v", name, err)
		}
		if err := errors.Join(h.Flush(), h.Fsync()); err != nil {
			t.Errorf("%s: fsync: %v", name, err)
		}
		w.v.Settle()
		w.pressed()
		if st, err := h.Node().Attr(); err != nil || st.Size != int64(len(content)) {
			t.Errorf("%s: size %d, %v", name, st.Size, err)
		}
		if _, err := h.Seek(0, unix.SEEK_DATA); err != nil {
			t.Errorf("%s: seek: %v", name, err)
		}
		w.do("close", h.Release())
	}
	copy(content, "new")
	w.want("elsewhere", content)
	w.want("second", content)
}

// Files that an earlier mount made and never synced can be parked too, and a file that is open
// is served though no descriptor is left for new ones.
func TestParkedFilesOfBefore(t *testing.T) {
	const files = 200
	w := newWorld(t, volume.Options{})
	w.quiet = true
	for i := range files {
		w.write(fmt.Sprintf("f%d", i), []byte("content"))
	}
	w.reopen(volume.Options{}.FDLimit(100))
	var open []*volume.Handle
	for i := range files {
		open = append(open, w.opened(fmt.Sprintf("f%d", i)))
	}
	var gone []*volume.Handle
	for i := 0; ; i++ { // until nothing can be opened
		h, err := w.create(fmt.Sprintf("gone%d", i))
		if err != nil {
			wantErr(t, "create", err, unix.ENFILE)
			break
		}
		_, err = h.Write(ctx, []byte("x"), 0)
		w.do("write", errors.Join(err, w.v.Unlink(w.v.Root(), fmt.Sprintf("gone%d", i))))
		gone = append(gone, h)
	}
	for i, h := range open {
		b := make([]byte, 7)
		if _, err := h.Read(ctx, b, 0); err != nil || string(b) != "content" {
			t.Fatalf("read of an open file, %d: %q, %v", i, b, err)
		}
		w.do("delayed write", h.WriteDelayed(ctx, []byte("CONTENT"), 0))
	}
	for _, h := range append(open, gone...) {
		w.do("close", h.Release())
	}
}

// An error of sync_file_range is an error of writeback, which fsync does not tell again.
func TestWaitErrorIsASyncError(t *testing.T) {
	var fails atomic.Bool
	w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		if fails.Load() && c.Op == "sync_file_range" {
			return unix.EIO
		}
		return nil
	}).Torn())
	w.quiet = true
	w.write("f", noise(20000))
	h := w.opened("f")
	w.do("fsync", h.Fsync())
	fails.Store(true)
	_, err := h.Write(ctx, noise(100), 5000)
	wantErr(t, "write", err, unix.EIO)
	fails.Store(false)
	wantErr(t, "fsync", h.Fsync(), unix.EIO)
	h.Release()
}

// After a syncfs that failed, fresh open files are doubted too, and no session leaves the
// marker by way of the walk.
func TestFailedSyncfsBreaksFreshFiles(t *testing.T) {
	var broken atomic.Bool
	w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		if broken.Load() && c.Op == "syncfs" {
			return unix.EIO
		}
		return nil
	}))
	w.quiet = true
	h, err := w.create("f")
	w.do("create", err)
	_, err = h.Write(ctx, noise(20000), 0)
	w.do("write", errors.Join(err, h.Flush()))
	broken.Store(true)
	wantErr(t, "a session", w.v.NextSession(), unix.EIO)
	broken.Store(false)
	wantErr(t, "fsync", h.Fsync(), unix.EIO)
	if w.v.Cleaned() == nil {
		t.Error("the marker is taken for clean after a sync that failed")
	}
	h.Release()
	if w.v.Close() == nil {
		t.Error("the session ends well")
	}
	w.v = nil
	if !exists(filepath.Join(w.dir, "kmsfs.mounted")) {
		t.Error("the marker is gone")
	}
}

// A file that is shorter after a failed sync than the kernel believes shows no zeros at its
// end, and tells it once that the kernel must read it again.
func TestShorterAfterFailedSync(t *testing.T) {
	var broken atomic.Bool
	w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		switch {
		case broken.Load() && c.Op == "fsync":
			return unix.EIO
		case broken.Load() && c.Op == "pwrite" && c.Len > 5000:
			return volume.ErrSkip // it never reaches the disk
		}
		return nil
	}))
	w.quiet = true
	w.write("f", noise(3000))
	h := w.opened("f")
	w.do("fsync", h.Fsync())
	broken.Store(true)
	_, err := h.Write(ctx, noise(20000), 3000)
	w.do("write", err)
	wantErr(t, "fsync", h.Fsync(), unix.EIO)
	n := h.Node()
	h.Release()
	broken.Store(false)
	h, err = n.Open(ctx, true)
	w.do("open", err)
	defer h.Release()
	if !h.Reread() || h.Reread() {
		t.Error("the kernel is not told, once, to read it again")
	}
	if _, err := h.Read(ctx, make([]byte, 100), 15000); err == nil {
		t.Error("bytes that are not there are shown")
	}
	if _, err := h.Read(ctx, make([]byte, 100), 1000); err != nil {
		t.Errorf("bytes that are: %v", err)
	}
	fails(t, "fsync", h.Fsync())
}

// Bytes that were lost are no hole: a copy within the daemon, and a program that looks for
// data, meet the error.
func TestLostIsNoHole(t *testing.T) {
	w, full := failing(t)
	in, err := w.create("in")
	w.do("create", err)
	_, err = in.Write(ctx, []byte("begin"), 0)
	w.do("write", err)
	_, err = in.Node().SetAttr(ctx, size(64<<20))
	w.do("grow", err)
	full.Store(true)
	fails(t, "a delayed write into the hole", in.WriteDelayed(ctx, noise(5000), 32<<20))
	fails(t, "and one behind the end", in.WriteDelayed(ctx, noise(5000), 64<<20))
	full.Store(false)
	if at, err := in.Seek(1<<20, unix.SEEK_DATA); err != nil || at != 1<<20 {
		t.Errorf("the next data: %d, %v", at, err)
	}
	out, err := w.create("out")
	w.do("create", err)
	for _, at := range []int64{32 << 20, 64 << 20} {
		if _, err := out.CopyFrom(ctx, in, at, 0, 5000); !errors.Is(err, unix.EIO) {
			t.Errorf("a copy of lost bytes at %d: %v", at, err)
		}
	}
	in.Release()
	w.do("close", out.Release())
}

// Block 0 is never a hole: one that was emptied is damage, in whatever way it is read.
func TestLoneBlockZeroIsNoHole(t *testing.T) {
	w := newWorld(t, volume.Options{})
	h, err := w.create("f")
	w.do("create", err)
	_, err = h.Write(ctx, noise(3000), 0)
	w.do("write", err)
	_, err = h.Node().SetAttr(ctx, size(64<<20))
	w.do("grow", errors.Join(err, h.Release()))
	w.close()
	path := w.cipherFile()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	w.do("open", err)
	zeros := make([]byte, 4096-1024)
	_, err = f.WriteAt(zeros, 1024)
	w.do("write", errors.Join(err, f.Close()))
	l, err := volume.OpenLone(path)
	w.do("open", err)
	defer l.Close()
	key, err := w.store.Unwrap(ctx, l.Binding(), l.Header.Recipients[0])
	w.do("unwrap", err)
	_, err = l.Unlock(key)
	w.do("unlock", err)
	var out bytes.Buffer
	if err := l.CopyTo(&out, nil); blockcrypt.ClassOf(err) == "" {
		t.Errorf("%d bytes were given: %v", out.Len(), err)
	}
}
