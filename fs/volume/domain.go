package volume

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// domain is a list of recipients, with what is known of their keys: the volume's own list, or that of
// directories. The files of a domain can be used, or none of them can. A file is of the domain whose
// recipients open it, wherever it lies; a new file is of the domain of its directory.
type domain struct {
	v       *Volume
	ring    *keystore.Ring
	refusal atomic.Pointer[refusal]

	unwritten atomic.Pointer[error] // the error of writing or settling when keys were wiped last

	// Of directories only; the volume's own list stands in [listed].
	keySet
	absent error // no new file can be made: why a recipient's key is not at hand
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
	byDir map[blockcrypt.ID]*domain // of new files below a directory
	all   []*domain                 // the volume's own is the first
}

// directoryKeys is how many unwrapped keys are kept in memory for the files of a directory's domain.
const directoryKeys = 1024

// newDomains returns the lists that kmsfs.json names. What was known of a list that was there before
// is kept. stores are those of the recipients of directories whose keys are at hand.
func (v *Volume) newDomains(cfg *blockcrypt.Config, before *domains, stores []keystore.Store) *domains {
	out := &domains{byDir: map[blockcrypt.ID]*domain{}, all: []*domain{v.own}}
	if before != nil {
		for _, d := range before.all {
			stores = append(slices.Clone(stores), d.stores...)
		}
	}
	of := func(id blockcrypt.ID, rs []blockcrypt.Recipient) *domain {
		same := func(d *domain) bool { return d != v.own && urisOf(d.recipients) == urisOf(rs) }
		if i := slices.IndexFunc(out.all, same); i >= 0 {
			return out.all[i]
		}
		i := -1
		if before != nil {
			i = slices.IndexFunc(before.all, same)
		}
		if i >= 0 {
			out.all = append(out.all, before.all[i])
			return before.all[i]
		}
		d := &domain{v: v, keySet: keySet{recipients: rs}}
		for _, r := range rs {
			if s := keystore.StoreFor(stores, r.URI); s != nil {
				d.stores = append(d.stores, s)
			} else if d.absent == nil {
				d.absent = &keystore.Error{Kind: keystore.Untrusted, URI: r.URI, Op: "generate",
					Err: errors.New("the key of the directory is not at hand")}
			}
		}
		d.ring = v.newRing(d, d.stores, keystore.RingOptions{Keys: directoryKeys,
			Sample: keystore.Sample{Binding: directoryBinding(cfg.Volume, id), Wrapped: rs}})
		out.all = append(out.all, d)
		return d
	}
	for id, keys := range cfg.Directories {
		if len(keys.Recipients) > 0 {
			out.byDir[id] = of(id, keys.Recipients)
		}
		if len(keys.Former) > 0 {
			of(id, keys.Former)
		}
	}
	return out
}

// directoryBinding is that of the key which shows that a directory's recipients unwrap.
func directoryBinding(volume, dir blockcrypt.ID) keystore.Binding {
	return keystore.Binding{Use: keystore.ForDirectory, Volume: volume, ID: dir}
}

// newRing makes the ring of a domain.
func (v *Volume) newRing(d *domain, stores []keystore.Store, o keystore.RingOptions) *keystore.Ring {
	if o.Pool = v.o.Pool; v.o.ReadOnly {
		o.Pool = 0
	}
	o.MaxAge, o.Grace, o.EachKey, o.Branches = v.o.MaxAge, v.o.Grace, v.o.FileLease, branches(v.cfg)
	o.Report = func(err error) {
		v.report("pool", "a data key could not be made ahead, or not for all recipients", err)
	}
	o.Changed, o.Reach = d.changed, v.access.reached
	return keystore.NewRing(v.cfg.Volume, stores, o)
}

// domains returns the lists as they are now.
func (v *Volume) domains() *domains { return v.recipients.now.Load().domains }

// domainOf returns the domain of a file with this header.
func (v *Volume) domainOf(h *blockcrypt.Header) *domain {
	all := v.domains().all
	if len(all) == 1 {
		return v.own
	}
	for _, d := range all {
		if d.ring.Opens(h.Recipients) {
			return d
		}
	}
	for _, d := range all { // whose key is not at hand
		if d != v.own && slices.ContainsFunc(h.Recipients, func(x blockcrypt.Recipient) bool { return d.at(x.URI) >= 0 }) {
			return d
		}
	}
	return v.own
}

