//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/keystore"
)

// RewrapOptions say which recipients files get.
type RewrapOptions struct {
	// From and To, both or none, are URIs: To, a recipient of the volume, takes the place of From
	// in each file that has it. Without them a file gets just the recipients of the volume.
	From, To string
	Same     func(a, b string) bool // whether two URIs name one key, as replicas do; nil: equal ones
	Missing  bool                   // no recipient is taken out of a file

	AtOnce   int                 // files at the same time; 1 if zero
	Progress func(Rewrapped)     // told now and then, by one goroutine at a time; it may be nil
	Failed   func(string, error) // told of each file that could not be changed, likewise
}

// Rewrapped counts what [Recipients.Rewrap] has done.
type Rewrapped struct {
	Files   int64 `json:"files"`   // that were looked at
	Changed int64 `json:"changed"` // that have other recipients now
	Failed  int64 `json:"failed"`

	// Absent are recipients of the volume that files lack, and that they were not given since the
	// keys are not at hand.
	Absent []string `json:"absent,omitempty"`

	// FormerNeeded is how many files still need a key that a directory had before.
	FormerNeeded int64 `json:"former_needed,omitempty"`

	// FormerKept says why it is not known whether a file needs one: they stay trusted.
	FormerKept string `json:"former_kept,omitempty"`

	Record *Record `json:"-"` // what the trust record should say, if kmsfs.json was changed
}

// rewrapTries is how often a file is tried again that others change meanwhile.
const rewrapTries = 10

