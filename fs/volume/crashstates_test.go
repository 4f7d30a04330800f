package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
)

// What a power cut may leave, as this file models it:
//
//   - Content: of each page any version since the last fsync of its file, or zeros
//     where there was none; independently of other pages (ext4(5), data=writeback
//     and delayed allocation). A page that was rewritten while it may have been
//     under writeback is a mix of both versions in pieces of 64 bytes (seen on ext4
//     and xfs; sync_file_range(2) or fsync in between forbids it).
//   - Length: any since the last fsync, in any order with the content. A truncation
//     takes content away for good: what lies behind it does not come back with a
//     later, greater length.
//   - Names: the operations on directories are lost from the end, at least up to
//     the last fsync of anything (ext4, xfs: one journal). Or, as on btrfs and
//     f2fs, up to the last syncfs, but for what an fsync of a file, or of a directory,
//     has logged: that file under the names that it had, that directory's entries.
//   - syncfs and fsync are barriers; everything before them is durable as they return.
//
// The state of a file (bytes 128 to 192 of its header) is content as any other.

// sim records the calls of a volume and can build what a cut would leave.
type sim struct {
	t     testing.TB
	nodes []*simNode
	byIno map[inoKey]*simNode
	names []nameOp // in order
	calls int
	// marks: how many names are durable for sure, by call.
	journal, commit []int // journal[i]: after call i, names up to here are on the disk (ext4); commit: by syncfs
	logged          []loggedNames
}

type inoKey struct {
	ino  uint64
	mode uint32
}

// simNode is a file, directory or symlink.
type simNode struct {
	id     int
	mode   uint32
	target string
	epochs []*simEpoch // of a file: a truncation begins a new one
}

// simEpoch is what a file was between two truncations.
type simEpoch struct {
	lengths []stamped[int64]
	pages   map[int64][]pageVersion
}

type stamped[T any] struct {
	at int // the call by which it was made
	v  T
}

type pageVersion struct {
	at   int
	data []byte // nil: zeros
	torn bool   // it can be a mix with the version before it
}

// nameOp is one change of directories, whole or not at all.
type nameOp struct {
	at  int
	set []nameSet
}

type nameSet struct {
	dir  int
	name string
	node int // -1: removed
}

// loggedNames is what an fsync has logged besides the journal's order.
type loggedNames struct {
	at  int
	set []nameSet
}

const simPage = 4096

func newSim(t testing.TB, root string) *sim {
	s := &sim{t: t, byIno: map[inoKey]*simNode{}}
	s.load(root, nil)
	for _, n := range s.nodes {
		s.synced(n)
	}
	s.mark(true, true)
	return s
}

// load takes what is in a directory as durable.
func (s *sim) load(path string, parent *simNode) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		s.t.Fatal(err)
	}
	n := s.node(&st)
	if parent != nil {
		s.names = append(s.names, nameOp{0, []nameSet{{parent.id, filepath.Base(path), n.id}}})
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		es, err := os.ReadDir(path)
		if err != nil {
			s.t.Fatal(err)
		}
		for _, e := range es {
			s.load(filepath.Join(path, e.Name()), n)
		}
	case unix.S_IFLNK:
		n.target, _ = os.Readlink(path)
	default:
		b, err := os.ReadFile(path)
		if err != nil {
			s.t.Fatal(err)
		}
		s.write(n, b, 0)
	}
}

func (s *sim) node(st *unix.Stat_t) *simNode {
	key := inoKey{st.Ino, st.Mode & unix.S_IFMT}
	n := s.byIno[key]
	if n == nil {
		n = &simNode{id: len(s.nodes), mode: st.Mode, epochs: []*simEpoch{{lengths: []stamped[int64]{{s.calls, 0}}, pages: map[int64][]pageVersion{}}}}
		s.nodes = append(s.nodes, n)
		s.byIno[key] = n
	}
	return n
}

func (s *sim) fd(fd int) *simNode {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		s.t.Fatal("a descriptor that is not open:", err)
	}
	return s.node(&st)
}

func (s *sim) at(dir int, name string) *simNode {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		s.t.Fatalf("%s: %v", name, err)
	}
	return s.node(&st)
}

func (n *simNode) epoch() *simEpoch { return n.epochs[len(n.epochs)-1] }

func (e *simEpoch) length() int64 { return e.lengths[len(e.lengths)-1].v }

func (e *simEpoch) page(k int64) (data []byte, dirty bool) {
	vs := e.pages[k]
	if len(vs) == 0 {
		return nil, false
	}
	return vs[len(vs)-1].data, len(vs) > 1
}

