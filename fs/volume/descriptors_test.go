//go:build linux && !portable

package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// With few descriptors a large and deep tree can be walked, and directories that are not in
// use give theirs up.
func TestFewDescriptors(t *testing.T) {
	w := newWorld(t, volume.Options{}.FDLimit(64))
	w.quiet = true
	for i := range 300 {
		w.mkdir(fmt.Sprintf("d%d", i))
		w.write(fmt.Sprintf("d%d/f", i), []byte("x"))
	}
	path := ""
	for range 100 {
		path += "/deep"
		w.mkdir(path)
	}
	w.write(path+"/f", []byte("deep"))
	if n := w.v.Descriptors(); n > 60 {
		t.Errorf("%d descriptors are open", n)
	}
	for i := range 300 {
		w.want(fmt.Sprintf("d%d/f", i), []byte("x"))
	}
	w.want(path+"/f", []byte("deep"))
}

// More files can be open than the daemon has descriptors, as long as the disk has all of
// them: they are opened again as they are used.
func TestMoreFilesThanDescriptors(t *testing.T) {
	const files = 500
	w := newWorld(t, volume.Options{}.FDLimit(100))
	text := func(i int) []byte { return bytes.Repeat(fmt.Appendf(nil, "%d.", i), 5000) }
	var open []*volume.Handle
	for i := range files {
		h, err := w.create(fmt.Sprintf("f%d", i))
		w.do("create", err)
		if i%3 > 0 {
			_, err = h.Write(ctx, text(i), 0)
			w.do("write", errors.Join(err, h.Flush()))
		}
		open = append(open, h)
	}
	w.do("unlink", w.v.Unlink(w.v.Root(), "f1"))
	w.do("rename", w.v.Rename(w.v.Root(), "f2", w.v.Root(), "renamed", 0))
	if n := w.v.Descriptors(); n > 100 {
		t.Errorf("%d descriptors are open", n)
	}
	for round := range 2 {
		for i, h := range open {
			b := make([]byte, 30000)
			n, err := h.Read(ctx, b, 0)
			want := text(i)
			if i%3 == 0 && round == 0 {
				want = nil
			}
			if err != nil || !bytes.Equal(b[:n], want) {
				t.Fatalf("round %d, file %d: %d bytes, %v", round, i, n, err)
			}
			if st, err := h.Node().Attr(); err != nil || st.Size != int64(len(want)) {
				t.Fatalf("round %d, file %d: size %d, %v", round, i, st.Size, err)
			}
			if i%3 == 0 && round == 0 {
				_, err = h.Write(ctx, text(i), 0)
				w.do("write", err)
			}
		}
	}
	for _, h := range open {
		w.do("close", h.Release())
	}
	w.want("renamed", text(2))
	w.want("f3", text(3))
}

// Programs that have too many files open whose descriptors cannot be given up, since no name
// leads to them, get ENFILE; all that needs a descriptor for a moment goes on, and closing one
// file makes room for another.
func TestTooManyOpen(t *testing.T) {
	const limit = 200
	w := newWorld(t, volume.Options{}.FDLimit(limit))
	w.quiet = true
	for i := range limit {
		w.write(fmt.Sprintf("f%d", i), []byte("x"))
	}
	var open []*volume.Handle
	defer func() {
		for _, h := range open {
			h.Release()
		}
	}()
	var err error
	for i := 0; err == nil && i < limit; i++ {
		var h *volume.Handle
		if h, err = w.must(fmt.Sprintf("f%d", i)).Open(ctx, true); err == nil {
			open = append(open, h)
			_, werr := h.Write(ctx, []byte("changed"), 0)
			w.do("write", errors.Join(werr, w.v.Unlink(w.v.Root(), fmt.Sprintf("f%d", i))))
		}
	}
	wantErr(t, "opening them all", err, unix.ENFILE)
	if len(open) < limit/4 {
		t.Errorf("only %d could be opened", len(open))
	}
	if _, err := w.create("new"); err == nil {
		t.Error("another can be made")
	} else {
		wantErr(t, "making another", err, unix.ENFILE)
	}
	if n := len(w.list("")); n != limit-len(open) {
		t.Errorf("the listing has %d", n)
	}
	w.mkdir("dir")
	w.do("rename", w.v.Rename(w.v.Root(), "dir", w.v.Root(), "renamed", 0))
	if _, err := w.must("f199").Attr(); err != nil {
		t.Error(err)
	}
	w.do("xattr", w.must("f199").Setxattr("user.x", []byte("y"), 0, false))
	w.do("close", open[0].Release())
	w.do("close", open[1].Release())
	open = open[2:]
	w.write("new", []byte("room again"))
}

// A call that finds no descriptor is made again when directories have given theirs up.
func TestNoDescriptorLeft(t *testing.T) {
	fail := 0
	w := newWorld(t, volume.Options{}.FDLimit(4096))
	for i := range 50 {
		w.mkdir(fmt.Sprintf("d%d", i))
		w.write(fmt.Sprintf("d%d/f", i), []byte("x"))
	}
	had := w.v.DirFDs()
	// The process has none left.
	var was unix.Rlimit
	w.do("getrlimit", unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	fd, err := unix.Open("/", unix.O_PATH, 0)
	w.do("open", err)
	unix.Close(fd)
	w.do("setrlimit", unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(fd), Max: was.Max}))
	for i := range 50 {
		if _, err := w.read(fmt.Sprintf("d%d/f", i)); err != nil {
			fail++
		}
	}
	w.do("setrlimit", unix.Setrlimit(unix.RLIMIT_NOFILE, &was))
	if had < 50 || fail > 0 {
		t.Errorf("with %d directories open, %d of 50 files could not be read", had, fail)
	}
}
