//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// Faults of a change of the recipients.
var (
	ErrNoRoom        = cfile.ErrNoRoom
	ErrSameRecipient = errors.New("both are the same recipient")
	ErrChanged       = errors.New("the recipients of the volume were changed meanwhile; call it again")
	ErrRecipient     = errors.New("it is a recipient of the volume already")
	ErrNotRecipient  = errors.New("it is no recipient of the volume")
	ErrLastRecipient = errors.New("it is the last recipient that can open the volume from here")
)

// OnlyRecipientError says that files have no other recipient than one that is to be removed.
type OnlyRecipientError struct {
	Files int64
	First string // path of one, below the volume
}

func (e *OnlyRecipientError) Error() string {
	return fmt.Sprintf("%d files have no other recipient of the volume, such as %s", e.Files, e.First)
}

// Recipients are the keys under which the volume's key and those of its files are wrapped. Their
// list stands in kmsfs.json, which the volume key authenticates.
type Recipients struct {
	v *Volume

	// mu is held across a change, with its syscalls and calls to key services. No request waits
	// for it.
	mu  sync.Mutex
	now atomic.Pointer[listed] // written under mu

	// stable is held for reading while a file is given recipients of cfg, for writing while it is
	// made sure that no file needs one that goes.
	stable sync.RWMutex
}

// listed is a list of recipients, with a store for each whose key is at hand. It is replaced, and never
// changed.
type listed struct {
	cfg     *blockcrypt.Config
	stores  []keystore.Store // of the volume's recipients
	domains *domains
}

// set returns the recipients of a domain.
func (l *listed) set(d *domain) keySet {
	if d == d.v.lists.own {
		return keySet{l.cfg.Recipients, l.stores}
	}
	return d.keySet
}

// Recipients gives access to the recipients of the volume.
func (v *Volume) Recipients() *Recipients { return &v.recipients }

// List returns the URIs, in the order in which new files have them: the first makes their keys.
func (r *Recipients) List() (out []string) {
	for _, x := range r.now.Load().cfg.Recipients {
		out = append(out, x.URI)
	}
	return out
}

// at returns the place in the list of the recipient that a store serves, -1 if there is none. mu is
// held.
func (r *Recipients) at(s keystore.Store) int {
	return slices.IndexFunc(r.now.Load().cfg.Recipients,
		func(x blockcrypt.Recipient) bool { return keystore.Serves(s, x.URI) })
}

// Add makes a store a recipient: new files are wrapped for it from then on, others by
// [Recipients.Rewrap]. It returns what the trust record should say.
func (r *Recipients) Add(ctx context.Context, s keystore.Store) (*Record, error) {
	unlock, err := r.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if r.at(s) >= 0 {
		return nil, fmt.Errorf("%s: %w", s.URI(), ErrRecipient)
	}
	v := r.v
	b := keystore.Binding{Use: keystore.ForVolume, Volume: v.cfg.Volume}
	// First by keys that are at hand: of a recovery nobody else is asked.
	ws := slices.Clone(r.now.Load().cfg.Recipients)
	slices.SortStableFunc(ws, func(x, y blockcrypt.Recipient) int { return r.rank(x) - r.rank(y) })
	key, err := keystore.UnwrapFirst(ctx,
		slices.DeleteFunc(slices.Clone(r.now.Load().stores), keystore.OnlySeals), b, ws)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	vk, err := blockcrypt.NewVolumeKeys(key, v.cfg.Volume)
	if err != nil {
		return nil, err
	}
	if vk.Commitment() != v.vk.Commitment() {
		return nil, ErrOtherKey
	}
	w, err := s.Wrap(ctx, b, key)
	if err != nil {
		return nil, err
	}
	rs := append(slices.Clone(r.now.Load().cfg.Recipients), w)
	return r.change(rs, append(slices.Clone(r.now.Load().stores), s))
}

// rank is 0 for a recipient whose store waits for nobody. mu is held.
func (r *Recipients) rank(w blockcrypt.Recipient) int {
	if _, ok := keystore.StoreFor(r.now.Load().stores, w.URI).(keystore.Immediate); ok {
		return 0
	}
	return 1
}

// Entries returns the list as kmsfs.json has it.
func (r *Recipients) Entries() []blockcrypt.Recipient {
	return r.now.Load().cfg.Recipients
}

