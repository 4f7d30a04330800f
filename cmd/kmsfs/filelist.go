package main

import (
	"context"
	"encoding/csv"
	"os"

	"kmsfs/fs/volume"
)

// fileList writes the IDs of files with their paths.
type fileList struct {
	f     *os.File
	w     *csv.Writer
	u     *volume.Unlocked
	names *volume.Names
}

// newList begins the list of a volume, which it opens.
func (f *inventoryFlags) newList(ctx context.Context, dir string) (*fileList, error) {
	m := mountFlags{keyFlags: f.keyFlags, readOnly: true, acceptOlder: true}
	u, err := m.unlock(ctx, dir)
	if err != nil {
		return nil, err
	}
	l := &fileList{u: u, names: u.Names()}
	// It has plaintext names, so it is for its owner alone.
	if l.f, err = os.OpenFile(f.list, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
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

// close ends the list. One that is not whole is removed.
func (l *fileList) close(whole bool) error {
	l.u.Close()
	l.w.Flush()
	err := l.w.Error()
	if cerr := l.f.Close(); err == nil {
		err = cerr
	}
	if err != nil || !whole {
		os.Remove(l.f.Name())
	}
	return err
}
