package volume

import (
	"context"
	"errors"
	"kmsfs/keystore"
	"sync"
	"sync/atomic"
	"time"
)

var errSuspended = &keystore.Error{Kind: keystore.Credentials, Op: "unwrap",
	Err: errors.New("the volume is locked"), Hint: "kmsfs unlock MOUNTPOINT"}

// access says whether content may be read and written, and wipes the keys if it may not.
type access struct {
	v           *Volume
	kernel      atomic.Pointer[Kernel] // nil without a mount
	suspended   atomic.Bool            // by Suspend
	refusal     atomic.Pointer[refusal]
	mu          sync.Mutex    // held by suspend and resume
	writeWithin time.Duration // see the constant
	renewing    sync.Once
	unwritten   atomic.Pointer[error] // the error of writing or settling when keys were wiped last
}

// refuses returns why no content of the volume is read or written now.
func (a *access) refuses(delayedWrite bool) error { return a.refusal.Load().of(delayedWrite) }

// refusal is why no content can be read or written: the keys may not be used.
type refusal struct {
	err     error
	flushed bool // what the kernel held back is written; its writes are refused too
}

// of returns why content is not read or written now.
func (r *refusal) of(delayedWrite bool) error {
	if r == nil || delayedWrite && !r.flushed {
		return nil
	}
	return r.err
}

// Suspended returns why nothing at all is answered, nil unless [Volume.Suspend] was called.
func (v *Volume) Suspended() error {
	if v.access.suspended.Load() {
		return errSuspended
	}
	return nil
}

// refuses returns why the file's content is not.
func (f *file) refuses(delayedWrite bool) error {
	if err := f.v.access.refuses(delayedWrite); err != nil {
		return err
	}
	return f.refusal.Load().of(delayedWrite)
}

// wipe forgets the file's keys and all that is in memory of its content. mu is held.
func (f *file) wipe() {
	f.Wipe()
	if f.next != nil {
		f.v.ring.PutBack(f.next)
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
		if err := f.refuses(delayedWrite); err != nil {
			return err
		}
		if !delayedWrite {
			known, err := f.v.ring.ProveNow()
			if !known {
				waitsOf(ctx).ForKey()
				err = f.v.ring.Prove(ctx)
			}
			if err != nil {
				return err
			}
		}
		f.rlock(ctx)
		hdr, has := f.Header, f.Keys != nil
		f.mu.RUnlock()
		if hdr == nil || has {
			return nil
		}
		waitsOf(ctx).ForKey()
		keys, err := f.v.ring.Unlock(ctx, hdr)
		if err != nil {
			return f.failed("opening it again", err)
		}
		f.mu.Lock()
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

// newKey returns a data key for a new file, and tells if it waits for a key service.
func (ns *namespace) newKey(ctx context.Context) (*keystore.DataKey, error) {
	key, ok, err := ns.v.ring.NewKeyNow()
	if !ok {
		waitsOf(ctx).ForKey()
		key, err = ns.v.ring.NewKey(ctx)
	}
	return key, err
}

// renewKey takes a data key in the place of one that was made for other recipients, or of none. If
// none can be had, it returns the old one, provided that one of its recipients still is one of the volume:
// accepted writes are not to be lost for that.
func (f *file) renewKey(ctx context.Context, old *keystore.DataKey) (kept *keystore.DataKey, err error) {
	k, err := f.v.newKey(ctx)
	if err != nil {
		if old != nil && f.v.ring.Opens(old.Wrapped) {
			return old, nil
		}
		f.v.report(f.n.where(), "no data key for new content", err)
		return nil, err
	}
	f.mu.Lock()
	defer f.unlock()
	if f.next == old {
		f.next, k = k, old
	}
	if k != nil {
		f.v.ring.PutBack(k)
	}
	return nil, nil
}

// Waits is told when a call is about to wait, so that who handles requests can let somebody else
// go on with the next one.
type Waits interface {
	ForKey()  // for a key service
	ForDisk() // perhaps for the disk: a read of data that is not in the page cache
	Behind()  // for another call of the same file: how long it takes says nothing about the disk
}

// WaitsKey is the key of a context value of type [Waits].
type WaitsKey struct{}

// waitsOf returns the Waits of a context, which may have none.
func waitsOf(ctx context.Context) Waits {
	if w, ok := ctx.Value(WaitsKey{}).(Waits); ok {
		return w
	}
	return nobody{}
}

type nobody struct{}

// rlock takes mu for reading, and tells if it waits for another call.
func (f *file) rlock(ctx context.Context) {
	if !f.mu.TryRLock() {
		waitsOf(ctx).Behind()
		f.mu.RLock()
	}
}