// Attach gives the volume the store of a recipient that it has already, whose key was not at hand.
func (r *Recipients) Attach(s keystore.Store) (*Record, error) {
	unlock, err := r.lock(context.Background())
	if err != nil {
		return nil, err
	}
	defer unlock()
	if r.at(s) < 0 {
		return nil, fmt.Errorf("%s: %w", s.URI(), ErrNotRecipient)
	}
	if !slices.ContainsFunc(r.now.Load().stores,
		func(x keystore.Store) bool { return x.URI() == s.URI() }) {
		now := *r.now.Load()
		now.stores = append(slices.Clone(now.stores), s)
		r.now.Store(&now)
		r.v.lists.own.ring.SetStores(now.stores, r.sample())
	}
	return record(r.now.Load().cfg, r.v.vk), nil
}

// Remove takes a recipient out of the list: new files are not wrapped for it any more.
// [Recipients.Rewrap] takes it out of the others. It refuses if a file has no other one by which it
// can be opened here.
func (r *Recipients) Remove(ctx context.Context, uri string) (rec *Record, err error) {
	unlock, err := r.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := r.v.peers.settled(ctx, r.generation()); err != nil {
		return nil, err
	}
	i := slices.IndexFunc(r.now.Load().cfg.Recipients,
		func(x blockcrypt.Recipient) bool { return x.URI == uri })
	if i < 0 {
		return nil, fmt.Errorf("%s: %w", uri, ErrNotRecipient)
	}
	stores := slices.DeleteFunc(slices.Clone(r.now.Load().stores),
		func(s keystore.Store) bool { return keystore.Serves(s, uri) })
	if !slices.ContainsFunc(stores, func(s keystore.Store) bool { return !keystore.OnlySeals(s) }) {
		return nil, fmt.Errorf("%s: %w", uri, ErrLastRecipient)
	}
	r.stable.Lock()
	defer r.stable.Unlock()
	// From here on no file is made for this one; those that are being made are waited for.
	if s := keystore.StoreFor(r.now.Load().stores, uri); s != nil {
		r.v.lists.own.ring.Retire(s)
	}
	defer func() {
		if err != nil {
			r.v.lists.own.ring.SetStores(r.now.Load().stores, r.sample())
		}
	}()
	rs := slices.Delete(slices.Clone(r.now.Load().cfg.Recipients), i, i+1)
	sets := []keySet{{rs, stores}}
	for _, d := range r.now.Load().domains.all {
		if d != r.v.lists.own {
			sets = append(sets, d.keySet)
		}
	}
	goes := func(x blockcrypt.Recipient) bool {
		s := keystore.StoreFor(r.now.Load().stores, uri)
		return x.URI == uri || s != nil && keystore.Serves(s, x.URI)
	}
	if err := r.allOpen(ctx, goes, sets); err != nil {
		return nil, err
	}
	// The headers that were read need not be on the disk yet.
	if err := r.v.syncAll(); err != nil {
		return nil, err
	}
	return r.change(rs, stores)
}

// scanTries is how often all files are looked at again while names are moved.
const scanTries = 10

// allOpen returns an [OnlyRecipientError] if a file has a recipient that goes, and none that is of one
// of these lists and unwraps here. mu is held.
func (r *Recipients) allOpen(ctx context.Context, goes func(blockcrypt.Recipient) bool, sets []keySet) error {
	found, err := r.all(ctx, func(h *blockcrypt.Header) bool {
		return !slices.ContainsFunc(h.Recipients, goes) ||
			slices.ContainsFunc(sets, func(k keySet) bool { return k.opens(h.Recipients) })
	})
	if err == nil && found.Files > 0 {
		return &found
	}
	return err
}

// all counts the files whose headers, as they are on the disk and in memory, are not good. mu is held.
func (r *Recipients) all(ctx context.Context,
	good func(h *blockcrypt.Header) bool) (none OnlyRecipientError, err error) {
	for range scanTries {
		moves := r.v.renames.Load()
		var only OnlyRecipientError
		count := func(at string, h *blockcrypt.Header) {
			if h != nil && !good(h) {
				if only.Files++; only.First == "" {
					only.First = at
				}
			}
		}
		// Open files too: one without a name is found in no directory. A call that
		// writes a first header now has the file's lock.
		for _, f := range r.v.nodes.files() {
			f.mu.Lock()
			named := f.n.named()
			h := f.Header
			f.unlock()
			if !named {
				count(f.n.where(), h)
			}
		}
		var unread error
		for _, n := range r.v.nodes.all() { // without a name, and open by O_PATH alone, or about to get one
			if n.IsFile() && n.file.Load() == nil && !n.named() {
				if h, err := n.header(); err == nil {
					count(n.where(), h)
				}
			}
		}
		err := headersBelow(ctx, &r.v.disk, r.v.rootD, r.v.plain, func(e Inventoried) {
			if errors.Is(e.Err, unix.EACCES) { // its mode does not let its own owner
				e.Header, e.Err = r.v.headerAt(e.Path)
			}
			if e.Err != nil && blockcrypt.ClassOf(e.Err) == "" { // it may have no other
				unread = fmt.Errorf("%s: %w", e.Path, e.Err)
			}
			count(e.Path, e.Header)
		})
		if err = errors.Join(err, unread); err != nil {
			return none, err
		}
		if only.Files > 0 || r.v.renames.Load() == moves {
			return only, nil
		}
	}
	return none, errors.New("names are moved all the time, so not all files can be looked at; try again later")
}

