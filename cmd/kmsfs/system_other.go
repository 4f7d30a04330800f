//go:build !linux || portable

package main

import (
	"errors"
	"os"
	"runtime"

	"kmsfs/fs/volume"
)

// What this system has instead of Linux's own: see system_linux.go.

// terminal is where a passphrase is asked for.
var terminal = map[bool]string{false: "/dev/tty", true: "CONIN$"}[runtime.GOOS == "windows"]

// terminalOut is where a prompt is shown: Windows has a file of its own for that.
func terminalOut(tty *os.File) *os.File {
	if runtime.GOOS == "windows" {
		return os.Stderr
	}
	return tty
}

func harden() {}

func hintOfWriting(err error) string {
	if errors.Is(err, volume.ErrNotVolume) {
		return "name the directory of a volume: it has kmsfs.json"
	}
	return ""
}

func isBusy(error) bool { return false }

func hideEcho(int) error { return nil } // term.ReadPassword does

// canWrite reports whether a file can be made in a directory, by making one.
func canWrite(dir string) error {
	f, err := os.CreateTemp(dir, ".kmsfs-*")
	if err != nil {
		return err
	}
	f.Close()
	return os.Remove(f.Name())
}

func umask() os.FileMode { return 0o077 }

func appends(*os.File) bool { return false }

// spool makes a file that unspool removes; it holds ciphertext only.
func spool() (f *os.File, path string, err error) {
	if f, err = os.CreateTemp("", "kmsfs-*"); err != nil {
		return nil, "", err
	}
	return f, f.Name(), nil
}

func unspool(f *os.File) {
	f.Close()
	os.Remove(f.Name())
}
