//go:build linux && !portable

package volume

import (
	"container/list"
	"sync"

	"kmsfs/fs/volume/internal/disk"
)

// dirFDs are the descriptors of directories that are kept open. Those that were not used for
// longest are closed first.
type dirFDs struct {
	d    *disk.Disk
	most int // that are kept without being in use

	// mu guards list, and Node.dirFD, dirRefs, dirElem. No syscall is made under it.
	mu   sync.Mutex
	list list.List // of *Node; most recently used first
}

// closeAll closes them all.
func (l *dirFDs) closeAll() {
	for e := l.list.Front(); e != nil; e = e.Next() {
		l.d.Close(e.Value.(*Node).dirFD)
	}
	l.list.Init()
}

// take takes the descriptor of a directory away, -1 if it has none or it is in use.
// mu is held.
func (l *dirFDs) take(n *Node) (fd int) {
	if n.dirFD < 0 || n.dirElem == nil || n.dirRefs > 0 {
		return -1
	}
	fd = n.dirFD
	l.list.Remove(n.dirElem)
	n.dirFD, n.dirElem = -1, nil
	return fd
}

// closeIdle closes the descriptors of directories that are not in use, and reports
// whether there were any.
func (l *dirFDs) closeIdle() bool {
	l.mu.Lock()
	fds := l.takeDownTo(0)
	l.mu.Unlock()
	for _, fd := range fds {
		l.d.Close(fd)
	}
	return len(fds) > 0
}

// takeDownTo takes the descriptors of the least recently used directories away, to be
// closed, until only n have one without being in use. mu is held.
func (l *dirFDs) takeDownTo(n int) (fds []int) {
	for e := l.list.Back(); e != nil && l.list.Len() > n; {
		prev := e.Prev()
		if fd := l.take(e.Value.(*Node)); fd >= 0 {
			fds = append(fds, fd)
		}
		e = prev
	}
	return fds
}
