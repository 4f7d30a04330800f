//go:build linux && !portable

package volume_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
)

// mtime returns the time of modification that a host is told of a file.
func (w *world) mtime(p string) unix.Timespec {
	w.t.Helper()
	st, err := w.must(p).Attr()
	w.do("stat "+p, err)
	return st.Mtim
}

// In a shared volume a file has the time that the filesystem gave its last change, unless a program knows
// another one by then: that stays true when the file comes to rest, on all hosts.
func TestSharedTimes(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	a.write("f", noise(100))
	puts := 0
	a.reopen(volume.Options{}.Beats(beat).Hooked(func(c volume.Call) error {
		if c.Op == "utimensat" {
			puts++
		}
		return nil
	}))
	n := a.must("f")
	set := func(at unix.Timespec) {
		t.Helper()
		_, err := n.SetAttr(ctx, volume.SetAttr{Mtime: &at})
		a.do("set the time", err)
	}
	told := func() unix.Timespec {
		t.Helper()
		st, err := n.Attr()
		a.do("stat", err)
		return st.Mtim
	}
	some := unix.Timespec{Sec: 1_000_000_000, Nsec: 7000}
	var first unix.Timespec
	for _, c := range []struct {
		name string
		done func(write func())
		puts int
		want *unix.Timespec // nil: a time of now
	}{
		{"no program knows it", func(write func()) { write() }, 0, nil},
		{"a program knows it", func(write func()) { write(); first = told() }, 1, &first},
		{"changed after a program knew it", func(write func()) { write(); told(); write() }, 0, nil},
		{"set", func(write func()) { write(); set(some) }, 2, &some},
		{"set, and known", func(write func()) { write(); set(some); told() }, 2, &some},
		{"set, and changed after that", func(write func()) { write(); set(some); write() }, 1, nil},
		{"set, and not changed", func(write func()) { set(some) }, 1, &some},
	} {
		puts = 0
		before := time.Now().Add(-time.Second)
		h, err := n.Open(ctx, true)
		a.do("open", err)
		c.done(func() {
			time.Sleep(5 * time.Millisecond) // the filesystem's clock goes on
			_, err := h.Write(ctx, noise(10), 20)
			a.do("write", err)
		})
		time.Sleep(5 * time.Millisecond)
		a.do("close", h.Release())
		here, there := a.mtime("f"), b.mtime("f")
		if here != there {
			t.Errorf("%s: %v on one host, %v on the other", c.name, here, there)
		}
		if c.want != nil && here != *c.want {
			t.Errorf("%s: %v, want %v", c.name, here, *c.want)
		}
		if at := time.Unix(here.Unix()); c.want == nil && (at.Before(before) || at.After(time.Now().Add(time.Second))) {
			t.Errorf("%s: %v is not a time of now", c.name, at)
		}
		if puts != c.puts {
			t.Errorf("%s: the time was set %d times on the disk, want %d", c.name, puts, c.puts)
		}
	}

	// What another host sets is not held back by what this one knew.
	h, err := n.Open(ctx, true)
	a.do("open", err)
	set(some)
	later := unix.Timespec{Sec: 1_100_000_000}
	_, err = b.must("f").SetAttr(ctx, volume.SetAttr{Mtime: &later})
	b.do("set the time", err)
	if got := told(); got != later {
		t.Errorf("%v, after another host set %v", got, later)
	}
	a.do("close", h.Release())
	sound(t, hosts...)
}

// An open finds out whether the file is as the kernel was told with its name.
func TestSharedAsTold(t *testing.T) {
	hosts := newHosts(t, 2)
	a, b := hosts[0], hosts[1]
	mode := uint32(0o600)
	for i, c := range []struct {
		change string
		do     func(name string)
	}{
		{"", func(string) {}},
		{"written", func(name string) { a.write(name, noise(200)) }},
		{"given another mode", func(name string) {
			_, err := a.must(name).SetAttr(ctx, volume.SetAttr{Mode: &mode})
			a.do("chmod", err)
		}},
	} {
		name := string(rune('f' + i)) // host b has told nothing of it
		a.write(name, noise(100))
		n := b.must(name)
		time.Sleep(20 * time.Millisecond) // the filesystem's clock goes on
		c.do(name)
		h, err := n.Open(ctx, false)
		b.do("open", err)
		if got := h.AsTold(); got != (c.change == "") {
			t.Errorf("a file that another host has %s: as told: %v", c.change, got)
		}
		b.do("close", h.Release())
		h, err = b.must(name).Open(ctx, false)
		b.do("open", err)
		if h.AsTold() {
			t.Error("a file that was told twice counts as told: the kernel may have ignored the second answer")
		}
		b.do("close", h.Release())
	}
	sound(t, hosts...)
}

// A lookup in a shared volume asks for the name, but not for attributes that were read just before.
func TestSharedCalls(t *testing.T) {
	stores := newStore(t)
	w := &world{t: t, dir: t.TempDir(), store: stores[0], log: &logBuffer{}}
	if _, err := volume.Init(ctx, w.dir, stores, blockcrypt.NewID(), volume.InitOptions{Shared: true}); err != nil {
		t.Fatal(err)
	}
	var c calls
	w.open(volume.Options{}.Beats(time.Hour).Seeing(c.see))
	defer w.close()
	w.mkdir("d")
	w.write("d/f", noise(100))
	w.write("d/g", noise(100))
	d := w.must("d")
	look := func(name string) string {
		t.Helper()
		c.take()
		n, _, _, err := w.v.Lookup(ctx, d, name)
		w.do("lookup", err)
		w.v.Forget(n.ID(), 1)
		return c.take()
	}
	open := func(name string) string {
		t.Helper()
		n := w.must("d/" + name)
		c.take()
		h, err := n.Open(ctx, false)
		w.do("open", err)
		got := c.take()
		w.do("close", h.Release())
		return got
	}
	want := []string{"statx statx name_to_handle_at", "statx statx name_to_handle_at", "statx fstatat name_to_handle_at",
		"statx statx", "openat fstat name_to_handle_at pread"}
	var got []string
	for range 50 { // background work, or a slow machine, can add calls
		time.Sleep(150 * time.Millisecond)
		got = []string{look("f"), look("g"), look("f")}
		_, _, _, err := w.v.Lookup(ctx, d, "none")
		wantErr(t, "lookup", err, unix.ENOENT)
		got = append(got, strings.TrimSuffix(c.take(), " readlinkat statx"), open("f")) // but while this host makes entries
		if slices.Equal(got, want) {
			return
		}
	}
	t.Errorf("three lookups, one of a missing name, and an open: %q, want %q", got, want)
}