// write records a pwrite.
func (s *sim) write(n *simNode, b []byte, off int64) {
	e := n.epoch()
	for len(b) > 0 {
		k, at := off/simPage, off%simPage
		m := min(simPage-at, int64(len(b)))
		old, _ := e.page(k)
		page := make([]byte, simPage)
		copy(page, old)
		copy(page[at:], b[:m])
		vs := e.pages[k]
		if len(vs) == 0 {
			vs = []pageVersion{{at: -1}}
		}
		// Under writeback it can be only while it is dirty.
		torn := len(vs) > 1 && !clean(vs)
		e.pages[k] = append(vs, pageVersion{s.calls, page, torn})
		b, off = b[m:], off+m
	}
	if off > e.length() {
		e.lengths = append(e.lengths, stamped[int64]{s.calls, off})
	}
}

// clean reports whether the last version was waited for: see settle.
func clean(vs []pageVersion) bool { return len(vs) > 1 && vs[len(vs)-1].at < 0 }

// truncate records an ftruncate.
func (s *sim) truncate(n *simNode, size int64) {
	e := n.epoch()
	if size >= e.length() {
		if size > e.length() {
			e.lengths = append(e.lengths, stamped[int64]{s.calls, size})
		}
		return
	}
	next := &simEpoch{lengths: []stamped[int64]{{s.calls, size}}, pages: map[int64][]pageVersion{}}
	for k, vs := range e.pages {
		switch {
		case (k+1)*simPage <= size:
			next.pages[k] = slices.Clone(vs)
		case k*simPage < size: // the rest of its page is zeros now
			var cut []pageVersion
			for _, v := range vs {
				d := make([]byte, simPage)
				copy(d, v.data)
				clear(d[size%simPage:])
				cut = append(cut, pageVersion{v.at, d, v.torn})
			}
			next.pages[k] = cut
		}
	}
	n.epochs = append(n.epochs, next)
}

// punch records a hole of whole pages.
func (s *sim) punch(n *simNode, off, size int64) {
	e := n.epoch()
	for k := off / simPage; k < (off+size)/simPage; k++ {
		if vs := e.pages[k]; len(vs) > 0 {
			e.pages[k] = append(vs, pageVersion{at: s.calls})
		}
	}
}

// settle is S over pages: none of them is under writeback, and the last version
// is written. It is durable only if the file's length and map were.
func (s *sim) settle(n *simNode, off, size int64) {
	for k, vs := range n.epoch().pages {
		if (k+1)*simPage > off && k*simPage < off+size && len(vs) > 1 {
			vs[len(vs)-1].at = -1 - s.calls // clean, and made by this call at the latest
		}
	}
}

// synced makes a file's content durable.
func (s *sim) synced(n *simNode) {
	e := n.epoch()
	x := &simEpoch{lengths: []stamped[int64]{{s.calls, e.length()}}, pages: map[int64][]pageVersion{}}
	for k := range e.pages {
		d, _ := e.page(k)
		x.pages[k] = []pageVersion{{at: s.calls, data: d}}
	}
	n.epochs = []*simEpoch{x}
}

// mark notes what is durable of the names after this call.
func (s *sim) mark(journal, commit bool) {
	last := func(v []int) int {
		if len(v) == 0 {
			return 0
		}
		return v[len(v)-1]
	}
	j, c := last(s.journal), last(s.commit)
	if journal {
		j = len(s.names)
	}
	if commit {
		c = len(s.names)
	}
	s.journal, s.commit = append(s.journal, j), append(s.commit, c)
}

