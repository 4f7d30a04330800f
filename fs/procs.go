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
				if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10,
					32); err == nil { // or "max"
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

// procs gives the runtime twice as many processors while requests wait for the disk: a thread that
// waits in a syscall keeps its processor until the runtime notices, up to 10 ms later, and
// goroutines that could run wait for it. While requests are quick, more processors than there are
// cost a tenth.
type procs struct {
	usual    int
	double   bool
	seen     uint64 // requests that took long
	at       time.Time
	lastSlow time.Time
}

const (
	procsEvery  = 50 * time.Millisecond
	procsLong   = 5 // requests that took long, in that time
	singleAfter = time.Second
)

func newProcs() *procs { return &procs{usual: runtime.GOMAXPROCS(0)} }

// see is told how many requests have been expected to take long so far.
func (p *procs) see(long uint64) {
	now := time.Now()
	if now.Sub(p.at) < procsEvery {
		return
	}
	if long-p.seen >= procsLong {
		p.lastSlow = now
	}
	p.seen, p.at = long, now
	p.set(now.Sub(p.lastSlow) < singleAfter)
}

func (p *procs) set(double bool) {
	if p.double == double {
		return
	}
	if p.double = double; double {
		runtime.GOMAXPROCS(2 * p.usual)
	} else {
		runtime.GOMAXPROCS(p.usual)
	}
}
