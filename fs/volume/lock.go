package volume

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// Kernel is what a mount tells the kernel: to write what it holds back of a file,
// and to forget what it knows of its content.
type Kernel interface {
	WriteBack(node uint64) error
}

// AttachKernel is called by a mount before it serves.
func (v *Volume) AttachKernel(k Kernel) { v.kernel = k }

// refusal is why no content can be read or written: the keys may not be used.
type refusal struct {
	err    error
	sealed bool // what the kernel held back is written; its writes are refused too
}

// sealWithin is how long the kernel has to write what it holds back.
const sealWithin = 30 * time.Second

// Lock makes all content unreadable until Unlock: what was accepted is written,
// the kernel forgets what it knows, the data keys are wiped. Everything that is
// asked meanwhile is EKEYEXPIRED.
func (v *Volume) Lock() {
	v.locked.Store(true)
	v.ring.Lock(errLocked)
}

// Unlock ends Lock.
func (v *Volume) Unlock() {
	v.locked.Store(false)
	v.ring.Unlock()
}

// RetryKeys asks key services again that were not asked any more.
func (v *Volume) RetryKeys() { v.ring.Retry() }

var errLocked = &keystore.Error{Kind: keystore.Credentials, Op: "unwrap", Err: errors.New("the volume is locked"), Hint: "kmsfs unlock MOUNTPOINT"}

// Locked returns why nothing at all is answered, nil unless [Volume.Lock] was called.
func (v *Volume) Locked() error {
	if v.locked.Load() {
		return errLocked
	}
	return nil
}

// refuses returns why content is not read or written now.
func (v *Volume) refuses(delayedWrite bool) error {
	r := v.refusal.Load()
	if r == nil || delayedWrite && !r.sealed {
		return nil
	}
	return r.err
}

// keysChanged is told by the ring when keys may not be used any more, and when
// they may again.
func (v *Volume) keysChanged(verdict error) {
	if verdict == nil {
		v.refusal.Store(nil)
		v.log.Info("the volume's keys can be used again")
		return
	}
	v.refusal.Store(&refusal{err: verdict})
	if v.Locked() != nil {
		v.log.Info("the volume is locked")
	} else {
		v.report("keys", "the volume's keys may not be used any more; its files answer with the verdict until they may", verdict)
	}
	v.letKernelWrite()
	v.refusal.Store(&refusal{verdict, true})
	if err := v.dropKeys(v.files()); err != nil {
		v.report(".", "before the keys were wiped, not everything could be settled", err)
	}
}

// letKernelWrite makes the kernel write what it holds back of every file, and
// forget the rest. A disk that does not answer does not keep the keys alive.
func (v *Volume) letKernelWrite() {
	if v.kernel == nil {
		return
	}
	v.mu.Lock()
	var ids []uint64
	for id, n := range v.nodes {
		if n.typ == unix.S_IFREG {
			ids = append(ids, id)
		}
	}
	v.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		var wg sync.WaitGroup
		queue := make(chan uint64)
		for range 4 {
			wg.Go(func() {
				for id := range queue {
					v.kernel.WriteBack(id) // what fails is remembered as lost
				}
			})
		}
		for _, id := range ids {
			queue <- id
		}
		close(queue)
		wg.Wait()
	}()
	select {
	case <-done:
	case <-time.After(sealWithin):
	}
}

// dropKeys brings files into their final form and wipes their keys.
func (v *Volume) dropKeys(files []*file) error {
	changes := make([]uint64, len(files))
	for i, f := range files {
		f.mu.RLock()
		changes[i] = f.changes
		f.mu.RUnlock()
	}
	var err error
	if !v.o.ReadOnly {
		err = v.syncAll()
	}
	for i, f := range files {
		f.mu.Lock()
		if err == nil && f.rw && !f.closed && !f.broken {
			err = errors.Join(f.rest(), f.settle(changes[i]))
		}
		if f.hdr != nil && f.rw && f.flags()&(blockcrypt.Dirty|blockcrypt.Cut) != 0 {
			v.stuck.Store(true) // it cannot be settled without its key: the next mount does
		}
		f.wipe()
		f.mu.Unlock()
	}
	return err
}

// dropKey is what keysChanged does, for one file.
func (v *Volume) dropKey(f *file, hdr *blockcrypt.Header) error {
	letGo := func() error {
		if v.kernel == nil {
			return nil
		}
		return v.kernel.WriteBack(f.n.id)
	}
	err := letGo()
	v.ring.Forget(hdr.File, wrapped(hdr.Recipients))
	// Once more: somebody may have read it meanwhile.
	return errors.Join(err, v.dropKeys([]*file{f}), letGo())
}

// wipe forgets the file's keys and what is known of its content. mu is held.
func (f *file) wipe() {
	f.keys = nil
	clear(f.tail)
	f.tailK = -1
	if f.next != nil {
		f.v.ring.PutBack(f.next)
		f.next = nil
	}
}

// ready makes sure that the file's content can be read and written: it was not
// forbidden, and its key is there, which may have to be asked for anew.
func (f *file) ready(ctx context.Context, delayedWrite bool) error {
	if err := f.v.refuses(delayedWrite); err != nil {
		return err
	}
	for {
		f.mu.RLock()
		hdr, has := f.hdr, f.keys != nil
		f.mu.RUnlock()
		if hdr == nil || has {
			return nil
		}
		key, err := f.v.ring.Unwrap(ctx, hdr.File, wrapped(hdr.Recipients))
		if err != nil {
			return f.failed("opening it again", err)
		}
		keys, err := hdr.Unlock(key)
		clear(key)
		if err != nil {
			return f.failed("opening it again", err)
		}
		f.mu.Lock()
		err = f.v.refuses(delayedWrite) // it may be locked by now
		if err == nil && f.hdr == hdr && f.keys == nil {
			f.keys = keys
		}
		f.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// keyless reports whether the file has content whose key was wiped. mu is held.
func (f *file) keyless() bool { return f.hdr != nil && f.keys == nil }

// renewer is the lease of single files, for policies that allow some and not
// others: the key of every open file is asked for anew, twice in each MaxAge, and
// wiped where that is refused.
func (v *Volume) renewer() {
	t := time.NewTicker(v.o.MaxAge / 2)
	defer t.Stop()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-v.quit
		cancel()
	}()
	for {
		select {
		case <-v.quit:
			return
		case <-t.C:
		}
		for _, f := range v.files() {
			f.mu.RLock()
			hdr, has := f.hdr, f.keys != nil
			f.mu.RUnlock()
			if hdr == nil || !has {
				continue
			}
			err := v.ring.Renew(ctx, hdr.File, wrapped(hdr.Recipients))
			if k := keystore.KindOf(err); k == keystore.Revoked || k == keystore.Denied || k == keystore.Damaged {
				f.failed("renewing its key", err)
				f.failed("settling it before its key was wiped", v.dropKey(f, hdr))
			}
		}
	}
}
