//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// walker goes through the tree once after a session that ended badly.
type walker struct {
	v     *Volume
	moves atomic.Uint64 // of directories, and of files still to be repaired: the walk may have missed them

	mu      sync.Mutex    // guards the fields below
	done    chan struct{} // closed when the walk is over
	walking bool
	more    bool // a host died meanwhile
	closed  bool
}

// again begins a walk, after the one that is under way.
func (w *walker) again() {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.closed:
	case w.walking:
		w.more = true
	default:
		w.walking, w.done = true, make(chan struct{})
		w.v.bg.Go(w.walk)
	}
}

// stop lets no walk begin any more.
func (w *walker) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
}

// over notes that a walk is over, and begins the next one.
func (w *walker) over() {
	w.mu.Lock()
	more := w.more
	w.walking, w.more = false, false
	close(w.done)
	w.mu.Unlock()
	if more {
		w.again()
	}
}

// end returns what is closed when the walk is over.
func (w *walker) end() chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.done
}

// walk looks everything up once after a session that ended badly, so that its
// files are repaired and it can leave the marker.
func (w *walker) walk() {
	defer w.over()
	bad := w.v.sessions.badOnes()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-w.v.quit:
			cancel()
		case <-ctx.Done():
		}
	}()
	whole, err := false, error(nil)
	for range maxWalks {
		var still bool
		if whole, still, err = w.once(ctx); err != nil || still {
			break
		}
		whole = false // something may have moved from where it was not yet to where it was already
	}
	if err == nil && whole {
		err = w.v.cleaned(bad)
	}
	switch {
	case ctx.Err() != nil:
	case err != nil:
		w.v.report(".",
			"the walk after a mount that did not end well failed; it is made again at the next mount", err)
	case !whole:
		w.v.log.Warn("some files could not be repaired yet; it is tried again when they are looked up, and at the next mount")
	default:
		w.v.log.Info("all files of the mount that did not end well were checked")
	}
}

// once goes through the tree; still says that nothing was moved meanwhile, by this host or by others.
func (w *walker) once(ctx context.Context) (whole, still bool, err error) {
	moves := w.moves.Load()
	others, err := w.v.peers.moves()
	if err != nil {
		return false, false, err
	}
	if whole, err = w.dir(ctx, w.v.root); err != nil || len(others) == 0 && !w.v.Shared() {
		return whole, w.moves.Load() == moves, err
	}
	if len(others) > 0 {
		if err = w.v.peers.beaten(ctx); err != nil {
			return false, false, err
		}
	}
	now, err := w.v.peers.moves()
	return whole, w.moves.Load() == moves && maps.Equal(others, now), err
}

// maxWalks is how often the walk begins again while directories are moved.
const maxWalks = 20

func (w *walker) dir(ctx context.Context, n *Node) (whole bool, err error) {
	d, err := n.OpenDir()
	if err != nil {
		return false, err
	}
	defer d.Close()
	whole = true
	err = d.Next(func(e Entry) bool {
		if e.Name == "." || e.Name == ".." {
			return ctx.Err() == nil
		}
		c, _, final, lerr := d.Lookup(ctx, e)
		if lerr != nil {
			whole = whole && errors.Is(lerr, unix.ENOENT)
			return ctx.Err() == nil
		}
		whole = whole && final
		if c.IsDir() {
			ok, derr := w.dir(ctx, c)
			whole = whole && (ok && derr == nil)
		}
		w.v.Forget(c.id, 1)
		return ctx.Err() == nil
	})
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	return whole, err
}

// cleaned forgets the sessions that ended badly: the walk has been everywhere.
func (v *Volume) cleaned(bad map[uint64]bool) error {
	if err := v.syncAll(); err != nil {
		return err
	}
	if err := v.sessions.cleaned(bad); err != nil || !v.Shared() {
		return err
	}
	return v.peers.cleaned(bad)
}

// Wait returns when the background walk after a bad end is over, for tests and tools.
func (v *Volume) Wait(ctx context.Context) error {
	for v.repairs() {
		select {
		case <-v.walker.end():
			return nil // the rest is tried at the next mount
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}
