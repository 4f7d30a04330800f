package fs

import (
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// requests are those that are being answered, and the thread that made each.
//
// The kernel sends an INTERRUPT for any signal that comes while a program waits,
// and does not restart the call: a program with a timer, as git's progress has,
// would see EINTR from open, which on a disk it never sees. So a request ends early
// only for a thread that is being killed, or of which that cannot be told: one of another PID
// namespace. The kernel tells of the first signal alone; whether a deadly one has come since is
// looked for from then on.
type requests struct {
	mu   sync.Mutex
	made map[uint64]*request
}

// request is one that is being answered.
type request struct {
	thread  uint32 // the ID of the thread that asks, 0 if it is of another PID namespace
	opcode  uint32
	begun   time.Time
	long    bool        // it was expected to take long
	waits   bool        // and that for the disk
	noted   atomic.Bool // it has counted for the pace of its kind already, or does not
	yielded atomic.Bool // another worker was called before it waited
	missed  time.Time   // when it first asked the disk for data that is not in the page cache
}

const (
	lookAgain  = 20 * time.Millisecond
	lookAtMost = time.Second // for a request that is unknown: the worker that has read it is slow, or has answered
)

func (r *requests) begin(h *fuse.InHeader, q *request) {
	q.thread, q.opcode = h.Pid, h.Opcode
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.made == nil {
		r.made = map[uint64]*request{}
	}
	r.made[h.Unique] = q
}

func (r *requests) end(unique uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.made, unique)
}

// get returns a request that is being answered, nil if it is not.
func (r *requests) get(unique uint64) *request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.made[unique]
}

// stuck calls f for each request that has kept its worker for d and has not yielded.
func (r *requests) stuck(d time.Duration, f func(*request)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, q := range r.made {
		if !q.long && !q.yielded.Load() && time.Since(q.begun) > d {
			f(q)
		}
	}
}

// interrupt handles an INTERRUPT, and reports whether in is one.
func (l *loop) interrupt(in []byte) bool {
	const at = unsafe.Sizeof(fuse.InHeader{})
	if h := (*fuse.InHeader)(unsafe.Pointer(&in[0])); h.Opcode != opInterrupt || len(in) < int(at)+8 {
		return false
	}
	in = append([]byte(nil), in...)
	unique := binary.NativeEndian.Uint64(in[at:])
	l.workers.Go(func() {
		l.requests.interrupt(unique, dying, func() bool {
			n, _ := l.ps.HandleRequest([][]byte{in},
				[][]byte{make([]byte, unsafe.Sizeof(fuse.OutHeader{}))})
			return n == 0
		})
	})
	return true
}

// interrupt waits for a request to be answered, and ends it once its thread is dying.
// end reports whether that is done: it is not if the request has not begun yet, or
// has just ended.
func (r *requests) interrupt(unique uint64, dying func(tid uint32) bool, end func() bool) {
	met := false
	for begun := time.Now(); ; time.Sleep(lookAgain) {
		q := r.get(unique)
		met = met || q != nil
		switch {
		case q == nil && (met || time.Since(begun) > lookAtMost):
			return // it is answered
		case q != nil && (q.thread == 0 || q.opcode == opSetLkw || dying(q.thread)): // the kernel restarts a lock's call
			if end() {
				return
			}
		}
	}
}

// dying reports whether a signal that ends the thread's process waits for it.
func dying(tid uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	return err != nil || deadly(string(b))
}

// deadly is dying of a thread with this status.
func deadly(status string) bool {
	var waiting, met uint64
	for line := range strings.Lines(status) {
		name, hex, _ := strings.Cut(line, ":\t")
		set, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		switch name {
		case "SigPnd", "ShdPnd":
			waiting |= set
		case "SigBlk", "SigIgn", "SigCgt":
			met |= set
		default:
			continue
		}
		if err != nil {
			return true // as where nothing is known of it
		}
	}
	return waiting&^(met|harmless) != 0
}

// harmless are the signals that do not end who has made no provision for them.
var harmless = signals(unix.SIGCHLD, unix.SIGCONT, unix.SIGURG, unix.SIGWINCH, unix.SIGSTOP,
	unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU)

func signals(ss ...unix.Signal) (set uint64) {
	for _, s := range ss {
		set |= 1 << (s - 1)
	}
	return set
}