// done is the volume's hook: it records a call that was made.
func (s *sim) done(c volume.Call, err error) {
	if err != nil {
		if c.Op == "pwrite" {
			s.t.Fatal("a write failed: ", err)
		}
		return
	}
	s.calls++
	journal, commit := false, false
	name := func(sets ...nameSet) { s.names = append(s.names, nameOp{s.calls, sets}) }
	switch c.Op {
	case "openat":
		if c.Mode&unix.O_CREAT != 0 {
			name(nameSet{s.fd(c.FD).id, c.Name, s.fresh(c.FD, c.Name)})
		}
	case "mkdirat", "mknodat":
		name(nameSet{s.fd(c.FD).id, c.Name, s.fresh(c.FD, c.Name)})
	case "symlinkat":
		id := s.fresh(c.FD, c.Name)
		s.nodes[id].target = c.To
		name(nameSet{s.fd(c.FD).id, c.Name, id})
	case "unlinkat":
		name(nameSet{s.fd(c.FD).id, c.Name, -1})
	case "linkat":
		name(nameSet{s.fd(c.ToFD).id, c.To, s.at(c.ToFD, c.To).id})
	case "renameat2":
		n := s.at(c.ToFD, c.To)
		name(nameSet{s.fd(c.FD).id, c.Name, -1}, nameSet{s.fd(c.ToFD).id, c.To, n.id})
	case "pwrite":
		s.write(s.fd(c.FD), c.Data, c.Off)
	case "ftruncate":
		s.truncate(s.fd(c.FD), c.Off)
	case "fallocate":
		if c.Mode&unix.FALLOC_FL_PUNCH_HOLE != 0 {
			s.punch(s.fd(c.FD), c.Off, c.Len)
		}
	case "sync_file_range":
		s.settle(s.fd(c.FD), c.Off, c.Len)
	case "fsync", "fdatasync":
		n := s.fd(c.FD)
		if n.mode&unix.S_IFMT == unix.S_IFREG {
			s.synced(n)
		}
		s.log(n)
		journal = true
	case "syncfs":
		for _, n := range s.nodes {
			if n.mode&unix.S_IFMT == unix.S_IFREG {
				s.synced(n)
			}
		}
		journal, commit = true, true
	}
	s.mark(journal, commit)
}

// fresh forgets a node whose inode number is used again, and returns the new one.
func (s *sim) fresh(dir int, name string) int {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		s.t.Fatal(err)
	}
	delete(s.byIno, inoKey{st.Ino, st.Mode & unix.S_IFMT})
	return s.node(&st).id
}

// log notes what btrfs's log holds after an fsync of n: its names, or its entries.
func (s *sim) log(n *simNode) {
	var set []nameSet
	for dir, entries := range s.tree(len(s.names), nil) {
		for name, id := range entries {
			if id == n.id || dir == n.id {
				set = append(set, nameSet{dir, name, id})
			}
		}
	}
	s.logged = append(s.logged, loggedNames{s.calls, set})
}

// tree replays the first k operations on names, and then what was logged.
func (s *sim) tree(k int, logged []loggedNames) map[int]map[string]int {
	t := map[int]map[string]int{}
	apply := func(set []nameSet) {
		for _, x := range set {
			if t[x.dir] == nil {
				t[x.dir] = map[string]int{}
			}
			if x.node < 0 {
				delete(t[x.dir], x.name)
			} else {
				t[x.dir][x.name] = x.node
			}
		}
	}
	for _, op := range s.names[:k] {
		apply(op.set)
	}
	for _, l := range logged {
		apply(l.set)
	}
	return t
}

// A choice decides what a cut leaves.
type choice struct {
	r    *rand.Rand
	all  bool // everything that was done
	none bool // only what is durable
	btrf bool
}

// build makes the tree that a cut just now may leave.
func (s *sim) build(dir string, c choice) {
	least := s.journal[len(s.journal)-1]
	var logged []loggedNames
	if c.btrf {
		least = s.commit[len(s.commit)-1]
	}
	k := least
	switch {
	case c.all:
		k = len(s.names)
	case !c.none:
		k = least + c.r.IntN(len(s.names)-least+1)
	}
	if c.btrf {
		// What was logged after that point.
		from := 0
		if k > 0 {
			from = s.names[k-1].at
		}
		for _, l := range s.logged {
			if l.at > from {
				logged = append(logged, l)
			}
		}
	}
	made := map[int]string{}
	s.make(dir, 0, s.tree(k, logged), made, c)
}

func (s *sim) make(path string, id int, tree map[int]map[string]int, made map[int]string, c choice) {
	n := s.nodes[id]
	do := func(err error) {
		if err != nil {
			s.t.Fatal(err)
		}
	}
	if other, ok := made[id]; ok {
		if n.mode&unix.S_IFMT != unix.S_IFDIR {
			do(os.Link(other, path))
		}
		return
	}
	made[id] = path
	switch n.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if id != 0 {
			do(os.Mkdir(path, 0o755))
		}
		for _, name := range slices.Sorted(maps.Keys(tree[id])) {
			s.make(filepath.Join(path, name), tree[id][name], tree, made, c)
		}
	case unix.S_IFLNK:
		do(os.Symlink(n.target, path))
	default:
		do(os.WriteFile(path, n.content(c), 0o644))
	}
}

