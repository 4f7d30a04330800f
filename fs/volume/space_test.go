//go:build linux && !portable

package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore/keystoretest"
)

const punch = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE

func blocks(t *testing.T, n *volume.Node) int64 {
	t.Helper()
	st, err := n.Attr()
	if err != nil {
		t.Fatal(err)
	}
	return st.Blocks
}

// Punching frees space, reserving takes it, and the file says so; holes go when
// they are written, and are what they were after a remount.
func TestPunchAndReserve(t *testing.T) {
	w := newWorld(t, volume.Options{})
	want := noise(4 << 20)
	w.write("f", want)
	h := w.opened("f")
	w.do("fsync", h.Fsync())
	full := blocks(t, h.Node())
	w.do("punch", h.Fallocate(ctx, punch, 1<<20, 2<<20))
	clear(want[1<<20 : 3<<20])
	if got := blocks(t, h.Node()); got > full-4000 {
		t.Errorf("%d blocks, after punching 4096 of %d", got, full)
	}
	w.do("fsync", h.Fsync())
	w.do("close", h.Release())
	w.want("f", want)
	w.reopen(volume.Options{})
	w.want("f", want)
	h = w.opened("f")
	if at, err := h.Seek(0, unix.SEEK_HOLE); err != nil || at < 1<<20 || at > 1<<20+4064 {
		t.Errorf("the hole is at %d, %v", at, err)
	}
	if at, err := h.Seek(2<<20, unix.SEEK_DATA); err != nil || at > 3<<20 || at < 3<<20-4064 {
		t.Errorf("it ends at %d, %v", at, err)
	}
	w.do("reserve", h.Fallocate(ctx, unix.FALLOC_FL_KEEP_SIZE, 0, 8<<20))
	if got := blocks(t, h.Node()); got < 2*8<<10 {
		t.Errorf("%d blocks, after reserving %d", got, 2*8<<10)
	}
	w.do("close", h.Release())
	w.v.Settle()
	if got := blocks(t, w.must("f")); got < 2*8<<10 {
		t.Errorf("settling has freed what is reserved: %d blocks", got)
	}
	w.want("f", want)
	for _, mode := range []uint32{unix.FALLOC_FL_COLLAPSE_RANGE, unix.FALLOC_FL_INSERT_RANGE,
		unix.FALLOC_FL_UNSHARE_RANGE, unix.FALLOC_FL_PUNCH_HOLE} {
		h := w.opened("f")
		wantErr(t, fmt.Sprint("mode ", mode), h.Fallocate(ctx, mode, 0, 4096), unix.EOPNOTSUPP)
		w.do("close", h.Release())
	}
}

// A hole within the confirmed bytes: the floor is raised to them, or a repair
// would take the hole for the end.
func TestPunchRaisesFloor(t *testing.T) {
	w := newWorld(t, volume.Options{})
	want := noise(100000)
	h, err := w.create("f")
	w.do("create", err)
	_, err = h.Write(ctx, want, 0)
	w.do("write", err)
	w.do("fsync", h.Fsync())
	w.do("punch", h.Fallocate(ctx, punch, 20000, 79000))
	clear(want[20000:99000])
	if flags, floor, _ := h.State(); flags&(blockcrypt.Dirty|blockcrypt.Sparse) != blockcrypt.Dirty|blockcrypt.Sparse || floor != int64(len(want)) {
		t.Errorf("flags %d, floor %d", flags, floor)
	}
	w.killed()
	w.want("f", want)
}

// What the kernel's cache could not write is not forgotten: not by a second
// fsync, not by close; it reads as an error until it is written again.
func TestLostWrites(t *testing.T) {
	var full atomic.Bool
	w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		if full.Load() && c.Op == "pwrite" {
			return unix.ENOSPC
		}
		return nil
	}))
	w.quiet = true
	h, err := w.create("f")
	w.do("create", err)
	b := noise(12288)
	w.do("write", h.WriteDelayed(ctx, b[:4096], 0))
	full.Store(true)
	wantErr(t, "write", h.WriteDelayed(ctx, b[4096:8192], 4096), unix.ENOSPC)
	full.Store(false)
	w.do("write", h.WriteDelayed(ctx, b[8192:], 8192))
	for range 2 {
		wantErr(t, "fsync", h.Fsync(), unix.ENOSPC)
		wantErr(t, "close", h.Flush(), unix.ENOSPC)
	}
	got := make([]byte, 12288)
	if _, err := h.Read(ctx, got, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("the lost bytes read with %v", err)
	}
	for _, off := range []int64{0, 8192} {
		if _, err := h.Read(ctx, got[:4096], off); err != nil || !bytes.Equal(got[:4096], b[off:off+4096]) {
			t.Errorf("the bytes beside, at %d: %v", off, err)
		}
	}
	wantErr(t, "close", h.Release(), unix.ENOSPC)
	h = w.opened("f") // the kernel still knows the file
	wantErr(t, "fsync", h.Fsync(), unix.ENOSPC)
	_, err = h.Write(ctx, b[4096:6000], 4096)
	w.do("write", err)
	wantErr(t, "fsync", h.Fsync(), unix.ENOSPC)
	_, err = h.Write(ctx, b[6000:8192], 6000)
	w.do("write", err)
	w.do("fsync", h.Fsync())
	w.do("close", h.Release())
	w.want("f", b)
	full.Store(true)
	h = w.opened("f")
	wantErr(t, "write", h.WriteDelayed(ctx, b, 12288), unix.ENOSPC)
	full.Store(false)
	if _, err := h.Read(ctx, got, 12288); !errors.Is(err, unix.EIO) {
		t.Errorf("the lost bytes behind the end read with %v", err)
	}
	_, err = h.Node().SetAttr(ctx, size(100))
	w.do("truncate", err)
	w.do("fsync after the lost bytes were cut off", h.Fsync())
	w.do("close", h.Release())
}

