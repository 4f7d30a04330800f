//go:build linux && !portable

package volume_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// whole is a lock on all bytes of a file, by a program with this number.
func whole(owner uint64, kind int16) volume.ProgramLock {
	return volume.ProgramLock{Owner: owner, Kind: kind, Last: 1<<63 - 1, Wait: true}
}

// Programs that take a lock again as soon as they have given it back let one another go first, on one host
// and on several: none starves.
func TestProgramLocksInTurns(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	a.write("f", noise(100))
	programs := []*world{a, a, b}
	const times = 90
	var mu sync.Mutex
	var order []int // the programs that had the lock
	var wg sync.WaitGroup
	for i, w := range programs {
		n, owner, closes := w.must("f"), uint64(i+1), i == 0
		wg.Go(func() {
			defer func() { n.DropLocks(owner, false) }()
			for more := true; more; {
				if closes { // and opens the file again
					owner += 100
				}
				if err := n.Lock(ctx, whole(owner, unix.F_WRLCK)); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				order = append(order, i)
				more = len(order) < times
				mu.Unlock()
				time.Sleep(time.Millisecond)
				if closes {
					n.DropLocks(owner, false)
				} else if err := n.Lock(ctx, whole(owner, unix.F_UNLCK)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	had, turns := map[int]int{}, 0
	for i, x := range order {
		if had[x]++; i > 0 && order[i-1] != x {
			turns++
		}
	}
	if turns < times/6 || len(had) < len(programs) {
		t.Errorf("%d changes of %d, of which each program had %v", turns, len(order), had)
	}
}

// A program that has a lock of a file does not give way when it takes another one. A program that stops to
// wait leaves no lock behind.
func TestProgramLocksAskedFor(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	a.write("f", noise(100))
	cipher := ""
	names, err := os.ReadDir(a.dir)
	a.do("list", err)
	for _, e := range names {
		if !strings.HasPrefix(e.Name(), "kmsfs.") {
			cipher = filepath.Join(a.dir, e.Name())
		}
	}
	n, m := a.must("f"), b.must("f")
	first := volume.ProgramLock{Owner: 1, Kind: unix.F_WRLCK, First: 10, Last: 19}
	a.do("lock", n.Lock(ctx, first))
	canceled, cancel := context.WithCancel(ctx)
	waiting := make(chan error)
	go func() { waiting <- m.Lock(canceled, whole(7, unix.F_RDLCK)) }()
	asked := func() bool {
		file, err := os.Open(cipher)
		a.do("open", err)
		defer file.Close()
		l := unix.Flock_t{Type: unix.F_WRLCK, Start: 1<<62 + 1<<60, Len: 1 << 60}
		a.do("look", unix.FcntlFlock(file.Fd(), unix.F_OFD_GETLK, &l))
		return l.Type != unix.F_UNLCK
	}
	waitFor(t, "the other host to ask", asked)
	second := first
	second.First, second.Last = 30, 39
	a.do("a further lock", n.Lock(ctx, second))
	part := second
	part.Kind = unix.F_UNLCK
	a.do("unlock of it", n.Lock(ctx, part))
	a.do("a further lock", n.Lock(ctx, second))
	if err := m.Lock(ctx, volume.ProgramLock{Owner: 8, Kind: unix.F_RDLCK, First: 35, Last: 35}); err != unix.EAGAIN {
		t.Errorf("a lock that is in the way: %v", err)
	}
	if !asked() {
		t.Error("another program's attempt has ended the wait of the first")
	}
	cancel()
	if err := <-waiting; !errors.Is(err, unix.EINTR) {
		t.Errorf("a wait that was ended: %v", err)
	}
	if asked() {
		t.Error("a program that stopped to wait still asks")
	}
	n.DropLocks(1, false)
	b.do("lock after a close", m.Lock(ctx, whole(7, unix.F_WRLCK)))
	m.DropLocks(7, false)
	m.DropLocks(8, false)
}

// A program that waits long for other bytes of the file slows nobody down who does not wait for these; and
// an attempt that must not wait takes a lock that is free, though it is interrupted.
func TestProgramLocksOfOtherBytes(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	a.write("f", noise(100))
	n, m := a.must("f"), b.must("f")
	lock := func(owner uint64, first, last int64, kind int16) volume.ProgramLock {
		return volume.ProgramLock{Owner: owner, Kind: kind, First: first, Last: last}
	}
	a.do("lock", n.Lock(ctx, lock(1, 50, 51, unix.F_WRLCK)))
	canceled, cancel := context.WithCancel(ctx)
	waiting := make(chan error)
	go func() {
		wanted := lock(2, 50, 1<<63-1, unix.F_WRLCK)
		wanted.Wait = true
		waiting <- m.Lock(canceled, wanted)
	}()
	gaveWay := func(first, last int64) bool {
		t.Helper()
		interrupted, stop := context.WithCancel(ctx)
		time.AfterFunc(time.Millisecond, stop)
		a.do("lock", n.Lock(interrupted, lock(3, first, last, unix.F_RDLCK)))
		waited := interrupted.Err() != nil
		stop()
		a.do("unlock", n.Lock(ctx, lock(3, first, last, unix.F_UNLCK)))
		return waited
	}
	waitFor(t, "the other host to ask", func() bool { return gaveWay(60, 69) })
	quick := 0
	for range 20 {
		if !gaveWay(0, 49) {
			quick++
		}
	}
	if quick == 0 {
		t.Error("each lock of bytes that nobody waits for gave way")
	}
	cancel()
	if err := <-waiting; !errors.Is(err, unix.EINTR) {
		t.Errorf("a wait that was ended: %v", err)
	}
	n.DropLocks(1, false)
	n.DropLocks(3, false)
	m.DropLocks(2, false)
}
