package fs

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// waiting is a filesystem whose reads and lookups do not return before they are let.
type waiting struct {
	fuse.RawFileSystem
	held  chan struct{}
	waits func(unique uint64)
	asked atomic.Uint64 // the last read that has called waits
}

func (w *waiting) Read(_ <-chan struct{}, in *fuse.ReadIn, b []byte) (fuse.ReadResult, fuse.Status) {
	w.waits(in.Unique)
	w.asked.Store(in.Unique)
	<-w.held
	return fuse.ReadResultData(b[:8]), fuse.OK
}

func (w *waiting) Lookup(_ <-chan struct{}, _ *fuse.InHeader, _ string, out *fuse.EntryOut) fuse.Status {
	<-w.held
	return fuse.OK
}

func (w *waiting) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	return fuse.OK
}

// device is the kernel's end of a connection.
type device struct {
	t      *testing.T
	fd     int
	unique uint64
	l      *loop
	w      *waiting
	hold   func() // lets all that waits go on
}

// newDevice begins a connection. An answer that does not come within a long time is an error.
func newDevice(t *testing.T, configure ...func(*loop)) *device {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	limit := unix.Timeval{Sec: 20}
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		t.Fatal(err)
	}
	w := &waiting{RawFileSystem: fuse.NewDefaultRawFileSystem(), held: make(chan struct{})}
	d := &device{t: t, fd: pair[0], w: w, hold: sync.OnceFunc(func() { close(w.held) })}
	d.l, err = newLoop(pair[1], fuse.NewProtocolServer(w, &fuse.MountOptions{MaxWrite: maxWrite}),
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w.waits = d.l.yield
	for _, f := range configure {
		f(d.l)
	}
	const opInit = 26
	init := &fuse.InitIn{Major: 7, Minor: 36, MaxReadAhead: 1 << 17}
	init.Opcode = opInit
	d.send(&init.InHeader, unsafe.Sizeof(*init))
	if err := d.l.start(); err != nil {
		t.Fatal(err)
	}
	if got := d.answered(); got != d.unique {
		t.Fatalf("INIT is answered as %d", got)
	}
	t.Cleanup(func() {
		d.hold()
		unix.Close(d.fd)
		d.l.wait()
	})
	return d
}

// send sends a request of n bytes, and the data that follows it.
func (d *device) send(h *fuse.InHeader, size uintptr, more ...byte) uint64 {
	d.t.Helper()
	d.unique += 2
	h.Unique, h.Length = d.unique, uint32(size)+uint32(len(more))
	b := append([]byte(nil), unsafe.Slice((*byte)(unsafe.Pointer(h)), size)...)
	if _, err := unix.Write(d.fd, append(b, more...)); err != nil {
		d.t.Fatal(err)
	}
	return d.unique
}

// answered returns which request the next answer is for.
func (d *device) answered() uint64 {
	d.t.Helper()
	b := make([]byte, 1<<16)
	n, err := unix.Read(d.fd, b)
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Read(d.fd, b)
	}
	if err != nil || n < int(unsafe.Sizeof(fuse.OutHeader{})) {
		d.t.Fatalf("no answer: %d bytes, %v", n, err)
	}
	return (*fuse.OutHeader)(unsafe.Pointer(&b[0])).Unique
}

func (d *device) read() uint64 {
	in := &fuse.ReadIn{Size: 4096}
	in.Opcode = opRead
	return d.send(&in.InHeader, unsafe.Sizeof(*in))
}

func (d *device) lookup() uint64 {
	h := &fuse.InHeader{Opcode: 1, NodeId: 1}
	return d.send(h, unsafe.Sizeof(*h), 'x', 0)
}

func (d *device) statfs() uint64 {
	h := &fuse.InHeader{Opcode: 17, NodeId: 1}
	return d.send(h, unsafe.Sizeof(*h))
}

