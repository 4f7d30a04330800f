package fs

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// An INTERRUPT can be read before the request that it is for, and the thread can
// begin to die later.
func TestInterrupt(t *testing.T) {
	const never = time.Hour
	for _, c := range []struct {
		name               string
		begun, dies, ended time.Duration // after the INTERRUPT
		refused            int           // how often the request is not there yet
		interrupted        bool
		within             time.Duration
	}{
		{"it dies", 0, 0, never, 0, true, 0},
		{"read too early", 300 * time.Millisecond, 0, never, 2, true, 400 * time.Millisecond},
		{"it dies later", 0, 5 * time.Second, never, 0, true, 5100 * time.Millisecond},
		{"a signal that it handles", 0, never, 3 * time.Second, 0, false, 3100 * time.Millisecond},
		{"answered before", never, 0, never, 0, false, 1100 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var r requests
				start, stop := time.Now(), make(chan struct{})
				at := func(d time.Duration, f func()) {
					go func() {
						select {
						case <-time.After(d):
							f()
						case <-stop:
						}
					}()
				}
				h := &fuse.InHeader{Unique: 7}
				h.Pid = 1234
				at(c.begun, func() { r.begin(h, &request{}) })
				at(c.ended, func() { r.end(7) })
				synctest.Wait()
				interrupted := false
				r.interrupt(7, func(tid uint32) bool {
					return tid == 1234 &&
						time.Since(start) >= c.dies
				}, func() bool {
					c.refused--
					interrupted = c.refused < 0
					return interrupted
				})
				if took := time.Since(start); interrupted != c.interrupted || took > c.within {
					t.Errorf("interrupted: %v, after %v", interrupted, took)
				}
				close(stop)
			})
		})
	}
}

// Whether a signal that waits ends a process is up to the process.
func TestDying(t *testing.T) {
	for _, c := range []struct {
		handles string
		signal  unix.Signal
		want    bool
	}{
		{"true", unix.SIGTERM, true},
		{"true", unix.SIGALRM, true},
		{"true", unix.SIGWINCH, false},
		{"trap : TERM", unix.SIGTERM, false},
		{"trap '' TERM", unix.SIGTERM, false},
		{"trap : TERM", unix.SIGINT, true},
	} {
		p := exec.Command("bash", "-c", c.handles+"; echo ready; read")
		p.Stderr = os.Stderr
		in, err := p.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := p.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Start(); err != nil {
			t.Fatal(err)
		}
		tid := uint32(p.Process.Pid)
		out.Read(make([]byte, 10))
		before := dying(tid)
		// A stopped process keeps its signals waiting.
		unix.Kill(int(tid), unix.SIGSTOP)
		for until := time.Now().Add(10 * time.Second); time.Now().Before(until) &&
			!strings.Contains(statusOf(t, tid), "T (stopped)"); {
			time.Sleep(time.Millisecond)
		}
		unix.Kill(int(tid), c.signal)
		if got := dying(tid); before || got != c.want {
			t.Errorf("%q and %v: %v, before it %v", c.handles, c.signal, got, before)
		}
		p.Process.Kill()
		in.Close()
		p.Wait()
		if !dying(tid) {
			t.Errorf("%q: dead, and not dying", c.handles)
		}
	}
	for _, s := range []string{"SigPnd:\t00zz\n", "SigPnd:\t\n"} {
		if !deadly(s) {
			t.Errorf("%q cannot be read: it may be dying", s)
		}
	}
}

func statusOf(t *testing.T, tid uint32) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
