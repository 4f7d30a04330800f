//go:build linux && !portable

package volume

import (
	"context"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// domain is a list of recipients, with their keys as far as they are known: the volume's own list, or
// that of directories. The files of a domain can be used, or none of them can. A file is of the domain whose
// recipients open it, wherever it lies; a new file is of the domain of its directory.
type domain struct {
	v       *Volume
	ring    *keystore.Ring
	refusal atomic.Pointer[refusal]

	// Of directories only; the volume's own list stands in [listed].
	keySet
	absent error           // no new file can be made: why a recipient's key is not at hand
	sample keystore.Sample // what its probes unwrap

	retired bool // only of former recipients: no key is made; guarded by Recipients.mu
}

// keySet is a list of recipients, with the stores of those whose keys are at hand.
type keySet struct {
	recipients []blockcrypt.Recipient
	stores     []keystore.Store
}

// at returns which of the recipients a URI is, -1 if it is none: the same one, or a replica of it.
func (k keySet) at(uri string) int {
	if i := slices.IndexFunc(k.recipients, func(x blockcrypt.Recipient) bool { return x.URI == uri }); i >= 0 {
		return i
	}
	s := keystore.StoreFor(k.stores, uri)
	if s == nil {
		return -1
	}
	return slices.IndexFunc(k.recipients, func(x blockcrypt.Recipient) bool { return keystore.Serves(s, x.URI) })
}

// opens reports whether one of these recipients unwraps here, and is of the list.
func (k keySet) opens(ws []blockcrypt.Recipient) bool {
	return slices.ContainsFunc(ws, func(x blockcrypt.Recipient) bool {
		s := keystore.StoreFor(k.stores, x.URI)
		return s != nil && !keystore.OnlySeals(s) && k.at(x.URI) >= 0
	})
}

// urisOf joins the URIs of a list.
func urisOf(rs []blockcrypt.Recipient) string {
	var out []string
	for _, r := range rs {
		out = append(out, r.URI)
	}
	return strings.Join(out, " ")
}

// domains are the lists of recipients of a volume. They are replaced, and never changed.
type domains struct {
	byDir   map[blockcrypt.ID]*domain // of new files below a directory
	all     []*domain                 // in a fixed order, the volume's own first
	dropped []*domain                 // that are of no list any more; they are closed with the volume
}

// active reports whether new files belong to a domain.
func (ds *domains) active(d *domain) bool {
	for _, x := range ds.byDir {
		if x == d {
			return true
		}
	}
	return d == d.v.lists.own
}

// directoryBinding is that of the key which shows that a directory's recipients unwrap.
func directoryBinding(volume, dir blockcrypt.ID) keystore.Binding {
	return keystore.Binding{Use: keystore.ForDirectory, Volume: volume, ID: dir}
}

// lists gives a volume's lists of recipients, and the domain of each file.
type lists struct {
	v   *Volume
	own *domain // of the volume's own recipients
}

// now returns the lists as they are now.
func (l *lists) now() *domains { return l.v.recipients.now.Load().domains }

// allOf returns the domains whose recipients a header has, in the order in which they are asked: first
// those with a key at hand that is not known to be lost; of these, those with most of the header's
// recipients; then those with the shortest list. There is one at least.
func (l *lists) allOf(h *blockcrypt.Header) []*domain {
	all := l.now().all
	if len(all) == 1 {
		return all
	}
	type scored struct {
		d     *domain
		score int
	}
	const more = 2 * blockcrypt.MaxHeader // than a header has recipients
	now := l.v.recipients.now.Load()
	var found []scored
	for _, d := range all {
		k, has := now.set(d), 0
		for _, x := range h.Recipients {
			if k.at(x.URI) >= 0 {
				has++
			}
		}
		if has == 0 {
			continue
		}
		score := has*more - len(k.recipients)
		if d.ring.Good(h.Recipients) {
			score += more * more
		}
		found = append(found, scored{d, score})
	}
	slices.SortStableFunc(found, func(a, b scored) int { return b.score - a.score })
	var out []*domain
	for _, x := range found {
		out = append(out, x.d)
	}
	if len(out) == 0 {
		return all[:1]
	}
	return out
}

// of returns the first of allOf.
func (l *lists) of(h *blockcrypt.Header) *domain { return l.allOf(h)[0] }

// chain returns the IDs of a directory and of those above it, without the root's.
func (d *directory) chain() (ids []blockcrypt.ID, err error) {
	n := d.n
	for n != n.v.root {
		id, ok, err := n.dirIdent(false)
		if err != nil {
			return nil, err
		}
		if ok {
			ids = append(ids, id)
		}
		at, ok := n.place()
		if !ok {
			return nil, unix.ENOENT // removed
		}
		n = at.dir
	}
	return ids, nil
}

// below returns the domain of new files below these directories, of which the first is the nearest.
func (ds *domains) below(own *domain, ids []blockcrypt.ID) *domain {
	for _, id := range ids {
		if d := ds.byDir[id]; d != nil {
			return d
		}
	}
	return own
}

// domain returns the domain of new files in a directory.
func (d *directory) domain() (*domain, error) {
	ds := d.v.lists.now()
	if len(ds.byDir) == 0 {
		return d.v.lists.own, nil
	}
	ids, err := d.chain()
	if err != nil {
		return nil, err
	}
	return ds.below(d.v.lists.own, ids), nil
}

// target returns the domain that new content of the file belongs to: that of its directory, or, if it
// has no name, of the one in which it was.
func (l *lists) target(c *content) (*domain, error) {
	ds := l.now()
	if at, ok := c.n.place(); ok && len(ds.byDir) > 0 {
		ids, err := at.dir.chain()
		if err != nil {
			return nil, err
		}
		c.dirs.Store(&ids)
	}
	if ids := c.dirs.Load(); ids != nil {
		return ds.below(l.own, *ids), nil
	}
	return l.own, nil
}

// mayMove returns EXDEV if a file or a directory must not move from its place to another directory,
// since new content there is for other recipients: then programs copy it. The entries of both
// directories are held.
func (n *Node) mayMove(from, to *Node) error {
	byDir := n.v.lists.now().byDir
	if n.IsDir() {
		id, ok, err := n.dirIdent(false)
		if err != nil || ok && byDir[id] != nil {
			return err // its keys go with it
		}
	} else if !n.IsFile() {
		return nil
	}
	d, err := from.domain()
	if err != nil {
		return err
	}
	return to.isOf(d)
}

// mayLink is mayMove for a further name of a file.
func (n *Node) mayLink(to *Node) error {
	if !n.IsFile() || len(n.v.lists.now().byDir) == 0 {
		return nil
	}
	d, err := n.v.lists.target(&n.content)
	if err != nil {
		return err
	}
	return to.isOf(d)
}

// isOf returns EXDEV if the new files of a directory are of another domain.
func (d *directory) isOf(of *domain) error {
	own, err := d.domain()
	if err == nil && own != of {
		err = unix.EXDEV
	}
	return err
}

// freshKey is a data key for new content, and the domain for whose recipients it is wrapped.
type freshKey struct {
	*keystore.DataKey
	domain *domain
}

// putBack returns a key under which nothing was written.
func (k *freshKey) putBack() { k.domain.ring.PutBack(k.DataKey) }

// current reports whether the key is wrapped for just the recipients that new content of the file has
// now.
func (k *freshKey) current(f *file) bool {
	d, err := f.v.lists.target(&f.n.content)
	return err == nil && d == k.domain && k.domain.ring.Current(k.DataKey)
}

// keep gives the file another domain only if its own is of no list any more. f.mu is held.
func (l *lists) keep(f *file) {
	if f.Header == nil || !slices.Contains(l.now().all, f.domain.Load()) {
		l.regroup(f)
	}
}

// regroup gives the file its domain, by the present lists. f.mu is held.
func (l *lists) regroup(f *file) {
	d := f.domain.Load()
	if f.Header != nil {
		d = l.of(f.Header)
	} else if t, err := l.target(&f.n.content); err == nil {
		d = t
	}
	f.domain.Store(d)
}

// regrouped gives the file the domain of another of its keys if that of d may not be used. It reports
// whether there is one, or the file has it by now. No lock is held.
func (l *lists) regrouped(f *file, d *domain) bool {
	if len(l.now().all) > 1 && f.domain.Load() == d {
		f.mu.Lock()
		l.regroup(f)
		f.unlock()
	}
	return f.domain.Load() != d
}

// newKey returns a data key for a new file of a domain, and tells if it waits for a key service.
func (d *domain) newKey(ctx context.Context) (*freshKey, error) {
	if d.absent != nil {
		return nil, d.absent
	}
	key, ok, err := d.ring.NewKeyNow()
	if !ok {
		waitsOf(ctx).ForKey()
		key, err = d.ring.NewKey(ctx)
	}
	if err != nil {
		return nil, err
	}
	return &freshKey{key, d}, nil
}

// newKeyIn is [domain.newKey] for a new file in a directory.
func (d *directory) newKeyIn(ctx context.Context) (*freshKey, error) {
	return d.v.lists.newKeyOf(ctx, d.domain)
}

// newKey is [domain.newKey] for new content of the file.
func (c *content) newKey(ctx context.Context) (*freshKey, error) {
	return c.v.lists.newKeyOf(ctx, func() (*domain, error) { return c.v.lists.target(c) })
}

// newKeyOf is [domain.newKey] of the domain that which returns: again if that is another one when the
// key comes, or when none comes.
func (l *lists) newKeyOf(ctx context.Context, which func() (*domain, error)) (*freshKey, error) {
	for {
		d, err := which()
		if err != nil {
			return nil, err
		}
		k, err := d.newKey(ctx)
		now, werr := which()
		if werr != nil || now == d {
			return k, err
		}
		if k != nil {
			k.putBack()
		}
	}
}

// takes makes a key that of the new content of a file, or takes it back, if that is nil. f.mu is held.
func takes(f *file, k *freshKey) {
	if f.next = k; k != nil && f.Header == nil {
		f.domain.Store(k.domain)
	}
}

// unlockNow is [keystore.Ring.UnlockNow] by the domains of a file. It returns the one that has the key.
func (l *lists) unlockNow(h *blockcrypt.Header) (keys *blockcrypt.FileKeys, d *domain, known bool, err error) {
	for _, d := range l.allOf(h) {
		keys, known, e := d.ring.UnlockNow(h)
		if !known || e == nil {
			return keys, d, known, nil
		}
		if err == nil {
			err = d.named(e)
		}
	}
	return nil, nil, true, err
}

// unlock is [keystore.Ring.Unlock] by the domains of a file: the next one where one refuses. It
// returns the one that has the key.
func (l *lists) unlock(ctx context.Context, h *blockcrypt.Header) (keys *blockcrypt.FileKeys, d *domain, err error) {
	for _, d := range l.allOf(h) {
		keys, e := d.ring.Unlock(ctx, h)
		if e == nil || keystore.KindOf(e) == keystore.Canceled {
			return keys, d, e
		}
		if err == nil {
			err = d.named(e)
		}
	}
	return nil, nil, err
}

// named returns the error that says which key is not at hand, where nobody's key was.
func (d *domain) named(err error) error {
	if d.absent != nil && keystore.KindOf(err) == keystore.Untrusted {
		return d.absent
	}
	return err
}

// waits reports whether any key is one of a service that has to be waited for.
func (l *lists) waits() bool {
	return slices.ContainsFunc(l.now().all, func(d *domain) bool { return d.ring.Waits() })
}