// However many requests wait, and whether or not they say so, the next one is answered.
func TestNothingWaitsBehindOthers(t *testing.T) {
	d := newDevice(t)
	waits := map[uint64]bool{}
	for i := range 40 {
		if waits[d.lookup()] = true; i%2 == 0 {
			waits[d.read()] = true
		}
		if want := d.statfs(); d.answered() != want {
			t.Fatal("a request that waits was answered")
		}
	}
	d.soon("as many requests are being answered as wait",
		func() bool { return int(d.l.queue.busy.Load()) == len(waits) })
	d.hold()
	for range len(waits) {
		got := d.answered()
		if !waits[got] {
			t.Errorf("request %d is answered twice, or was never made", got)
		}
		delete(waits, got)
	}
	// Now nothing takes long, and what reads besides one ends with its next request. A worker that was slow
	// to come back from its answer may read a little later.
	d.soon("as many workers read as may", func() bool {
		if want := d.statfs(); d.answered() != want {
			t.Fatal("another request was answered")
		}
		return d.l.long.Load() == 0 && d.l.reading.Load() <= d.l.most.Load()
	})
}

// soon waits for a condition that comes true a moment after an answer.
func (d *device) soon(what string, f func() bool) {
	d.t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			d.t.Fatalf("it never comes true that %s", what)
		}
	}
}

// A kind of request that takes long is expected to, even while none of it has ended: then
// another worker reads before it begins, and the watchdog is not needed.
func TestLongIsExpected(t *testing.T) {
	d := newDevice(t)
	h := &fuse.InHeader{Opcode: 1}
	lookup := unsafe.Slice((*byte)(unsafe.Pointer(h)), unsafe.Sizeof(*h))
	begun := 0
	for ; begun < 20 && !d.l.takesLong(lookup); begun++ {
		d.lookup()
		d.soon("it is answered, and another worker reads", func() bool {
			return int(d.l.queue.busy.Load()) == begun+1 && d.l.reading.Load() > 0
		})
	}
	if begun > 5 {
		t.Errorf("it took %d lookups that hang until another is expected to", begun)
	}
	d.hold()
	for range begun {
		d.answered()
	}
	for range 200 {
		d.lookup()
		d.answered()
	}
	if d.l.takesLong(lookup) {
		t.Error("lookups are expected to take long, of which 200 were quick")
	}
}

// The runtime has more processors while requests take long, and as many as before afterwards.
func TestProcs(t *testing.T) {
	was := runtime.GOMAXPROCS(0)
	synctest.Test(t, func(t *testing.T) {
		p := newProcs()
		defer p.set(false)
		long := uint64(0)
		see := func(each uint64, during time.Duration) {
			for begun := time.Now(); time.Since(begun) < during; time.Sleep(watchTick) {
				long += each
				p.see(long)
			}
		}
		for _, c := range []struct {
			each   uint64
			during time.Duration
			want   int
		}{{0, time.Second, was}, {2, 2 * procsEvery, 2 * was}, {0, singleAfter / 2, 2 * was},
			{0, singleAfter, was}, {2, time.Minute, 2 * was}} {
			see(c.each, c.during)
			if n := runtime.GOMAXPROCS(0); n != c.want {
				t.Errorf("after %d long requests a tick for %v: %d processors, want %d", c.each,
					c.during, n, c.want)
			}
		}
	})
	if n := runtime.GOMAXPROCS(0); n != was {
		t.Errorf("%d processors afterwards, want %d", n, was)
	}
}

