//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// Why a directory cannot have keys of its own.
var (
	ErrPlainNames = errors.New("directories of a volume with plain names have no IDs, by which keys are given to them")
	ErrRootKeys   = errors.New("the keys of the whole volume are its recipients: kmsfs recipients changes them")
	ErrManyLists  = fmt.Errorf("directories have %d different lists of keys already, which are the most", MaxLists)
	ErrSealsOnly  = errors.New("with these keys nobody here could read the files: one must be able to unwrap")
)

// SetKeys makes stores the recipients of new files below a directory; with none they are again those
// of the directory above. The recipients of before stay trusted as long as files have no other.
// [Recipients.Rewrap] gives the files that are there the new ones. It returns what the trust record
// should say.
func (r *Recipients) SetKeys(ctx context.Context, dir *Node, stores []keystore.Store) (*Record, error) {
	unlock, err := r.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	v := r.v
	switch {
	case ctx.Err() != nil: // the caller went away while it waited
		return nil, ctx.Err()
	case v.o.ReadOnly:
		return nil, unix.EROFS
	case v.Suspended() != nil:
		return nil, v.Suspended()
	case !dir.IsDir():
		return nil, unix.ENOTDIR
	case v.plain:
		return nil, ErrPlainNames
	case dir == v.root:
		return nil, ErrRootKeys
	case len(stores) > 0 && !slices.ContainsFunc(stores, func(s keystore.Store) bool { return !keystore.OnlySeals(s) }):
		return nil, ErrSealsOnly
	}
	// The ID is on the disk before kmsfs.json names it.
	id, _, err := dir.dirIdent(true)
	if err == nil {
		err = dir.syncIDs()
	}
	if err != nil {
		return nil, err
	}
	was := r.now.Load().cfg.Directories[id]
	keys := blockcrypt.DirectoryKeys{Recipients: was.Recipients}
	if !slices.EqualFunc(stores, was.Recipients,
		func(s keystore.Store, x blockcrypt.Recipient) bool { return s.URI() == x.URI }) {
		if keys.Recipients, err = proofs(ctx, stores, directoryBinding(v.cfg.Volume, id)); err != nil {
			return nil, err
		}
	}
	keys.Former = slices.DeleteFunc(slices.Concat(was.Recipients, was.Former),
		func(x blockcrypt.Recipient) bool { return hasURI(keys.Recipients, x.URI) })
	rec, err := r.setDirectory(id, keys, stores)
	if err != nil || len(keys.Former) == 0 {
		return rec, err
	}
	again, _, err := r.dropFormer(ctx)
	if err != nil { // the keys were set, and the next rewrap looks again
		v.log.Warn("keys that a directory had before stay trusted", "error", err)
	}
	if again != nil {
		rec = again
	}
	return rec, nil
}

func hasURI(rs []blockcrypt.Recipient, uri string) bool {
	return slices.ContainsFunc(rs, func(x blockcrypt.Recipient) bool { return x.URI == uri })
}

// proofs makes a key that has no other use than to show whether these stores unwrap.
func proofs(ctx context.Context, stores []keystore.Store, b keystore.Binding) ([]blockcrypt.Recipient, error) {
	if len(stores) == 0 {
		return nil, nil
	}
	k, err := keystore.New(ctx, stores, b)
	if err != nil {
		return nil, err
	}
	k.Wipe()
	return k.Wrapped, nil
}

// setDirectory changes what kmsfs.json says of a directory. mu is held.
func (r *Recipients) setDirectory(id blockcrypt.ID, keys blockcrypt.DirectoryKeys,
	stores []keystore.Store) (*Record, error) {
	now := r.now.Load()
	next := *now.cfg
	next.Directories = map[blockcrypt.ID]blockcrypt.DirectoryKeys{}
	maps.Copy(next.Directories, now.cfg.Directories)
	if next.Directories[id] = keys; len(keys.Recipients)+len(keys.Former) == 0 {
		delete(next.Directories, id)
	}
	return r.replace(next, now.stores, stores)
}

// former reports whether a recipient is one that directories had before, or a replica of it.
func (l *listed) former(x blockcrypt.Recipient) bool {
	return slices.ContainsFunc(l.domains.all[1:], func(d *domain) bool { return !l.domains.active(d) && d.at(x.URI) >= 0 })
}

