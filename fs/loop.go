package fs

import (
	"errors"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// loop reads requests from the device and answers them.
//
// What a FUSE request costs is one sleeping processor waking another, so as few
// workers as possible take turns: mostly one, which answers what it read itself before
// it reads again. While requests queue up there are more, one for each processor.
//
// A request that waits must not keep the next one from being read. So a worker sees to it that
// another reads, in one of three ways. Before it begins, if requests of that kind have mostly taken
// long of late (pace). When it is about to wait, if it can tell: for pages that are not in the page
// cache, if the disk mostly takes long, for a key service (yield). Or the watchdog finds that
// nobody has read for one or two ticks. While something takes long, some more workers read, so that
// one that begins what takes long need not call another first.
type loop struct {
	fd       int
	ps       *fuse.ProtocolServer
	log      *slog.Logger
	slowSync bool   // a sync waits for a disk
	timeGran uint32 // of the times that the disk keeps, in nanoseconds; 0: not told

	readers
	watchdog

	done    chan struct{} // closed when the connection ends
	ended   int           // an eventfd, written then
	end     sync.Once
	workers sync.WaitGroup

	paces    [opcodes]pace
	misses   pace // of reads, from where the disk is asked
	meter    meter
	buffers  buffers
	requests requests
	queue    queue

	gate   sync.RWMutex // held for reading while notifications are written
	closed atomic.Bool
}

// readers are the workers that read from the device.
type readers struct {
	reading atomic.Int32  // workers that wait for a request, or are about to
	reads   atomic.Uint64 // requests so far
	most    atomic.Int32  // workers that read while nothing takes long, at most procs
	procs   int32         // processors
	long    atomic.Int32  // requests under way that were expected to wait long
	longs   atomic.Uint64 // all of these so far
	free    chan struct{} // calls a parked worker to read
	parked  atomic.Int32
}

// watchdog finds out that nobody reads.
type watchdog struct {
	awake   atomic.Bool
	wake    chan struct{} // wakes it
	begun   time.Time
	closely atomic.Int64 // until when it looks often, in nanoseconds since begun
}

const (
	// A tick of the watchdog costs what a small request costs, so it looks often only where
	// it has missed something of late.
	watchTick    = 10 * time.Millisecond
	watchClosely = 200 * time.Microsecond
	closeFor     = time.Second            // after a miss the watchdog looks closely
	watchIdle    = 100 * time.Millisecond // without a request, after which the watchdog sleeps

	longReaders = 4 // workers that read while something takes long
	maxParked   = 64
	quickRead   = 3 * time.Microsecond // a read that took less found a request waiting
	manyMore    = 32                   // so many more reads that left requests waiting than others call for another worker, the reverse for one less
	bigRequest  = 64 << 10             // bytes whose sealing or opening takes as long as a wake-up
)

func newLoop(fd int, ps *fuse.ProtocolServer, log *slog.Logger) (*loop, error) {
	ended, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	l := &loop{fd: fd, ended: ended, ps: ps, log: log, done: make(chan struct{}),
		queue: queue{most: threadLimit()}}
	l.free, l.procs = make(chan struct{}), int32(runtime.GOMAXPROCS(0))
	l.wake, l.begun = make(chan struct{}, 1), time.Now()
	l.most.Store(1)
	return l, nil
}

// start answers the kernel's INIT, the first request, and then serves.
func (l *loop) start() error {
	b := newBuffer()
	n, err := l.read(b.in)
	if err != nil {
		return err
	}
	l.answerInit(b.in[:n], b.answer(b.in[:n]))
	l.workers.Go(l.watch)
	l.needReader()
	return nil
}

// wait returns when the connection has ended and every request was answered.
func (l *loop) wait() {
	l.workers.Wait()
	l.closed.Store(true)
	l.gate.Lock()
	defer l.gate.Unlock()
	unix.Close(l.fd)
	unix.Close(l.ended)
}

// needReader lets another worker read, if none does.
func (l *loop) needReader() { l.addReader(1) }

// addReader lets another worker read, if fewer than most do.
func (l *loop) addReader(most int32) {
	if !l.mayRead(most) {
		return
	}
	select {
	case l.free <- struct{}{}:
	default:
		l.workers.Go(l.work)
	}
}

// hasEnded tells those that wait for something else than requests.
func (l *loop) hasEnded() {
	close(l.done)
	unix.Write(l.ended, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // cannot fail: nothing else is written
}

// mayRead counts one more worker that reads, if fewer than most do.
func (l *loop) mayRead(most int32) bool {
	for {
		n := l.reading.Load()
		if n >= most {
			return false
		}
		if l.reading.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// work reads requests and answers them, and parks in between.
func (l *loop) work() {
	for l.serve() && l.park() {
	}
}

// serve reads requests and answers them until others do; false if the connection has ended.
func (l *loop) serve() bool {
	b := l.buffers.get()
	defer func() { l.buffers.put(b) }()
	score := 0
	for {
		begun := time.Now()
		n, err := l.read(b.in)
		if err != nil {
			l.end.Do(l.hasEnded)
			return false
		}
		if l.interrupt(b.in[:n]) {
			continue
		}
		if time.Since(begun) < quickRead && l.more() {
			score = max(score, -manyMore) + 1
		} else {
			score = min(score, manyMore) - 1
		}
		l.reads.Add(1)
		in, r := b.in[:n], &request{}
		if !l.queue.admit(in) {
			continue
		}
		l.reading.Add(-1)
		switch most := l.most.Load(); {
		case l.takesLong(in):
			// A request with much data keeps the processor busy for long: more workers would
			// only be in each other's way.
			if r.long = true; len(in) <= bigRequest && answerSize(in) <= bigRequest {
				r.waits = true
				l.long.Add(1)
				l.longs.Add(1)
			}
			if s := small(in); s != nil {
				l.buffers.put(b) // for the next reader
				b, in = s, s.in[:n]
			}
			l.needReader()
		case score > manyMore && most < l.procs:
			score = 0
			l.most.CompareAndSwap(most, most+1)
			l.addReader(most)
		case score < -manyMore && most > 1:
			score = 0
			l.most.CompareAndSwap(most, most-1)
		}
		if !l.awake.Load() && l.awake.CompareAndSwap(false, true) {
			l.wake <- struct{}{}
		}
		l.answer(r, in, b.answer(in))
		if r.waits {
			l.long.Add(-1)
		}
		l.answerQueued()
		most := l.most.Load()
		if r.waits || l.long.Load() > 0 {
			most = longReaders
		}
		if !l.mayRead(most) {
			return true
		}
		if len(b.in) < bufferSize {
			l.buffers.put(b)
			b = l.buffers.get()
		}
	}
}

// answerQueued answers requests that had to wait until others were answered.
func (l *loop) answerQueued() {
	for in := l.queue.done(); in != nil; in = l.queue.done() {
		b := small(in)
		if b == nil {
			b = newBuffer()
		}
		l.needReader()
		l.answer(&request{}, in, b.answer(in))
		l.buffers.put(b)
	}
}

// park waits until a worker is needed; false if this one is not any more.
func (l *loop) park() bool {
	if l.parked.Add(1) > maxParked {
		l.parked.Add(-1)
		return false
	}
	defer l.parked.Add(-1)
	select {
	case <-l.free:
		return true
	case <-l.done:
		return false
	}
}

// more reports whether further requests wait: then several programs ask at once.
// One alone can be quick enough to ask before its last answer's worker reads.
func (l *loop) more() bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}, 0)
	return n > 0 && err == nil
}

// yield lets another worker read: the one that answers this request is about to wait.
func (l *loop) yield(unique uint64) {
	if r := l.requests.get(unique); r != nil {
		r.yielded.Store(true)
	}
	l.needReader()
}

// yieldForDisk is yield before a read that is not answered from the page cache: nothing is
// done if those have been quick of late.
func (l *loop) yieldForDisk(unique uint64) {
	r := l.requests.get(unique)
	if r == nil {
		return
	}
	if r.missed.IsZero() {
		r.missed = time.Now()
	}
	if l.misses.long() {
		r.yielded.Store(true)
		l.needReader()
	}
}

// behind says that a request waits for another one of the same file: it does not count for
// the pace of its kind.
func (l *loop) behind(unique uint64) {
	if r := l.requests.get(unique); r != nil {
		r.noted.Store(true)
	}
}

// sleep waits for d, or until the connection has ended, and reports whether it has. It
// does so by a syscall: a timer of the runtime that comes so often makes processors look for
// work that there is not, and small requests take twice the time.
func (l *loop) sleep(d time.Duration) (ended bool) {
	t := unix.NsecToTimespec(int64(d))
	n, err := unix.Ppoll([]unix.PollFd{{Fd: int32(l.ended), Events: unix.POLLIN}}, &t, nil)
	return err == nil && n > 0
}

// watch looks whether somebody reads, and sleeps while nothing is asked.
func (l *loop) watch() {
	procs := newProcs()
	for {
		select {
		case <-l.wake:
		case <-l.done:
			return
		}
		var last uint64
		tick := watchTick
		for idle := time.Duration(0); idle < watchIdle; {
			procs.see(l.longs.Load())
			reads, reading := l.reads.Load(), l.reading.Load() > 0
			if reads != last || !reading {
				idle = 0
			}
			if reads == last && !reading {
				l.stalled(tick)
			}
			last = reads
			tick = watchTick
			if time.Since(l.begun) < time.Duration(l.closely.Load()) {
				tick = watchClosely
			}
			if l.sleep(tick) {
				procs.set(false)
				return
			}
			idle += tick
		}
		procs.set(false)
		l.awake.Store(false)
		// A request that came just now may have counted on being watched.
		if l.reading.Load() == 0 && l.awake.CompareAndSwap(false, true) {
			l.wake <- struct{}{}
		}
	}
}

// Opcodes of the kernel's fuse.h: of requests that may wait for the disk, that ask for bytes,
// and that end another one.
const (
	opRead, opWrite, opFsync, opFsyncDir, opCopyFileRange = 15, 16, 20, 30, 47
	opGetXattr, opListXattr                               = 22, 23
	opReadDir, opReadDirPlus                              = 28, 44
	opSetLkw, opInterrupt, opIoctl                        = 33, 36, 39
	opForget, opBatchForget, opRelease, opReleaseDir      = 2, 42, 18, 29
	opSetAttr, opFlush, opDestroy                         = 4, 25, 38

	opcodes = 64 // more than there are
)

// takesLong reports whether a request is expected to take longer than to let another worker
// read.
func (l *loop) takesLong(in []byte) bool {
	h := (*fuse.InHeader)(unsafe.Pointer(&in[0]))
	switch h.Opcode {
	case opFsync, opFsyncDir:
		if l.slowSync {
			return true
		}
	case opCopyFileRange:
		return true
	case opWrite, opRead:
		if max(len(in), answerSize(in)) > bigRequest {
			return true
		}
	}
	return l.paces[h.Opcode%opcodes].long()
}

// A pace is how long requests of one kind take, on this disk and of late: the share of those
// that take longer than longAfter, in units of 1/paceUnit.
type pace struct{ share atomic.Int32 }

const (
	longAfter = 150 * time.Microsecond // some ten times what it costs to let another read
	paceUnit  = 1 << 10

	// A list of entries with their attributes takes long by what the processor does.
	bytesOfEntry = 160
	lookupTakes  = 20 * time.Microsecond
	paceLong     = paceUnit / 8 // from this share on it is better to let another read first
)

// note counts a request. Two at once may count as one.
func (p *pace) note(long bool) {
	was, is := p.share.Load(), int32(0)
	if long {
		is = paceUnit
	}
	if next := was + (is-was)/16; next != was {
		p.share.Store(next)
	}
}

func (p *pace) long() bool { return p.share.Load() >= paceLong }

// read reads one request, at least its header.
func (l *loop) read(b []byte) (int, error) {
	for {
		n, err := unix.Read(l.fd, b)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN), errors.Is(err,
			unix.ENOENT): // ENOENT: it was interrupted meanwhile
		case err != nil: // ENODEV: unmounted
			if !errors.Is(err, unix.ENODEV) {
				l.log.Error("reading requests failed", "error", err)
			}
			return 0, err
		case n >= int(unsafe.Sizeof(fuse.InHeader{})):
			return n, nil
		case n == 0: // the other end of a socket was closed
			return 0, unix.ENODEV
		}
	}
}

