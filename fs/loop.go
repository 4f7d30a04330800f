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
// before it reads again. A place is the right to read. Who is about to do
// something slow, or to wait for a key service, hands its place on; the watchdog
// takes it from who has been busy for long, so that a stalled disk keeps nobody
// else waiting. There are more places, up to one a processor, while requests
// queue up.
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

	mu     sync.Mutex
	places []*place

	requests requests

	gate   sync.RWMutex // held for reading by who writes notifications
	closed atomic.Bool

	awake atomic.Bool   // the watchdog
	wake  chan struct{} // wakes it
}

// place is the right to read. Its state is even while its worker waits for a
// request, odd while it handles one; whoever advances it owns what follows.
type place struct {
	state  atomic.Uint64
	unique atomic.Uint64 // the request that is handled
}

const (
	// watchTick is long, since each tick disturbs the others: at 1 ms, small
	// requests took twice the time.
	watchTick  = 50 * time.Millisecond
	maxParked  = 4
	quickRead  = 3 * time.Microsecond // a read that took less found a request waiting
	manyMore   = 32                   // so many more reads that left requests waiting than others call for another place, the reverse for one less
	bigRequest = 64 << 10             // bytes whose sealing or opening takes as long as a wake-up
	bufferSize = maxWrite + 8192      // a request, or its answer, with its header
)

func newLoop(fd int, ps *fuse.ProtocolServer, log *slog.Logger) *loop {
	return &loop{fd: fd, ps: ps, log: log, free: make(chan *place), done: make(chan struct{}), wake: make(chan struct{}, 1)}
}

// start answers the kernel's INIT, the first request, and then serves.
func (l *loop) start() error {
	in, out := make([]byte, bufferSize), make([]byte, bufferSize)
	n, err := l.read(in)
	if err != nil {
		return err
	}
	l.answerInit(in[:n], out)
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

func (l *loop) work(p *place) {
	in, out := make([]byte, bufferSize), make([]byte, bufferSize)
	score := 0
	for {
		begun := time.Now()
		n, err := l.read(in)
		if err != nil {
			l.end.Do(func() { close(l.done) })
			return
		}
		if l.interrupt(in[:n]) {
			continue
		}
		if time.Since(begun) < quickRead && l.more() {
			score = max(score, -manyMore) + 1
		} else {
			score = min(score, manyMore) - 1
		}
		p.unique.Store((*fuse.InHeader)(unsafe.Pointer(&in[0])).Unique)
		st := p.state.Add(1)
		mine := true
		switch {
		case l.takesLong(in[:n]):
			mine = !l.take(p, st)
		case score > manyMore && l.short():
			score = 0
			l.add()
		}
		if mine && !l.awake.Load() && l.awake.CompareAndSwap(false, true) {
			l.wake <- struct{}{}
		}
		l.answer(in[:n], out)
		if mine {
			mine = p.state.CompareAndSwap(st, st+1) // or the watchdog has given it away
		}
		if mine && score < -manyMore && l.retire(p) {
			mine = false
		}
		if !mine {
			if p = l.park(); p == nil {
				return
			}
			score = 0
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

// take gives the place of who handles a request in state st to somebody else;
// false where that was done before.
func (l *loop) take(p *place, st uint64) bool {
	if st%2 == 0 || !p.state.CompareAndSwap(st, st+1) {
		return false
	}
	l.pass(p)
	return true
}

// yield gives the place of the worker that handles this request to another: it
// is about to wait.
func (l *loop) yield(unique uint64) {
	l.mu.Lock()
	places := append([]*place(nil), l.places...)
	l.mu.Unlock()
	for _, p := range places {
		if st := p.state.Load(); p.unique.Load() == unique {
			l.take(p, st)
		}
	}
}

// watch takes a place from a worker that has handled one request for a tick, and
// sleeps while nothing is asked.
func (l *loop) watch() {
	t := time.NewTicker(time.Hour)
	defer t.Stop()
	last := map[*place]uint64{}
	for {
		select {
		case <-l.wake:
			t.Reset(watchTick)
		case <-l.done:
			return
		case <-t.C:
			if l.look(last) {
				continue
			}
			clear(last)
			l.awake.Store(false)
			// A request that came just now may have counted on being watched.
			if l.busy() && l.awake.CompareAndSwap(false, true) {
				continue
			}
			t.Reset(time.Hour)
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

// Opcodes of the kernel's fuse.h: of what may wait for the disk, and of who gives up.
const (
	opRead, opWrite, opFsync, opFsyncDir, opCopyFileRange = 15, 16, 20, 30, 47
	opInterrupt                                           = 36
)

// takesLong reports whether a request is expected to take longer than handing
// the place on.
func (l *loop) takesLong(in []byte) bool {
	h := (*fuse.InHeader)(unsafe.Pointer(&in[0]))
	switch h.Opcode {
	case opFsync, opFsyncDir:
		return l.slowSync
	case opCopyFileRange:
		return true
	case opWrite:
		return len(in) > bigRequest
	case opRead:
		return len(in) >= int(unsafe.Sizeof(fuse.ReadIn{})) && (*fuse.ReadIn)(unsafe.Pointer(&in[0])).Size > bigRequest
	}
	return false
}

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

// answer handles a request and writes the reply.
func (l *loop) answer(in, out []byte) { l.reply(in, out[:l.handle(in, out)]) }

// answerInit is answer of the INIT request. The kernel cuts the times that it keeps to the
// granularity of the disk, or they would change when it forgets a file: go-fuse has no
// option for that field.
func (l *loop) answerInit(in, out []byte) {
	n := l.handle(in, out)
	const header = unsafe.Sizeof(fuse.OutHeader{})
	if h := (*fuse.OutHeader)(unsafe.Pointer(&out[0])); l.timeGran != 0 && h.Status == 0 && uintptr(n) >= header+unsafe.Offsetof(fuse.InitOut{}.TimeGran)+4 {
		(*fuse.InitOut)(unsafe.Pointer(&out[header])).TimeGran = l.timeGran
	}
	l.reply(in, out[:n])
}

// handle handles a request and returns the length of the reply in out, 0 if there is none.
func (l *loop) handle(in, out []byte) int {
	h := (*fuse.InHeader)(unsafe.Pointer(&in[0]))
	unique := h.Unique
	l.requests.begin(h)
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
