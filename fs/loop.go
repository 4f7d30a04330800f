package fs

import (
	"errors"
	"log/slog"
	"runtime"
	"slices"
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
// threads as possible take turns: mostly one, which answers what it read itself
// before it reads again. A place is the right to read. There are more places, up to
// one a processor, while requests queue up.
//
// A worker that waits keeps no place, so that no request is left unread behind
// another. It hands its place on in one of three ways. Before it begins, if
// requests of that kind have mostly taken long of late (pace). When it is about to
// wait, if it can tell: for pages that are not in the page cache, for a lock that
// another has, for a key service (yield). Or the watchdog takes the place, from a
// worker that has been busy for one or two ticks.
type loop struct {
	fd       int
	ps       *fuse.ProtocolServer
	log      *slog.Logger
	slowSync bool   // a sync waits for a disk
	timeGran uint32 // of the times that the disk keeps, in nanoseconds; 0: not told

	free    chan *place   // places handed on, to who is parked
	done    chan struct{} // closed when the connection ends
	end     sync.Once
	workers sync.WaitGroup
	parked  atomic.Int32
	without atomic.Int32 // workers that answer a request and have no place
	paces   [opcodes]pace
	buffers buffers

	mu     sync.Mutex
	places []*place

	requests requests

	gate   sync.RWMutex // held for reading by who writes notifications
	closed atomic.Bool

	awake atomic.Bool   // the watchdog
	wake  chan struct{} // wakes it
	close atomic.Int64  // until when it watches closely, in nanoseconds since begun
	begun time.Time
}

// place is the right to read. Its state is even while its worker waits for a
// request, odd while it handles one; whoever advances it owns what follows.
type place struct{ state atomic.Uint64 }

const (
	// A tick of the watchdog costs what a small request costs, so it looks often only where
	// it has missed something of late.
	watchTick    = 10 * time.Millisecond
	watchClosely = 200 * time.Microsecond
	closeAfter   = 5 * time.Millisecond // a request that has kept its place for so long
	closeFor     = time.Second
	watchIdle    = 100 * time.Millisecond // without a request, after which the watchdog sleeps

	maxParked   = 64
	mostWithout = 8192                 // requests that are answered without a place: each has a thread, and some 64 KiB
	quickRead   = 3 * time.Microsecond // a read that took less found a request waiting
	manyMore    = 32                   // so many more reads that left requests waiting than others call for another place, the reverse for one less
	bigRequest  = 64 << 10             // bytes whose sealing or opening takes as long as a wake-up
)

func newLoop(fd int, ps *fuse.ProtocolServer, log *slog.Logger) *loop {
	return &loop{fd: fd, ps: ps, log: log, free: make(chan *place), done: make(chan struct{}), wake: make(chan struct{}, 1), begun: time.Now()}
}

// start answers the kernel's INIT, the first request, and then serves.
func (l *loop) start() error {
	b := newBuffer()
	n, err := l.read(b.in)
	if err != nil {
		return err
	}
	l.answerInit(b.in[:n], b.out)
	l.workers.Go(l.watch)
	l.add()
	return nil
}

// wait returns when the connection has ended and every request was answered.
func (l *loop) wait() {
	l.workers.Wait()
	l.closed.Store(true)
	l.gate.Lock()
	defer l.gate.Unlock()
	unix.Close(l.fd)
}

func (l *loop) add() {
	p := &place{}
	l.mu.Lock()
	l.places = append(l.places, p)
	l.mu.Unlock()
	l.pass(p)
}

// retire takes a superfluous place away; false where it is the last one.
func (l *loop) retire(p *place) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.places) < 2 {
		return false
	}
	for i, q := range l.places {
		if p == q {
			l.places = append(l.places[:i:i], l.places[i+1:]...)
		}
	}
	return true
}

// pass gives a place to a parked worker, or to a new one.
func (l *loop) pass(p *place) {
	select {
	case l.free <- p:
	default:
		l.workers.Go(func() { l.work(p) })
	}
}

// work answers requests as long as there is a place for it.
func (l *loop) work(p *place) {
	for p != nil {
		l.serve(p)
		p = l.park()
	}
}

// serve reads requests and answers them until the place is another's, or not needed.
func (l *loop) serve(p *place) {
	b := l.buffers.get()
	defer func() { l.buffers.put(b) }()
	score := 0
	for {
		begun := time.Now()
		n, err := l.read(b.in)
		if err != nil {
			l.end.Do(func() { close(l.done) })
			return
		}
		if l.interrupt(b.in[:n]) {
			continue
		}
		if time.Since(begun) < quickRead && l.more() {
			score = max(score, -manyMore) + 1
		} else {
			score = min(score, manyMore) - 1
		}
		in, out := b.in[:n], b.out
		r := &request{p: p, st: p.state.Add(1)}
		switch {
		case l.takesLong(in) && l.spare():
			if small := b.small(in); small != nil {
				l.buffers.put(b) // for who reads next
				b, in, out = small, small.in, small.out
			}
			r.ahead = l.take(p, r.st)
		case score > manyMore && l.short():
			score = 0
			l.add()
		}
		if !l.awake.Load() && l.awake.CompareAndSwap(false, true) {
			l.wake <- struct{}{}
		}
		l.answer(r, in, out)
		if !p.state.CompareAndSwap(r.st, r.st+1) { // it was given away
			l.without.Add(-1)
			return
		}
		if score < -manyMore && l.retire(p) {
			return
		}
		if len(b.in) < bufferSize { // too many had no place
			b = l.buffers.get()
		}
	}
}

