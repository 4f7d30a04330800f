//go:build linux && !portable

package main

import (
	"context"
	"encoding/csv"
	"errors"
	"os"
	"path/filepath"

	"kmsfs/fs/volume"
)

// fileList writes the IDs of files with their paths.
type fileList struct {
	path  string // of the list; f is written beside it first
	f     *os.File
	w     *csv.Writer
	u     *volume.Unlocked
	names *volume.Names
}

// newList begins the list of a volume, which it opens.
func (f *inventoryFlags) newList(ctx context.Context, dir string) (*fileList, error) {
	m := unlockFlags{keyFlags: f.keyFlags, readOnly: true, acceptOlder: true}
	u, err := m.unlock(ctx, dir)
	if err != nil {
		return nil, err
	}
	l := &fileList{u: u, names: u.Names()}
	// It has plaintext names, so it is for its owner alone: CreateTemp gives it the mode 0600.
	l.path = f.list
	if l.f, err = os.CreateTemp(filepath.Dir(f.list), ".kmsfs-*"); err != nil {
		u.Close()
		return nil, err
	}
	l.w = csv.NewWriter(l.f)
	return l, l.w.Write([]string{"file_id", "path", "cipher_path"})
}

// add writes one line. A file whose name cannot be read has none there.
func (l *fileList) add(e volume.Inventoried) error {
	name, err := l.names.Path(e.Path)
	if err != nil {
		name = ""
	}
	return l.w.Write([]string{e.Header.File.String(), name, e.Path})
}

// close ends the list. Only one that is whole takes its place.
func (l *fileList) close(whole bool) error {
	l.u.Close()
	l.w.Flush()
	err := l.w.Error()
	if err == nil && !whole {
		err = errNotWhole
	}
	if err = finish(l.f, l.path, err); errors.Is(err, errNotWhole) {
		return nil // the caller has the reason
	}
	return err
}

var errNotWhole = errors.New("the list is not whole")