// content is what a cut leaves of a file.
func (n *simNode) content(c choice) []byte {
	e := n.epoch()
	length := e.length()
	switch {
	case c.none:
		e = n.epochs[0]
		length = e.lengths[0].v
	case !c.all:
		e = n.epochs[c.r.IntN(len(n.epochs))]
		length = e.lengths[c.r.IntN(len(e.lengths))].v
	}
	b := make([]byte, length)
	for k, vs := range e.pages {
		if k*simPage >= length {
			continue
		}
		i := len(vs) - 1
		switch {
		case c.none:
			i = 0
		case !c.all:
			i = c.r.IntN(len(vs))
		}
		page := vs[i].data
		if vs[i].torn && !c.all && c.r.IntN(2) == 0 {
			page = mix(c.r, vs[i-1].data, page)
		}
		copy(b[k*simPage:], page)
	}
	return b
}

// mix is a page of which some pieces are the old and some the new version.
func mix(r *rand.Rand, old, now []byte) []byte {
	out := make([]byte, simPage)
	copy(out, now)
	was := make([]byte, simPage)
	copy(was, old)
	for i := 0; i < simPage; i += 64 {
		if r.IntN(2) == 0 {
			copy(out[i:i+64], was[i:i+64])
		}
	}
	return out
}

// expectation is what must be true of a file after a cut.
type expectation struct {
	truth
	whole bool // it is one of its versions, not a mix of them
}

// crashRun is a workload under way, with what it expects at each call.
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

func (c *crashRun) syncDir(path string) {
	c.t.Helper()
	d, err := c.must(path).OpenDir()
	c.do("open directory", err)
	defer d.Close()
	c.do("fsync of a directory", d.Sync())
}

// crashStates is how many states are built and opened in all.
func crashStates() int {
	n := 20_000
	fmt.Sscan(os.Getenv("KMSFS_CRASH_STATES"), &n)
	return n
}

// For every prefix of each workload's calls, trees that a power cut would have
// left: what was confirmed is there, and nothing else than what was written.
func TestCrashStates(t *testing.T) {
	each := max(1, crashStates()/len(workloads))
	var total, second atomic.Int64
	t.Cleanup(func() { t.Logf("%d states, %d of them cut a second time during repair", total.Load(), second.Load()) })
	for _, name := range slices.Sorted(maps.Keys(workloads)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(uint64(len(name)), 3))
			left := each
			for round := uint64(0); left > 0 && !t.Failed(); round++ {
				k := &crashChecker{t: t, r: r, left: &left, second: &second, total: &total}
				k.record(workloads[name], round)
			}
		})
	}
}

// crashChecker records one run of a workload, and checks states at each call.
type crashChecker struct {
	t             *testing.T
	r             *rand.Rand
	left          *int
	total, second *atomic.Int64
	run           *crashRun
	busy          bool
}

const statesPerCall = 4

func (k *crashChecker) record(work func(*crashRun, *rand.Rand), round uint64) {
	t := k.t
	dir, err := os.MkdirTemp(k.t.TempDir(), "v")
	if err != nil {
		t.Fatal(err)
	}
	var s *sim
	done := func(c volume.Call, err error) {
		if s == nil || k.busy || c.Op == "pread" || c.Op == "openat" && c.Mode&unix.O_CREAT == 0 {
			return
		}
		s.done(c, err)
		if err == nil {
			k.check()
		}
	}
	w := newWorldIn(t, dir, volume.Options{}, round%4 == 3)
	w.quiet = true
	w.write("old", []byte("an old file, settled"))
	w.close()
	s = newSim(t, dir)
	c := &crashRun{world: w, sim: s, expect: map[string]*expectation{"old": {truth: truth{confirmed: true, versions: [][]byte{[]byte("an old file, settled")}}}}}
	k.run = c
	w.open(volume.Options{Done: done}.Torn())
	work(c, rand.New(rand.NewPCG(round, 5)))
	k.busy = true
	w.crash()
}

// check builds some of the states that a cut just now may leave, and opens them.
func (k *crashChecker) check() {
	k.busy = true // what checking does is not recorded
	defer func() { k.busy = false }()
	for i := range statesPerCall {
		if *k.left <= 0 || k.t.Failed() {
			return
		}
		*k.left--
		k.total.Add(1)
		c := choice{r: k.r, btrf: k.r.IntN(2) == 0}
		switch i {
		case 0:
			c.all = k.r.IntN(2) == 0
			c.none = !c.all
		}
		k.state(c)
	}
}

