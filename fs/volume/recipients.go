package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/keystore"
)

// Faults of a change of the recipients.
var (
	ErrNoRoom        = cfile.ErrNoRoom
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
	mu     sync.Mutex
	cfg    *blockcrypt.Config
	stores []keystore.Store
}

// Recipients gives access to the recipients of the volume.
func (v *Volume) Recipients() *Recipients { return &v.recipients }

// List returns the URIs, in the order in which new files have them: the first makes their keys.
func (r *Recipients) List() (out []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range r.cfg.Recipients {
		out = append(out, x.URI)
	}
	return out
}

// at returns the place in the list of the recipient that a store serves, -1 if there is none. mu is
// held.
func (r *Recipients) at(s keystore.Store) int {
	return slices.IndexFunc(r.cfg.Recipients, func(x blockcrypt.ConfigRecipient) bool { return keystore.Serves(s, x.URI) })
}

// Add makes a store a recipient: new files are wrapped for it from then on, others by
// [Recipients.Rewrap]. It returns what the trust record should say.
func (r *Recipients) Add(ctx context.Context, s keystore.Store) (*Record, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at(s) >= 0 {
		return nil, fmt.Errorf("%s: %w", s.URI(), ErrRecipient)
	}
	v := r.v
	b := keystore.Binding{Use: keystore.ForVolume, Volume: v.cfg.Volume}
	key, err := keystore.UnwrapFirst(ctx, r.stores, b, wrapped(r.cfg.List()))
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
	rs := append(slices.Clone(r.cfg.Recipients), blockcrypt.ConfigRecipient{URI: w.URI, Branch: w.Branch, Wrapped: w.Blob})
	return r.change(rs, append(slices.Clone(r.stores), s))
}

// Entries returns the list as kmsfs.json has it.
func (r *Recipients) Entries() []blockcrypt.Recipient {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cfg.List()
}

// Attach gives the volume the store of a recipient that it has already, whose key was not at hand.
func (r *Recipients) Attach(s keystore.Store) (*Record, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at(s) < 0 {
		return nil, fmt.Errorf("%s: %w", s.URI(), ErrNotRecipient)
	}
	if !slices.ContainsFunc(r.stores, func(x keystore.Store) bool { return x.URI() == s.URI() }) {
		r.stores = append(slices.Clone(r.stores), s)
		r.v.ring.SetStores(r.stores)
	}
	return record(r.cfg, r.v.vk), nil
}

// Remove takes a recipient out of the list: new files are not wrapped for it any more.
// [Recipients.Rewrap] takes it out of the others. It refuses if a file has no other one.
func (r *Recipients) Remove(ctx context.Context, uri string) (*Record, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.cfg.Recipients, func(x blockcrypt.ConfigRecipient) bool { return x.URI == uri })
	if i < 0 {
		return nil, fmt.Errorf("%s: %w", uri, ErrNotRecipient)
	}
	stores := slices.DeleteFunc(slices.Clone(r.stores), func(s keystore.Store) bool { return keystore.Serves(s, uri) })
	if !slices.ContainsFunc(stores, func(s keystore.Store) bool { return !keystore.OnlySeals(s) }) {
		return nil, fmt.Errorf("%s: %w", uri, ErrLastRecipient)
	}
	rs := slices.Delete(slices.Clone(r.cfg.Recipients), i, i+1)
	only := &OnlyRecipientError{}
	var unread error
	err := headersBelow(ctx, &r.v.disk, r.v.rootD, func(e Inventoried) {
		if e.Err != nil && blockcrypt.ClassOf(e.Err) == "" { // it may have no other
			unread = fmt.Errorf("%s: %w", e.Path, e.Err)
		}
		if e.Header != nil && !slices.ContainsFunc(e.Header.Recipients, func(x blockcrypt.Recipient) bool { return among(rs, stores, x.URI) >= 0 }) {
			if only.Files++; only.First == "" {
				only.First = e.Path
			}
		}
	})
	if err = errors.Join(err, unread); err != nil {
		return nil, err
	}
	if only.Files > 0 {
		return nil, only
	}
	// The headers that were read need not be on the disk yet.
	if err := r.v.syncAll(); err != nil {
		return nil, err
	}
	return r.change(rs, stores)
}

// SetFirst makes a recipient the first: the one that makes new keys, if its service does that.
func (r *Recipients) SetFirst(uri string) (*Record, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.cfg.Recipients, func(x blockcrypt.ConfigRecipient) bool { return x.URI == uri })
	if i < 0 {
		return nil, fmt.Errorf("%s: %w", uri, ErrNotRecipient)
	}
	first := r.cfg.Recipients[i]
	rs := append([]blockcrypt.ConfigRecipient{first}, slices.Delete(slices.Clone(r.cfg.Recipients), i, i+1)...)
	stores := slices.Clone(r.stores)
	slices.SortStableFunc(stores, func(a, b keystore.Store) int { return place(rs, a) - place(rs, b) })
	return r.change(rs, stores)
}

// place returns the place in the list of the recipient that a store serves; the last if none.
func place(rs []blockcrypt.ConfigRecipient, s keystore.Store) int {
	for i, x := range rs {
		if keystore.Serves(s, x.URI) {
			return i
		}
	}
	return len(rs)
}

// among returns which of the recipients of a volume a URI is, -1 if it is none: the same one, or a
// replica of it.
func among(rs []blockcrypt.ConfigRecipient, stores []keystore.Store, uri string) int {
	if i := slices.IndexFunc(rs, func(x blockcrypt.ConfigRecipient) bool { return x.URI == uri }); i >= 0 {
		return i
	}
	s := keystore.StoreFor(stores, uri)
	if s == nil {
		return -1
	}
	return slices.IndexFunc(rs, func(x blockcrypt.ConfigRecipient) bool { return keystore.Serves(s, x.URI) })
}

// change replaces kmsfs.json, durably, and then uses what it says. mu is held.
func (r *Recipients) change(rs []blockcrypt.ConfigRecipient, stores []keystore.Store) (*Record, error) {
	v := r.v
	if v.o.ReadOnly {
		return nil, unix.EROFS
	}
	next := *r.cfg
	next.Recipients = rs
	next.Generation++
	if n := blockcrypt.RecipientsFit(inFiles(&next)); n == 0 || n > next.Header {
		return nil, fmt.Errorf("%w: files of this volume have one of %d bytes", ErrNoRoom, next.Header)
	}
	b, err := next.Encode(v.vk)
	if err != nil {
		return nil, err
	}
	if err := v.disk.Replace(v.rootD, blockcrypt.ConfigName, b); err != nil {
		return nil, err
	}
	r.cfg, r.stores = &next, stores
	v.ring.SetStores(stores)
	return record(&next, v.vk), nil
}

// snapshot returns the recipients and their stores as they are now.
func (r *Recipients) snapshot() ([]blockcrypt.ConfigRecipient, []keystore.Store) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cfg.Recipients, r.stores
}
