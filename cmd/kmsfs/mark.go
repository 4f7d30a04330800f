//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A mark is a file under the state directory by which umount finds the daemon of a mount. Its
// name is the mount's device number, by which a mount is the same in every mount namespace.
// Its first line names the process; after a failure the error follows. A daemon that ends well
// removes it.

// mountMark is the mark of this process's own mount; a nil one does nothing.
type mountMark struct{ path, line string }

// perMount is the name of a mount's mark and of its socket.
func perMount(dev string) string { return strings.ReplaceAll(dev, ":", "-") }

// markPath is where the mark of a mount lies, by its device number.
func markPath(dev string) (string, error) {
	dir, err := statePath()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "mounts", perMount(dev)), nil
}

// markMounted makes the mark, which umount waits for.
func markMounted(dev string) (*mountMark, error) {
	path, err := markPath(dev)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o700)
	}
	m := &mountMark{path, thisProcess().line()}
	if err == nil {
		err = os.WriteFile(path, []byte(m.line), 0o600)
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

// ended removes the mark, or writes into it why the volume could not be closed well.
func (m *mountMark) ended(err error) {
	if m == nil {
		return
	}
	if b, rerr := os.ReadFile(m.path); rerr != nil || string(b) != m.line {
		return // of the next mount by now
	}
	if err == nil {
		os.Remove(m.path)
	} else {
		os.WriteFile(m.path, fmt.Appendf(nil, "%s%v\n", m.line, err), 0o600)
	}
}

// process names a process for good: its ID in a PID namespace, and when it was started, in
// the kernel's ticks since the machine was.
type process struct {
	pid       int
	start     string
	namespace string
	boot      string
}

func thisProcess() process {
	return process{os.Getpid(), startOf(os.Getpid()), pidNamespace(), bootID()}
}

func (p process) line() string {
	return fmt.Sprintf("%d %s %s %s\n", p.pid, p.start, p.namespace, p.boot)
}

// alive reports whether the process is there still, as far as this one can see it.
func (p process) alive() bool {
	return p.namespace == pidNamespace() && p.boot == bootID() && startOf(p.pid) == p.start
}

func pidNamespace() string {
	ns, _ := os.Readlink("/proc/self/ns/pid")
	return ns
}

func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// startOf returns when a process was started, "" if there is none.
func startOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The name, in parentheses, may hold anything.
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 20 {
		return ""
	}
	return f[19]
}

// readMark returns which process the mark of a mount names; ok is false if there is none.
func readMark(dev string) (id process, ok bool) {
	path, err := markPath(dev)
	if err != nil {
		return id, false
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return id, false // of another user, perhaps
	}
	first, _, _ := strings.Cut(string(b), "\n")
	f := strings.Fields(first)
	if len(f) != 4 {
		return id, false
	}
	id.pid, err = strconv.Atoi(f[0])
	id.start, id.namespace, id.boot = f[1], f[2], f[3]
	return id, err == nil
}

// serves reports whether the daemon of a mount still serves it: it ends its socket as soon as
// the filesystem is mounted in no namespace any more.
func serves(dev string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return askMount(ctx, dev, http.MethodGet, "stats", nil) == nil
}

// servedBy reports whether a process is the daemon of a mount that it still serves.
func servedBy(pid int) bool {
	path, err := markPath("*")
	if err != nil {
		return false
	}
	marks, _ := filepath.Glob(path)
	for _, m := range marks {
		dev := strings.ReplaceAll(filepath.Base(m), "-", ":")
		if id, ok := readMark(dev); ok && id.pid == pid && id.alive() && serves(dev) {
			return true
		}
	}
	return false
}

// daemon is the process behind a mount, as far as it is known.
type daemon struct {
	m  *mountInfo
	fd int // a pidfd, -1 if it is not known
	id process
}

// daemonOf finds the daemon of a mount by its mark. Its descriptor is -1 if there is none that lives.
func daemonOf(m *mountInfo) *daemon {
	d := &daemon{m: m, fd: -1}
	id, ok := readMark(m.dev)
	if !ok || !id.alive() {
		return d
	}
	fd, err := unix.PidfdOpen(id.pid, 0)
	if err != nil {
		return d
	}
	if !id.alive() { // the number may be another process's by now
		unix.Close(fd)
		return d
	}
	d.fd, d.id = fd, id
	return d
}

func (d *daemon) close() {
	if d.fd >= 0 {
		unix.Close(d.fd)
	}
}

const (
	lookForOthers = time.Second      // how often after an unmount other namespaces are looked for
	surelyServes  = 3 * time.Second  // a daemon that still serves then is mounted elsewhere
	sayWaiting    = 10 * time.Second // after which umount says that it waits
)

// awaitEnd returns when the daemon has ended, and whether everything is on the disk. A mount
// that another mount namespace still has does not end: others names its users.
func (d *daemon) awaitEnd() (others string, err error) {
	begun, said := time.Now(), false
	look := begun.Add(lookForOthers)
	for {
		ended, err := d.ended(100 * time.Millisecond)
		if err != nil {
			return "", err
		}
		if ended {
			return "", d.outcome()
		}
		waited := time.Since(begun)
		if time.Now().After(look) {
			if others = d.m.otherNamespaces(waited > surelyServes); others != "" {
				return others, nil
			}
			look = time.Now().Add(lookForOthers)
		}
		if waited > sayWaiting && !said {
			said = true
			say("waiting until the daemon has written everything; to interrupt this ends only the waiting")
		}
	}
}

// ended waits for the end of the daemon. A daemon of another user is known by the volume's
// lock alone; a read-only mount has none, and leaves nothing to wait for.
func (d *daemon) ended(atMost time.Duration) (bool, error) {
	if d.fd >= 0 {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}},
			int(atMost/time.Millisecond))
		if errors.Is(err, unix.EINTR) {
			err = nil
		}
		return n > 0 && err == nil, err
	}
	fd, err := unix.Open(d.m.source, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return true, nil
	}
	defer unix.Close(fd)
	if err = unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		time.Sleep(atMost)
		return false, nil
	}
	return true, err
}

// outcome is what the daemon has left in its mark.
func (d *daemon) outcome() error {
	path, err := markPath(d.m.dev)
	if err != nil || d.fd < 0 {
		return nil
	}
	b, err := os.ReadFile(path)
	why, mine := strings.CutPrefix(string(b), d.id.line())
	if err != nil || !mine { // it has removed it, or it is the next mount's
		return nil
	}
	os.Remove(path)
	if why = strings.TrimSpace(why); why == "" {
		why = "the daemon ended early"
	}
	return hint(fmt.Errorf("unmounted, but not everything is known to be on the disk: %s", why),
		"see the log; the next mount repairs what was being written")
}
