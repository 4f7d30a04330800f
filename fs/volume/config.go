package volume

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// Faults of a volume, besides its keys and damage.
var (
	ErrNotVolume = layout.ErrNotVolume
	ErrOlder     = errors.New("kmsfs.json is older than the last one seen")
	ErrOtherKey  = errors.New("the volume's key is not the one in the trust record")
)

// Record is the trust record of a volume, kept outside its ciphertext: which
// recipients are trusted, which volume key is the right one, and the newest
// kmsfs.json that was seen.
type Record struct {
	Volume     blockcrypt.ID `json:"volume"`
	Recipients []string      `json:"recipients"`
	Commitment string        `json:"commitment"`
	Generation uint64        `json:"generation"`
	Local      string        `json:"local"` // path of the local key's file

	// Locals are the paths of further ones, by URI.
	Locals map[string]string `json:"locals,omitempty"`
}

// LocalPath returns where the key file of a recipient lies, "" if that is not known.
func (r *Record) LocalPath(uri string) string {
	if r == nil {
		return ""
	}
	return cmp.Or(r.Locals[uri], r.Local)
}

// SetLocal notes where the key file of a recipient lies.
func (r *Record) SetLocal(uri, path string) {
	if r.Locals[uri] != "" || !r.Trusts(uri) { // of a directory, Local being the volume's
		if r.Locals == nil {
			r.Locals = map[string]string{}
		}
		r.Locals[uri] = path
		return
	}
	more := slices.ContainsFunc(r.Recipients,
		func(u string) bool { return u != uri && strings.HasPrefix(u, "local:") })
	if r.Local == "" || !more {
		r.Local = path
		return
	}
	if r.Locals == nil {
		r.Locals = map[string]string{}
	}
	r.Locals[uri] = path
}

// Trusts reports whether the record names a recipient. A nil record trusts none.
func (r *Record) Trusts(uri string) bool {
	if r != nil {
		for _, u := range r.Recipients {
			if u == uri {
				return true
			}
		}
	}
	return false
}

func record(cfg *blockcrypt.Config, vk *blockcrypt.VolumeKeys) *Record {
	c := vk.Commitment()
	r := &Record{Volume: cfg.Volume, Commitment: hex.EncodeToString(c[:]), Generation: cfg.Generation}
	for _, rc := range cfg.Recipients {
		r.Recipients = append(r.Recipients, rc.URI)
	}
	return r
}

// Found is a volume whose kmsfs.json was read, with nothing authenticated yet.
type Found struct {
	Config *blockcrypt.Config
	disk   disk.Disk
	root   int
}

