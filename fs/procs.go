package fs

import (
	"runtime"
	"time"
)

// procs gives the runtime twice as many processors while many threads wait in syscalls: one
// that waits keeps its processor until the runtime notices, up to 10 ms later, and what could
// run waits for it. On a disk with latency a quarter more requests are answered then. While
// requests are quick, more processors than there are cost a tenth.
type procs struct {
	usual  int
	double bool
	since  time.Time // the other number would have been better; zero: it is right
}

const (
	doubleAfter = 50 * time.Millisecond
	singleAfter = time.Second
)

func newProcs() *procs { return &procs{usual: runtime.GOMAXPROCS(0)} }

// see is told how many requests take long.
func (p *procs) see(long int) {
	want, after := long > 2*p.usual, singleAfter
	if want {
		after = doubleAfter
	}
	switch {
	case want == p.double:
		p.since = time.Time{}
	case p.since.IsZero():
		p.since = time.Now()
	case time.Since(p.since) > after:
		p.set(want)
	}
}

func (p *procs) set(double bool) {
	p.since = time.Time{}
	if p.double == double {
		return
	}
	if p.double = double; double {
		runtime.GOMAXPROCS(2 * p.usual)
	} else {
		runtime.GOMAXPROCS(p.usual)
	}
}
