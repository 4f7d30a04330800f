//go:build linux && !portable

package volume_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"

	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

// expectation is what must be true of a file after a cut.
type expectation struct {
	truth
	whole bool // it is one of its versions, not a mix of them
}

// crashRun is a workload under way, with the allowed contents at each call.
type crashRun struct {
	*world
	sim    *sim
	expect map[string]*expectation
}

func (c *crashRun) file(name string) *expectation {
	x := c.expect[name]
	if x == nil {
		x = &expectation{truth: truth{versions: [][]byte{nil}}}
		c.expect[name] = x
	}
	return x
}

// change does f, by which the file becomes now.
func (c *crashRun) change(name string, now []byte, f func() error) {
	c.t.Helper()
	x := c.file(name)
	x.versions = append(x.versions, now)
	c.do("change", f())
}

func (c *crashRun) fsync(name string, h *volume.Handle) {
	c.t.Helper()
	c.do("fsync", h.Fsync())
	x := c.file(name)
	x.confirmed, x.versions = true, [][]byte{x.now()}
}

func (c *crashRun) write(name string, h *volume.Handle, b []byte, off int) {
	c.t.Helper()
	old := c.file(name).now()
	now := append([]byte(nil), old...)
	if grown := off + len(b); grown > len(now) {
		now = append(now, make([]byte, grown-len(now))...)
	}
	copy(now[off:], b)
	c.change(name, now, func() error { _, err := h.Write(ctx, b, int64(off)); return err })
}

func (c *crashRun) truncate(name string, h *volume.Handle, n int) {
	c.t.Helper()
	now := make([]byte, n)
	copy(now, c.file(name).now())
	c.change(name, now, func() error { _, err := h.Node().SetAttr(ctx, size(int64(n))); return err })
}

func (c *crashRun) open(name string) *volume.Handle {
	c.t.Helper()
	h, err := c.create(name)
	c.do("create "+name, err)
	c.file(name)
	return h
}

