//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// Kernel is what a mount tells the kernel: to write what it holds back of a file,
// and to forget what it knows of its content.
type Kernel interface {
	WriteBack(node uint64) error
	// ForgetAttr makes the kernel ask for attributes again.
	ForgetAttr(node uint64) error
}

// AttachKernel is called by a mount before it serves.
func (v *Volume) AttachKernel(k Kernel) { v.access.kernel.Store(&k) }

const (
	writeWithin = 30 * time.Second       // in which the kernel writes what it holds back, and the disk takes it
	fileWithin  = 100 * time.Millisecond // for each file that a disk that does not answer holds
)

// within runs f; ok is false where it goes on for longer than d, alone.
func within[T any](d time.Duration, f func() T) (out T, ok bool) {
	done := make(chan T, 1)
	go func() { done <- f() }()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case out = <-done:
		return out, true
	case <-t.C:
		return out, false
	}
}

// Suspend makes all content unreadable until Resume, as kmsfs lock does: accepted writes are
// written, the kernel forgets what it knows, the data keys are wiped. Everything that is asked
// meanwhile, or waits, is EKEYEXPIRED. The error says what could not be written before; the volume
// is suspended all the same.
func (v *Volume) Suspend() error {
	v.access.mu.Lock()
	defer v.access.mu.Unlock()
	v.access.suspended.Store(true)
	v.access.keysForWriters(nil, v.access.writeWithin/6) // for what the kernel holds back
	all := v.lists.now().all
	sideBySide(all, func(_ int, d *domain) { d.ring.Suspend(errSuspended) })
	v.log.Info("the volume is locked")
	return v.access.wipe(errSuspended, all)
}

// wipe makes the kernel write what it holds back of the files of some domains, refuses delayed writes
// from then on, and wipes the files' keys.
func (a *access) wipe(verdict error, of []*domain) error {
	err := a.letKernelWrite(of)
	for _, d := range of {
		d.refusal.Store(&refusal{verdict, true})
	}
	files := slices.DeleteFunc(a.v.nodes.files(), func(f *file) bool { return !slices.Contains(of, f.domain.Load()) })
	if err = errors.Join(err, a.dropKeys(files)); err != nil {
		a.v.report(".", "before the keys were wiped, not everything could be written or settled", err)
	}
	return err
}

// Resume ends Suspend, after one that is under way.
func (v *Volume) Resume() {
	v.access.mu.Lock()
	defer v.access.mu.Unlock()
	v.access.suspended.Store(false)
	for _, d := range v.lists.now().all {
		d.ring.Resume()
	}
}

// RetryKeys asks key services again that were not asked any more.
func (v *Volume) RetryKeys() {
	for _, d := range v.lists.now().all {
		d.ring.Retry()
	}
}

// settleAndWipe settles the file, if it is as it was, and wipes its keys.
func (f *file) settleAndWipe(settle bool, changes uint64) (err error) {
	f.mu.Lock()
	defer f.unlock()
	if f.refuses(false) == nil {
		return nil // it took so long that it may be used again
	}
	if f.v.Shared() {
		err = f.lease.giveBack()
	} else if settle && f.rw && !f.closed && !f.Broken() {
		err = errors.Join(f.Rest(), f.Settle(changes))
	}
	if f.Header != nil && f.rw && f.Unfinished() {
		f.v.sessions.stuck.Store(true) // it cannot be settled without its key: the next mount does
	}
	f.wipe()
	if f.lease.held {
		f.lease.drop()
	}
	return err
}

// renewAtOnce is how many keys are asked for at the same time.
const renewAtOnce = 32

// letGo makes the kernel write what it holds back of a file, and forget the rest.
func (a *access) letGo(node uint64) error {
	if k := a.kernel.Load(); k != nil {
		return (*k).WriteBack(node)
	}
	return nil
}

// tellAttr makes the kernel ask for a node's attributes again.
func (a *access) tellAttr(node uint64) error {
	if k := a.kernel.Load(); k != nil {
		return (*k).ForgetAttr(node)
	}
	return nil
}