// domain returns the domain of new files in a directory.
func (n *Node) domain() (*domain, error) {
	v := n.v
	byDir := v.domains().byDir
	if len(byDir) == 0 {
		return v.own, nil
	}
	for n != v.root {
		id, ok, err := n.dirIdent(false)
		if err != nil {
			return nil, err
		}
		if d := byDir[id]; ok && d != nil {
			return d, nil
		}
		at, ok := n.place()
		if !ok {
			return nil, unix.ENOENT // removed
		}
		n = at.dir
	}
	return v.own, nil
}

// target returns the domain that new content of the file belongs to: that of its directory.
func (c *content) target() (*domain, error) {
	if at, ok := c.n.place(); ok {
		return at.dir.domain()
	}
	d := c.unnamed.Load()
	if f := c.file.Load(); d == nil && f != nil { // it was removed
		d = f.domain.Load()
	}
	if d != nil && slices.Contains(c.v.domains().all, d) {
		return d, nil
	}
	return c.v.own, nil
}

// mayMove returns EXDEV if a file or a directory must not move from its place to another directory,
// since new content there is for other recipients: then programs copy it. The entries of both
// directories are held.
func (ns *namespace) mayMove(from location, to *Node) error {
	byDir := ns.v.domains().byDir
	if from.dir == to || len(byDir) == 0 {
		return nil
	}
	n, _, err := ns.lookup(from.dir, from.cname)
	if err != nil {
		return err
	}
	defer ns.v.Forget(n.id, 1)
	if n.IsDir() {
		id, ok, err := n.dirIdent(false)
		if err != nil || ok && byDir[id] != nil {
			return err // its keys go with it
		}
	} else if !n.IsFile() {
		return nil
	}
	d, err := from.dir.domain()
	if err != nil {
		return err
	}
	return to.isOf(d)
}

// mayLink is mayMove for a further name of a file.
func (n *Node) mayLink(to *Node) error {
	if !n.IsFile() || len(n.v.domains().byDir) == 0 {
		return nil
	}
	d, err := n.target()
	if err != nil {
		return err
	}
	return to.isOf(d)
}

// isOf returns EXDEV if the new files of a directory are of another domain.
func (n *Node) isOf(d *domain) error {
	own, err := n.domain()
	if err == nil && own != d {
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
	d, err := f.n.target()
	return (err != nil || d == k.domain) && k.domain.ring.Current(k.DataKey)
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
func (n *Node) newKeyIn(ctx context.Context) (*freshKey, error) {
	d, err := n.domain()
	if err != nil {
		return nil, err
	}
	return d.newKey(ctx)
}

// newKey is [domain.newKey] for new content of the file.
func (c *content) newKey(ctx context.Context) (*freshKey, error) {
	d, err := c.target()
	if err != nil {
		return nil, err
	}
	return d.newKey(ctx)
}

// takes makes a key that of the new content of a file, or takes it back, if that is nil. f.mu is held.
func (f *file) takes(k *freshKey) {
	if f.next = k; k != nil && f.Header == nil {
		f.domain.Store(k.domain)
	}
}

// unlockNow is [keystore.Ring.UnlockNow] of the domain.
func (d *domain) unlockNow(h *blockcrypt.Header) (keys *blockcrypt.FileKeys, known bool, err error) {
	keys, known, err = d.ring.UnlockNow(h)
	return keys, known, d.named(err)
}

// unlock is [keystore.Ring.Unlock] of the domain.
func (d *domain) unlock(ctx context.Context, h *blockcrypt.Header) (*blockcrypt.FileKeys, error) {
	keys, err := d.ring.Unlock(ctx, h)
	return keys, d.named(err)
}

// named returns the error that says which key is not at hand, where nobody's key was.
func (d *domain) named(err error) error {
	if d.absent != nil && keystore.KindOf(err) == keystore.Untrusted {
		return d.absent
	}
	return err
}
