//go:build linux && !portable

package volume

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
