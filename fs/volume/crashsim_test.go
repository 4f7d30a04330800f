//go:build linux && !portable

package volume_test

import (
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// What a power cut may leave, as crash states model it:
//
//   - Content: of each page any version since the last fsync of its file, or zeros
//     zeros if there was none; independently of other pages (ext4(5), data=writeback
//     and delayed allocation). A page that was rewritten while it may have been
//     under writeback is a mix of both versions in pieces of 64 bytes (seen on ext4
//     and xfs; sync_file_range(2) or fsync in between forbids it).
//   - Length: any since the last fsync, in any order with the content. A truncation
//     takes content away for good: the bytes behind it do not come back with a
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
		n = &simNode{id: len(s.nodes), mode: st.Mode,
			epochs: []*simEpoch{{lengths: []stamped[int64]{{s.calls, 0}},
				pages: map[int64][]pageVersion{}}}}
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
		// The calls that were logged after that point.
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