// changed is told by the ring when keys may not be used any more, and when
// they may again.
func (d *domain) changed(verdict error) {
	a := &d.v.access
	if verdict == nil {
		d.refusal.Store(nil)
		if d == a.v.lists.own {
			a.v.log.Info("the volume's keys can be used again")
		} else {
			a.v.log.Info("a directory's keys can be used again", "keys", urisOf(d.recipients))
		}
		a.keysForWriters(d, a.writeWithin)
		return
	}
	d.refusal.Store(&refusal{err: verdict})
	if verdict == error(errSuspended) {
		return // Suspend goes on
	}
	at, msg := "keys", "the volume's keys may not be used any more; its files answer with the verdict until they may"
	if d != a.v.lists.own {
		at, msg = urisOf(d.recipients), "a directory's keys may not be used any more; its files answer with the verdict until they may"
	}
	a.v.report(at, msg, verdict)
	if len(a.v.lists.now().all) > 1 {
		for _, f := range d.files() { // those that another key opens; not one that a slow disk holds
			if f.mu.TryLock() {
				a.v.lists.regroup(f)
				f.unlock()
			}
		}
	}
	a.wipe(verdict, []*domain{d})
}

// files returns the open files of the domain.
func (d *domain) files() []*file {
	return slices.DeleteFunc(d.v.nodes.files(), func(f *file) bool { return f.domain.Load() != d })
}

// reached is told by the ring when a key service cannot be reached any more, and
// when it can again.
func (a *access) reached(uri string, err error) {
	if err == nil {
		a.v.log.Info("the key service answers again", "key", uri)
		return
	}
	attrs := []any{"key", uri, "error", err, "grace", a.v.o.Grace}
	if e, ok := errors.AsType[*keystore.Error](err); ok && e.Hint != "" {
		attrs = append(attrs, "hint", e.Hint)
	}
	a.v.log.Warn("the key service cannot be reached; files whose keys are known can be used until the grace period ends", attrs...)
}

// keysForWriters asks again for the wiped keys of files, of one domain unless it is nil, that
// somebody has open for writing: what the kernel's cache takes shows here only when it is written, and
// then the keys may be gone again. It takes this time at most, whatever disk and key
// service do.
func (a *access) keysForWriters(d *domain, atMost time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), atMost)
	defer cancel()
	within(atMost, func() (_ struct{}) {
		var wg sync.WaitGroup
		slots := make(chan struct{}, renewAtOnce)
		for _, f := range a.v.nodes.files() {
			if d != nil && f.domain.Load() != d {
				continue
			}
			f.mu.RLock()
			needs, empty := f.writers > 0 && f.Keyless(), f.writers > 0 && f.Header == nil &&
				(f.next == nil || !f.next.current(f))
			old := f.next
			f.mu.RUnlock()
			if !needs && !empty {
				continue
			}
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				if empty {
					f.renewKey(ctx, old)
				} else {
					f.ready(ctx, false) // what fails is tried again when it is needed
				}
			})
		}
		wg.Wait()
		return
	})
}

// letKernelWrite makes the kernel write what it holds back of every file, but open ones of other
// domains than these, and forget the rest, and its entries of directories. A disk that does not answer
// does not keep the keys alive.
func (a *access) letKernelWrite(of []*domain) error {
	if a.kernel.Load() == nil {
		return nil
	}
	nodes := slices.DeleteFunc(a.v.nodes.all(), func(n *Node) bool {
		f := n.file.Load()
		return f != nil && !slices.Contains(of, f.domain.Load())
	})
	_, ok := within(a.writeWithin, func() (_ struct{}) {
		var wg sync.WaitGroup
		queue := make(chan *Node)
		for range 4 {
			wg.Go(func() {
				for n := range queue {
					a.letGo(n.id) // what fails is remembered as lost
				}
			})
		}
		for _, n := range nodes {
			queue <- n
		}
		close(queue)
		wg.Wait()
		return
	})
	if !ok {
		return fmt.Errorf("the kernel does not write what it holds back: %w", context.DeadlineExceeded)
	}
	var err error
	for _, n := range nodes {
		err = errors.Join(err, n.lost.tell())
	}
	return err
}