// sample is the volume key as the recipients have it. mu is held.
func (r *Recipients) sample() keystore.Sample {
	cfg := r.now.Load().cfg
	return keystore.SampleOfVolume(cfg.Volume, cfg.Recipients)
}

// SetFirst makes a recipient the first: the one that makes new keys, if its service does that.
func (r *Recipients) SetFirst(uri string) (*Record, error) {
	unlock, err := r.lock(context.Background())
	if err != nil {
		return nil, err
	}
	defer unlock()
	i := slices.IndexFunc(r.now.Load().cfg.Recipients,
		func(x blockcrypt.Recipient) bool { return x.URI == uri })
	if i < 0 {
		return nil, fmt.Errorf("%s: %w", uri, ErrNotRecipient)
	}
	first := r.now.Load().cfg.Recipients[i]
	rs := append([]blockcrypt.Recipient{first},
		slices.Delete(slices.Clone(r.now.Load().cfg.Recipients), i, i+1)...)
	stores := slices.Clone(r.now.Load().stores)
	slices.SortStableFunc(stores, func(a, b keystore.Store) int { return place(rs, a) - place(rs, b) })
	return r.change(rs, stores)
}

// place returns the place in the list of the recipient that a store serves; the last if none.
func place(rs []blockcrypt.Recipient, s keystore.Store) int {
	for i, x := range rs {
		if keystore.Serves(s, x.URI) {
			return i
		}
	}
	return len(rs)
}

// change replaces the list of recipients. mu is held.
func (r *Recipients) change(rs []blockcrypt.Recipient, stores []keystore.Store) (*Record, error) {
	next := *r.now.Load().cfg
	next.Recipients = rs
	return r.replace(next, stores, nil)
}

// replace replaces kmsfs.json, durably, and then uses what it says; ofDirectories are stores of new
// recipients of directories. mu is held.
func (r *Recipients) replace(next blockcrypt.Config, stores, ofDirectories []keystore.Store) (*Record, error) {
	v := r.v
	if v.o.ReadOnly {
		return nil, unix.EROFS
	}
	next.Generation++
	lists := [][]blockcrypt.Recipient{next.Recipients}
	for _, keys := range next.Directories {
		if len(keys.Recipients) > 0 {
			lists = append(lists, keys.Recipients)
		}
	}
	if many(next.Directories) {
		return nil, ErrManyLists
	}
	for _, list := range lists {
		if n := blockcrypt.RecipientsFit(inFiles(list, next.Branch != nil)); n == 0 || n > next.Header {
			return nil, fmt.Errorf("%w: files of this volume have one of %d bytes", ErrNoRoom, next.Header)
		}
	}
	sizes, err := layout.SizesOf(&next)
	if err != nil {
		return nil, err
	}
	b, err := next.Encode(v.vk)
	if err != nil {
		return nil, err
	}
	err = v.disk.Replace(v.rootD, blockcrypt.ConfigName, b)
	if err != nil {
		// It may have been replaced all the same, and not be durable.
		if now, rerr := layout.ReadConfig(&v.disk, v.rootD); rerr != nil ||
			now.Generation != next.Generation {
			return nil, err
		}
	}
	r.adopt(&next, sizes, stores, ofDirectories)
	return record(&next, v.vk), err
}