// answer handles a request, writes the reply, and notes how long it has taken: as quick, if another
// worker was called before it waited.
func (l *loop) answer(r *request, in, out []byte) {
	r.begun = time.Now()
	n := l.handle(r, in, out)
	took := time.Since(r.begun)
	l.count((*fuse.InHeader)(unsafe.Pointer(&in[0])), took, len(in), out[:n])
	if r.opcode == opRead && !r.missed.IsZero() {
		l.misses.note(time.Since(r.missed) > longAfter)
	}
	if r.opcode == opReadDirPlus {
		took -= time.Duration(n/bytesOfEntry) * lookupTakes
	}
	if len(in) <= bigRequest && n <= bigRequest && !r.noted.Load() {
		l.paces[r.opcode%opcodes].note(took > longAfter && !r.yielded.Load())
	}
	l.reply(in, out[:n])
}

// count counts a request of inLen bytes and its answer.
func (l *loop) count(h *fuse.InHeader, took time.Duration, inLen int, out []byte) {
	const outHeader = int(unsafe.Sizeof(fuse.OutHeader{}))
	status := int32(0)
	if len(out) >= outHeader {
		status = (*fuse.OutHeader)(unsafe.Pointer(&out[0])).Status
	}
	l.meter.note(h.Opcode, took, status)
	switch {
	case status != 0:
	case h.Opcode == opRead:
		n := uint64(len(out) - outHeader)
		l.meter.read.Add(n)
		l.meter.hot.note(h.NodeId, n)
	case h.Opcode == opWrite:
		n := uint64(max(0, inLen-int(unsafe.Sizeof(fuse.WriteIn{}))))
		l.meter.written.Add(n)
		l.meter.hot.note(h.NodeId, n)
	}
}

