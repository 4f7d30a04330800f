//go:build linux && !portable

package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/fs/volume/check"
)

// crashStates is how many states are built and opened in all.
func crashStates() int {
	n := 20_000
	fmt.Sscan(os.Getenv("KMSFS_CRASH_STATES"), &n)
	return n
}

// For every prefix of each workload's calls, trees that a power cut would have
// left: all that was confirmed is there, and nothing that was never written.
func TestCrashStates(t *testing.T) {
	each := max(1, crashStates()/len(workloads))
	var total, second atomic.Int64
	t.Cleanup(func() {
		t.Logf("%d states, %d of them cut a second time during repair", total.Load(),
			second.Load())
	})
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
	busy          atomic.Bool // calls are not recorded
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
		if s == nil || k.busy.Load() || c.Op == "pread" || c.Op == "openat" && c.Mode&unix.O_CREAT == 0 {
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
	c := &crashRun{world: w, sim: s,
		expect: map[string]*expectation{"old": {truth: truth{confirmed: true,
			versions: [][]byte{[]byte("an old file, settled")}}}}}
	k.run = c
	w.open(volume.Options{}.Done(done).Torn())
	work(c, rand.New(rand.NewPCG(round, 5)))
	k.busy.Store(true)
	w.crash()
}

// check builds some of the states that a cut just now may leave, and opens them.
func (k *crashChecker) check() {
	k.busy.Store(true)
	defer k.busy.Store(false)
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
	w := &world{t: k.t, dir: dir, store: k.run.store, more: k.run.more, log: &logBuffer{}, quiet: true}
	fail := func(format string, args ...any) {
		k.t.Errorf("after call %d (all %v, none %v, btrfs %v): %s; the log: %.600s",
			k.run.sim.calls, c.all, c.none, c.btrf, fmt.Sprintf(format, args...), w.log)
	}
	fs, _ := w.fsck()
	for _, f := range fs {
		if f.Grade > check.Unconfirmed {
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
	w.open(volume.Options{}.Done(done).Torn())
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
	w = &world{t: k.t, dir: again, store: k.run.store, more: k.run.more, log: &logBuffer{}, quiet: true}
	w.open(volume.Options{})
	if msg := k.verify(w); msg != "" {
		fail("cut again in call %d of the repair: %s", nested.calls, msg)
	}
	w.crash()
}

// verify compares every file with its allowed contents: stat first, then its content.
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
		if x.whole && x.confirmed && !slices.ContainsFunc(x.versions,
			func(v []byte) bool { return bytes.Equal(v, got) }) {
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
			s.build(at,
				choice{r: rand.New(rand.NewPCG(uint64(i), uint64(s.calls))), btrf: i%2 == 0,
					all: i == 0, none: i == 1})
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
	if _, err := volume.Init(ctx, dir, store, blockcrypt.NewID(),
		volume.InitOptions{}.Done(check)); err != nil {
		t.Fatal(err)
	}
	l, err := volume.Find(dir)
	if err != nil || built < 100 {
		t.Fatalf("%d states: %v", built, err)
	}
	l.Close()
	runtime.KeepAlive(s)
}
