//go:build linux && !portable

package volume

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// InitOptions of [Init].
type InitOptions struct {
	PlainNames bool
	Shared     bool          // several hosts may write
	Branches   time.Duration // how long a branch key is used for new files; 0: none is

	hooks disk.Hooks // set by tests only
}

// Init makes a volume in an empty directory: kmsfs.json, durable when it
// returns. The volume key is wrapped for every store.
func Init(ctx context.Context, dir string, stores []keystore.Store, id blockcrypt.ID,
	o InitOptions) (*Record, error) {
	d := &disk.Disk{Hooks: o.hooks}
	root, err := layout.OpenRoot(d, dir)
	if err != nil {
		return nil, err
	}
	defer d.Close(root)
	if err := mustBeEmpty(d, root); err != nil {
		return nil, err
	}
	key, err := keystore.New(ctx, stores, keystore.Binding{Use: keystore.ForVolume, Volume: id})
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	vk, err := blockcrypt.NewVolumeKeys(key.Key, id)
	if err != nil {
		return nil, err
	}
	cfg := &blockcrypt.Config{Format: blockcrypt.Version, Volume: id, Generation: 1,
		Names: blockcrypt.NamesEncrypted, Shared: o.Shared}
	if o.PlainNames {
		cfg.Names = blockcrypt.NamesPlain
	}
	if o.Branches > 0 {
		cfg.Branch = &blockcrypt.ConfigBranch{Seconds: int64(o.Branches / time.Second)}
	}
	cfg.Recipients = key.Wrapped
	cfg.Header = max(blockcrypt.DefaultHeader, blockcrypt.RecipientsFit(inFiles(cfg.Recipients, cfg.Branch != nil)))
	b, err := cfg.Encode(vk)
	if err != nil {
		return nil, err
	}
	err = layout.MakeRootEntries(d, root)
	if err == nil && o.Shared {
		err = layout.MakeHosts(d, root)
	}
	if err == nil {
		err = d.Replace(root, blockcrypt.ConfigName, b) // last: with it there is a volume
	}
	if err != nil {
		d.Unlink(root, layout.LockName, 0)
		d.Unlink(root, layout.LinksName, 0)
		d.Unlink(root, layout.HostsName, unix.AT_REMOVEDIR)
		return nil, fmt.Errorf("make the volume in %s: %w", dir, err)
	}
	return record(cfg, vk), nil
}

// inFiles returns recipients of the size that they have in the headers of files, under branch keys or
// not.
func inFiles(rs []blockcrypt.Recipient, branches bool) []blockcrypt.Recipient {
	rs = slices.Clone(rs)
	for i := range rs {
		if strings.HasPrefix(rs[i].URI, "age:") { // files do not have the public key
			rs[i].Branch = nil
		} else if branches && len(rs[i].Branch) == 0 { // the wrapped branch key, and under it the file's
			rs[i].Branch = make([]byte, 16+len(rs[i].Wrapped))
			rs[i].Wrapped = make([]byte, keystore.LocalWrapSize)
		}
	}
	return rs
}

// IsEmpty reports whether dir holds nothing.
func IsEmpty(dir string) (bool, error) {
	d := &disk.Disk{}
	root, err := layout.OpenRoot(d, dir)
	if err != nil {
		return false, err
	}
	defer d.Close(root)
	err = mustBeEmpty(d, root)
	return err == nil, disk.Ignore(err, ErrNotEmpty)
}

func mustBeEmpty(d *disk.Disk, root int) error {
	return d.Scan(root, func(e disk.Dirent) error { return ErrNotEmpty })
}
