//go:build linux && !portable

package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
)

// lockState keeps others from changing trust records until unlock is called.
func lockState() (unlock func(), err error) {
	dir, err := stateDir()
	if err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, noState(err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, noState(err)
	}
	return func() { f.Close() }, nil
}

// writeRecord puts the trust record in its place, and a copy of kmsfs.json
// beside it.
func writeRecord(rec *volume.Record, cipherDir string) error {
	dir, err := stateDir()
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return err
	}
	if cfg, err := os.ReadFile(filepath.Join(cipherDir, blockcrypt.ConfigName)); err == nil {
		if err := replaceFile(filepath.Join(dir, rec.Volume.String()+"."+blockcrypt.ConfigName),
			cfg); err != nil {
			return noState(err)
		}
	}
	if err := replaceFile(filepath.Join(dir, rec.Volume.String()+".json"), append(b, '\n')); err != nil {
		return noState(err)
	}
	return nil
}
