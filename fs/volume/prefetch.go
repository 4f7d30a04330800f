//go:build linux && !portable

package volume

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

// prefetcher unwraps ahead the keys of files that a program is about to open. It
// follows scans: opens of one file of a directory after the other, in the order
// of its listing, its names or its inode numbers, into subdirectories too. One
// goroutine owns all but events, active, once and on.
//
// Only opens that had to wait for a key begin a scan, so that nothing is done
// where keys are known or nobody is to be asked. A scan predicts twice as many
// files with each one that it has predicted rightly, from fullWindow on one more,
// maxWindow at most: that is what a scan that breaks off costs. Random opens begin
// no scan, and take over none.
type prefetcher struct {
	v      *Volume
	events chan event
	once   sync.Once    // start
	on     atomic.Bool  // it was started
	active atomic.Int64 // files that are predicted
	scans  []*scan      // the most recent first
}

const (
	maxScans    = 8
	firstWindow = 4
	fullWindow  = 64 // up to here it doubles
	maxWindow   = 256
	hotWindow   = 16 // from here on a scan may lead into another directory
	scanPause   = 2 * time.Second
	maxListed   = 20000 // entries of a directory that is looked through
	maxDepth    = 64
)

// scan is one program's way through the tree.
type scan struct {
	levels []*level // from where it came to where it is, all held
	window int
	ahead  map[location]bool // predicted, and not opened yet; the directories are held
	last   location
	seen   time.Time
	deep   bool // it goes from one directory to the next
	order  order
}

// order is one in which programs go through a directory.
type order int

const (
	byListing order = iota // grep, find, tar
	byName                 // a shell, rsync: files first
	byInode                // cp
	orders    int   = iota
)

// level is a directory of a scan.
type level struct {
	dir     *Node               // held
	sorted  [orders][]scanEntry // by order; nil until it is asked for
	entries []scanEntry         // one of these
	next    int                 // the first entry that is not predicted yet
}

type scanEntry struct {
	cname, name string
	ino         uint64
	dir         bool
}

// start begins, if a key service has to be waited for, and that is wanted.
func (p *prefetcher) start(v *Volume) {
	if v.o.NoPrefetch || !v.lists.waits() {
		return
	}
	p.once.Do(func() {
		p.v, p.events = v, make(chan event, 256)
		v.bg.Go(p.loop)
		p.on.Store(true)
	})
}

func (p *prefetcher) loop() {
	for {
		select {
		case <-p.v.quit:
			for len(p.events) > 0 {
				(<-p.events).n.release()
			}
			for len(p.scans) > 0 {
				p.end(0)
			}
			return
		case e := <-p.events:
			if at, ok := e.n.place(); ok {
				p.follow(at, e.cold)
			}
			e.n.release()
		}
	}
}

// follow goes on with the scan to which an open belongs, or begins one.
func (p *prefetcher) follow(at location, cold bool) {
	for i, s := range p.scans {
		if s.ahead[at] {
			p.drop(s, at)
			if s.window < fullWindow {
				s.window *= 2
			} else { // more than are asked for at once: one that comes late holds up few
				s.window = min(s.window+1, maxWindow)
			}
			p.touch(i, at)
			p.extend(s)
			return
		}
	}
	if !cold {
		return
	}
	for i, s := range p.scans {
		if s.last.dir == at.dir {
			p.restart(s, at)
		} else if !p.leads(s, at) {
			continue
		}
		p.touch(i, at)
		p.extend(s)
		return
	}
	for len(p.scans) >= maxScans {
		p.end(len(p.scans) - 1)
	}
	at.dir.hold()
	p.scans = slices.Insert(p.scans, 0,
		&scan{levels: []*level{{dir: at.dir}}, ahead: map[location]bool{}, last: at, seen: time.Now()})
}

// leads reports whether a scan that has come to the end of a directory goes on at
// this place in another one.
func (p *prefetcher) leads(s *scan, at location) bool {
	if s.deep || len(s.ahead) > 0 || s.window < hotWindow || time.Since(s.seen) > scanPause {
		return false
	}
	s.deep = true
	next, ok := p.predict(s)
	if ok && next != at {
		p.expect(s, next)
	}
	return ok && next == at
}

// touch makes scan i the most recent one, at this place.
func (p *prefetcher) touch(i int, at location) {
	s := p.scans[i]
	s.last, s.seen = at, time.Now()
	copy(p.scans[1:i+1], p.scans[:i])
	p.scans[0] = s
}

func (p *prefetcher) end(i int) {
	s := p.scans[i]
	p.scans = slices.Delete(p.scans, i, i+1)
	p.forget(s)
	for len(s.levels) > 0 {
		s.pop()
	}
}

// forget gives up what was predicted.
func (p *prefetcher) forget(s *scan) {
	for at := range s.ahead {
		p.drop(s, at)
	}
}

// expect notes a prediction.
func (p *prefetcher) expect(s *scan, at location) {
	if s.ahead[at] {
		return
	}
	at.dir.hold() // that it is the same node when a program comes to it
	s.ahead[at] = true
	p.active.Add(1)
}

// drop takes back one prediction.
func (p *prefetcher) drop(s *scan, at location) {
	delete(s.ahead, at)
	p.active.Add(-1)
	at.dir.release()
}

func (s *scan) top() *level { return s.levels[len(s.levels)-1] }

