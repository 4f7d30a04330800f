//go:build linux && !portable

package volume_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"kmsfs/fs/volume"
)

// While files are given larger headers, those of both sizes are files like any other, and the volume
// can be mounted, checked and repaired.
func TestReheader(t *testing.T) {
	for _, plain := range []bool{false, true} {
		w := newWorldIn(t, t.TempDir(), volume.Options{}, plain)
		sizes := []int{0, 1, 100, 3039, 3040, 3041, 4064, 5000, 7104, 7105, 100000}
		content := map[string][]byte{}
		w.mkdir("d")
		for _, n := range sizes {
			for _, dir := range []string{"", "d/"} {
				name := fmt.Sprintf("%sf%d", dir, n)
				content[name] = noise(n)
				w.write(name, content[name])
			}
		}
		check := func(what string) {
			t.Helper()
			for name, b := range content {
				w.want(name, b)
				if st, err := w.must(name).Attr(); err != nil || st.Size != int64(len(b)) {
					t.Errorf("%s: %s has %d bytes, %v", what, name, st.Size, err)
				}
			}
		}
		rs := w.v.Recipients()
		_, err := rs.SetHeaderSize(2048)
		w.do("set the size", err)
		if now, former := rs.HeaderSize(); now != 2048 || former != 1024 {
			t.Errorf("%d, formerly %d", now, former)
		}
		content["new"], content["d/new"] = noise(5000), noise(2016)
		w.write("new", content["new"])
		w.write("d/new", content["d/new"])
		check("both sizes")
		h := w.opened("d/f5000")
		_, err = h.Write(ctx, []byte("changed"), 4990)
		w.do("write", errors.Join(err, h.Fsync(), h.Release()))
		copy(content["d/f5000"][4990:], "changed")
		w.reopen(volume.Options{})
		check("mounted with both")
		w.close()
		if fs, _ := w.fsck(); len(fs) != 0 {
			t.Errorf("with both: %+v", fs)
		}
		if fs := w.fsckNoKeys(); len(fs) != 0 {
			t.Errorf("with both, no keys: %+v", fs)
		}
		w.open(volume.Options{})
		rs = w.v.Recipients()
		_, err = rs.SetHeaderSize(4096)
		wantErr(t, "a third size", err, volume.ErrOtherSize)
		h = w.opened("d/f3041") // in use: it stays, and so does the former size
		done, rec, err := rs.Reheader(ctx, volume.RekeyOptions{AtOnce: 4})
		if err != nil || rec != nil || done.Failed != 1 || done.Changed != 19 {
			t.Errorf("%+v, %v, %v", done, rec, err)
		}
		check("one is left")
		w.do("close", h.Release())
		done, rec, err = rs.Reheader(ctx, volume.RekeyOptions{})
		if err != nil || rec == nil || done.Changed != 1 {
			t.Errorf("%+v, %v, %v", done, rec, err)
		}
		if now, former := rs.HeaderSize(); now != 2048 || former != 0 {
			t.Errorf("at the end %d, formerly %d", now, former)
		}
		check("done")
		w.reopen(volume.Options{})
		check("mounted again")
		w.close()
		if fs, _ := w.fsck(); len(fs) != 0 {
			t.Errorf("%+v", fs)
		}
		w.open(volume.Options{})
		for size, want := range map[int]string{66048: "65024 are the most", 512: "too small"} {
			if _, err := w.v.Recipients().SetHeaderSize(size); size == 512 && err == nil {
				continue // one recipient fits
			} else if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%d: %v", size, err)
			}
		}
	}
}

// A damaged block of a file that has the former header is kept apart as any other.
func TestReheaderDamage(t *testing.T) {
	w := newWorld(t, volume.Options{})
	w.quiet = true
	w.write("f", noise(20000))
	w.close()
	w.flip(w.cipherFile(), 5000)
	w.open(volume.Options{})
	_, err := w.v.Recipients().SetHeaderSize(3072)
	w.do("set the size", err)
	w.write("g", noise(100))
	done, rec, err := w.v.Recipients().Reheader(ctx, volume.RekeyOptions{})
	if err != nil || rec != nil || done.Failed != 1 {
		t.Errorf("%+v, %v, %v", done, rec, err)
	}
	if st, err := w.must("f").Attr(); err != nil || st.Size != 20000 {
		t.Errorf("%d bytes, %v", st.Size, err)
	}
	w.close()
	if fs, _ := w.fsck(); len(fs) != 1 || fs[0].From != 3040 || fs[0].To != 7104 {
		t.Errorf("%+v", fs)
	}
}

// flip changes a byte of a ciphertext file.
func (w *world) flip(path string, at int) {
	w.t.Helper()
	b, err := os.ReadFile(path)
	w.do("read", err)
	b[at] ^= 1
	w.do("write", os.WriteFile(path, b, 0o600))
}
