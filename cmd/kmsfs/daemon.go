//go:build linux && !portable

package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// background runs the same command again as a process that goes on, and returns
// when its mount can be used. The new process asks for passphrases and prints
// its errors itself, and only then leaves the terminal.
func background() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	// What this command was given stays with it: a lock or a pipe of the caller
	// must not live as long as the mount.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil &&
		!errors.Is(err, unix.ENOSYS) {
		return err
	}
	c := exec.Command(self)
	c.Args = os.Args
	c.Env = append(os.Environ(), readyEnv+"=3")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.ExtraFiles = []*os.File{w}
	raiseFiles()
	runtime.LockOSThread() // the new process has what this thread has
	dropReserve()
	err = c.Start()
	w.Close()
	if err != nil {
		return err
	}
	msg, err := io.ReadAll(r)
	if err == nil && len(msg) > 0 {
		fmt.Print(string(msg))
		return c.Process.Release()
	}
	if exit, ok := errors.AsType[*exec.ExitError](c.Wait()); ok && exit.ExitCode() > 0 {
		os.Exit(exit.ExitCode()) // it has said why
	}
	return errors.New("the background process ended before the mount could be used")
}

// raiseFiles raises the limit of descriptors, of which a mount needs one for each file that
// any program has open: as far as root may, or to the hard limit. A failure leaves it as it
// is.
func raiseFiles() {
	var r unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) != nil {
		return
	}
	if b, err := os.ReadFile("/proc/sys/fs/nr_open"); err == nil && os.Geteuid() == 0 {
		if most, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err == nil &&
			most > r.Max {
			if unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: most}) == nil {
				return
			}
		}
	}
	// Set it though Go has raised it already: Go gives its children the soft limit of before.
	r.Cur = r.Max
	unix.Setrlimit(unix.RLIMIT_NOFILE, &r)
}

// dropReserve takes CAP_SYS_RESOURCE from whatever this thread executes: a mount that
// root runs for others must not use what quotas and filesystems keep from them.
// dropped is false where there was none, or it may not be taken away.
func dropReserve() (dropped bool) {
	has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_SYS_RESOURCE, 0, 0, 0)
	return err == nil && has == 1 && os.Geteuid() == 0 &&
		unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_RESOURCE, 0, 0, 0) == nil
}

// foreground executes the same command again in this process, without what
// dropReserve takes away; it returns where there is nothing to take.
func foreground() error {
	raiseFiles()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if !dropReserve() {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return os.NewSyscallError("execve", unix.Exec(self, os.Args, os.Environ()))
}

// ready lets the waiting command print that the mount can be used, or what it still waits for, and
// leaves its terminal and, unless stay is set, its directory. In the foreground, and the second time, the
// log says so.
func ready(log io.Writer, says string, stay bool) error {
	fd, err := strconv.Atoi(os.Getenv(readyEnv))
	if err != nil {
		return nil
	}
	os.Unsetenv(readyEnv)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	_, err = unix.Setsid()
	if !stay {
		err = errors.Join(err, os.Chdir("/"))
	}
	for _, std := range []int{0, 1} {
		err = errors.Join(err, unix.Dup3(int(null.Fd()), std, 0))
	}
	if l, ok := log.(*logFile); ok { // a crash of the runtime goes to the log too
		err = errors.Join(err, unix.Dup3(int(l.f.Fd()), 2, 0))
		l.stderr = true
	}
	w := os.NewFile(uintptr(fd), "ready")
	_, werr := fmt.Fprintln(w, says)
	return errors.Join(err, werr, w.Close())
}
