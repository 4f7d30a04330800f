//go:build linux && !portable

package volume_test

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// onDisk returns the modification time that the only ciphertext file has.
func (w *world) onDisk() unix.Timespec {
	w.t.Helper()
	var st unix.Stat_t
	w.do("stat", unix.Stat(w.cipherFile(), &st))
	return st.Mtim
}

func mtime(t unix.Timespec) volume.SetAttr { return volume.SetAttr{Mtime: &t} }

// A time that a program sets is on the disk after the next fsync, whatever came before; one
// that a write has left nearly there is put right when the file is closed.
func TestKeepMtime(t *testing.T) {
	var c calls
	w := newWorld(t, volume.Options{KernelTimes: true}.Seeing(c.see))
	h, err := w.create("f")
	w.do("create", err)
	n := h.Node()
	now := func() unix.Timespec { return unix.NsecToTimespec(time.Now().UnixNano()) }
	old := unix.Timespec{Sec: 1e9}
	keeps := func(what string, at unix.Timespec, want bool) {
		t.Helper()
		if _, ok := n.KeepMtime(at); ok != want {
			t.Errorf("%s: kept: %v", what, ok)
		}
	}
	w.do("write", h.WriteDelayed(ctx, noise(100), 0))
	keeps("another time", old, false)
	keeps("the write's time", now(), true)
	_, err = n.SetAttr(ctx, mtime(old))
	w.do("set", err)
	keeps("the same again", old, true)
	keeps("now, and the disk has an old time", now(), false)
	w.do("fsync", h.Fsync())
	if got := w.onDisk(); got != old {
		t.Errorf("after fsync the disk has %v", got)
	}
	w.do("write", h.WriteDelayed(ctx, noise(100), 50))
	at := now()
	keeps("the write's time", at, true)
	w.do("fsync", h.Fsync())
	got := w.onDisk()
	if d := time.Duration(got.Nano() - at.Nano()); d < -time.Second || d > time.Second {
		t.Errorf("after fsync the disk is %v off", d)
	}
	w.do("close", h.Release())
	if got := w.onDisk(); got != at {
		t.Errorf("after close the disk has %v, want %v", got, at)
	}
	st, err := n.Attr()
	w.do("attributes", err)
	keeps("a closed file's own time", st.Mtim, true)
	keeps("another one", now(), false)

	// A name that is gone, or a mode that changed, makes what was told stale.
	w.do("chmod", func() error {
		mode := uint32(0o600)
		_, err := n.SetAttr(ctx, volume.SetAttr{Mode: &mode})
		return err
	}())
	if st, ok := n.KeepMtime(at); !ok || st.Mode&0o7777 != 0o600 {
		t.Errorf("after chmod: kept: %v, mode %o", ok, st.Mode)
	}
	_, _, err = w.v.Link(ctx, n, w.v.Root(), "g")
	w.do("link", err)
	w.do("unlink", w.v.Unlink(w.v.Root(), "g"))
	w.v.Settle()
	keeps("after a name went", at, false)
}

// A time that is set while a write waits is the file's time afterwards.
func TestSetMtimeBesideWrite(t *testing.T) {
	var s stalls
	w := newWorld(t, volume.Options{KernelTimes: true}.Hooked(s.hook))
	h, err := w.create("f")
	w.do("create", err)
	old := unix.Timespec{Sec: 1e9}
	s.stall(func(c volume.Call) bool { return c.Op == "utimensat" })
	set, wrote := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := h.Node().SetAttr(ctx, mtime(old))
		set <- err
	}()
	<-s.met
	go func() { wrote <- h.WriteDelayed(ctx, noise(100), 0) }()
	time.Sleep(20 * time.Millisecond)
	close(s.held)
	w.do("set", <-set)
	w.do("write", <-wrote)
	w.do("close", h.Release())
	if got := w.onDisk(); got != old {
		t.Errorf("the disk has %v, want %v", got, old)
	}
	st, err := h.Node().Attr()
	if err != nil || st.Mtim != old {
		t.Errorf("stat says %v, %v", st.Mtim, err)
	}
}
