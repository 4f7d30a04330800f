//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"kmsfs/keystore"
)

// errSuspended is the answer while the volume is suspended, which users call locked.
var errSuspended = &keystore.Error{Kind: keystore.Credentials, Op: "unwrap",
	Err: errors.New("the volume is locked"), Hint: "kmsfs unlock MOUNTPOINT"}

// access says whether content may be read and written, and wipes the keys if it may not.
type access struct {
	v           *Volume
	kernel      atomic.Pointer[Kernel] // nil without a mount
	suspended   atomic.Bool            // by Suspend
	mu          sync.Mutex             // held by suspend and resume
	writeWithin time.Duration          // the constant of this name, but in tests
	renewing    sync.Once
}

// refused returns why no content of a node is read or written now, as far as that is known before
// the file is opened.
func (a *access) refused(c *content) error {
	if f := c.file.Load(); f != nil {
		return f.refuses(false)
	}
	if len(a.v.lists.now().all) == 1 {
		return a.v.lists.own.refusal.Load().of(false)
	}
	return nil
}

// refusal is why no content can be read or written: the keys may not be used.
type refusal struct {
	err     error
	flushed bool // the kernel has written what it held back: from now on delayed writes are refused too
}

// of returns why content is not read or written now. A delayed write is one that the kernel has
// accepted before, and held back.
func (r *refusal) of(delayedWrite bool) error {
	if r == nil || delayedWrite && !r.flushed {
		return nil
	}
	return r.err
}

// Suspended returns why nothing at all is answered, from [Volume.Suspend] to [Volume.Resume]; else
// nil.
func (v *Volume) Suspended() error {
	if v.access.suspended.Load() {
		return errSuspended
	}
	return nil
}

// refuses returns why the file's content is not read or written now.
func (f *file) refuses(delayedWrite bool) error {
	if err := f.domain.Load().refusal.Load().of(delayedWrite); err != nil {
		return err
	}
	return f.refusal.Load().of(delayedWrite)
}

// wipe forgets the file's keys and all that is in memory of its content. mu is held.
func (f *file) wipe() {
	f.Wipe()
	f.n.lost.wipe()
	if f.next != nil {
		f.next.putBack()
		f.next = nil
	}
}

// ready makes sure that the file's content can be read and written: it was not
// forbidden, and its key is there, which may have to be unwrapped again.
func (f *file) ready(ctx context.Context, delayedWrite bool) error {
	if err := f.wake(); err != nil {
		return err
	}
	for {
		d := f.domain.Load()
		err := f.refuses(delayedWrite)
		if err == nil && !delayedWrite {
			var known bool
			if known, err = d.ring.ProveNow(); !known {
				waitsOf(ctx).ForKey()
				err = d.ring.Prove(ctx)
			}
		}
		if err != nil {
			if f.v.lists.regrouped(f, d) {
				continue
			}
			return err
		}
		f.rlock(ctx)
		hdr, has := f.Header, f.Keys != nil
		f.mu.RUnlock()
		if hdr == nil || has {
			return nil
		}
		waitsOf(ctx).ForKey()
		keys, d, err := f.v.lists.unlock(ctx, hdr)
		if err != nil {
			return f.failed("unwrapping its key again", err)
		}
		f.mu.Lock()
		if f.Header == hdr && f.Keys == nil {
			f.domain.Store(d)
			f.v.lists.keep(f)
		}
		err = f.refuses(delayedWrite) // it may be suspended by now
		if err == nil && f.Header == hdr && f.Keys == nil {
			f.Keys = keys
		}
		f.unlock()
		if err != nil {
			return err
		}
	}
}

// renewKey replaces old, the data key that an empty file has taken (nil: none), by a new one. If
// none can be had, and old opens for a recipient that the volume still has, old is kept: accepted
// writes are not to be lost for that.
func (f *file) renewKey(ctx context.Context, old *freshKey) (kept *freshKey, err error) {
	k, err := f.n.newKey(ctx)
	if err != nil {
		if old != nil && old.domain.ring.Opens(old.Wrapped) {
			return old, nil
		}
		f.v.report(f.n.where(), "no data key for new content", err)
		return nil, err
	}
	f.mu.Lock()
	defer f.unlock()
	if f.next == old {
		takes(f, k)
		k = old
	}
	if k != nil {
		k.putBack()
	}
	return nil, nil
}
