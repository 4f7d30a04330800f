//go:build linux && !portable

package volume_test

import (
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// calls are the syscalls on the ciphertext tree, but for close.
type calls struct {
	mu  sync.Mutex
	ops []string
}

func (c *calls) see(op string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ops = append(c.ops, op)
}

func (c *calls) take() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := strings.Join(c.ops, " ")
	c.ops = nil
	return s
}

// count returns how many there were of one since the last take.
func (c *calls) count(op string) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, o := range c.ops {
		if o == op {
			n++
		}
	}
	return n
}

// What operations cost on a disk with latency is how many calls they make one after the
// other.
func TestCalls(t *testing.T) {
	var c calls
	w := newWorld(t, volume.Options{KernelTimes: true}.Seeing(c.see).Torn())
	w.mkdir("d")
	w.mkdir("e")
	w.write("d/small", noise(3000))
	w.write("d/page", noise(4096))
	w.write("d/large", noise(100000))
	w.write("d/a", nil)
	w.write("d/victim", nil)
	w.write("e/z", nil)
	d, e := w.must("d"), w.must("e")
	w.must("d/victim") // as the kernel does before it renames
	w.v.Age()          // nothing is fresh, as in a program that has run for a while
	w.v.Settle()
	want := func(what, ops string) {
		t.Helper()
		if got := c.take(); got != ops {
			t.Errorf("%s: %s, want %s", what, got, ops)
		}
	}
	c.take()

	_, _, _, err := w.v.Lookup(ctx, d, "small")
	w.do("lookup", err)
	want("lookup", "fstatat")
	_, _, _, err = w.v.Lookup(ctx, d, "none")
	wantErr(t, "lookup", err, unix.ENOENT)
	want("lookup of a missing name", "fstatat")

	w.do("rename", w.v.Rename(d, "a", d, "b", 0))
	want("rename", "renameat2")
	_, _, _, err = w.v.Lookup(ctx, d, "a")
	wantErr(t, "lookup", err, unix.ENOENT)
	want("lookup of a name that was just taken away", "")
	w.do("rename", w.v.Rename(d, "b", e, "a", 0))
	want("rename to another directory", "renameat2")
	n, st, _, err := w.v.Lookup(ctx, e, "a")
	w.do("lookup", err)
	c.take()
	if _, ok := n.KeepMtime(st.Mtim); !ok {
		t.Error("a time that the disk has is written")
	}
	want("the kernel's times after a rename", "")
	if _, ok := n.KeepMtime(unix.Timespec{Sec: 1}); ok {
		t.Error("another time is not written")
	}
	w.do("rename", w.v.Rename(e, "a", d, "victim", 0))
	want("rename over a file", "openat fstat renameat2")
	w.do("unlink", w.v.Unlink(d, "victim"))
	want("unlink", "openat fstat unlinkat")

	for _, f := range []struct{ name, read string }{{"small", ""}, {"page", ""}, {"large", "pread"}} {
		n := w.must("d/" + f.name)
		c.take()
		h, err := n.Open(ctx, false)
		w.do("open", err)
		want("open "+f.name, "openat fstat pread")
		b := make([]byte, 1<<17)
		_, err = h.Read(ctx, b, 0)
		w.do("read", err)
		want("read "+f.name, f.read)
		_, err = h.Read(ctx, b, 0)
		w.do("read", err)
		want("read again "+f.name, "pread")
		w.do("close", h.Release())
		want("close "+f.name, "")
	}

	n, _, h, err := w.v.Create(ctx, d, "new", volume.NewFile{NewNode: volume.NewNode{Mode: 0o644}, Write: true})
	w.do("create", err)
	want("create", "openat fstat")
	w.do("write", h.WriteDelayed(ctx, noise(4096), 0))
	want("write a small file", "pwrite")
	now := unix.NsecToTimespec(time.Now().UnixNano())
	if _, ok := n.KeepMtime(now); !ok {
		t.Error("the time of a write is not kept for the close")
	}
	w.do("flush", h.Flush())
	want("close it", "utimensat")
	w.do("release", h.Release())
	want("release it", "")

	// A log: after the first appends, which announce that the file grows.
	h = w.opened("d/small")
	off := int64(3000)
	appends := func() {
		t.Helper()
		page := noise(int(off%4096) + 512)
		w.do("write", h.WriteDelayed(ctx, page, off-off%4096))
		off += 512
		if _, ok := h.Node().KeepMtime(unix.NsecToTimespec(time.Now().UnixNano())); !ok {
			t.Error("the time of a write is not kept for the close")
		}
		w.do("fsync", h.Fsync())
	}
	for range 3 {
		appends()
	}
	c.take()
	appends()
	want("append and fsync", "sync_file_range pwrite fsync")
	w.do("close", h.Release())
}

// A file with a name of more than 160 bytes needs its directory synced once, not with each
// fsync.
func TestCallsOfLongName(t *testing.T) {
	var c calls
	w := newWorld(t, volume.Options{}.Seeing(c.see))
	w.mkdir("d")
	name := strings.Repeat("n", 200)
	w.write("d/"+name, noise(100))
	h := w.opened("d/" + name)
	syncs := func(want int) {
		t.Helper()
		c.take()
		_, err := h.Write(ctx, noise(10), 0)
		w.do("write", err)
		w.do("fsync", h.Fsync())
		got := 0
		for op := range strings.FieldsSeq(c.take()) {
			if op == "fsync" {
				got++
			}
		}
		if got != want {
			t.Errorf("%d fsyncs, want %d", got, want)
		}
	}
	syncs(3) // the directory for its ID and for the name, and the file
	syncs(1)
	w.do("rename", w.v.Rename(w.must("d"), name, w.must("d"), name+"2", 0))
	syncs(2)
	syncs(1)
	w.do("close", h.Release())
}