// A removed file makes room for the next writer, though the kernel closes and forgets
// it a moment later; a file that stays open does not.
func TestRoomAfterRemoval(t *testing.T) {
	keystoretest.Need(t, "root", os.Geteuid() == 0)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	w := newWorldIn(t, dir, volume.Options{}, false)
	w.quiet = true
	chunk := noise(256 << 10)
	fill := func() (h *volume.Handle, off int64) {
		h, err := w.create("big")
		for w.do("create", err); err == nil; off += int64(len(chunk)) {
			_, err = h.Write(ctx, chunk, off)
		}
		wantErr(t, "a full disk", err, unix.ENOSPC)
		w.do("unlink", w.v.Unlink(w.v.Root(), "big"))
		return h, off
	}
	for range 3 {
		h, _ := fill()
		freed := make(chan struct{})
		time.AfterFunc(50*time.Millisecond, func() {
			h.Release()
			w.v.Forget(h.Node().ID(), 100)
			close(freed)
		})
		b := noise(1 << 20)
		w.write("after", b)
		<-freed
		w.want("after", b)
		n := w.must("after")
		w.do("unlink", w.v.Unlink(w.v.Root(), "after"))
		w.v.Forget(n.ID(), 100)
	}
	// One that would have been settled a moment later.
	w.write("big", chunk)
	h := w.opened("big")
	w.do("fsync", h.Fsync())
	for i := range int64(11) {
		_, err := h.Write(ctx, chunk, (i+1)*int64(len(chunk)))
		w.do("append", err)
	}
	w.do("close", h.Release())
	w.do("unlink", w.v.Unlink(w.v.Root(), "big"))
	w.v.Forget(h.Node().ID(), 100)
	w.write("after", noise(2<<20))
	n := w.must("after")
	w.do("unlink", w.v.Unlink(w.v.Root(), "after"))
	w.v.Forget(n.ID(), 100)

	h, off := fill()
	_, err := h.Write(ctx, chunk, off)
	wantErr(t, "the removed file is still open", err, unix.ENOSPC)
	w.do("close", h.Release())
	w.v.Forget(h.Node().ID(), 100)
}

// A file whose writing hangs can be replaced and removed.
func TestRemovalWaitsForNobody(t *testing.T) {
	var hang atomic.Bool
	hangs, goOn := make(chan struct{}), make(chan struct{})
	w := newWorld(t, volume.Options{}.Hooked(func(c volume.Call) error {
		if c.Op == "pwrite" && hang.CompareAndSwap(true, false) {
			close(hangs)
			<-goOn
		}
		return nil
	}))
	w.write("f", []byte("old"))
	w.write("g", []byte("new"))
	h := w.opened("f")
	hang.Store(true)
	written := make(chan error)
	go func() {
		_, err := h.Write(ctx, noise(100000), 0)
		written <- err
	}()
	<-hangs
	done := make(chan error, 1)
	go func() {
		root := w.v.Root()
		done <- errors.Join(w.v.Rename(root, "g", root, "f", 0), w.v.Unlink(root, "f"))
	}()
	select {
	case err := <-done:
		w.do("rename and unlink", err)
	case <-time.After(10 * time.Second):
		t.Error("they wait for the write")
	}
	close(goOn)
	w.do("write", <-written)
	w.do("close", h.Release())
}

// A file without a name gets one by link, or goes.
func TestTmpfile(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.mkdir("d")
	long := strings.Repeat("n", 250)
	for i, name := range []string{"", "d/f", "d/" + long} {
		n, st, h, err := w.v.Tmpfile(ctx, w.must("d"), 0o640, volume.Caller{}, true)
		if errors.Is(err, unix.EOPNOTSUPP) {
			t.Skip("the backing filesystem has no O_TMPFILE")
		}
		w.do("O_TMPFILE", err)
		if st.Nlink != 0 || st.Mode&0o777 != 0o640 {
			t.Errorf("%d links, mode %o", st.Nlink, st.Mode)
		}
		want := noise(10000)
		_, err = h.Write(ctx, want, 0)
		w.do("write", err)
		if got, err := readNode(n); err != nil || !bytes.Equal(got, want) {
			t.Error("without a name:", err)
		}
		if name != "" {
			d, base := w.parent(name)
			n2, st, err := w.v.Link(ctx, n, d, base)
			w.do("link", err)
			if n2 != n || st.Nlink != 1 || n.Gone() {
				t.Errorf("another node, or %d links", st.Nlink)
			}
		}
		_, err = h.Write(ctx, want, 10000)
		w.do("write", err)
		w.do("close", errors.Join(h.Fsync(), h.Release()))
		w.v.Forget(n.ID(), 1)
		if name != "" {
			w.want(name, append(want, want...))
		}
		if got := len(w.list("d")); got != i {
			t.Errorf("%d entries", got)
		}
	}
	w.reopen(volume.Options{})
	if _, err := w.read("d/" + long); err != nil {
		t.Error(err)
	}
}

// How much space is left is looked at seldom, however often it is asked.
func TestSpaceIsLookedAtSeldom(t *testing.T) {
	var looks atomic.Int32
	w := newWorld(t, volume.Options{}.Seeing(func(op string) {
		if op == "fstatfs" {
			looks.Add(1)
		}
	}))
	before, begun := looks.Load(), time.Now()
	for range 1000 {
		w.v.NearFull()
	}
	most := 1 + int32(time.Since(begun)/(100*time.Millisecond))
	if n := looks.Load() - before; n < 1 || n > most {
		t.Errorf("%d looks, at most %d", n, most)
	}
}