// adopt uses what kmsfs.json says by now. mu is held.
func (r *Recipients) adopt(next *blockcrypt.Config, sizes layout.Sizes, stores, ofDirectories []keystore.Store) {
	v := r.v
	before := r.now.Load()
	v.access.mu.Lock() // a ring that is made now is suspended with the others
	r.now.Store(&listed{next, stores, v.lists.renewed(next, before.domains, ofDirectories)})
	v.access.mu.Unlock()
	v.headers.Store(&sizes)
	if sameList := urisOf(before.cfg.Recipients) == urisOf(next.Recipients); !sameList {
		v.lists.own.ring.SetStores(stores, r.sample())
	}
	r.regroup(before.domains)
	v.prefetch.start(v)
	v.access.renewKeys()
}

// lock takes mu. In a shared volume it keeps other hosts from changing kmsfs.json, and takes over
// their changes first.
func (r *Recipients) lock(ctx context.Context) (unlock func(), err error) {
	r.mu.Lock()
	if err = ctx.Err(); err != nil { // the caller went away while it waited
		r.mu.Unlock()
		return nil, err
	}
	if !r.v.peers.on() {
		return r.mu.Unlock, nil
	}
	l := disk.Lock{Kind: disk.Alone, At: layout.ConfigByte, N: 1}
	if err = r.v.locks.take(l, disk.Lock{}); err == nil {
		if err = r.takeOver(ctx); err == nil {
			return func() {
				r.v.locks.give(l)
				r.mu.Unlock()
			}, nil
		}
		r.v.locks.give(l)
	}
	r.mu.Unlock()
	return nil, err
}

// follow takes over a kmsfs.json that another host has replaced, and returns the generation that this
// host uses then.
func (r *Recipients) follow(ctx context.Context) (generation uint64) {
	if r.mu.TryLock() { // else a change of this host is under way
		defer r.mu.Unlock()
		if err := r.takeOver(ctx); err != nil {
			r.v.report(blockcrypt.ConfigName, "what another host has changed of the recipients cannot be used here", err)
		}
	}
	return r.generation()
}

// takeOver is follow; mu is held. Without the key of a recipient the old list stays.
func (r *Recipients) takeOver(ctx context.Context) error {
	v := r.v
	next, err := layout.ReadConfig(&v.disk, v.rootD)
	if err != nil {
		return err
	}
	now := r.now.Load()
	if next.Generation <= now.cfg.Generation {
		return nil
	}
	if err := next.Verify(v.vk); err != nil {
		return err
	}
	sizes, err := layout.SizesOf(next)
	if err != nil {
		return err
	}
	var stores, ofDirectories []keystore.Store
	for _, x := range next.Recipients {
		s, err := r.store(ctx, x, now.stores)
		if err != nil {
			return fmt.Errorf("cannot write for the recipient %s: %w", x.URI, err)
		}
		if !slices.ContainsFunc(stores, func(o keystore.Store) bool { return o.URI() == s.URI() }) {
			stores = append(stores, s)
		}
	}
	for _, keys := range next.Directories {
		for _, x := range slices.Concat(keys.Recipients, keys.Former) {
			if s, err := r.store(ctx, x, nil); err == nil { // without one the rest of the volume can be used
				ofDirectories = append(ofDirectories, s)
			}
		}
	}
	r.adopt(next, sizes, stores, ofDirectories)
	v.log.Info("another host has changed the recipients", "generation", next.Generation)
	return nil
}

// store returns the store of a recipient, one of those or another whose key is at hand.
func (r *Recipients) store(ctx context.Context, x blockcrypt.Recipient, stores []keystore.Store) (keystore.Store, error) {
	if s := keystore.StoreFor(stores, x.URI); s != nil {
		return s, nil
	}
	if r.v.o.Stores == nil {
		return nil, errors.New("its key is not at hand")
	}
	return r.v.o.Stores(ctx, x)
}

// regroup gives open files the domains of the present lists, and ends the use of those that are of no
// list any more. mu is held.
func (r *Recipients) regroup(before *domains) {
	v := r.v
	now := v.lists.now()
	if len(before.all) == 1 && len(now.all) == 1 {
		return
	}
	for _, d := range now.all[1:] { // no key is made for former recipients
		if !now.active(d) && !d.retired {
			for _, s := range d.stores {
				d.ring.Retire(s)
			}
			d.retired = true
		}
	}
	for _, f := range v.nodes.files() {
		f.mu.Lock()
		v.lists.regroup(f)
		f.unlock()
		v.access.dropIfRefused(f)
	}
	for _, d := range now.dropped[len(before.dropped):] {
		d.ring.Drop()
	}
}

// generation returns that of the list.
func (r *Recipients) generation() uint64 { return r.now.Load().cfg.Generation }