// dropKeys brings files into their final form and wipes their keys. Those that a
// disk that does not answer holds are wiped when it lets them go.
func (a *access) dropKeys(files []*file) error {
	end := time.Now().Add(a.writeWithin)
	left := func() time.Duration { return max(time.Until(end), fileWithin) }
	changes := make([]uint64, len(files))
	for i, f := range files {
		changes[i], _ = within(left(), func() uint64 { // 0 if it is held: then it is not settled if it has changed
			f.mu.RLock()
			defer f.mu.RUnlock()
			return f.Changes()
		})
	}
	var err error
	if !a.v.o.ReadOnly {
		err = a.syncWithin(left())
	}
	for i, f := range files {
		settle := err == nil
		ferr, ok := within(left(), func() error { return f.settleAndWipe(settle, changes[i]) })
		if !ok {
			a.v.sessions.stuck.Store(true)
			ferr = context.DeadlineExceeded
		}
		err = errors.Join(err, ferr)
	}
	return err
}

// syncWithin is syncAll for at most d: a disk that does not answer does not
// keep the keys alive.
func (a *access) syncWithin(d time.Duration) error {
	err, ok := within(d, a.v.syncAll)
	if !ok {
		a.v.sessions.stuck.Store(true)
		return context.DeadlineExceeded
	}
	return err
}

// dropKey is what changed does, for one file.
func (a *access) dropKey(f *file, hdr *blockcrypt.Header, verdict error) error {
	f.refusal.Store(&refusal{err: verdict}) // or it would change meanwhile
	err := a.letGo(f.n.id)
	if hdr != nil {
		f.domain.Load().ring.Forget(hdr.File, hdr.Recipients)
	}
	f.refusal.Store(&refusal{verdict, true})
	err = errors.Join(err, a.dropKeys([]*file{f}), a.letGo(f.n.id)) // somebody may have read it meanwhile
	f.refusal.Store(nil)                                            // from here on its key is asked for
	return err
}

// dropIfRefused wipes the keys of a file that came to a domain whose keys may not be used.
func (a *access) dropIfRefused(f *file) {
	verdict := f.refuses(false)
	if verdict == nil {
		return
	}
	f.mu.RLock()
	hdr, has := f.Header, f.Keys != nil
	f.mu.RUnlock()
	if has {
		f.failed("settling it before its key was wiped", a.dropKey(f, hdr, verdict))
	}
}

// renewKeys begins the lease of single files, if that is asked for and a service has to be asked.
func (a *access) renewKeys() {
	if a.v.o.FileLease && a.v.lists.waits() {
		a.renewing.Do(func() { a.v.bg.Go(a.renewer) })
	}
}

// renewer is the lease of single files, for policies that allow some and not
// others: the key of every open file is unwrapped again, twice in each MaxAge, and
// wiped where that is refused.
func (a *access) renewer() {
	t := time.NewTicker(a.v.o.MaxAge / 2)
	defer t.Stop()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-a.v.quit
		cancel()
	}()
	for {
		select {
		case <-a.v.quit:
			return
		case <-t.C:
		}
		var wg sync.WaitGroup
		slots := make(chan struct{}, renewAtOnce)
		for _, f := range a.v.nodes.files() {
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				a.renew(ctx, f)
			})
		}
		wg.Wait()
	}
}

func (a *access) renew(ctx context.Context, f *file) {
	f.mu.RLock()
	hdr, has := f.Header, f.Keys != nil
	f.mu.RUnlock()
	if hdr == nil || !has {
		return
	}
	err := f.domain.Load().ring.Renew(ctx, hdr.File, hdr.Recipients)
	if k := keystore.KindOf(err); k == keystore.Revoked || k == keystore.Denied || k == keystore.Damaged {
		f.failed("renewing its key", err)
		f.failed("settling it before its key was wiped", a.dropKey(f, hdr, err))
	}
}