// Rewrap gives files other recipients. It changes nothing but the recipients in their headers, and
// can be interrupted at any time and called again: nothing is done twice. When it returns
// without an error, all is durable.
func (r *Recipients) Rewrap(ctx context.Context, o RewrapOptions) (done Rewrapped, err error) {
	v := r.v
	if v.o.ReadOnly {
		return done, unix.EROFS
	}
	if err := v.Wait(ctx); err != nil { // repairs may need a recipient that would go
		return done, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if o.Same == nil {
		o.Same = func(a, b string) bool { return a == b }
	}
	p := &rewrapping{v: v, o: o, cancel: cancel}
	p.r = r
	p.listed = r.now.Load()
	if o.To != "" {
		if err := p.checkTo(); err != nil {
			return done, err
		}
	}
	err = v.eachFile(ctx, v.root, o.AtOnce, sweep{p.file, func(at string, err error) { p.count(false, at, err) }})
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if err == nil {
		err = v.syncAll()
	}
	if err == nil {
		p.dropFormer(ctx)
	}
	return p.done, err
}

// dropFormer is [Recipients.dropFormer], after all files were rewrapped. The keys of directories that
// are gone are former ones.
func (p *rewrapping) dropFormer(ctx context.Context) {
	unlock, err := p.r.lock(ctx)
	if err != nil {
		p.done.FormerKept = err.Error()
		return
	}
	defer unlock()
	gone, err := p.r.dropRemoved(ctx)
	var rec *Record
	var needed OnlyRecipientError
	if err == nil {
		rec, needed, err = p.r.dropFormer(ctx)
	}
	if rec == nil {
		rec = gone
	}
	p.done.Record, p.done.FormerNeeded = rec, needed.Files
	if err != nil {
		p.done.FormerKept = err.Error()
	}
}

// rewrapping is a Rewrap under way.
type rewrapping struct {
	v *Volume
	r *Recipients
	o RewrapOptions

	cancel context.CancelCauseFunc

	listed *listed // what the volume had when it began

	mu   sync.Mutex
	done Rewrapped
}

// checkTo makes sure that the key of To is another one than that of From, and is a recipient of the
// volume or of a directory.
func (p *rewrapping) checkTo() error {
	known := false
	for _, d := range p.listed.domains.all {
		k := p.listed.set(d)
		i := k.at(p.o.To)
		known = known || i >= 0
		if i >= 0 && k.at(p.o.From) == i {
			return ErrSameRecipient
		}
	}
	if !known {
		return ErrNotRecipient
	}
	if p.o.From == p.o.To {
		return ErrSameRecipient
	}
	return nil
}

// count notes what became of a file.
func (p *rewrapping) count(changed bool, at string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done.Files++
	if changed {
		p.done.Changed++
	}
	if err != nil {
		p.done.Failed++
		if p.o.Failed != nil {
			p.o.Failed(at, err)
		}
	}
	if p.o.Progress != nil {
		p.o.Progress(p.done)
	}
}

// file gives one file its recipients.
func (p *rewrapping) file(ctx context.Context, n *Node) {
	changed, err := false, error(nil)
	for range rewrapTries {
		var again bool
		if changed, again, err = p.try(ctx, n); !again {
			break
		}
		err = errors.New("others change its recipients all the time")
	}
	if err != nil && (ctx.Err() != nil || errors.Is(err, unix.ENOENT)) {
		return // interrupted, or removed meanwhile
	}
	p.count(changed, n.where(), err)
}

// try is one attempt; again says that the header is another one by now.
func (p *rewrapping) try(ctx context.Context, n *Node) (changed, again bool, err error) {
	hdr, err := n.header()
	if err != nil || hdr == nil {
		return false, false, err
	}
	d, err := p.v.lists.target(&n.content)
	if err != nil {
		return false, false, err
	}
	x := &rewrapped{p, hdr, d, p.listed.set(d)}
	if hdr.Geometry.Header() > blockcrypt.PageSize {
		changed, err := x.again(ctx, n)
		return changed, false, err
	}
	rs, err := x.wanted(ctx)
	if err != nil || slices.EqualFunc(rs, hdr.Recipients, sameRecipient) {
		return false, false, err
	}
	if err := x.staysOpen(ctx, rs); err != nil {
		return false, false, err
	}
	p.r.stable.RLock()
	defer p.r.stable.RUnlock()
	if p.r.generation() != p.listed.cfg.Generation {
		p.cancel(ErrChanged)
		return false, false, ErrChanged
	}
	written, err := n.setRecipients(ctx, hdr, rs)
	return written, !written && err == nil, err
}

// rewrapped is a file that is given the recipients of a domain.
type rewrapped struct {
	*rewrapping
	hdr *blockcrypt.Header
	d   *domain
	keySet
}

// has returns the place in the header of a recipient of the list, -1 if it lacks that.
func (p *rewrapped) has(uri string) int {
	i := p.at(uri)
	return slices.IndexFunc(p.hdr.Recipients, func(x blockcrypt.Recipient) bool { return p.at(x.URI) == i })
}

// staysOpen makes sure that no recipient is taken out of a file whose others are damaged: one that was
// made just now is good, of the others one must open.
func (p *rewrapped) staysOpen(ctx context.Context, rs []blockcrypt.Recipient) error {
	next := *p.hdr
	next.Recipients = rs
	isNew := func(x blockcrypt.Recipient) bool {
		s := keystore.StoreFor(p.stores, x.URI)
		return s != nil && !keystore.OnlySeals(s) && !slices.ContainsFunc(p.hdr.Recipients,
			func(y blockcrypt.Recipient) bool { return sameRecipient(x, y) })
	}
	var first error
	if slices.ContainsFunc(rs, isNew) {
		return nil
	}
	for _, d := range p.v.lists.allOf(&next) {
		key, err := d.ring.Unwrap(keystore.WithPurpose(ctx, keystore.ForRewrap), next.File, rs)
		if keystore.KindOf(err) == keystore.Denied && d.ring.StillUnwraps(ctx, next.File, rs) {
			return nil // by somebody who may rewrap, and not read
		}
		if err == nil {
			_, err = next.Unlock(key)
			clear(key)
		}
		if err == nil {
			return nil
		}
		if first == nil {
			first = err
		}
	}
	return first
}

func sameRecipient(a, b blockcrypt.Recipient) bool {
	return a.URI == b.URI && string(a.Branch) == string(b.Branch) && string(a.Wrapped) == string(b.Wrapped)
}

// ErrLargeHeader says that one recipient alone cannot be replaced in a header.
var ErrLargeHeader = errors.New("its header has more than 4096 bytes, and gets all recipients of the volume or of its directory: take the one out of them first that is to go")

// again encrypts a file again, if it is not to have just the recipients that it has: two pages of a
// header can be of two times after a power cut. It gets those of the list, and a new data key.
func (p *rewrapped) again(ctx context.Context, n *Node) (changed bool, err error) {
	lacks := slices.ContainsFunc(p.keySet.recipients, func(x blockcrypt.Recipient) bool {
		if p.has(x.URI) >= 0 {
			return false
		}
		if keystore.StoreFor(p.stores, x.URI) == nil {
			p.absent(x.URI)
			return false
		}
		return true
	})
	strange := slices.ContainsFunc(p.hdr.Recipients, func(x blockcrypt.Recipient) bool { return p.at(x.URI) < 0 })
	switch has := slices.ContainsFunc(p.hdr.Recipients, func(x blockcrypt.Recipient) bool { return p.o.Same(x.URI, p.o.From) }); {
	case p.o.From != "" && (!has || p.at(p.o.To) < 0):
		return false, nil
	case p.o.From != "" && p.at(p.o.From) >= 0:
		return false, ErrLargeHeader
	case p.o.From == "" && !lacks && (p.o.Missing || !strange):
		return false, nil
	}
	return rekey(ctx, n, false)
}

// wanted returns the recipients that a file is to have: never others than those that it has and those
// that the authenticated kmsfs.json names, and never none.
func (p *rewrapped) wanted(ctx context.Context) ([]blockcrypt.Recipient, error) {
	hdr := p.hdr
	if p.o.From != "" {
		if p.at(p.o.To) < 0 {
			return hdr.Recipients, nil // not for the files of this directory
		}
		i := slices.IndexFunc(hdr.Recipients,
			func(x blockcrypt.Recipient) bool { return p.o.Same(x.URI, p.o.From) })
		if i < 0 {
			return hdr.Recipients, nil
		}
		out := slices.Clone(hdr.Recipients)
		if p.has(p.o.To) < 0 {
			w, err := p.wrap(ctx, p.o.To)
			out[i] = w
			return out, err
		}
		return slices.Delete(out, i, i+1), nil
	}
	var out []blockcrypt.Recipient
	for _, x := range p.keySet.recipients {
		if i := p.has(x.URI); i >= 0 {
			out = append(out, hdr.Recipients[i])
			continue
		}
		if keystore.StoreFor(p.stores, x.URI) == nil {
			p.absent(x.URI)
			continue
		}
		w, err := p.wrap(ctx, x.URI)
		if err != nil {
			return nil, err
		}
		out = append(out, w)
	}
	if len(out) == 0 { // none of them can be had
		return hdr.Recipients, nil
	}
	if p.o.Missing || !p.keySet.opens(out) { // or nobody here could open it any more
		for _, x := range hdr.Recipients {
			if !slices.ContainsFunc(out, func(y blockcrypt.Recipient) bool { return y.URI == x.URI }) {
				out = append(out, x)
			}
		}
		if len(out) == len(hdr.Recipients) {
			return hdr.Recipients, nil // in another order
		}
	}
	return out, nil
}

// absent notes a recipient that a file lacks and cannot be given.
func (p *rewrapping) absent(uri string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !slices.Contains(p.done.Absent, uri) {
		p.done.Absent = append(slices.Clone(p.done.Absent), uri)
	}
}

// wrap wraps the file's key for a recipient of the list.
func (p *rewrapped) wrap(ctx context.Context, to string) (blockcrypt.Recipient, error) {
	var first error
	for _, d := range p.v.lists.allOf(p.hdr) {
		w, err := p.d.ring.Rewrap(ctx, d.ring, p.hdr, to)
		if err == nil || keystore.KindOf(err) == keystore.Canceled {
			return w, err
		}
		if first == nil {
			first = err
		}
	}
	return blockcrypt.Recipient{}, first
}

// setRecipients gives the file other recipients, if its header still is what it was.
func (c *content) setRecipients(ctx context.Context, was *blockcrypt.Header,
	rs []blockcrypt.Recipient) (written bool, err error) {
	f := c.file.Load()
	if f != nil { // before openMu: it may have to settle others
		if err := f.wake(); err != nil {
			return false, err
		}
		if err := f.lease.freshen(ctx); err != nil && c.v.Shared() {
			return false, err
		}
	}
	written, err = setRecipientsAwake(ctx, c, was, rs)
	if f != nil {
		c.v.access.dropIfRefused(f)
	}
	return written, err
}

// setRecipientsAwake is setRecipients of a file that is not parked.
func setRecipientsAwake(ctx context.Context, c *content, was *blockcrypt.Header,
	rs []blockcrypt.Recipient) (written bool, err error) {
	c.openMu.Lock()
	defer c.openMu.Unlock()
	defer c.n.change()
	if c.isPending() { // another node may have the file by now
		return false, unix.ESTALE
	}
	c.dropHalf() // calls that wait for its key read the header again
	still := func(now *blockcrypt.Header) bool {
		return now != nil && now.File == was.File &&
			slices.EqualFunc(now.Recipients, was.Recipients, sameRecipient)
	}
	if f := c.file.Load(); f != nil {
		if err := f.needWrite(); err != nil {
			return false, err
		}
		f.mu.Lock()
		defer f.unlock()
		if f.FD < 0 || !still(f.Header) {
			return false, nil
		}
		if ok, err := f.lease.has(); !ok || !still(f.Header) {
			return false, err
		}
		err := f.SetRecipients(rs)
		if err == nil && c.v.Shared() {
			err = f.SyncFailed(c.v.disk.Fsync(f.FD)) // before other hosts have the lease
		}
		c.v.lists.regroup(f)
		return true, err
	}
	fd, err := c.openFor(unix.O_RDWR)
	if err != nil {
		return false, err
	}
	defer c.v.disk.Close(fd)
	if c.v.Shared() {
		if err := leaseFD(ctx, c.v, fd, disk.Alone); err != nil {
			return false, err
		}
		defer c.v.disk.OFDLock(fd, leaseLock(disk.None))
		if c.v.disk.Remote {
			c.v.disk.ForgetPages(fd, 0, 0)
		}
	}
	hdr, raw, err := c.readOwn(fd)
	if err != nil || !still(hdr) {
		return false, err
	}
	_, err = cfile.Head{Disk: &c.v.disk, FD: fd, Raw: raw, Header: hdr, Calm: c.v.calm}.SetRecipients(rs)
	if err == nil && c.v.Shared() {
		if err = c.v.disk.Fsync(fd); err != nil {
			err = cfile.SyncFailure(err)
		}
	}
	if _, ok := errors.AsType[cfile.SyncError](err); ok {
		c.v.doubts.begin(c.n)
		c.v.doubts.leave(c.n)
	}
	return true, err
}
