//go:build linux && !portable

package cfile

import (
	"time"

	"golang.org/x/sys/unix"
)

// Times are those of modification: on the disk, and in the kernel.
type Times struct {
	Mtime   unix.Timespec // what the kernel believes
	Touched bool          // the backing's is another by now
	Moves   uint64        // how often the backing's times were moved, by a write or set
	anyTime bool          // nobody knows it, so that the one on the disk is as good

	wroteAt time.Time     // of our last write, which gave the backing its time
	near    time.Duration // mtimeNear or mtimeNearRemote
}

// Times returns the times of modification.
func (p *pages) Times() *Times { return &p.times }

// Keep takes a time that the kernel believes; the backing gets it later.
func (t *Times) Keep(mtime unix.Timespec) {
	t.Touched = t.Touched || t.Mtime != mtime
	t.Mtime = mtime
}

// TouchNow gives the file the present time, as a program's write does.
func (t *Times) TouchNow() {
	unix.ClockGettime(unix.CLOCK_REALTIME, &t.Mtime)
	t.move()
}

// move notes that a write of ours moves the backing's mtime.
func (t *Times) move() {
	t.Touched, t.wroteAt = true, time.Now()
	t.Moves++
}

// mtimeNear is how much later the modification time on the disk may be than the one that the
// kernel believes, while a file is open for writing. After a power cut it can stay so.
const (
	mtimeNear = time.Second
	// On a network filesystem to set a time sends all that was written before: the kernel, which writes times
	// back every second, would make a large file as slow as single writes.
	mtimeNearRemote = 30 * time.Second
)

// Near reports whether the time on the disk is nearly this one, since it was written just then.
func (t *Times) Near(want unix.Timespec) bool {
	d := t.wroteAt.Sub(time.Unix(want.Unix()))
	return !t.wroteAt.IsZero() && -t.near < d && d < t.near
}

// SetMtime notes that the backing file was given a time.
func (p *pages) SetMtime(t unix.Timespec) {
	p.times.wroteAt = time.Time{}
	if t.Nsec == unix.UTIME_NOW {
		var st unix.Stat_t
		if p.Disk.Fstat(p.FD, &st) == nil {
			p.times.Mtime, p.times.Touched = st.Mtim, false
		}
		return
	}
	p.times.Mtime, p.times.Touched = t, false
}

// touch notes that the content changed.
func (p *pages) touch() {
	p.Ahead.Store(nil)
	p.changes++
	p.times.move()
	if !p.rules.KernelTimes {
		unix.ClockGettime(unix.CLOCK_REALTIME, &p.times.Mtime)
	}
}

// PutMtime puts the time back that the kernel believes, which our own writes have moved.
func (p *pages) PutMtime() error {
	if !p.times.Touched {
		return nil
	}
	if p.times.anyTime {
		p.times.Touched = false
		return nil
	}
	err := p.Disk.Utimens(p.FD, unix.Timespec{Nsec: unix.UTIME_OMIT}, p.times.Mtime)
	if p.times.Touched = err != nil; err == nil {
		p.times.wroteAt = time.Time{}
	}
	p.times.Moves++
	return err
}
