//go:build linux && !portable

package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"kmsfs/fs/volume"
)

// SIGKILL at any syscall: data that close has confirmed is there, data that an
// operation under way was doing is there or not, and nothing is damage.
func TestKillAnywhere(t *testing.T) {
	for seed := range uint64(150) {
		r := rand.New(rand.NewPCG(seed, 3))
		f := &fault{err: errors.New("killed")}
		f.all.Store(true)
		f.never()
		w := newWorldIn(t, t.TempDir(), volume.Options{}.Hooked(f.hook), false)
		w.quiet = true
		closed := map[string][]byte{}
		busy, during := "", [2][]byte{}
		f.after(int64(r.IntN(150)))
	session:
		for range 40 {
			name := fmt.Sprintf("f%d", r.IntN(3))
			was := closed[name]
			busy, during = name, [2][]byte{was, was}
			h, err := w.create(name)
			if err != nil {
				break
			}
			content := bytes.Clone(was)
			for range 1 + r.IntN(3) {
				next := content
				switch r.IntN(4) {
				case 0:
					n := int64(r.IntN(len(content) + 5000))
					next = make([]byte, n)
					copy(next, content)
					during = [2][]byte{content, next}
					_, err = h.Node().SetAttr(ctx, size(n))
				case 1:
					err = h.Fsync()
				default:
					at, data := r.IntN(len(content)+1), noise(1+r.IntN(6000))
					next = make([]byte, max(len(content), at+len(data)))
					copy(next, content)
					copy(next[at:], data)
					during = [2][]byte{content, next}
					_, err = h.Write(ctx, data, int64(at))
				}
				if err != nil {
					break session
				}
				content, during = next, [2][]byte{next, next}
			}
			if err := h.Release(); err != nil {
				break
			}
			closed[name] = content
			if r.IntN(3) == 0 {
				w.v.Settle()
			}
			busy = ""
			if f.hit.Load() {
				break
			}
		}
		w.crash()
		w.open(volume.Options{})
		for name, want := range closed {
			if name == busy {
				continue
			}
			if got, err := w.read(name); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("seed %d: %s has %d bytes, not the %d that close answered for: %v", seed,
					name, len(got), len(want), err)
			}
		}
		if busy != "" {
			if n, err := w.node(busy); err == nil {
				got, err := readNode(n)
				if err != nil {
					t.Fatalf("seed %d: %s does not open: %v", seed, busy, err)
				}
				if !killBetween(got, during[0], during[1]) {
					t.Fatalf("seed %d: %s has %d bytes, neither the %d before nor the %d after",
						seed, busy, len(got), len(during[0]), len(during[1]))
				}
			}
		}
		if err := w.v.Wait(ctx); err != nil {
			t.Fatal(err)
		}
		w.close()
		if exists(filepath.Join(w.dir, "kmsfs.mounted")) {
			t.Fatalf("seed %d: the marker is left", seed)
		}
	}
}

// killBetween is between, for a write that was cut short anywhere.
func killBetween(got, old, now []byte) bool {
	if len(got) < min(len(old), len(now)) || len(got) > max(len(old), len(now))+4064 {
		return false
	}
	for i, c := range got {
		if !(i < len(old) && old[i] == c) && !(i < len(now) && now[i] == c) && c != 0 {
			return false
		}
	}
	return true
}
