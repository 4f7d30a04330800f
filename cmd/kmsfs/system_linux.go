//go:build !portable

package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// What every system has: see system_other.go.

// terminal is where a passphrase is asked for.
const terminal = "/dev/tty"

func terminalOut(tty *os.File) *os.File { return tty }

// harden keeps keys out of core dumps, and others from looking into the memory.
func harden() {
	unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}

// hintOfWriting is hintOf for errors of mounts and of changes of volumes.
func hintOfWriting(err error) string {
	switch {
	case errors.Is(err, volume.ErrNotVolume):
		return "make one with kmsfs init, or mount with --create"
	case errors.Is(err, volume.ErrLocked):
		return "one mount at a time can write; unmount the other, on its host, or mount with --read-only"
	case errors.Is(err, volume.ErrLockFile):
		return "kmsfs.lock must be a regular file that this user may write; if the volume is mounted nowhere, remove it and mount again; or mount with --read-only"
	case errors.As(err, new(*volume.UnfitError)) && errors.Is(err, unix.EACCES):
		return "make it as a user who may write there"
	case errors.As(err, new(*volume.UnfitError)):
		if unfit, _ := errors.AsType[*volume.UnfitError](err); unfit.Option != "" {
			return "mount that filesystem without the option " + unfit.Option
		}
		return "make the volume on another filesystem"
	case errors.As(err, new(*volume.OnlyRecipientError)):
		return "give them another one first: kmsfs rewrap --missing"
	case errors.Is(err, volume.ErrNoRoom):
		return "kmsfs reheader CIPHERDIR makes room; or remove a recipient first"
	case errors.Is(err, volume.ErrNotRecipient):
		return "kmsfs recipients list names those that it has"
	case errors.Is(err, volume.ErrNotEmpty):
		return "name an empty directory, or a new one"
	}
	return ""
}

func isBusy(err error) bool { return errors.Is(err, volume.ErrLocked) || errors.Is(err, unix.EBUSY) }

// hideEcho makes a terminal silent.
func hideEcho(fd int) error {
	quiet, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	quiet.Lflag &^= unix.ECHO
	return unix.IoctlSetTermios(fd, unix.TCSETS, quiet)
}

func canWrite(dir string) error { return unix.Access(dir, unix.W_OK|unix.X_OK) }

func umask() os.FileMode {
	m := unix.Umask(0)
	unix.Umask(m)
	return os.FileMode(m)
}

// appends reports whether what is written to a file goes to its end.
func appends(f *os.File) bool {
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	return err != nil || flags&unix.O_APPEND != 0
}

// spool makes a file that has a path only while it is open; it holds ciphertext only.
func spool() (f *os.File, path string, err error) {
	f, err = os.CreateTemp("", "kmsfs-*")
	if err != nil {
		return nil, "", err
	}
	return f, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.Remove(f.Name())
}

func unspool(f *os.File) { f.Close() }
