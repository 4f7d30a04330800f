package fs

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// mostThreads is how many requests may be answered at the same time where nothing else limits
// them: each that waits in a syscall has a thread, and some 64 KiB. The runtime ends a process
// at 10,000 threads, or if it can have no further one.
const mostThreads = 8192

// threadLimit returns mostThreads, or less where the process's cgroup may have only so many
// tasks: three quarters of them.
func threadLimit() int32 {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return mostThreads
	}
	return cgroupLimit(string(b), "/sys/fs/cgroup")
}

// cgroupLimit is threadLimit of a process with these cgroups (cgroups(7)). A limit can be that
// of any cgroup above.
func cgroupLimit(cgroups, mount string) int32 {
	limit := int32(mostThreads)
	for line := range strings.Lines(cgroups) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, dir, _ := strings.Cut(rest, ":")
		base := mount
		switch controllers {
		case "": // version 2
		case "pids":
			base = filepath.Join(mount, "pids")
		default:
			continue
		}
		for ; ; dir = filepath.Dir(dir) {
			if b, err := os.ReadFile(filepath.Join(base, dir, "pids.max")); err == nil {
				if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 32); err == nil { // or "max"
					limit = min(limit, int32(n/4*3))
				}
			}
			if dir == "/" || dir == "." {
				break
			}
		}
	}
	return max(limit, 16)
}

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
