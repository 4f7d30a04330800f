package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"strings"
	"syscall"

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
	line := strings.ReplaceAll(strings.TrimSpace(fmt.Sprintf(format, args...)), "\n", "; ")
	fmt.Fprintln(os.Stderr, "kmsfs: "+shown(line, true)) // names of files can hold what would change the terminal
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
	if h := hintOfWriting(err); h != "" {
		return h
	}
	switch {
	case errors.Is(err, syscall.EROFS):
		return "mount with --read-only"
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "free some space, and try again"
	case errors.Is(err, volume.ErrOlder):
		return "if a backup was restored on purpose, mount with --accept-older"
	case errors.Is(err, volume.ErrOtherKey):
		return "this is not the volume that was mounted here before, or kmsfs.json was exchanged; restore kmsfs.json from a backup"
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
	case isBusy(err):
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
	tty, err := os.OpenFile(terminal, os.O_RDWR, 0) // stdin may be what is encrypted
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
	signal.Notify(c, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(c)
	go func() {
		if s, ok := <-c; ok {
			term.Restore(fd, was)
			fmt.Fprintln(terminalOut(tty))
			os.Exit(128 + int(s.(syscall.Signal)))
		}
	}()
	// No echo before the prompt shows: who types at once must not be shown it.
	if err := hideEcho(fd); err != nil {
		return nil, err
	}
	defer term.Restore(fd, was)
	fmt.Fprint(terminalOut(tty), prompt)
	p, err := term.ReadPassword(fd)
	fmt.Fprintln(terminalOut(tty))
	return p, err
}
