//go:build linux && !portable

package volume

import (
	"errors"
	"slices"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

const (
	// directoryKeys is how many unwrapped keys are kept in memory for the files of a directory's domain.
	directoryKeys = 1024
	// MaxLists is how many different lists of recipients directories can have, with the former recipients.
	MaxLists = 1000
)

// renewed returns the lists that kmsfs.json names. A list of before goes on with its ring, unless a key
// of it is at hand now that was not. stores are those of the recipients of directories.
func (l *lists) renewed(cfg *blockcrypt.Config, before *domains, stores []keystore.Store) *domains {
	out := &domains{byDir: map[blockcrypt.ID]*domain{}, all: []*domain{l.own}}
	var had []*domain
	if before != nil {
		had, out.dropped = before.all[1:], before.dropped
		for _, d := range had {
			stores = append(slices.Clone(stores), d.stores...)
		}
	}
	of := func(id blockcrypt.ID, rs []blockcrypt.Recipient) *domain {
		same := func(d *domain) bool { return d != l.own && urisOf(d.recipients) == urisOf(rs) }
		if i := slices.IndexFunc(out.all, same); i >= 0 {
			return out.all[i]
		}
		d := &domain{v: l.v, keySet: keySet{recipients: rs}}
		for _, r := range rs {
			if s := keystore.StoreFor(stores, r.URI); s != nil {
				d.stores = append(d.stores, s)
			} else if d.absent == nil {
				d.absent = &keystore.Error{Kind: keystore.Untrusted, URI: r.URI, Op: "generate",
					Err: errors.New("the key of the directory is not at hand")}
			}
		}
		if i := slices.IndexFunc(had, same); i >= 0 && len(had[i].stores) == len(d.stores) {
			d = had[i]
		} else {
			o := keystore.RingOptions{Keys: directoryKeys, Lazy: true,
				Sample: keystore.Sample{Binding: directoryBinding(cfg.Volume, id), Wrapped: rs}}
			if l.v.Suspended() != nil {
				o.Suspended = errSuspended
				d.refusal.Store(&refusal{errSuspended, true})
			}
			d.sample = o.Sample
			d.ring = l.newRing(d, d.stores, o)
		}
		out.all = append(out.all, d)
		return d
	}
	for _, id := range cfg.DirectoryIDs() {
		keys := cfg.Directories[id]
		if len(keys.Recipients) > 0 {
			d := of(id, keys.Recipients)
			if d.retired { // it was one of former recipients
				d.ring.SetStores(d.stores, d.sample)
				d.retired = false
			}
			out.byDir[id] = d
		}
		for _, r := range keys.Former { // each by itself: one that is revoked darkens its own files
			of(id, []blockcrypt.Recipient{r})
		}
	}
	for _, d := range had {
		if !slices.Contains(out.all, d) {
			out.dropped = append(slices.Clone(out.dropped), d)
		}
	}
	return out
}

// newRing makes the ring of a domain.
func (l *lists) newRing(d *domain, stores []keystore.Store, o keystore.RingOptions) *keystore.Ring {
	if o.Pool = l.v.o.Pool; l.v.o.ReadOnly {
		o.Pool = 0
	}
	o.MaxAge, o.Grace, o.EachKey, o.Branches = l.v.o.MaxAge, l.v.o.Grace, l.v.o.FileLease, branches(l.v.cfg)
	o.Report = func(err error) {
		l.v.report("pool", "a data key could not be made ahead, or not for all recipients", err)
	}
	o.Changed, o.Reach = d.changed, l.v.access.reached
	return keystore.NewRing(l.v.cfg.Volume, stores, o)
}

// branches returns how long a branch key is used for new files, 0 if none is.
func branches(c *blockcrypt.Config) time.Duration {
	if c.Branch == nil {
		return 0
	}
	return time.Duration(c.Branch.Seconds) * time.Second
}

// many reports whether directories have more lists of recipients than there can be.
func many(dirs map[blockcrypt.ID]blockcrypt.DirectoryKeys) bool {
	lists := map[string]bool{}
	for _, keys := range dirs {
		lists[urisOf(keys.Recipients)] = true
		for _, r := range keys.Former {
			lists[r.URI] = true
		}
	}
	return len(lists) > MaxLists
}
