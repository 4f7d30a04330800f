//go:build linux && !portable

package cfile

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// bench is one ciphertext file, and the host of those that open it.
type bench struct {
	t       *testing.T
	d       disk.Disk
	g       blockcrypt.Geometry
	fd      int
	key     [32]byte
	session uint64
	faults  []string
	broke   int
}

func newBench(t *testing.T) *bench {
	g, err := blockcrypt.NewGeometry(blockcrypt.DefaultHeader)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, g: g, session: 1}
	b.fd, err = unix.Open(filepath.Join(t.TempDir(), "f"), unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(b.fd) })
	return b
}

func (b *bench) Session() uint64 { return b.session }

func (b *bench) NewFile() (*blockcrypt.Header, *blockcrypt.FileKeys, error) {
	rs := []blockcrypt.Recipient{{URI: "local:x", Wrapped: b.key[:]}}
	return blockcrypt.NewFile(b.g, nil, blockcrypt.FileIDs{File: blockcrypt.NewID()}, b.key[:], rs)
}

func (b *bench) TakeSpace(_ int64, take func() error) error { return take() }

func (b *bench) Failed(op string, err error) error {
	if err != nil {
		b.faults = append(b.faults, op+": "+err.Error())
	}
	return err
}

func (b *bench) Broke(bool) { b.broke++ }

// length returns how long the ciphertext file is.
func (b *bench) length() int64 {
	var st unix.Stat_t
	if err := unix.Fstat(b.fd, &st); err != nil {
		b.t.Fatal(err)
	}
	return st.Size
}

