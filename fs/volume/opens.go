//go:build linux && !portable

package volume

// event is an open that waits for a key, or one while there are predictions.
type event struct {
	n    *Node // held
	cold bool
}

// opened notes that a file is being opened.
func (p *prefetcher) opened(n *Node, cold bool) {
	if !p.on.Load() || !cold && p.active.Load() == 0 {
		return
	}
	n.hold()
	select {
	case p.events <- event{n, cold}:
	default: // it has enough to do
		n.release()
	}
}
