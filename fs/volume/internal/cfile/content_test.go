//go:build linux && !portable

package cfile

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// sealed makes a ciphertext file of so many random bytes with this state; a size of 0 in the
// state stands for all of them.
func sealed(t *testing.T, n int, state blockcrypt.State) (c *Content, text []byte) {
	t.Helper()
	g, err := blockcrypt.NewGeometry(blockcrypt.DefaultHeader)
	if err != nil {
		t.Fatal(err)
	}
	key := make([]byte, 32)
	hdr, keys, err := blockcrypt.NewFile(g, nil, blockcrypt.FileIDs{File: blockcrypt.NewID()}, key,
		[]blockcrypt.Recipient{{URI: "local:x", Wrapped: key}})
	if err != nil {
		t.Fatal(err)
	}
	text = make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(text)
	file := make([]byte, g.Exact(int64(n)))
	for k, at := int64(0), 0; at < n; k++ {
		end := min(n, at+g.Capacity(k))
		keys.Seal(file[g.PageOff(k)+int64(g.Lead(k)):], k, 1, text[at:end])
		at = end
	}
	if state.Size == 0 {
		state.Size = int64(n)
	}
	keys.SetState(hdr, state)
	head, err := hdr.Encode()
	if err != nil {
		t.Fatal(err)
	}
	copy(file, head)
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return &Content{Disk: &disk.Disk{}, Geo: g, FD: fd, Header: hdr, Keys: keys, Size: state.Size}, text
}

// flip changes a bit in the middle of the page of block k.
func flip(t *testing.T, c *Content, k int64) {
	t.Helper()
	var b [1]byte
	at := c.Geo.PageOff(k) + blockcrypt.PageSize/2
	if _, err := unix.Pread(c.FD, b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 4
	if _, err := unix.Pwrite(c.FD, b[:], at); err != nil {
		t.Fatal(err)
	}
}

func TestRead(t *testing.T) {
	c, text := sealed(t, 20000, blockcrypt.State{Floor: 20000, Generation: 1})
	for _, r := range [][2]int{{0, 1}, {0, 20000}, {4000, 200}, {19999, 1}, {19990, 100},
		{20000, 1}, {4046, 4064}} {
		b := make([]byte, r[1])
		n, err := c.Read(nil, b, int64(r[0]))
		if want := text[r[0]:min(len(text), r[0]+r[1])]; err != nil || !bytes.Equal(b[:n], want) {
			t.Errorf("%d bytes at %d: %d bytes, %v", r[1], r[0], n, err)
		}
	}
	flip(t, c, 2)
	g := c.Geo
	b := make([]byte, 8000)
	if n, err := c.Read(nil, b, g.Start(2)+10); blockcrypt.ClassOf(err) != blockcrypt.BadBlock || n != 0 {
		t.Errorf("a damaged block: %d bytes, %v", n, err)
	}
	if n, err := c.Read(nil, b[:100], g.Start(3)); err != nil || n != 100 {
		t.Errorf("the block beside it: %d bytes, %v", n, err)
	}
}

// The clean state goes with two lengths of the file; any other is damage.
func TestAccept(t *testing.T) {
	c, _ := sealed(t, 10000, blockcrypt.State{Floor: 10000, Generation: 2})
	exact, whole := c.Geo.Exact(10000), c.Geo.Whole(10000)
	for length, ok := range map[int64]bool{exact: true, whole: true, exact - 1: false,
		whole + 1: false, 0: false, int64(c.Geo.Header()): false} {
		c.Size, c.Whole = 0, false
		empty, err := c.Accept(length)
		if (err == nil) != ok || empty || ok && (c.Size != 10000 || c.Whole != (length == whole)) {
			t.Errorf("a length of %d: size %d, whole %v, %v", length, c.Size, c.Whole, err)
		}
		if !ok && blockcrypt.ClassOf(err) != blockcrypt.BadSize {
			t.Errorf("a length of %d: %v", length, err)
		}
	}
	c.Header.State.Size = 0
	if empty, err := c.Accept(int64(c.Geo.Header())); err != nil || !empty {
		t.Errorf("only a header: %v, %v", empty, err)
	}
}

// An unfinished file ends at the first block that does not open, but not below its floor.
func TestAssess(t *testing.T) {
	const n, floor = 40000, 10000
	for _, x := range []struct {
		name  string
		harm  int64 // the block that is damaged, -1 for none
		cut   bool
		size  int64 // 0: an error
		class blockcrypt.Class
	}{
		{"all of it opens", -1, false, n, ""},
		{"damage beyond the floor", 6, false, 6, ""},
		{"damage below the floor", 1, false, 0, blockcrypt.BadBlock},
		{"it was being cut", -1, true, floor, ""},
	} {
		t.Run(x.name, func(t *testing.T) {
			flags := uint32(blockcrypt.Dirty)
			if x.cut {
				flags = blockcrypt.Cut
			}
			c, text := sealed(t, n, blockcrypt.State{Floor: floor, Generation: 1, Flags: flags})
			want := x.size
			if x.harm >= 0 {
				flip(t, c, x.harm)
				want = c.Geo.Start(x.harm)
			}
			if !c.Unfinished() {
				t.Error("its state says that it is finished")
			}
			err := c.LookThrough(c.Geo.Exact(n))
			if x.class != "" {
				if blockcrypt.ClassOf(err) != x.class {
					t.Errorf("size %d, %v", c.Size, err)
				}
				return
			}
			if err != nil || c.Size != want || !c.Partial {
				t.Fatalf("size %d, want %d, %v", c.Size, want, err)
			}
			b := make([]byte, n)
			if m, err := c.Read(nil, b, 0); err != nil || !bytes.Equal(b[:m], text[:want]) {
				t.Errorf("%d bytes, %v", m, err)
			}
		})
	}
}

func TestAssessStops(t *testing.T) {
	c, _ := sealed(t, 4<<20, blockcrypt.State{Floor: 1, Generation: 1, Flags: blockcrypt.Dirty})
	stop, calls := errors.New("stop"), 0
	_, err := c.Assess(c.Geo.Exact(4<<20), func() error {
		if calls++; calls == 3 {
			return stop
		}
		return nil
	})
	if err != stop || calls != 3 {
		t.Errorf("after %d calls: %v", calls, err)
	}
}
