package volume

import (
	"golang.org/x/sys/unix"
)

// told are the attributes of a file as a stat gave them that was made when Volume.clock had
// this value.
//
// With its writeback cache the kernel owns the times of files. It writes them back a while
// after it changed one: after each write, and after a rename or a link, for the ctime that
// is the disk's own affair. The disk has most of these times already, or gets them when the
// file is closed, so no syscall is made for them.
type told struct {
	st    Attr
	clock uint64
}

// tell remembers attributes that were asked for when Volume.clock was clock.
func (n *Node) tell(st *Attr, clock uint64) {
	if n.typ == unix.S_IFREG && n.v.o.KernelTimes {
		n.told.Store(&told{*st, clock})
	}
}

// change notes that the attributes on the disk are others than those that were told.
func (n *Node) change() {
	now := n.v.clock.Add(1)
	for {
		was := n.changed.Load()
		if was >= now || n.changed.CompareAndSwap(was, now) {
			return
		}
	}
}

// KeepMtime is [Node.SetAttr] of the modification time as the kernel writes it back, where
// nothing has to be done for it now: ok is false if something has to. Attributes are as they
// were told last.
func (n *Node) KeepMtime(t unix.Timespec) (st Attr, ok bool) {
	told := n.told.Load()
	if told == nil || told.st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 { // a write may have taken these
		return st, false
	}
	st = told.st
	f := n.file.Load()
	if f == nil {
		return st, t == st.Mtim && n.changed.Load() <= told.clock
	}
	if !f.mu.TryLock() {
		return st, false
	}
	defer f.unlock()
	if times := f.Times(); f.closed || times.Mtime != t && (f.writers == 0 || !times.Near(t)) {
		return st, false
	}
	f.KeepMtime(t)
	f.fillLocked(&st)
	return st, true
}