func (s *scan) pop() {
	s.top().dir.release()
	s.levels = s.levels[:len(s.levels)-1]
}

// restart lets a scan go on behind at, in the directory of its last open. By one of
// the orders at must be the next one; else the scan predicts nothing.
func (p *prefetcher) restart(s *scan, at location) {
	p.forget(s)
	old := s.top()
	if old.dir != at.dir || old.sorted[byListing] == nil {
		for len(s.levels) > 0 {
			s.pop()
		}
		at.dir.hold()
		old = p.level(at.dir, byListing)
		s.levels = []*level{old}
	}
	s.window = 0
	for o := range order(orders) {
		old.sort(o)
		if i, j := old.find(s.last.cname), old.find(at.cname); i >= 0 && old.nextFile(i) == j {
			s.order, s.window, old.next = o, firstWindow, j+1
			return
		}
	}
}

// sort takes the entries in an order.
func (l *level) sort(o order) {
	if l.sorted[o] == nil {
		es := slices.Clone(l.sorted[byListing])
		slices.SortFunc(es, func(a, b scanEntry) int {
			if o == byInode {
				return cmp.Compare(a.ino, b.ino)
			}
			return cmp.Or(cmp.Compare(btoi(a.dir), btoi(b.dir)), cmp.Compare(a.name, b.name))
		})
		l.sorted[o] = es
	}
	l.entries = l.sorted[o]
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (l *level) find(cname string) int {
	return slices.IndexFunc(l.entries, func(e scanEntry) bool { return e.cname == cname })
}

// nextFile returns the first entry behind i that is a file.
func (l *level) nextFile(i int) int {
	for i++; i < len(l.entries) && l.entries[i].dir; i++ {
	}
	return i
}

// extend predicts as many files as the scan has earned.
func (p *prefetcher) extend(s *scan) {
	for len(s.ahead) < s.window {
		at, ok := p.predict(s)
		if !ok {
			return
		}
		p.expect(s, at)
		p.fetch(at)
	}
}

// predict returns the next file on the scan's way.
func (p *prefetcher) predict(s *scan) (at location, ok bool) {
	for len(s.levels) > 0 {
		l := s.top()
		if l.next >= len(l.entries) {
			if !s.deep || !p.up(s) {
				return at, false
			}
			continue
		}
		e := l.entries[l.next]
		l.next++
		if !e.dir {
			return location{l.dir, e.cname}, true
		}
		if len(s.levels) < maxDepth {
			p.down(s, location{l.dir, e.cname})
		}
	}
	return at, false
}

// down goes into a subdirectory.
func (p *prefetcher) down(s *scan, at location) {
	n, _, err := p.v.find(at.dir, func() (string, error) { return at.cname, nil })
	if err != nil {
		return
	}
	defer p.v.Forget(n.id, 1)
	if n.IsDir() {
		n.hold()
		s.levels = append(s.levels, p.level(n, s.order))
	}
}

// up goes back to the directory above, behind where the scan has come from.
func (p *prefetcher) up(s *scan) bool {
	l := s.top()
	if len(s.levels) > 1 {
		s.pop()
		return true
	}
	at, ok := l.dir.place()
	if !ok {
		return false
	}
	at.dir.hold()
	above := p.level(at.dir, s.order)
	above.next = above.find(at.cname) + 1
	s.pop()
	s.levels = []*level{above}
	return above.next > 0
}

// level returns a directory, which is held, in an order.
func (p *prefetcher) level(dir *Node, o order) *level {
	l := &level{dir: dir}
	l.sorted[byListing] = p.list(dir)
	l.sort(o)
	return l
}

// list returns the files and directories of a directory.
func (p *prefetcher) list(n *Node) []scanEntry {
	fd, err := n.enter()
	if err != nil {
		return nil
	}
	defer n.leave()
	id, _, err := n.dirIdent(false)
	if err != nil {
		return nil
	}
	var out []scanEntry
	p.v.disk.Scan(fd, func(e disk.Dirent) error {
		if layout.IsOwn(e.Name) && !strings.HasPrefix(e.Name, blockcrypt.LongPrefix) ||
			e.Type != unix.S_IFREG && e.Type != unix.S_IFDIR {
			return nil
		}
		if name, ok, err := n.decode(fd, id, e.Name); err == nil && ok {
			out = append(out, scanEntry{cname: e.Name, name: name, ino: e.Ino, dir: e.Type == unix.S_IFDIR})
		}
		if len(out) > maxListed {
			return unix.E2BIG
		}
		return nil
	})
	return out
}

// fetch begins to unwrap a file's key.
func (p *prefetcher) fetch(at location) {
	v := p.v
	fd, err := at.dir.enter()
	if err != nil {
		return
	}
	defer at.dir.leave()
	f, err := v.disk.Open(fd, at.cname, unix.O_RDONLY|disk.FileFlags, 0)
	if err != nil {
		return
	}
	defer v.disk.Close(f)
	sizes := v.sizes()
	hdr, _, err := layout.ReadHeader(&v.disk, f, sizes.Most(), false)
	if err != nil || layout.CheckHeader(hdr, sizes, v.cfg.Volume, v.vk) != nil {
		return
	}
	v.lists.of(hdr).ring.Prefetch(hdr.File, hdr.Recipients)
}