// memory is a place for trees that need not be durable.
func memory(t testing.TB) string {
	base := "/dev/shm"
	if st, err := os.Stat(base); err != nil || !st.IsDir() {
		base = t.TempDir()
	}
	dir, err := os.MkdirTemp(base, "kmsfs-crash-")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func (k *crashChecker) state(c choice) {
	dir := memory(k.t)
	defer os.RemoveAll(dir)
	k.run.sim.build(dir, c)
	w := &world{t: k.t, dir: dir, store: k.run.store, log: &logBuffer{}, quiet: true}
	fail := func(format string, args ...any) {
		k.t.Errorf("after call %d (all %v, none %v, btrfs %v): %s; the log: %.600s", k.run.sim.calls, c.all, c.none, c.btrf, fmt.Sprintf(format, args...), w.log)
	}
	fs, _ := w.fsck()
	for _, f := range fs {
		if f.Grade > volume.Unconfirmed {
			fail("fsck: %+v", f)
			return
		}
	}
	// A second cut in the middle of the repair.
	var nested *sim
	var done func(volume.Call, error)
	if k.r.IntN(10) == 0 {
		nested = newSim(k.t, dir)
		stop := 1 + k.r.IntN(12)
		var mu sync.Mutex // the walk repairs too
		done = func(c volume.Call, err error) {
			mu.Lock()
			defer mu.Unlock()
			if nested.calls < stop && c.Op != "pread" && (c.Op != "openat" || c.Mode&unix.O_CREAT != 0) {
				nested.done(c, err)
			}
		}
	}
	w.open(volume.Options{Done: done}.Torn())
	if msg := k.verify(w); msg != "" {
		fail("%s", msg)
	}
	w.crash()
	if nested == nil || k.t.Failed() {
		return
	}
	k.second.Add(1)
	again := memory(k.t)
	defer os.RemoveAll(again)
	nested.build(again, choice{r: k.r, btrf: c.btrf})
	w = &world{t: k.t, dir: again, store: k.run.store, log: &logBuffer{}, quiet: true}
	w.open(volume.Options{})
	if msg := k.verify(w); msg != "" {
		fail("cut again in call %d of the repair: %s", nested.calls, msg)
	}
	w.crash()
}

// verify compares every file with what it may be: stat first, then its content.
func (k *crashChecker) verify(w *world) string {
	for name, x := range k.run.expect {
		n, err := w.node(name)
		if errors.Is(err, unix.ENOENT) && !x.confirmed {
			continue
		}
		if err != nil {
			return fmt.Sprintf("%.20s, confirmed %v: %v", name, x.confirmed, err)
		}
		st, err := n.Attr()
		if err != nil {
			return fmt.Sprintf("stat of %.20s: %v", name, err)
		}
		got, err := readNode(n)
		if err != nil {
			return fmt.Sprintf("%.20s, confirmed %v: %v", name, x.confirmed, err)
		}
		if int64(len(got)) != st.Size {
			return fmt.Sprintf("%.20s: stat says %d bytes, %d are read", name, st.Size, len(got))
		}
		if x.whole && x.confirmed && !slices.ContainsFunc(x.versions, func(v []byte) bool { return bytes.Equal(v, got) }) {
			return fmt.Sprintf("%.20s: %d bytes that are none of its versions", name, len(got))
		}
		if err := x.allows(got); err != nil {
			return fmt.Sprintf("%.20s, confirmed %v: %v", name, x.confirmed, err)
		}
	}
	return ""
}

// kmsfs.json is the old or the new one, or not there yet, whatever a cut leaves of
// its making.
func TestCrashStatesOfInit(t *testing.T) {
	dir := t.TempDir()
	s := newSim(t, dir)
	store := newStore(t)
	built := 0
	check := func(c volume.Call, err error) {
		if err != nil || c.Op == "pread" || c.Op == "openat" && c.Mode&unix.O_CREAT == 0 {
			return
		}
		s.done(c, err)
		for i := range 40 {
			at := memory(t)
			s.build(at, choice{r: rand.New(rand.NewPCG(uint64(i), uint64(s.calls))), btrf: i%2 == 0, all: i == 0, none: i == 1})
			l, err := volume.Find(at)
			if err == nil {
				_, err = l.Unlock(ctx, store, volume.UnlockOptions{})
				l.Close()
			}
			if err != nil && !errors.Is(err, volume.ErrNotVolume) {
				t.Errorf("after call %d: %v", s.calls, err)
			}
			os.RemoveAll(at)
			built++
		}
	}
	if _, err := volume.Init(ctx, dir, store, blockcrypt.NewID(), volume.InitOptions{Done: check}); err != nil {
		t.Fatal(err)
	}
	l, err := volume.Find(dir)
	if err != nil || built < 100 {
		t.Fatalf("%d states: %v", built, err)
	}
	l.Close()
	runtime.KeepAlive(s)
}
