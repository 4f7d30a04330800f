package tests

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is a program that runs on a pseudo-terminal of its own.
type terminal struct {
	t    testing.TB
	ptmx *os.File
	c    *exec.Cmd
	out  bytes.Buffer
}

// expect waits for a text to be shown, and types an answer.
func (x *terminal) expect(text, answer string) {
	x.t.Helper()
	for buf := make([]byte, 4096); !strings.Contains(x.out.String(), text); {
		x.ptmx.SetReadDeadline(time.Now().Add(20 * time.Second))
		n, err := x.ptmx.Read(buf)
		x.out.Write(buf[:n])
		if err != nil {
			x.t.Fatalf("waiting for %q: %v; it shows %q", text, err, x.out.String())
		}
	}
	x.out.Reset()
	if _, err := x.ptmx.WriteString(answer); err != nil {
		x.t.Fatal(err)
	}
}

// end waits for the program's end, and returns its exit code and its output
// since the last answer.
func (x *terminal) end() (code int, shown string) {
	x.t.Helper()
	x.ptmx.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := x.out.ReadFrom(x.ptmx); err != nil &&
		!errors.Is(err, unix.EIO) { // EIO: nobody has the terminal any more
		x.t.Fatalf("%v; it shows %q", err, x.out.String())
	}
	x.c.Wait()
	return x.c.ProcessState.ExitCode(), x.out.String()
}

func (m *mounted) onTerminal(args ...string) *terminal {
	m.t.Helper()
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { ptmx.Close() })
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		m.t.Fatal(err)
	}
	unix.SetNonblock(int(ptmx.Fd()), true) // Fd made it blocking, and deadlines need it not to be
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	defer tty.Close()
	c := exec.Command(binary, args...)
	c.Env, c.Stdin, c.Stdout, c.Stderr = m.env, tty, tty, tty
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := c.Start(); err != nil {
		m.t.Fatal(err)
	}
	return &terminal{t: m.t, ptmx: ptmx, c: c}
}