// open opens the file; bad says that the session that wrote it ended badly.
func (b *bench) open(past Past, bad bool) *File {
	b.t.Helper()
	f := New(&b.d, b.g, Opened{FD: b.fd}, Rules{}, b)
	n := b.length()
	if n == 0 {
		f.BelieveEmpty()
		return f
	}
	raw := make([]byte, b.g.Header())
	if _, err := unix.Pread(b.fd, raw, 0); err != nil {
		b.t.Fatal(err)
	}
	hdr, err := blockcrypt.ParseHeader(raw)
	if err != nil {
		b.t.Fatal(err)
	}
	f.SetHeader(hdr, raw)
	if f.Keys, err = hdr.Unlock(b.key[:]); err != nil {
		b.t.Fatal(err)
	}
	if bad && f.Unconfirmed() {
		_, err = f.Repair(n, false, nil)
	} else {
		err = f.Believe(n, past, false)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return f
}

// inOrder checks that the phase agrees with what memory and disk say.
func (b *bench) inOrder(f *File) {
	b.t.Helper()
	n, whole := b.length(), f.Header != nil && b.length() == b.g.Whole(f.Size)
	exact := f.Header != nil && n == b.g.Exact(f.Size)
	if f.overlong && n > b.g.Whole(f.Size) { // it could not be cut; the next change begins with that
		whole, exact = true, true
	}
	const dirty, cut = blockcrypt.Dirty, blockcrypt.Cut
	var ok bool
	switch f.Phase() {
	case Empty:
		ok = f.Header == nil && f.Size == 0 && n == 0
	case Fresh:
		ok = f.confirmed == 0 && f.Size > 0 && exact && f.Header.State.Floor == 0
	case Settled:
		ok = f.Flags()&(dirty|cut) == 0 && f.confirmed > 0 && (exact || whole)
	case Dirty:
		ok = f.Flags()&(dirty|cut) == dirty && f.confirmed > 0 && (exact || whole)
	case Growing:
		ok = f.Flags()&(dirty|cut) == dirty && f.Whole && whole
	case Cutting:
		ok = f.Flags()&cut != 0 && f.Whole && whole
	case Broken:
		ok = b.broke > 0
	}
	if !ok || f.durable > f.Size {
		b.t.Fatalf("%s: %d bytes, length %d (exact %v, whole %v), flags %#x, %+v, faults %q",
			f.Phase(), f.Size, n, exact, whole, f.Flags(), f.durability, b.faults)
	}
}

func (b *bench) content(f *File) []byte {
	b.t.Helper()
	out := make([]byte, f.Size)
	n, err := f.Read(nil, out, 0)
	if err != nil || int64(n) != f.Size {
		b.t.Fatalf("%d of %d bytes: %v", n, f.Size, err)
	}
	return out
}

func unlocked(g func() error) error { return g() }

// Any order of changes, syncs, loads and repairs gives the content that a plain file has, and the
// phase is always the one that the file on the disk is in.
func TestAnyOrderOfChanges(t *testing.T) {
	seen := map[Phase]int{}
	for seed := range uint64(5) {
		b, r := newBench(t), rand.New(rand.NewPCG(seed, 7))
		f, want := b.open(Past{}, false), []byte{}
		size := func() int64 {
			return r.Int64N([]int64{100, 5000, 40_000, 40_000, 40_000,
				3 << 20}[r.IntN(6)])
		}
		for step := range 120 {
			var err error
			op := r.IntN(11)
			switch op {
			case 0, 1, 2: // a write
				off, text := min(size(), int64(len(want))+2<<20), make([]byte, 1+r.IntN(20_000))
				for i := range text {
					text[i] = byte(r.Uint32())
				}
				if err = f.Write(text, off, int64(len(text))); err == nil {
					want = grown(want, off+int64(len(text)))
					copy(want[off:], text)
				}
			case 3, 4: // a truncation
				n := size()
				if n == 0 || f.Size == 0 {
					_, err = f.Clear()
					n = 0
				} else {
					err = f.Truncate(n)
				}
				want = grown(want, n)[:n]
			case 5: // zeros
				off, n := size(), 1+size()
				err = f.Zero(off, n, 0)
				if off < int64(len(want)) {
					clear(want[off:min(int64(len(want)), off+n)])
				}
			case 6:
				err = f.Sync(unlocked)
			case 7:
				err = f.Rest()
			case 8:
				if err = f.datasync(); err == nil {
					err = f.Settle(f.Changes())
				}
			case 9: // it is closed, and opened again
				if err = f.SettleNow(); err == nil {
					f = b.open(f.Past(), false)
				}
			case 10: // the daemon is killed
				b.session++
				f = b.open(Past{}, true)
			}
			if err != nil {
				t.Fatalf("seed %d, step %d, kind %d: %v; %q", seed, step, op, err, b.faults)
			}
			b.inOrder(f)
			if seen[f.Phase()]++; !bytes.Equal(b.content(f), want) {
				t.Fatalf("seed %d, step %d, kind %d: other content in phase %s", seed, step, op, f.Phase())
			}
		}
	}
	for _, p := range []Phase{Empty, Fresh, Settled, Dirty, Growing, Cutting} {
		if seen[p] == 0 {
			t.Errorf("never %s: %v", p, seen)
		}
	}
}

// grown returns b with zeros at its end, if it has fewer than n bytes.
func grown(b []byte, n int64) []byte {
	return append(b, make([]byte, max(0, n-int64(len(b))))...)
}

// An error at any call of a change leaves the old content or the new one, or for an overwrite
// whole pages of it; the file says so itself, or is broken and gets into order when it is opened
// again.
func TestErrorAtAnyCall(t *testing.T) {
	before := bytes.Repeat([]byte("before. "), 2000)
	for name, change := range map[string]func(*File) error{
		"append":   func(f *File) error { return f.Write([]byte("more"), f.Size, 4) },
		"gap":      func(f *File) error { return f.Write([]byte("more"), f.Size+3<<20, 4) },
		"truncate": func(f *File) error { return f.Truncate(5000) },
		"zeros":    func(f *File) error { return f.Zero(4096, 9000, 0) },
		"settle":   func(f *File) error { return f.SettleNow() },
		"fsync":    func(f *File) error { return f.Sync(unlocked) },
	} {
		t.Run(name, func(t *testing.T) {
			var after []byte // without an error
			for at := -1; ; at++ {
				b := newBench(t)
				f := b.open(Past{}, false)
				if err := errors.Join(f.Write(before, 0, int64(len(before))), f.Sync(unlocked),
					f.Write([]byte("B"), 0, 1), f.Sync(unlocked)); err != nil {
					t.Fatal(err)
				}
				old, calls := b.content(f), 0
				b.d.Hook = func(c disk.Call) error {
					if calls++; calls == at+1 && c.Op != "pread" {
						return unix.EIO
					}
					return nil
				}
				err := change(f)
				b.d.Hook = nil
				if at < 0 {
					after = b.content(f)
					continue
				}
				if calls <= at {
					return
				}
				if err == nil && len(b.faults) == 0 {
					continue // a read, or what may fail
				}
				if f.Broken() {
					f = b.open(Past{}, true)
				}
				b.inOrder(f)
				if got := b.content(f); !bytes.Equal(got, old) && !bytes.Equal(got, after) &&
					!bytes.Equal(got, zeroed(got, old)) {
					t.Fatalf("call %d: %v: %d bytes where there were %d", at, err, len(got), len(old))
				}
				if err := errors.Join(f.Write([]byte("goes on"), 3, 7), f.SettleNow()); err != nil {
					t.Fatalf("call %d: afterwards: %v", at, err)
				}
				if f = b.open(f.Past(), false); !bytes.Equal(b.content(f)[3:10], []byte("goes on")) {
					t.Fatalf("call %d: the write afterwards is gone", at)
				}
			}
		})
	}
}

// zeroed returns old with zeros wherever got has zeros.
func zeroed(got, old []byte) []byte {
	out := bytes.Clone(old)
	for i := range min(len(got), len(out)) {
		if got[i] == 0 {
			out[i] = 0
		}
	}
	return out
}

// The table has each way once, and a way that it does not have breaks the file, which is told.
func TestTransitions(t *testing.T) {
	has := map[[2]Phase]bool{}
	for _, x := range transitions {
		if has[[2]Phase{x.from, x.to}] || x.rule == "" || x.from == x.to {
			t.Errorf("from %s to %s: %q", x.from, x.to, x.rule)
		}
		has[[2]Phase{x.from, x.to}] = true
	}
	for from := Unread; from <= Broken; from++ {
		for to := Unread; to <= Broken; to++ {
			b := newBench(t)
			f := New(&b.d, b.g, Opened{FD: b.fd}, Rules{}, b)
			f.phase = from
			f.enter(to)
			switch allowed := from == to || has[[2]Phase{from, to}]; {
			case allowed && (f.phase != to || len(b.faults) > 0):
				t.Errorf("from %s to %s: %s, %q", from, to, f.phase, b.faults)
			case !allowed && (f.phase != Broken || len(b.faults) != 1):
				t.Errorf("from %s to %s, which the table does not have: %s, %q", from, to, f.phase,
					b.faults)
			case from != Broken && f.phase == Broken && b.broke == 0:
				t.Errorf("from %s to %s: nobody was told", from, to)
			}
		}
	}
}

// On a network filesystem S is a sync of the whole file. It is made once after each write, and not again
// after a sync that has covered all of them.
func TestSettleRemote(t *testing.T) {
	c, _ := sealed(t, 10000, blockcrypt.State{Floor: 10000, Generation: 1})
	syncs := 0
	p := &pages{}
	p.Disk = &disk.Disk{Remote: true, Hooks: disk.Hooks{Hook: func(c disk.Call) error {
		if c.Op == "fdatasync" {
			syncs++
		}
		return nil
	}}}
	p.FD, p.covered, p.phase = c.FD, -1, Settled
	for i, x := range []struct {
		before func()
		syncs  int
	}{
		{func() {}, 1}, // it is not known what earlier ones have covered
		{func() {}, 1},
		{func() { p.wrote++ }, 2},
		{func() {
			p.wrote++
			if err := p.datasync(); err != nil {
				t.Error(err)
			}
		}, 3},
	} {
		x.before()
		if err := settlePages(p, 0, blockcrypt.PageSize); err != nil || syncs != x.syncs {
			t.Errorf("%d: %d syncs, %v", i, syncs, err)
		}
	}
}

// The kernel writes times back every second. On a network filesystem, where to set one sends all data, that
// waits for the file's close unless the times are far apart.
func TestTimesWaitLongerOnNetworks(t *testing.T) {
	for _, remote := range []bool{false, true} {
		f := New(&disk.Disk{Remote: remote}, blockcrypt.Geometry{}, Opened{FD: -1}, Rules{KernelTimes: true}, nil)
		f.Times().TouchNow()
		for _, c := range []struct {
			ago  time.Duration
			near bool
		}{{0, true}, {10 * time.Second, remote}, {time.Minute, false}} {
			if got := f.Times().Near(unix.NsecToTimespec(time.Now().Add(-c.ago).UnixNano())); got != c.near {
				t.Errorf("on a network: %v; a time of %v ago is near: %v", remote, c.ago, got)
			}
		}
	}
}