// dropRemoved makes the recipients of directories that are gone former ones. The record is nil if none
// is. mu is held.
func (r *Recipients) dropRemoved(ctx context.Context) (rec *Record, err error) {
	v := r.v
	if len(r.now.Load().cfg.Directories) == 0 {
		return nil, nil
	}
	for range scanTries {
		moves := v.renames.Load()
		there, err := directoryIDs(ctx, &v.disk, v.rootD)
		if err != nil {
			return nil, err
		}
		if v.renames.Load() != moves { // one may have been moved to where it was not looked for
			continue
		}
		for id, keys := range r.now.Load().cfg.Directories {
			if there[id] || len(keys.Recipients) == 0 {
				continue
			}
			keys.Recipients, keys.Former = nil, slices.Concat(keys.Recipients, keys.Former)
			if rec, err = r.setDirectory(id, keys, nil); err != nil {
				return rec, err
			}
		}
		return rec, nil
	}
	return nil, errors.New("names are moved all the time, so not all directories can be looked at; try again later")
}

// directoryIDs returns the IDs of all directories below an open one, whether their names decode or not.
func directoryIDs(ctx context.Context, d *disk.Disk, dir int) (map[blockcrypt.ID]bool, error) {
	out := map[blockcrypt.ID]bool{}
	var in func(fd int) error
	in = func(fd int) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		real, err := d.Open(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		defer d.Close(real)
		x, err := layout.ReadDirID(d, real)
		if err != nil {
			return err
		}
		for _, id := range x.IDs {
			out[id] = true
		}
		var names []string
		err = d.Scan(real, func(e disk.Dirent) error {
			if e.Type == unix.S_IFDIR || e.Type == 0 {
				names = append(names, e.Name)
			}
			return nil
		})
		for _, name := range names {
			if err != nil {
				break
			}
			sub, oerr := d.Open(real, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
			if errors.Is(oerr, unix.ENOENT) || errors.Is(oerr, unix.ENOTDIR) {
				continue
			}
			if err = oerr; err == nil {
				err = in(sub)
				d.Close(sub)
			}
		}
		return err
	}
	return out, in(dir)
}

// dropFormer takes the former recipients of directories out of kmsfs.json, if no file needs one any
// more; else needed says how many do. The record is nil if nothing was changed. mu is held.
func (r *Recipients) dropFormer(ctx context.Context) (rec *Record, needed OnlyRecipientError, err error) {
	now := r.now.Load()
	next := *now.cfg
	next.Directories = map[blockcrypt.ID]blockcrypt.DirectoryKeys{}
	found := false
	for id, keys := range now.cfg.Directories {
		found = found || len(keys.Former) > 0
		if keys.Former = nil; len(keys.Recipients) > 0 {
			next.Directories[id] = keys
		}
	}
	if !found {
		return nil, needed, nil
	}
	for _, d := range now.domains.all[1:] {
		if !now.domains.active(d) && d.absent != nil && strings.HasPrefix(d.recipients[0].URI, "aws-kms:") { // which files have it cannot be told: replicas have other URIs
			return nil, needed, d.absent
		}
	}
	// No file is given a recipient that goes, meanwhile.
	r.stable.Lock()
	defer r.stable.Unlock()
	sets := []keySet{now.set(r.v.lists.own)}
	for _, d := range now.domains.byDir {
		sets = append(sets, d.keySet)
	}
	err = r.allOpen(ctx, now.former, sets)
	if only, ok := errors.AsType[*OnlyRecipientError](err); ok {
		return nil, *only, nil
	}
	if err == nil {
		err = r.v.syncAll() // the headers that were read need not be on the disk yet
	}
	if err != nil {
		return nil, needed, fmt.Errorf("whether files need former keys: %w", err)
	}
	rec, err = r.replace(next, now.stores, nil)
	return rec, needed, err
}

// Keys returns the URIs of the recipients that new files below a directory get.
func (d *directory) Keys() (uris []string, err error) {
	of, err := d.domain()
	if err != nil {
		return nil, err
	}
	for _, x := range d.v.recipients.now.Load().set(of).recipients {
		uris = append(uris, x.URI)
	}
	return uris, nil
}
