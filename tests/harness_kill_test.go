package tests

import (
	"errors"
	"fmt"
	"kmsfs/tests/cutdisk"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// killed is what a file may be after a SIGKILL: its versions since the last that
// fsync or close has confirmed, which is the first.
type killed struct {
	versions  [][]byte
	confirmed bool
	history   []string
}

func (k *killed) now() []byte { return k.versions[len(k.versions)-1] }

// killWriter does things to its own files until the daemon is dead.
type killWriter struct {
	path  func(...string) string
	power func() bool // whether the power has failed; nil where only the daemon dies
	r     *mrand.Rand
	name  string
	files map[string]*killed
	open  map[string]*os.File
	bytes int64
}

func (w *killWriter) run() {
	for w.step() {
	}
	for name, f := range w.open {
		f.Close()
		delete(w.open, name)
	}
}

func (w *killWriter) step() bool {
	name := fmt.Sprintf("%s-%d", w.name, w.r.IntN(4))
	if w.r.IntN(8) == 0 {
		name += strings.Repeat("long", 50)
	}
	k := w.files[name]
	f := w.open[name]
	if f == nil {
		var err error
		if f, err = os.OpenFile(w.path(name), os.O_RDWR|os.O_CREATE, 0o644); err != nil {
			return false
		}
		w.open[name] = f
		if k == nil {
			k = &killed{versions: [][]byte{nil}}
			w.files[name] = k
		}
	}
	old := k.now()
	change := func(now []byte, what string, f func() error) bool {
		k.versions = append(k.versions, now)
		err := f()
		k.history = append(k.history, fmt.Sprintf("%s to %d: %v", what, len(now), err))
		return err == nil
	}
	confirm := func(what string, err error) bool {
		k.history = append(k.history, fmt.Sprintf("%s: %v", what, err))
		switch {
		case err == nil && w.power == nil, err == nil && what == "fsync" && !w.power():
			k.confirmed, k.versions = true, [][]byte{k.now()}
			w.bytes += int64(len(k.now()))
		}
		return err == nil
	}
	k.history = k.history[max(0, len(k.history)-20):]
	switch x := w.r.IntN(100); {
	case x < 40:
		data := noise(1 + w.r.IntN([]int{100, 5000, 60000}[w.r.IntN(3)]))
		if len(old) > 300000 {
			return change(nil, "truncate", func() error { return f.Truncate(0) })
		}
		return change(append(old[:len(old):len(old)], data...), "append",
			func() error { _, err := f.WriteAt(data, int64(len(old))); return err })
	case x < 55 && len(old) > 0:
		at := w.r.IntN(len(old))
		data := noise(1 + w.r.IntN(min(len(old)-at, 9000)))
		now := slices.Clone(old)
		copy(now[at:], data)
		return change(now, "overwrite", func() error { _, err := f.WriteAt(data, int64(at)); return err })
	case x < 65:
		now := make([]byte, w.r.IntN(len(old)+5000))
		copy(now, old)
		return change(now, "truncate", func() error { return f.Truncate(int64(len(now))) })
	case x < 75:
		return confirm("fsync", f.Sync())
	case x < 90:
		delete(w.open, name)
		return confirm("close", f.Close())
	default: // replaced by another that is whole
		delete(w.open, name)
		if f.Close() != nil {
			return false
		}
		if w.power == nil {
			k.versions = [][]byte{k.now()}
		}
		data := noise(w.r.IntN(20000))
		next, err := os.Create(w.path(w.name + "-new"))
		if err != nil {
			return false
		}
		_, err = next.Write(data)
		if w.power != nil {
			err = errors.Join(err, next.Sync())
		}
		if errors.Join(err, next.Close()) != nil {
			return false
		}
		return change(data, "rename",
			func() error { return os.Rename(w.path(w.name+"-new"), w.path(name)) }) &&
			confirm("renamed", nil)
	}
}

// judge compares the writer's files with their allowed contents, and says which differ.
func (w *killWriter) judge() (looked int, faults []string) {
	for name, k := range w.files {
		got, err := os.ReadFile(w.path(name))
		looked++
		if errors.Is(err, os.ErrNotExist) && !k.confirmed {
			delete(w.files, name)
			continue
		}
		if err == nil {
			err = cutdisk.Mixture(k.versions, true, got)
		}
		if err != nil {
			faults = append(faults,
				fmt.Sprintf("%.30s, confirmed %v, of %d versions: %v; %s", name, k.confirmed,
					len(k.versions), err, strings.Join(k.history, "; ")))
			os.Remove(w.path(name))
			delete(w.files, name)
			continue
		}
		k.versions = [][]byte{got}
	}
	return looked, faults
}

// killable is a filesystem in a daemon.
type killable interface {
	path(...string) string
	mount()
	kill()
}

// crashes is what became of a filesystem that was killed again and again.
type crashes struct {
	looked    int
	confirmed int64 // bytes
	faults    []string
}

// crash lets four writers work, and kills v while they do; with a disk under it,
// its power fails first. v is mounted, before and after.
func crash(v killable, disk *cutdisk.Disk, rounds int) (c crashes) {
	writers := make([]*killWriter, 4)
	for i := range writers {
		writers[i] = &killWriter{path: v.path, name: fmt.Sprint("w", i), files: map[string]*killed{}}
		if disk != nil {
			writers[i].power = disk.Dead
		}
	}
	for round := range rounds {
		var wg sync.WaitGroup
		for i, w := range writers {
			w.r, w.open = mrand.New(mrand.NewPCG(uint64(round), uint64(i))), map[string]*os.File{}
			wg.Go(w.run)
		}
		stop := make(chan struct{})
		if disk != nil {
			wg.Go(func() {
				disk.Writeback(mrand.New(mrand.NewPCG(uint64(round), 9)),
					filepath.Join(disk.Dir, "cipher", "*"), stop)
			})
		}
		time.Sleep(time.Duration(100+mrand.IntN(500)) * time.Millisecond)
		if disk != nil {
			disk.Cut()
		}
		v.kill()
		close(stop)
		wg.Wait()
		if disk != nil {
			disk.Umount()
			disk.Mount()
		}
		v.mount()
		for _, w := range writers {
			looked, faults := w.judge()
			c.looked += looked
			for _, f := range faults {
				c.faults = append(c.faults, fmt.Sprintf("round %d: %s", round, f))
			}
		}
	}
	for _, w := range writers {
		c.confirmed += w.bytes
	}
	return c
}

func crashRounds(n int) int {
	fmt.Sscan(os.Getenv("KMSFS_KILL_ROUNDS"), &n)
	return n
}

func wantWhole(t *testing.T, m *mounted, disk *cutdisk.Disk, rounds int) {
	c := crash(m, disk, rounds)
	t.Logf("%d rounds, %d files looked at after them, %d MiB confirmed", rounds, c.looked, c.confirmed>>20)
	for _, f := range c.faults {
		t.Error(f)
	}
	m.umount()
	if out, err := m.try("fsck", m.cipher); err != nil {
		t.Errorf("fsck: %v\n%s", err, out)
	}
}
