//go:build linux && !portable

package volume_test

import (
	"path"
	"strings"
	"testing"

	"kmsfs/fs/volume"
)

// A tree whose ciphertext paths are longer than one call takes is listed, read and checked.
func TestStoredDeep(t *testing.T) {
	w := newWorld(t, volume.Options{})
	at := "."
	for range 40 {
		at = path.Join(at, strings.Repeat("deep", 37))
		w.mkdir(at)
	}
	w.write(path.Join(at, "file"), noise(5000))
	w.close()
	w.v = nil
	u, err := w.unlock()
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	s, err := u.Stored()
	if err != nil {
		t.Fatal(err)
	}
	e, err := s.Root()
	depth := 0
	for ; err == nil && e.Mode.IsDir(); depth++ {
		var in []volume.StoredEntry
		if in, err = s.List(e); err != nil || len(in) != 1 || in[0].Err != nil {
			t.Fatalf("at depth %d: %v, %v", depth, in, err)
		}
		e = in[0]
	}
	if err != nil || depth != 41 || path.Base(e.Path) != "file" {
		t.Fatalf("depth %d: %q, %v", depth, path.Base(e.Path), err)
	}
	l, err := s.Open(e)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if incomplete, err := s.Unlock(ctx, l); incomplete || err != nil || l.Size() != 5000 {
		t.Errorf("%v, %v, %d bytes", incomplete, err, l.Size())
	}
	if found, d := w.fsck(); len(found) > 0 || d.Files != 1 || d.Dirs != 41 {
		t.Errorf("%v, %+v", found, d)
	}
}
