//go:build linux && !portable

// Package disk makes every syscall on the ciphertext tree, relative to descriptors of
// directories. It never follows a symlink, but in a path that the user gave.
//
// A test sees each call by the hooks of [Disk], and can make it fail. What a failed call
// means is for the callers to decide, with one exception: a call that finds no space is made
// again while the space of a removed file is about to come back.
package disk

import (
	"errors"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A Call is a syscall on the ciphertext tree that changes something or moves
// data, as [Hooks] see it.
type Call struct {
	Op   string // the syscall's name
	FD   int    // of the file, or of the directory
	Name string // of the entry, for calls on directories
	Off  int64
	Len  int64

	ToFD int    // of rename and link: the directory
	To   string // of rename, link and symlink: the new name, or the target
	Mode uint32 // flags or mode
	Data []byte // of pwrite
}

// Hooks are set by tests.
type Hooks struct {
	Hook func(Call) error  // sees each call before it is made and can fail it, or skip it by ErrSkip
	Done func(Call, error) // sees each call after it was made
	Seen func(op string)   // told of each syscall but close, of those that only look too
}

// Disk makes every syscall on the ciphertext tree.
type Disk struct {
	Hooks

	// Files that have lost their last name while the kernel still knows them: how many, and
	// when the last one was removed. Their space comes back when the kernel has closed
	// and forgotten them, which it says after it was answered.
	leaving atomic.Int32
	removed atomic.Pointer[time.Time]

	blind atomic.Bool // the filesystem does not say what is in the page cache

	// Remote says that sync_file_range does not reach the disk, which is another host's: fdatasync does.
	Remote bool

	// Guard is asked before each call that changes something, and its error is the call's. It may be
	// nil.
	Guard func() error
	// Fresh says that others change the tree: attributes are asked of the filesystem itself, which may
	// be on another host, and not of its cache here.
	Fresh bool

	// Took is told how long the calls took that wait for the disk: reads of pages that are not in
	// the page cache, syncs, and SettlePages. It may be nil.
	Took func(op string, took time.Duration)

	fds  atomic.Int64 // descriptors that are open
	Idle func() bool  // closes some that are not in use, if there are any; it may be nil
}

// opens makes a call that opens a descriptor, a second time if there was none left and some
// could be closed.
func (d *Disk) opens(f func() error) error {
	err := again(f)
	if noDescriptor(err) && d.Idle != nil && d.Idle() {
		err = again(f)
	}
	if err == nil {
		d.fds.Add(1)
	}
	return err
}

// timed makes a call that waits for the disk.
func (d *Disk) timed(c Call, f func() error) error {
	begun := time.Now()
	err := d.do(c, f)
	if d.Took != nil {
		d.Took(c.Op, time.Since(begun))
	}
	return err
}

// NeverWaits says that the filesystem is in memory: PreadOr need not ask.
func (d *Disk) NeverWaits() { d.blind.Store(true) }

// Adopt counts a descriptor that another Disk has opened, and this one will close.
func (d *Disk) Adopt() { d.fds.Add(1) }

// Descriptors returns how many are open.
func (d *Disk) Descriptors() int64 { return d.fds.Load() }

// Leaves notes that something has lost its last name, while the kernel still knows it.
func (d *Disk) Leaves() {
	d.leaving.Add(1)
	t := time.Now()
	d.removed.Store(&t)
}

// Left notes that the space of n of those is free.
func (d *Disk) Left(n int32) { d.leaving.Add(-n) }

const (
	freedWithin = 500 * time.Millisecond // a removal, and a call that waits for space
	freedPause  = 32 * time.Millisecond  // between two looks at most
)

// ErrSkip is what a hook returns for a call that is not to be made, and to succeed.
var ErrSkip = errors.New("skip this call")

// sees notes a syscall.
func (d *Disk) sees(op string) {
	if d.Seen != nil {
		d.Seen(op)
	}
}

// looks are the calls that change nothing on the disk, of those that hooks see.
var looks = map[string]bool{"pread": true, "open": true, "openat2": true, "fadvise": true, "fcntl": true, "flock": true,
	"fdatasync": true, "fsync": true, "syncfs": true, "sync_file_range": true}

// changes reports whether a call changes something.
func (c Call) changes() bool {
	return !looks[c.Op] && (c.Op != "openat" || c.Mode&unix.O_CREAT != 0)
}

// do makes a call.
func (d *Disk) do(c Call, f func() error) error {
	d.sees(c.Op)
	if d.Guard != nil && c.changes() {
		if err := d.Guard(); err != nil {
			return err
		}
	}
	if d.Hook != nil {
		if err := d.Hook(c); err == ErrSkip {
			return nil
		} else if err != nil {
			return err
		}
	}
	err := f()
	if d.Done != nil {
		d.Done(c, err)
	}
	return err
}

// take makes a call that takes space. One that finds none is made again where some is
// about to come back: a program that removes a file from a full disk can write at once. Calls
// that sync must not be: the kernel tells once that it could not write.
func (d *Disk) take(c Call, f func() error) error {
	return d.do(c, func() error {
		waits := d.leaving.Load() > 0
		err := f()
		if t := d.removed.Load(); !NoSpace(err) || t == nil || time.Since(*t) > freedWithin {
			return err
		}
		end := time.Now().Add(freedWithin)
		for pause := time.Millisecond; NoSpace(err) && waits &&
			time.Now().Before(end); pause = min(2*pause, freedPause) {
			if waits = d.leaving.Load() > 0; waits {
				time.Sleep(pause)
			}
			err = f()
		}
		return err
	})
}

// noDescriptor reports whether a call failed since the process or the system has no
// descriptor left.
func noDescriptor(err error) bool { return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) }

func NoSpace(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// again repeats what a signal interrupted: Go's own preempt a thread at any time.
func again(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// Ignore returns nil for the target error.
func Ignore(err, target error) error {
	if errors.Is(err, target) {
		return nil
	}
	return err
}