func TestThreadLimit(t *testing.T) {
	mount := t.TempDir()
	for dir, n := range map[string]string{"system.slice/a": "max", "system.slice": "1000",
		"b": "100000", "pids/c": "400"} {
		if err := os.MkdirAll(filepath.Join(mount, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(mount, dir, "pids.max"), []byte(n+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for cgroups, want := range map[string]int32{
		"0::/system.slice/a\n": 750,
		"0::/b\n":              mostThreads,
		"0::/none\n":           mostThreads,
		"":                     mostThreads,
		"12:cpu,cpuacct:/system.slice\n11:pids:/c\n0::/\n": 300,
	} {
		if got := cgroupLimit(cgroups, mount); got != want {
			t.Errorf("%q: %d, want %d", cgroups, got, want)
		}
	}
}

// When as many requests wait as may, a further one waits until one is answered, but not what
// others may wait for.
func TestMostBusy(t *testing.T) {
	d := newDevice(t, func(l *loop) { l.queue.most = 5 })
	waits := map[uint64]bool{}
	for range 5 {
		waits[d.lookup()] = true
	}
	d.soon("five requests are being answered", func() bool { return d.l.queue.busy.Load() == 5 })
	var further []uint64
	for range 20 {
		further = append(further, d.statfs())
	}
	d.soon("the others are kept", func() bool { return d.l.queue.waiting.Load() == 20 })
	w := &fuse.WriteIn{Size: 1}
	w.Opcode = opWrite
	if want := d.send(&w.InHeader, unsafe.Sizeof(*w), 'x'); d.answered() != want {
		t.Error("a write waits for those that wait")
	}
	d.hold()
	for range 25 {
		got := d.answered()
		if waits[got] {
			delete(waits, got)
		} else if i := slices.Index(further, got); i >= 0 {
			further = slices.Delete(further, i, i+1)
		} else {
			t.Errorf("request %d is answered twice, or was never made", got)
		}
	}
	d.soon("nothing is being answered",
		func() bool { return d.l.queue.busy.Load() == 0 && d.l.queue.waiting.Load() == 0 })
	if want := d.statfs(); d.answered() != want {
		t.Error("another request was answered")
	}
}

// Requests that are admitted and those that are kept are all answered, in any order.
func TestQueue(t *testing.T) {
	q := queue{most: 3}
	h := &fuse.InHeader{Opcode: 1}
	in := unsafe.Slice((*byte)(unsafe.Pointer(h)), unsafe.Sizeof(*h))
	var answering, most, all atomic.Int32
	work := func() {
		for more := true; more; more = q.done() != nil {
			n := answering.Add(1)
			for was := most.Load(); n > was && !most.CompareAndSwap(was, n); was = most.Load() {
			}
			runtime.Gosched()
			answering.Add(-1)
			all.Add(1)
		}
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20000 {
				if q.admit(in) {
					work()
				}
			}
		})
	}
	wg.Wait()
	if n := all.Load(); n != 8*20000 || q.busy.Load() != 0 || len(q.kept) != 0 {
		t.Errorf("%d requests were answered, %d are busy, %d are kept", n, q.busy.Load(), len(q.kept))
	}
	if most.Load() > 3 {
		t.Errorf("%d were answered at once", most.Load())
	}
}

// A read that goes to the disk lets another worker read only if the disk is slow.
func TestMisses(t *testing.T) {
	d := newDevice(t)
	d.w.waits = d.l.yieldForDisk
	read := func(wait time.Duration) (yielded bool) {
		d.read()
		var r *request
		d.soon("the read asks the disk", func() bool {
			r = d.l.requests.get(d.unique)
			return r != nil && d.w.asked.Load() == d.unique
		})
		time.Sleep(wait)
		yielded = r.yielded.Load()
		d.w.held <- struct{}{}
		d.answered()
		return yielded
	}
	if read(0) {
		t.Error("the first one expects a slow disk")
	}
	for range 5 {
		read(4 * longAfter)
	}
	if !read(4 * longAfter) {
		t.Error("after five slow ones another is expected to be quick")
	}
}

// A request that says that it waits for another one of the same file does not count as slow.
func TestBehindDoesNotCount(t *testing.T) {
	for _, behind := range []bool{false, true} {
		d := newDevice(t)
		d.w.waits = func(uint64) {}
		if behind {
			d.w.waits = d.l.behind
		}
		for range 20 {
			d.read()
			d.soon("the read is being answered", func() bool { return d.w.asked.Load() == d.unique })
			time.Sleep(4 * longAfter)
			d.w.held <- struct{}{}
			d.answered()
		}
		d.soon("the last one has counted", func() bool { return d.l.requests.get(d.unique) == nil })
		if long := d.l.paces[opRead].long(); long == behind {
			t.Errorf("behind another: %v, but reads are taken for slow: %v", behind, long)
		}
	}
}