// Find reads the kmsfs.json of dir. Close it, or go on with Unlock.
func Find(dir string) (*Found, error) {
	l := &Found{}
	var err error
	if l.root, err = layout.OpenRoot(&l.disk, dir); err != nil {
		return nil, err
	}
	if l.Config, err = layout.ReadConfig(&l.disk, l.root); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Close gives the volume up.
func (l *Found) Close() {
	if l.root >= 0 {
		l.disk.Close(l.root)
		l.root = -1
	}
}

// Unlocked is a volume whose kmsfs.json was authenticated.
type Unlocked struct {
	Config *blockcrypt.Config
	Record *Record // what the trust record should say from now on

	keys   *blockcrypt.VolumeKeys
	stores []keystore.Store
	disk   disk.Disk
	root   int

	ofDirectories []keystore.Store // of the recipients of directories whose keys are at hand
	absent        []error          // why those of others are not
}

// UnlockOptions of [Found.Unlock].
type UnlockOptions struct {
	Record      *Record // nil: none is kept
	AcceptOlder bool    // a restored backup: an older kmsfs.json than the record's
	ReadOnly    bool
	Incomplete  bool // for changing the recipients: no store need be at hand for each
	// More opens the store of a recipient that the authenticated kmsfs.json
	// names, and that is trusted with it. It may be nil.
	More func(ctx context.Context, r blockcrypt.Recipient) (keystore.Store, error)
}

// Unlock unwraps the volume key through one of the trusted stores and checks
// kmsfs.json with it, and both against the trust record. On success l is
// consumed.
func (l *Found) Unlock(ctx context.Context, trusted []keystore.Store, o UnlockOptions) (*Unlocked, error) {
	keys, err := l.volumeKeys(ctx, trusted)
	if err != nil {
		return nil, err
	}
	if err := l.Config.Verify(keys); err != nil {
		return nil, err
	}
	rec := record(l.Config, keys)
	if o.Record != nil {
		rec.Local, rec.Locals = o.Record.Local, o.Record.Locals
		if o.Record.Commitment != rec.Commitment || o.Record.Volume != rec.Volume {
			return nil, ErrOtherKey
		}
		if o.Record.Generation > rec.Generation && !o.AcceptOlder {
			return nil, ErrOlder
		}
	}
	u := &Unlocked{Config: l.Config, Record: rec, keys: keys, root: l.root}
	if u.stores, err = l.allStores(ctx, trusted, o); err != nil {
		return nil, err
	}
	u.ofDirectories, u.absent = l.directoryStores(ctx, trusted, o)
	l.root = -1
	return u, nil
}

func (l *Found) volumeKeys(ctx context.Context, trusted []keystore.Store) (*blockcrypt.VolumeKeys, error) {
	b := keystore.Binding{Use: keystore.ForVolume, Volume: l.Config.Volume}
	key, err := keystore.UnwrapFirst(ctx, trusted, b, l.Config.Recipients)
	if keystore.KindOf(err) == keystore.Untrusted {
		return nil, &keystore.Error{Kind: keystore.Untrusted, URI: l.Config.Recipients[0].URI,
			Op: "unwrap", Err: errors.New("the volume is under a key that nobody named")}
	}
	if err != nil {
		return nil, err
	}
	defer clear(key)
	return blockcrypt.NewVolumeKeys(key, l.Config.Volume)
}

// allStores returns a store for every recipient: a new file is wrapped for all.
func (l *Found) allStores(ctx context.Context, trusted []keystore.Store,
	o UnlockOptions) ([]keystore.Store, error) {
	var out []keystore.Store
	for _, r := range l.Config.Recipients {
		s := keystore.StoreFor(trusted, r.URI)
		var err error
		if s == nil && o.More != nil {
			if s, err = o.More(ctx, r); err != nil {
				s = nil
			}
		}
		switch {
		case s != nil && slices.ContainsFunc(out,
			func(o keystore.Store) bool { return o.URI() == s.URI() }):
		case s != nil:
			out = append(out, s)
		case !o.ReadOnly && !o.Incomplete:
			if err == nil {
				err = errors.New("its key is not at hand")
			}
			return nil, fmt.Errorf("cannot write for the recipient %s: %w", r.URI, err)
		}
	}
	return out, nil
}

// directoryStores returns the stores of the recipients of directories. Without the key of one, the
// rest of the volume can be used.
func (l *Found) directoryStores(ctx context.Context, trusted []keystore.Store, o UnlockOptions) (out []keystore.Store, absent []error) {
	tried := map[string]bool{}
	for _, keys := range l.Config.Directories {
		for _, r := range slices.Concat(keys.Recipients, keys.Former) {
			if tried[r.URI] {
				continue
			}
			tried[r.URI] = true
			s, err := keystore.StoreFor(trusted, r.URI), error(nil)
			if s == nil && o.More != nil {
				s, err = o.More(ctx, r)
			}
			if s != nil && err == nil {
				out = append(out, s)
			} else {
				if err == nil {
					err = errors.New("nobody named it")
				}
				absent = append(absent, fmt.Errorf("a directory's key %s is not at hand: %w", r.URI, err))
			}
		}
	}
	return out, absent
}

// Absent says which keys of directories are not at hand, and why.
func (u *Unlocked) Absent() []error { return u.absent }

// Close gives the volume up, unless Open took it.
func (u *Unlocked) Close() {
	if u.root >= 0 {
		u.disk.Close(u.root)
		u.root = -1
	}
}
