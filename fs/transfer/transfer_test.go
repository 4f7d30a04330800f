//go:build linux && !portable

package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/transfer"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/local"
)

// opened makes a volume in dir, if there is none, and opens it.
func opened(t *testing.T, dir string, plain bool, o volume.Options) *volume.Volume {
	t.Helper()
	s, err := local.New(bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	stores := []keystore.Store{s}
	if err := os.Mkdir(dir, 0o700); err == nil {
		if _, err := volume.Init(t.Context(), dir, stores, blockcrypt.NewID(), volume.InitOptions{PlainNames: plain}); err != nil {
			t.Fatal(err)
		}
	}
	l, err := volume.Find(dir)
	if err != nil {
		t.Fatal(err)
	}
	u, err := l.Unlock(t.Context(), stores, volume.UnlockOptions{ReadOnly: o.ReadOnly})
	if err != nil {
		t.Fatal(err)
	}
	v, err := u.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// failures collects what could not be copied.
type failures map[string]error

func (f failures) options() transfer.Options {
	return transfer.Options{AtOnce: 4, Failed: func(path string, err error) { f[path] = err }}
}

// An entry that fails keeps no other from being imported.
func TestImportGoesOn(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	for _, name := range []string{"a", "kmsfs.reserved", "z/f"} {
		path := filepath.Join(src, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(name), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	v := opened(t, filepath.Join(dir, "v"), true, volume.Options{})
	failed := failures{}
	done, err := transfer.Import(t.Context(), v, src, failed.options())
	if err = errors.Join(err, v.Close()); err != nil || done.Files != 2 || done.Dirs != 1 || done.Failed != 1 {
		t.Errorf("%+v, %v", done, err)
	}
	if len(failed) != 1 || !errors.Is(failed["kmsfs.reserved"], unix.EPERM) {
		t.Errorf("%v", failed)
	}
}

// A file that changes while it is imported is named, and imported all the same.
func TestImportOfChangingFile(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	path := filepath.Join(src, "f")
	if err := errors.Join(os.Mkdir(src, 0o755), os.WriteFile(path, make([]byte, 64<<20), 0o644)); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return
		}
		defer f.Close()
		for ctx.Err() == nil {
			f.Write([]byte("x"))
		}
	}()
	v := opened(t, filepath.Join(dir, "v"), false, volume.Options{})
	failed := failures{}
	done, err := transfer.Import(t.Context(), v, src, failed.options())
	stop()
	<-stopped
	if err = errors.Join(err, v.Close()); err != nil || done.Files != 1 || done.Incomplete != 1 || done.Failed != 0 {
		t.Errorf("%+v, %v", done, err)
	}
	if !errors.Is(failed["f"], transfer.ErrChanged) {
		t.Errorf("%v", failed)
	}
}

// Of a file that was being written when the volume was copied, the blocks that open are exported, each
// time again.
func TestExportOfUnfinishedFile(t *testing.T) {
	dir := t.TempDir()
	v := opened(t, filepath.Join(dir, "v"), false, volume.Options{})
	_, _, h, err := v.Create(t.Context(), v.Root(), "f", volume.NewFile{Write: true, NewNode: volume.NewNode{Mode: 0o644}})
	if err != nil {
		t.Fatal(err)
	}
	text := bytes.Repeat([]byte("0123456789"), 1000)
	for i := range 3 { // a tail that is confirmed, and grows
		_, err = h.Write(t.Context(), text[:5000], int64(i)*5000)
		if err = errors.Join(err, h.Fsync()); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("cp", "-a", filepath.Join(dir, "v"), filepath.Join(dir, "copy")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := errors.Join(h.Release(), v.Close()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		c := opened(t, filepath.Join(dir, "copy"), false, volume.Options{ReadOnly: true})
		failed := failures{}
		done, err := transfer.Export(t.Context(), c, []string{"."}, filepath.Join(dir, "out"), failed.options())
		if err = errors.Join(err, c.Close()); err != nil || done.Files != 1 || done.Incomplete != 1 || done.Same != 0 {
			t.Errorf("%+v, %v", done, err)
		}
		if !errors.Is(failed["f"], transfer.ErrIncomplete) {
			t.Errorf("%v", failed)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "out", "f")); err != nil || len(b) != 15000 {
			t.Errorf("%d bytes, %v", len(b), err)
		}
	}
}

// A file is exported once, however often it is named, and one that has the name of another's temporary copy
// is exported, too.
func TestExportOfOverlappingPaths(t *testing.T) {
	dir := t.TempDir()
	v := opened(t, filepath.Join(dir, "v"), false, volume.Options{})
	d, _, err := v.Mkdir(t.Context(), v.Root(), "d", 0o755, volume.Caller{})
	if err != nil {
		t.Fatal(err)
	}
	part := filepath.Base(transfer.Temporary("f"))
	for _, name := range []string{part, "f"} {
		_, _, h, err := v.Create(t.Context(), d, name, volume.NewFile{Write: true, NewNode: volume.NewNode{Mode: 0o644}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.Write(t.Context(), []byte(name), 0); err != nil {
			t.Fatal(err)
		}
		if err := h.Release(); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	r := opened(t, filepath.Join(dir, "v"), false, volume.Options{ReadOnly: true})
	defer r.Close()
	failed := failures{}
	for _, paths := range [][]string{{"d/f", "d/", "./d/f", "d"}, {"d", "."}, {".", "d/" + part}} {
		out := filepath.Join(dir, "out"+strings.ReplaceAll(fmt.Sprint(paths), "/", "_"))
		done, err := transfer.Export(t.Context(), r, paths, out, failed.options())
		if err != nil || done.Files != 2 || done.Failed != 0 {
			t.Errorf("%q: %+v, %v, %v", paths, done, err, failed)
		}
		for _, name := range []string{part, "f"} {
			if b, err := os.ReadFile(filepath.Join(out, "d", name)); err != nil || string(b) != name {
				t.Errorf("%q: %q, %v", paths, b, err)
			}
		}
	}
	// And the other way round.
	w := opened(t, filepath.Join(dir, "w"), false, volume.Options{})
	defer w.Close()
	if done, err := transfer.Import(t.Context(), w, filepath.Join(dir, "out[d .]"), failed.options()); err != nil || done.Files != 2 || done.Failed != 0 {
		t.Errorf("%+v, %v, %v", done, err, failed)
	}
}

// Of the paths that are named, one that does not exist keeps no other from being exported.
func TestExportOfPaths(t *testing.T) {
	dir := t.TempDir()
	v := opened(t, filepath.Join(dir, "v"), false, volume.Options{})
	_, _, h, err := v.Create(t.Context(), v.Root(), "f", volume.NewFile{Write: true, NewNode: volume.NewNode{Mode: 0o644}})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(h.Release(), v.Close()); err != nil {
		t.Fatal(err)
	}
	r := opened(t, filepath.Join(dir, "v"), false, volume.Options{ReadOnly: true})
	defer r.Close()
	failed := failures{}
	done, err := transfer.Export(t.Context(), r, []string{"missing/f", "../v", "f"}, filepath.Join(dir, "out"), failed.options())
	if err != nil || done.Files != 1 || done.Failed != 2 || !errors.Is(failed["missing"], unix.ENOENT) ||
		!errors.Is(failed[".."], unix.EINVAL) {
		t.Errorf("%+v, %v, %v", done, err, failed)
	}
}
