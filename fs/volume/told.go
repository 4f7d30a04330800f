//go:build linux && !portable

package volume

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// told are the attributes of a file as a stat gave them that was made when Volume.clock had
// this value.
//
// In a shared volume [Handle.AsTold] compares them with the file that an open has found.
//
// With its writeback cache the kernel owns the times of files. It writes them back a while
// after it changed one: after each write, and after a rename or a link, for the ctime that
// is the disk's own affair. The disk has most of these times already, or gets them when the
// file is closed, so no syscall is made for them.
type told struct {
	st    Attr
	clock uint64
	first bool // nothing was told before, so the kernel has no newer answer
}

// attributes are those of a node: what stat says, times, owners and modes, extended attributes and
// inode flags.
type attributes struct {
	v *Volume
	n *Node

	// steady is held shared while attributes, flags or links are changed, and alone while the file is
	// replaced by another inode. It comes before content.openMu.
	steady sync.RWMutex

	told    atomic.Pointer[told] // of a file
	statted sight                // of the attributes, by name
	changed atomic.Uint64        // the value of Volume.clock at the last change
}

// tell remembers attributes that were asked for when Volume.clock was clock.
func (a *attributes) tell(st *Attr, clock uint64) {
	if a.n.typ == unix.S_IFREG && (a.v.o.KernelTimes || a.v.Shared()) {
		a.told.Store(&told{*st, clock, a.told.Load() == nil})
	}
}

// change notes that the attributes on the disk are others than those that were told.
func (a *attributes) change() {
	now := a.v.clock.Add(1)
	for {
		was := a.changed.Load()
		if was >= now || a.changed.CompareAndSwap(was, now) {
			return
		}
	}
}
