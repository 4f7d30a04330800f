package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"strings"

	"golang.org/x/sys/unix"
	"golang.org/x/term" // reads a passphrase without showing it

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

// Exit codes; the table is in the root command's help.
const (
	exitOK = iota
	exitFailed
	exitUsage
	exitDamaged
	exitKey
	exitCredentials
	exitOutage
	exitBusy
	exitIncomplete
	exitRepaired
	exitUnchecked
)

type usageError struct {
	err     error
	command string
}

func (e usageError) Error() string { return e.err.Error() }

// hinted is an error with what to do about it.
type hinted struct {
	err  error
	hint string
}

func (e hinted) Error() string { return e.err.Error() }
func (e hinted) Unwrap() error { return e.err }

func hint(err error, format string, args ...any) error {
	return hinted{err, fmt.Sprintf(format, args...)}
}

// coded is an error with an exit code of its own.
type coded struct {
	error
	code int
}

func (e coded) Unwrap() error { return e.error }

// show prints an error, one line and perhaps a hint, and returns its exit code.
func show(err error) int {
	if err == nil {
		return exitOK
	}
	if q, ok := errors.AsType[quiet](err); ok {
		return int(q)
	}
	say("error: %v", err)
	if h := hintOf(err); h != "" {
		say("hint: %s", h)
	}
	return exitCode(err)
}

// say prints one line for people on stderr.
func say(format string, args ...any) {
	fmt.Fprintln(os.Stderr,
		"kmsfs: "+strings.ReplaceAll(strings.TrimSpace(fmt.Sprintf(format, args...)), "\n", "; "))
}

func hintOf(err error) string {
	if h, ok := errors.AsType[hinted](err); ok {
		return h.hint
	}
	if k, ok := errors.AsType[*keystore.Error](err); ok && k.Hint != "" {
		return k.Hint
	}
	if u, ok := errors.AsType[usageError](err); ok {
		return "see " + u.command + " --help"
	}
	switch {
	case errors.Is(err, volume.ErrNotVolume):
		return "make one with kmsfs init, or mount with --create"
	case errors.Is(err, volume.ErrLocked):
		return "one mount at a time can write; unmount the other, on its host, or mount with --read-only"
	case errors.Is(err, unix.EROFS):
		return "mount with --read-only"
	case errors.Is(err, volume.ErrLockFile):
		return "kmsfs.lock must be a regular file that this user may write; if the volume is mounted nowhere, remove it and mount again; or mount with --read-only"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return "free some space, and try again"
	case errors.As(err, new(*volume.UnfitError)) && errors.Is(err, unix.EACCES):
		return "make it as a user who may write there"
	case errors.As(err, new(*volume.UnfitError)):
		return "make the volume on another filesystem"
	case errors.Is(err, volume.ErrOlder):
		return "if a backup was restored on purpose, mount with --accept-older"
	case errors.Is(err, volume.ErrOtherKey):
		return "this is not the volume that was mounted here before, or kmsfs.json was exchanged; restore kmsfs.json from a backup"
	case errors.As(err, new(*volume.OnlyRecipientError)):
		return "give them another one first: kmsfs rewrap --missing"
	case errors.Is(err, volume.ErrNoRoom):
		return "kmsfs reheader CIPHERDIR makes room; or remove a recipient first"
	case errors.Is(err, volume.ErrNotRecipient):
		return "kmsfs recipients list names those that it has"
	case errors.Is(err, volume.ErrNotEmpty):
		return "name an empty directory, or a new one"
	}
	switch blockcrypt.ClassOf(err) {
	case blockcrypt.BadConfig, blockcrypt.BadConfigMAC:
		return "restore kmsfs.json from a backup; a copy is kept beside the trust record, see docs/security.md"
	case blockcrypt.BadMarker:
		return "the ciphertext directory was tampered with or damaged; mount with --read-only, or restore it from a backup"
	case blockcrypt.BadChecksum, blockcrypt.BadCommitment, blockcrypt.BadState, blockcrypt.BadBlock, blockcrypt.BadSize:
		return "the file was damaged or altered; restore it from a backup"
	case blockcrypt.Unsupported:
		return "it needs a newer kmsfs"
	}
	return ""
}

func exitCode(err error) int {
	if c, ok := errors.AsType[coded](err); ok {
		return c.code
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	switch keystore.KindOf(err) {
	case keystore.Revoked, keystore.Denied, keystore.Untrusted:
		return exitKey
	case keystore.Credentials:
		return exitCredentials
	case keystore.Outage:
		return exitOutage
	case keystore.Damaged:
		return exitDamaged
	}
	switch {
	case blockcrypt.ClassOf(err) != "", errors.Is(err, volume.ErrOlder), errors.Is(err, volume.ErrOtherKey):
		return exitDamaged
	case errors.Is(err, volume.ErrLocked), errors.Is(err, unix.EBUSY):
		return exitBusy
	}
	return exitFailed
}

// askPassphrase reads a passphrase from a file or from the terminal, there
// twice if it is a new one.
func askPassphrase(file string, isNew bool) ([]byte, error) {
	if file != "" {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("the passphrase file %s does not exist", file)
		}
		if err != nil {
			return nil, err
		}
		if b = bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r")); len(b) == 0 {
			return nil, fmt.Errorf("the passphrase file %s is empty", file)
		}
		return b, nil
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0) // stdin may be what is encrypted
	if err != nil {
		return nil, hint(errors.New("there is no terminal to ask for the passphrase"),
			"give --passphrase-file")
	}
	defer tty.Close()
	p, err := readHidden(tty, "Passphrase: ")
	if err != nil {
		return nil, err
	}
	if len(p) == 0 {
		return nil, errors.New("the passphrase is empty")
	}
	if isNew {
		again, err := readHidden(tty, "Passphrase, again: ")
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(p, again) {
			return nil, errors.New("the passphrases differ")
		}
	}
	return p, nil
}

func readHidden(tty *os.File, prompt string) ([]byte, error) {
	fd := int(tty.Fd())
	was, err := term.GetState(fd)
	if err != nil {
		return nil, err
	}
	// Ctrl-C must not leave the terminal silent.
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGINT, unix.SIGTERM)
	defer signal.Stop(c)
	go func() {
		if s, ok := <-c; ok {
			term.Restore(fd, was)
			fmt.Fprintln(tty)
			os.Exit(128 + int(s.(unix.Signal)))
		}
	}()
	// No echo before the prompt shows: who types at once must not be shown it.
	quiet, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	quiet.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, quiet); err != nil {
		return nil, err
	}
	defer term.Restore(fd, was)
	fmt.Fprint(tty, prompt)
	p, err := term.ReadPassword(fd)
	fmt.Fprintln(tty)
	return p, err
}