// stalled is called by the watchdog when no worker has read for a tick. Requests that are
// older than that take long, and so may the next ones of their kind. A long list of entries
// takes the processor's time, not the disk's.
func (l *loop) stalled(tick time.Duration) {
	l.requests.stuck(tick, func(r *request) {
		if r.opcode == opReadDirPlus {
			return
		}
		l.closely.Store(int64(time.Since(l.begun) + closeFor))
		if !r.noted.Swap(true) {
			l.paces[r.opcode%opcodes].note(true)
		}
	})
	l.needReader()
}

// answerInit is answer of the INIT request. The kernel cuts the times that it keeps to the
// granularity of the disk, or they would change when it forgets a file: go-fuse has no
// option for that field.
func (l *loop) answerInit(in, out []byte) {
	n := l.handle(&request{}, in, out)
	const header = unsafe.Sizeof(fuse.OutHeader{})
	if h := (*fuse.OutHeader)(unsafe.Pointer(&out[0])); l.timeGran != 0 && h.Status == 0 &&
		uintptr(n) >= header+unsafe.Offsetof(fuse.InitOut{}.TimeGran)+4 {
		(*fuse.InitOut)(unsafe.Pointer(&out[header])).TimeGran = l.timeGran
	}
	l.reply(in, out[:n])
}

// handle handles a request and returns the length of the reply in out, 0 if there is none.
func (l *loop) handle(r *request, in, out []byte) int {
	h := (*fuse.InHeader)(unsafe.Pointer(&in[0]))
	unique := h.Unique
	l.requests.begin(h, r)
	n, s := l.ps.HandleRequest([][]byte{in}, [][]byte{out})
	l.requests.end(unique)
	if n == 0 && !s.Ok() {
		o := (*fuse.OutHeader)(unsafe.Pointer(&out[0]))
		*o = fuse.OutHeader{Length: uint32(unsafe.Sizeof(*o)), Status: -int32(s), Unique: unique}
		n = int(o.Length)
	}
	return n
}

// reply writes a reply, if there is one: FORGET and the like have none.
func (l *loop) reply(in, out []byte) {
	for len(out) > 0 {
		_, err := unix.Write(l.fd, out)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil && !errors.Is(err, unix.ENOENT) &&
			!errors.Is(err, unix.ENODEV): // whoever asked is gone
			l.log.Error("answering a request failed", "opcode",
				(*fuse.InHeader)(unsafe.Pointer(&in[0])).Opcode, "error", err)
		}
		return
	}
}
