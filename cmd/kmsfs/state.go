package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore/awskms"
)

// statePath is the place of trust records, logs and the list of mounts: outside
// any volume.
func statePath() (dir string, err error) {
	switch x := os.Getenv("XDG_STATE_HOME"); {
	case x != "":
		dir = filepath.Join(x, "kmsfs")
	case os.Geteuid() == 0:
		dir = "/var/lib/kmsfs"
	default:
		home, err := os.UserHomeDir()
		if err != nil {
			return "", noState(err)
		}
		dir = filepath.Join(home, ".local", "state", "kmsfs")
	}
	return dir, nil
}

// absoluteEnvironment makes the paths absolute that this program and the AWS SDK take from the
// environment: a daemon changes its directory.
func absoluteEnvironment() {
	for _, name := range []string{"XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "TMPDIR"} {
		if path := os.Getenv(name); path != "" && !filepath.IsAbs(path) {
			if abs, err := filepath.Abs(path); err == nil {
				os.Setenv(name, abs)
			}
		}
	}
	awskms.AbsoluteEnvironment()
}

// stateDir is [statePath], made, and one that can be written.
func stateDir() (string, error) {
	dir, err := statePath()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", noState(err)
	}
	if err := canWrite(dir); err != nil {
		return "", noState(fmt.Errorf("%s: %w", dir, err))
	}
	return dir, nil
}

func noState(err error) error {
	return hint(fmt.Errorf("there is no place for the trust record: %w", err),
		"set XDG_STATE_HOME to a directory that can be written")
}

// keyDir is where init puts key files of its own.
func keyDir() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", hint(fmt.Errorf("there is no place for a key file: %w", err),
			"name one with --key local:PATH")
	}
	dir = filepath.Join(dir, "kmsfs")
	return dir, os.MkdirAll(dir, 0o700)
}

// readRecord returns the trust record of a volume, nil if there is none.
func readRecord(id blockcrypt.ID) (*volume.Record, error) {
	dir, err := statePath()
	if err != nil {
		return nil, nil
	}
	path := filepath.Join(dir, id.String()+".json")
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the trust record: %w", err)
	}
	rec := &volume.Record{}
	if err := json.Unmarshal(b, rec); err != nil || rec.Volume != id {
		return nil, hint(fmt.Errorf("the trust record %s is damaged", path),
			"remove it and mount once with --key")
	}
	return rec, nil
}

// replaceFile replaces a file durably: it is the old one or the new one.
func replaceFile(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".kmsfs-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return finish(f, path, err)
}

// finish puts a file that was written under another name in its place, or
// removes it after an error. After a placedError it is in its place.
func finish(f *os.File, path string, err error) error {
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return err
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return placedError{err}
	}
	return nil
}

// syncDir makes the entries of a directory durable.
func syncDir(path string) error {
	if runtime.GOOS == "windows" {
		return nil // it has no such call
	}
	d, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		return nil // a directory that can only be written to: the disk gets it in time
	}
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// placedError says that a file is in its place, and that a power cut may still undo that.
type placedError struct{ error }

func (e placedError) Unwrap() error { return e.error }
