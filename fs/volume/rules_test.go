//go:build linux && !portable

package volume_test

import (
	"bytes"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
)

// Each of these is a way in which bytes were lost, or zeros would have been
// believed, before its rule was there.

// WRITEs that arrive out of order leave no file sparse: a page of zeros would
// read as zeros in it, with no error.
func TestOutOfOrderIsNotSparse(t *testing.T) {
	w := newWorld(t, volume.Options{})
	h, err := w.create("f")
	w.do("create", err)
	content := noise(4 << 20)
	for _, i := range []int{3, 1, 2, 0} {
		_, err := h.Write(ctx, content[i<<20:(i+1)<<20], int64(i)<<20)
		w.do("write", err)
		if flags, _, _ := h.State(); i == 3 && flags&blockcrypt.Sparse == 0 {
			t.Fatal("a gap of 3 MiB makes no hole")
		}
	}
	w.do("close", h.Release())
	l, err := volume.OpenLone(w.cipherFile())
	w.do("open", err)
	defer l.Close()
	if f := l.Header.State.Flags; f != 0 {
		t.Errorf("closed with the flags %d", f)
	}
	w.want("f", content)
}

// A truncation of a file that was fsynced when it was new, and closed: its floor
// is 0 yet, and must not be what a kill leaves of it.
func TestCutAfterFirstFsync(t *testing.T) {
	w := newWorld(t, volume.Options{})
	content := noise(100000)
	h, err := w.create("f")
	w.do("create", err)
	_, err = h.Write(ctx, content, 0)
	w.do("write", err)
	w.do("fsync", h.Fsync())
	w.do("close", h.Release())
	_, err = w.must("f").SetAttr(ctx, size(50000))
	w.do("truncate", err)
	w.killed()
	w.want("f", content[:50000])
}

// Data that is appended after a truncation and closed is there after a kill, though
// the truncation has not settled.
func TestAppendAfterCut(t *testing.T) {
	w := newWorld(t, volume.Options{})
	content := noise(25000)
	w.write("f", content[:10000])
	w.reopen(volume.Options{})
	_, err := w.must("f").SetAttr(ctx, size(5000))
	w.do("truncate", err)
	h := w.opened("f")
	_, err = h.Write(ctx, content[5000:], 5000)
	w.do("write", err)
	w.do("close", h.Release())
	w.killed()
	w.want("f", content)
}

// A file that cannot be repaired yet keeps its session in the marker, through a
// clean end, until it can.
func TestRepairIsTriedAgain(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	content := noise(20000)
	w.write("f", content[:5000])
	w.reopen(volume.Options{})
	h := w.opened("f")
	_, err := h.Write(ctx, content[5000:], 5000)
	w.do("write", err)
	w.crash()
	var full atomic.Bool
	full.Store(true)
	w.open(volume.Options{}.Hooked(func(c volume.Call) error {
		if full.Load() && (c.Op == "pwrite" || c.Op == "ftruncate") {
			return unix.ENOSPC
		}
		return nil
	}))
	if _, err := w.read("f"); err == nil {
		t.Error("it was repaired on a full disk")
	}
	w.do("waiting", w.v.Wait(ctx)) // or the walk repairs it when there is space
	full.Store(false)
	w.close()
	if !exists(filepath.Join(w.dir, "kmsfs.mounted")) {
		t.Fatal("the marker went, though a file is not repaired")
	}
	w.open(volume.Options{})
	w.want("f", content)
	w.do("waiting", w.v.Wait(ctx))
	w.close()
	if exists(filepath.Join(w.dir, "kmsfs.mounted")) {
		t.Error("the marker stays, though all is repaired")
	}
}

// Block 0 is never a hole, in a sparse file either.
func TestBlockZeroIsNoHole(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	h, err := w.create("f")
	w.do("create", err)
	for _, at := range []int64{0, 2 << 20} {
		_, err = h.Write(ctx, noise(9000), at)
		w.do("write", err)
	}
	w.do("close", h.Release())
	w.close()
	b, err := os.ReadFile(w.cipherFile())
	w.do("read", err)
	clear(b[1024:4096])
	w.do("write", os.WriteFile(w.cipherFile(), b, 0o644))
	w.open(volume.Options{})
	if got, err := w.read("f"); blockcrypt.ClassOf(err) != blockcrypt.BadBlock {
		t.Errorf("zeroed, it reads as %d bytes, %v", len(got), err)
	}
}

// Page rule: on a disk, a page that may hold confirmed bytes is rewritten only
// after S on it, and header and block 0 in one pwrite.
func TestPageRule(t *testing.T) {
	var calls []volume.Call
	record := false
	w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		if record {
			calls = append(calls, c)
		}
		return nil
	}))
	if !w.v.SyncWaits() {
		t.Skip("on a tmpfs there is no page rule")
	}
	h, err := w.create("f")
	w.do("create", err)
	_, err = h.Write(ctx, noise(20000), 0)
	w.do("write", err)
	w.do("fsync", h.Fsync())
	record = true
	_, err = h.Write(ctx, bytes.Repeat([]byte{1}, 5000), 0)
	w.do("write", err)
	record = false
	w.do("close", h.Release())
	var got []string
	for _, c := range calls {
		if c.Op != "pread" {
			got = append(got, c.Op)
		}
	}
	if len(got) != 2 || got[0] != "sync_file_range" || got[1] != "pwrite" ||
		calls[len(calls)-1].Off != 0 || calls[len(calls)-1].Len != 8192 {
		t.Errorf("the overwrite made the calls %+v", calls)
	}
}
