//go:build linux && !portable

package layout

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

func isUnwritten(err error) bool {
	_, ok := errors.AsType[Unwritten](err)
	return ok
}

// Of a header of several pages, those that hold recipients are looked at if nothing was confirmed.
func TestUnwrittenPages(t *testing.T) {
	g, err := blockcrypt.NewGeometry(3 * blockcrypt.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	header := func(recipients int, floor int64) []byte {
		var rs []blockcrypt.Recipient
		for i := range recipients {
			rs = append(rs, blockcrypt.Recipient{URI: fmt.Sprint("local:", i), Wrapped: bytes.Repeat([]byte{1}, 600)})
		}
		key := bytes.Repeat([]byte{2}, 32)
		h, keys, err := blockcrypt.NewFile(g, nil, blockcrypt.FileIDs{File: blockcrypt.NewID()}, key, rs)
		if err != nil {
			t.Fatal(err)
		}
		keys.SetState(h, blockcrypt.State{Size: 5, Floor: floor, Session: 77})
		b, err := h.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	zeroed := func(b []byte, page int) []byte {
		clear(b[page*blockcrypt.PageSize : (page+1)*blockcrypt.PageSize])
		return b
	}
	flipped := func(b []byte, at int) []byte {
		b[at] ^= 1
		return b
	}
	for name, c := range map[string]struct {
		content []byte
		want    bool
	}{
		"the second page":            {zeroed(header(15, 0), 1), true},
		"the last page":              {zeroed(header(15, 0), 2), true},
		"cut before the last page":   {header(15, 0)[:2*blockcrypt.PageSize], true},
		"something is confirmed":     {zeroed(header(15, 5), 1), false},
		"a bit of the second page":   {flipped(header(15, 0), 5000), false},
		"a bit, and no third page":   {flipped(header(8, 0), 5000), false},
		"a bit, with one page of it": {flipped(header(2, 0), 300), false},
		"whole":                      {header(15, 0), false},
	} {
		d, path := &disk.Disk{}, filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		fd, err := d.OpenPath(path, unix.O_RDONLY)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = ReadHeader(d, fd, g.Header(), false)
		d.Close(fd)
		u, ok := errors.AsType[Unwritten](err)
		if ok != c.want || ok && u.Session != 77 || (err == nil) != (name == "whole") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