// workloads are what is recorded; each ends with its files open or closed as it
// likes.
var workloads = map[string]func(c *crashRun, r *rand.Rand){
	"append log with fsync": func(c *crashRun, r *rand.Rand) {
		h := c.open("log")
		for i := range 14 {
			c.write("log", h, noise(1+r.IntN(900)), len(c.file("log").now()))
			if i%2 == 0 {
				c.fsync("log", h)
			}
		}
	},
	"overwrite at random with fsync": func(c *crashRun, r *rand.Rand) {
		h := c.open("db")
		c.write("db", h, noise(30000), 0)
		c.fsync("db", h)
		for range 10 {
			c.write("db", h, noise(1+r.IntN(5000)), r.IntN(25000))
			c.write("db", h, noise(1+r.IntN(50)), r.IntN(25000))
			if r.IntN(2) == 0 {
				c.fsync("db", h)
			}
		}
	},
	"large appends": func(c *crashRun, r *rand.Rand) {
		h := c.open("big")
		for range 4 {
			c.write("big", h, noise(300000+r.IntN(100)), len(c.file("big").now()))
		}
		c.fsync("big", h)
		c.write("big", h, noise(300000), len(c.file("big").now()))
		c.do("close", h.Release())
	},
	"replace by rename": func(c *crashRun, r *rand.Rand) {
		x := c.file("f")
		x.whole = true
		for i := range 5 {
			tmp := fmt.Sprint("tmp", i)
			h := c.open(tmp)
			b := noise(1 + r.IntN(9000))
			c.write(tmp, h, b, 0)
			c.fsync(tmp, h)
			c.do("close", h.Release())
			delete(c.expect, tmp)
			x.versions = append(x.versions, b)
			c.do("rename", c.v.Rename(c.v.Root(), tmp, c.v.Root(), "f", 0))
			c.syncDir("")
			x.confirmed, x.versions = true, [][]byte{b}
		}
	},
	"rekey": func(c *crashRun, r *rand.Rand) {
		h := c.open("f")
		c.write("f", h, noise(1+r.IntN(30000)), 0)
		c.fsync("f", h)
		c.do("close", h.Release())
		for i := range 4 {
			done, err := c.v.Rekey(ctx, c.must("f"), volume.RekeyOptions{})
			c.do("rekey", err)
			if done.Changed != 1 {
				c.t.Fatalf("%+v", done)
			}
			h := c.opened("f")
			c.write("f", h, noise(1+r.IntN(5000)), r.IntN(len(c.file("f").now())))
			if i%2 == 0 {
				c.fsync("f", h)
			}
			c.do("close", h.Release())
		}
	},
	"reheader": func(c *crashRun, r *rand.Rand) {
		for i := range 3 {
			name := fmt.Sprint("f", i)
			h := c.open(name)
			c.write(name, h, noise(1+r.IntN(9000)), 0)
			c.fsync(name, h)
			c.do("close", h.Release())
		}
		rs := c.v.Recipients()
		for _, size := range []int{8192, 1536} {
			_, err := rs.SetHeaderSize(size)
			c.do("set the size", err)
			h := c.open("new")
			c.write("new", h, noise(100), 0)
			c.fsync("new", h)
			c.do("close", h.Release())
			_, rec, err := rs.Reheader(ctx, volume.RekeyOptions{})
			c.do("reheader", err)
			if rec == nil {
				c.t.Fatal("files are left")
			}
		}
	},
	"rollback journal": func(c *crashRun, r *rand.Rand) { // as SQLite does
		db := c.open("db")
		c.write("db", db, noise(20000), 0)
		c.fsync("db", db)
		for i := range 4 {
			journal := fmt.Sprint("journal", i)
			j := c.open(journal)
			c.write(journal, j, noise(512), 0)
			c.write(journal, j, c.file("db").now()[:8192], 512)
			c.fsync(journal, j)
			c.write("db", db, noise(4096), 4096*r.IntN(2))
			c.write("db", db, noise(4096), 4096*(2+r.IntN(2)))
			c.fsync("db", db)
			c.truncate(journal, j, 0)
			c.do("close", j.Release())
			delete(c.expect, journal)
			c.do("unlink", c.v.Unlink(c.v.Root(), journal))
		}
	},
	"write-ahead log": func(c *crashRun, r *rand.Rand) {
		db, wal := c.open("db"), c.open("wal")
		c.write("db", db, noise(20000), 0)
		c.fsync("db", db)
		for range 3 {
			for range 3 {
				c.write("wal", wal, noise(4120), len(c.file("wal").now()))
				c.fsync("wal", wal)
			}
			c.write("db", db, noise(4096), 4096*r.IntN(4))
			c.fsync("db", db)
			c.write("wal", wal, noise(4120), 0) // from the beginning
			c.fsync("wal", wal)
		}
	},
	"directories": func(c *crashRun, r *rand.Rand) {
		for i := range 4 {
			d := fmt.Sprint("d", i)
			c.mkdir(d)
			c.mkdir(d + "/sub")
			name := d + "/sub/f"
			h := c.open(name)
			c.write(name, h, noise(1+r.IntN(5000)), 0)
			if i%2 == 0 {
				c.fsync(name, h)
			}
			c.syncDir(d + "/sub")
			c.do("close", h.Release())
		}
	},
	"truncate up and down": func(c *crashRun, r *rand.Rand) {
		h := c.open("f")
		c.write("f", h, noise(30000), 0)
		c.fsync("f", h)
		for range 8 {
			c.truncate("f", h, 1+r.IntN(40000))
			if r.IntN(2) == 0 {
				c.write("f", h, noise(3000), r.IntN(20000))
			}
			if r.IntN(3) == 0 {
				c.fsync("f", h)
			}
		}
		c.truncate("f", h, 3040)
		c.fsync("f", h)
		c.truncate("f", h, 0)
		c.write("f", h, noise(10), 0)
		c.fsync("f", h)
	},
	"long names": func(c *crashRun, r *rand.Rand) {
		long := func(i int) string { return strings.Repeat(fmt.Sprint(i), 230) }
		for i := range 4 {
			h := c.open(long(i))
			c.write(long(i), h, noise(100), 0)
			c.fsync(long(i), h)
			c.do("close", h.Release())
		}
		x := c.file(long(7))
		x.versions, x.whole = append(x.versions, c.file(long(1)).now()), true
		c.file(long(1)).confirmed = false // it may be under either name
		c.do("rename", c.v.Rename(c.v.Root(), long(1), c.v.Root(), long(7), 0))
		c.syncDir("")
		x.confirmed, x.versions = true, x.versions[1:]
		c.expect[long(2)].confirmed = false
		c.do("unlink", c.v.Unlink(c.v.Root(), long(2)))
	},
	"closed and never fsynced": func(c *crashRun, r *rand.Rand) {
		for i := range 8 {
			name := fmt.Sprint("f", i)
			h := c.open(name)
			c.write(name, h, noise(1+r.IntN(12000)), 0)
			c.do("close", h.Release())
		}
		c.v.Settle()
		h := c.open("f3")
		c.write("f3", h, noise(100), len(c.file("f3").now()))
		c.do("close", h.Release())
	},
	"holes": func(c *crashRun, r *rand.Rand) {
		h := c.open("f")
		c.write("f", h, noise(60000), 0)
		c.fsync("f", h)
		for range 5 {
			at, n := r.IntN(50000), 5000+r.IntN(20000)
			now := append([]byte(nil), c.file("f").now()...)
			clear(now[at:min(at+n, len(now))])
			c.change("f", now, func() error { return h.Fallocate(ctx, punch, int64(at), int64(n)) })
			if r.IntN(2) == 0 {
				c.write("f", h, noise(2000), r.IntN(55000))
				c.fsync("f", h)
			}
		}
	},
	"recipients":          (*crashRun).recipients,
	"keys of a directory": (*crashRun).directoryKeys,
	"large headers":       (*crashRun).largeHeaders,
	"settling and sessions": func(c *crashRun, r *rand.Rand) {
		for range 3 {
			h := c.open("f")
			c.write("f", h, noise(5000+r.IntN(4000)), len(c.file("f").now()))
			c.v.Age()
			if r.IntN(2) == 0 {
				c.fsync("f", h)
			}
			c.do("close", h.Release())
			c.v.Settle()
			c.do("session", c.v.NextSession())
			x := c.file("f") // a session's end is a sync
			x.confirmed, x.versions = true, [][]byte{x.now()}
		}
	},
}