// park waits for a place; nil where the worker is not needed any more.
func (l *loop) park() *place {
	if l.parked.Add(1) > maxParked {
		l.parked.Add(-1)
		return nil
	}
	defer l.parked.Add(-1)
	select {
	case p := <-l.free:
		return p
	case <-l.done:
		return nil
	}
}

// more reports whether further requests wait: then several programs ask at once.
// One alone can be quick enough to ask before its last answer's worker reads.
func (l *loop) more() bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}, 0)
	return n > 0 && err == nil
}

// short reports whether another place may be made.
func (l *loop) short() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.places) < runtime.GOMAXPROCS(0)
}

// spare reports whether one more request may be answered without a place.
func (l *loop) spare() bool { return l.without.Load() < mostWithout }

// take gives the place of who handles a request in state st to somebody else;
// false if that was done before, or too many have no place.
func (l *loop) take(p *place, st uint64) bool {
	if st%2 == 0 || !l.spare() || !p.state.CompareAndSwap(st, st+1) {
		return false
	}
	l.without.Add(1)
	l.pass(p)
	return true
}

// yield gives the place of the worker that handles this request to another: it
// is about to wait.
func (l *loop) yield(unique uint64) {
	if r := l.requests.get(unique); r != nil {
		r.yielded.Store(true)
		l.take(r.p, r.st)
	}
}

// watch takes a place from a worker that has handled one request for a tick, and
// sleeps while nothing is asked. It sleeps by a syscall: a timer of the runtime that
// comes so often makes processors look for work that there is not, and small
// requests take twice the time.
func (l *loop) watch() {
	last := map[*place]uint64{}
	for {
		select {
		case <-l.wake:
		case <-l.done:
			return
		}
		for idle := time.Duration(0); idle < watchIdle; {
			if l.look(last) {
				idle = 0
			}
			tick := watchTick
			if time.Since(l.begun) < time.Duration(l.close.Load()) {
				tick = watchClosely
			}
			ts := unix.NsecToTimespec(int64(tick))
			unix.Nanosleep(&ts, nil)
			idle += tick
		}
		clear(last)
		l.awake.Store(false)
		// A request that came just now may have counted on being watched.
		if l.busy() && l.awake.CompareAndSwap(false, true) {
			l.wake <- struct{}{}
		}
	}
}

// busy reports whether a request is being handled by who has a place.
func (l *loop) busy() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.places, func(p *place) bool { return p.state.Load()%2 == 1 })
}

// look compares with the last tick; false where nothing has happened since.
func (l *loop) look(last map[*place]uint64) (busy bool) {
	l.mu.Lock()
	places := append([]*place(nil), l.places...)
	l.mu.Unlock()
	for _, p := range places {
		st := p.state.Load()
		was, known := last[p]
		busy = busy || !known || st != was || st%2 == 1
		if known && st == was {
			l.take(p, st)
		}
		last[p] = p.state.Load()
	}
	if len(last) > 2*len(places)+8 {
		clear(last) // of places that were retired
	}
	return busy
}

// Opcodes of the kernel's fuse.h: of what may wait for the disk, of what asks for bytes,
// and of who gives up.
const (
	opRead, opWrite, opFsync, opFsyncDir, opCopyFileRange = 15, 16, 20, 30, 47
	opGetXattr, opListXattr                               = 22, 23
	opReadDir, opReadDirPlus                              = 28, 44
	opInterrupt, opIoctl                                  = 36, 39

	opcodes = 64 // more than there are
)

// takesLong reports whether a request is expected to take longer than handing
// the place on.
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
	longAfter = 150 * time.Microsecond // some ten times what it costs to hand a place on
	paceUnit  = 1 << 10

	// A list of entries with their attributes takes long by what the processor does.
	bytesOfEntry = 160
	lookupTakes  = 20 * time.Microsecond
	paceLong     = paceUnit / 8 // from this share on it is better to hand the place on first
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
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOENT): // ENOENT: it was interrupted meanwhile
		case err != nil: // ENODEV: unmounted
			if !errors.Is(err, unix.ENODEV) {
				l.log.Error("reading requests failed", "error", err)
			}
			return 0, err
		case n >= int(unsafe.Sizeof(fuse.InHeader{})):
			return n, nil
		}
	}
}

// answer handles a request, writes the reply, and notes how long the request has kept its
// place, or would have.
func (l *loop) answer(r *request, in, out []byte) {
	begun := time.Now()
	n := l.handle(r, in, out)
	took := time.Since(begun)
	if took > closeAfter && !r.ahead && !r.yielded.Load() {
		l.close.Store(int64(begun.Sub(l.begun) + took + closeFor))
	}
	if h := (*fuse.InHeader)(unsafe.Pointer(&in[0])); len(in) <= bigRequest && n <= bigRequest {
		if h.Opcode == opReadDirPlus {
			took -= time.Duration(n/bytesOfEntry) * lookupTakes
		}
		l.paces[h.Opcode%opcodes].note(took > longAfter && !r.yielded.Load())
	}
	l.reply(in, out[:n])
}

// answerInit is answer of the INIT request. The kernel cuts the times that it keeps to the
// granularity of the disk, or they would change when it forgets a file: go-fuse has no
// option for that field.
func (l *loop) answerInit(in, out []byte) {
	n := l.handle(&request{p: &place{}}, in, out)
	const header = unsafe.Sizeof(fuse.OutHeader{})
	if h := (*fuse.OutHeader)(unsafe.Pointer(&out[0])); l.timeGran != 0 && h.Status == 0 && uintptr(n) >= header+unsafe.Offsetof(fuse.InitOut{}.TimeGran)+4 {
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
		case err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV): // whoever asked is gone
			l.log.Error("answering a request failed", "opcode", (*fuse.InHeader)(unsafe.Pointer(&in[0])).Opcode, "error", err)
		}
		return
	}
}
