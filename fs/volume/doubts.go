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
type doubts struct {
	mu    sync.Mutex
	all   bool // a syncfs failed
	files map[inodeKey]bool
	any   atomic.Bool
}

func (d *doubts) begin(n *Node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.files == nil {
		d.files = map[inodeKey]bool{}
	}
	d.files[inodeKey{n.dev, n.ino.Load()}] = true
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
	return d.all || d.files[inodeKey{n.dev, n.ino.Load()}]
}

func (d *doubts) end(n *Node) {
	if !d.any.Load() {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.files, inodeKey{n.dev, n.ino.Load()})
	d.any.Store(d.all || len(d.files) > 0)
}

// syncAll is syncfs, whose failure is every open file's.
func (v *Volume) syncAll() error {
	err := v.disk.Syncfs(v.rootD)
	if v.Shared() {
		// Files and repairs were made durable one by one. An error is that of others, or of a mount
		// before this one: NFS tells it to the next who asks.
		return nil
	}
	if err != nil {
		// It does not say whose data is lost: perhaps that of files that are closed.
		v.doubts.beginAll()
		v.sessions.stuck.Store(true)
		for _, f := range v.nodes.files() {
			f.mu.Lock()
			if f.rw && !f.closed && f.Header != nil && (f.Unsettled() || !f.AllDurable()) {
				f.SyncFailed(err)
			}
			f.unlock()
		}
	}
	return err
}
