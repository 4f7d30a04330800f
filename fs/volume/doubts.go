//go:build linux && !portable

package volume

import (
	"sync"
	"sync/atomic"
)

// Syncs that failed.

// doubts are the files of which the page cache may say more than the disk has: a sync
// failed, and the kernel takes the pages that it could not write for written from then on.
// A doubt ends when the file was loaded from what the disk has; the node may be forgotten,
// and made again, before that.
//
// They know, too, which files an error left in disorder: the marker stays for them.
type doubts struct {
	mu    sync.Mutex
	all   bool // a syncfs failed
	files map[inodeKey]bool
	any   atomic.Bool

	disorder  map[inodeKey]bool // until they are loaded after a doubt, or removed
	disorders atomic.Int32      // how many
}

func keyOf(n *Node) inodeKey { return inodeKey{n.dev, n.ino.Load()} }

func (d *doubts) begin(n *Node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.files == nil {
		d.files = map[inodeKey]bool{}
	}
	d.files[keyOf(n)] = true
	d.any.Store(true)
}

// beginAll doubts every file, for as long as the volume is mounted.
func (d *doubts) beginAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.all = true
	d.any.Store(true)
}

func (d *doubts) of(n *Node) bool {
	if !d.any.Load() {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.all || d.files[keyOf(n)]
}

// end ends the doubt of a file that was loaded; one that was in disorder by it is repaired by now.
func (d *doubts) end(n *Node) {
	if !d.any.Load() {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.files[keyOf(n)] {
		d.forget(n)
	}
}

// leave notes that an error left a file in disorder.
func (d *doubts) leave(n *Node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.disorder == nil {
		d.disorder = map[inodeKey]bool{}
	}
	d.disorder[keyOf(n)] = true
	d.disorders.Store(int32(len(d.disorder)))
}

// removed forgets a file that has no name any more: nothing of it has to be repaired.
func (d *doubts) removed(n *Node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.forget(n)
}

// forget ends what is known of a file. mu is held.
func (d *doubts) forget(n *Node) {
	delete(d.files, keyOf(n))
	delete(d.disorder, keyOf(n))
	d.any.Store(d.all || len(d.files) > 0)
	d.disorders.Store(int32(len(d.disorder)))
}
