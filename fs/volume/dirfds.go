package volume

import (
	"container/list"
	"sync"

	"golang.org/x/sys/unix"

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

// enter returns a descriptor of a directory, good until leave is called.
func (n *Node) enter() (int, error) {
	v := n.v
	if n == v.root {
		return v.rootD, nil
	}
	v.dirFDs.mu.Lock()
	if n.dirFD >= 0 {
		n.dirRefs++
		v.dirFDs.list.MoveToFront(n.dirElem)
		v.dirFDs.mu.Unlock()
		return n.dirFD, nil
	}
	v.dirFDs.mu.Unlock()
	fd, err := n.open(unix.O_PATH | unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	v.dirFDs.mu.Lock()
	n.dirRefs++
	unneeded := []int{fd}
	if n.dirFD < 0 { // or another was faster
		n.dirFD, n.dirElem = fd, v.dirFDs.list.PushFront(n)
		unneeded = v.dirFDs.takeDownTo(v.dirFDs.most)
	}
	fd = n.dirFD
	v.dirFDs.mu.Unlock()
	for _, fd := range unneeded {
		v.disk.Close(fd)
	}
	return fd, nil
}

func (n *Node) leave() {
	if n == n.v.root {
		return
	}
	n.v.dirFDs.mu.Lock()
	n.dirRefs--
	n.v.dirFDs.mu.Unlock()
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
// closed, until only n have one without being in use. fdMu is held.
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