// recipients goes from one key to another, with files open meanwhile. Calls come from one goroutine at
// a time: the simulation follows no others.
func (c *crashRun) recipients(r *rand.Rand) {
	c.more = newStore(c.t)
	a, b := c.store, c.more[0]
	h := c.open("open")
	c.write("open", h, noise(3000), 0)
	c.fsync("open", h)
	for i := range 3 {
		name := fmt.Sprint("f", i)
		f := c.open(name)
		c.write(name, f, noise(1+r.IntN(9000)), 0)
		c.fsync(name, f)
		c.do("close", f.Release())
	}
	empty := c.open("empty") // its data key is wrapped for the first recipient alone
	rs := c.v.Recipients()
	rewrap := func() {
		done, err := rs.Rewrap(ctx, volume.RewrapOptions{})
		if c.do("rewrap", err); done.Failed > 0 {
			c.t.Fatalf("%+v", done)
		}
	}
	_, err := rs.Add(ctx, b)
	c.do("add", err)
	c.write("open", h, noise(100), 2950)
	rewrap()
	c.write("open", h, noise(100), 10) // with the new header
	c.fsync("open", h)
	_, err = rs.Remove(ctx, a.URI())
	c.do("remove", err)
	c.write("empty", empty, noise(50), 0)
	c.fsync("empty", empty)
	rewrap()
	c.write("open", h, noise(100), 3050)
	c.fsync("open", h)
}

// largeHeaders makes files whose recipients do not fit in one page.
func (c *crashRun) largeHeaders(r *rand.Rand) {
	for range 40 {
		c.more = append(c.more, newStore(c.t)...)
	}
	rs := c.v.Recipients()
	_, err := rs.SetHeaderSize(8192)
	c.do("set the size", err)
	_, rec, err := rs.Reheader(ctx, volume.RekeyOptions{})
	if c.do("reheader", err); rec == nil {
		c.t.Fatal("files are left")
	}
	c.mkdir("d")
	if _, err = rs.SetKeys(ctx, c.must("d"), c.more); errors.Is(err, volume.ErrPlainNames) {
		return
	}
	c.do("set the keys", err)
	for i := range 3 {
		name := fmt.Sprint("d/f", i)
		h := c.open(name)
		c.write(name, h, noise(1+r.IntN(9000)), 0)
		if i == 1 {
			c.v.Age()
		}
		c.write(name, h, noise(1+r.IntN(5000)), len(c.file(name).now()))
		if i > 0 {
			c.fsync(name, h)
		}
		c.do("close", h.Release())
		if i == 2 {
			h := c.open(name)
			c.write(name, h, noise(1+r.IntN(5000)), 100)
			c.do("close", h.Release())
		}
	}
	_, err = rs.SetKeys(ctx, c.must("d"), c.more[1:])
	c.do("set the keys", err)
	done, err := rs.Rewrap(ctx, volume.RewrapOptions{})
	if c.do("rewrap", err); done.Failed > 0 || done.Changed != 3 {
		c.t.Fatalf("%+v", done)
	}
}

// directoryKeys gives a directory a key of its own, then another one, and then the volume's again.
func (c *crashRun) directoryKeys(r *rand.Rand) {
	c.more = []keystore.Store{newStore(c.t)[0], newStore(c.t)[0]}
	c.mkdir("d")
	h := c.open("d/open")
	c.write("d/open", h, noise(3000), 0)
	c.fsync("d/open", h)
	empty := c.open("d/empty") // its data key is wrapped for the volume's recipient
	rs := c.v.Recipients()
	for i, keys := range [][]keystore.Store{c.more[:1], c.more[1:], nil} {
		_, err := rs.SetKeys(ctx, c.must("d"), keys)
		if errors.Is(err, volume.ErrPlainNames) {
			return
		}
		c.do("set the keys", err)
		name := fmt.Sprint("d/f", i)
		f := c.open(name)
		c.write(name, f, noise(1+r.IntN(9000)), 0)
		c.fsync(name, f)
		c.do("close", f.Release())
		if i == 0 {
			c.write("d/empty", empty, noise(50), 0)
			c.fsync("d/empty", empty)
		}
		if i == 1 { // the files have the key of before when the next one comes
			continue
		}
		done, err := rs.Rewrap(ctx, volume.RewrapOptions{})
		if c.do("rewrap", err); done.Failed > 0 {
			c.t.Fatalf("%+v", done)
		}
		c.write("d/open", h, noise(100), 2900)
		c.fsync("d/open", h)
	}
}

func (c *crashRun) syncDir(path string) {
	c.t.Helper()
	d, err := c.must(path).OpenDir()
	c.do("open directory", err)
	defer d.Close()
	c.do("fsync of a directory", d.Sync())
}
