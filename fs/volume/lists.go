package volume

import (
	"errors"
	"kmsfs/blockcrypt"
	"kmsfs/keystore"
	"slices"
	"time"
)

const (
	// directoryKeys is how many unwrapped keys are kept in memory for the files of a directory's domain.
	directoryKeys = 1024
	// MaxLists is how many different lists of recipients directories can have, with the former recipients.
	MaxLists = 1000
)

// newDomains returns the lists that kmsfs.json names. What was known of a list that was there before
// is kept, unless a key is at hand now that was not. stores are those of the recipients of directories.
func (v *Volume) newDomains(cfg *blockcrypt.Config, before *domains, stores []keystore.Store) *domains {
	out := &domains{byDir: map[blockcrypt.ID]*domain{}, all: []*domain{v.own}}
	var had []*domain
	if before != nil {
		had, out.dropped = before.all[1:], before.dropped
		for _, d := range had {
			stores = append(slices.Clone(stores), d.stores...)
		}
	}
	of := func(id blockcrypt.ID, rs []blockcrypt.Recipient) *domain {
		same := func(d *domain) bool { return d != v.own && urisOf(d.recipients) == urisOf(rs) }
		if i := slices.IndexFunc(out.all, same); i >= 0 {
			return out.all[i]
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
		if i := slices.IndexFunc(had, same); i >= 0 && len(had[i].stores) == len(d.stores) {
			d = had[i]
		} else {
			o := keystore.RingOptions{Keys: directoryKeys, Lazy: true,
				Sample: keystore.Sample{Binding: directoryBinding(cfg.Volume, id), Wrapped: rs}}
			if v.Suspended() != nil {
				o.Suspended = errSuspended
				d.refusal.Store(&refusal{errSuspended, true})
			}
			d.sample = o.Sample
			d.ring = v.newRing(d, d.stores, o)
		}
		out.all = append(out.all, d)
		return d
	}
	for _, id := range cfg.DirectoryIDs() {
		keys := cfg.Directories[id]
		if len(keys.Recipients) > 0 {
			out.byDir[id] = of(id, keys.Recipients)
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

// branches returns how long a branch key is used for new files, 0 if none is.
func branches(c *blockcrypt.Config) time.Duration {
	if c.Branch == nil {
		return 0
	}
	return time.Duration(c.Branch.Seconds) * time.Second
}
