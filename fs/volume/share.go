//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// Share makes the volume one that several hosts may write at the same time, or ends that. The volume was
// opened with the option Alone, by which nobody else has it mounted, and is closed after that. It returns
// what the trust record should say.
func (r *Recipients) Share(ctx context.Context, on bool) (*Record, error) {
	v := r.v
	if err := v.Wait(ctx); err != nil {
		return nil, err
	}
	if v.repairs() {
		return nil, errors.New("files of a mount that did not end well could not be repaired; see kmsfs fsck")
	}
	unlock, err := r.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	next := *r.now.Load().cfg
	if next.Shared == on {
		return record(&next, v.vk), nil
	}
	if on {
		if err := disk.Ignore(layout.MakeHosts(&v.disk, v.rootD), unix.EEXIST); err != nil {
			return nil, err
		}
	}
	next.Shared = on
	var ofDirectories []keystore.Store // none is new
	return r.replace(next, slices.Clone(r.now.Load().stores), ofDirectories)
}

// Unshared removes what only a shared volume has, after [Recipients.Share] and Close.
func Unshared(dir string) error {
	d := &disk.Disk{}
	root, err := layout.OpenRoot(d, dir)
	if err != nil {
		return err
	}
	defer d.Close(root)
	return disk.Ignore(d.Unlink(root, layout.HostsName, unix.AT_REMOVEDIR), unix.ENOENT)
}

// CheckShared returns an [UnfitError] if the filesystem of a directory is not fit for a shared volume, as far
// as this host alone can tell; local says that no other host can see the directory as this one does.
func CheckShared(dir string) (local bool, err error) {
	d := &disk.Disk{}
	root, err := layout.OpenRoot(d, dir)
	if err != nil {
		return false, err
	}
	defer d.Close(root)
	st, err := d.Statfs(root)
	if err != nil {
		return false, err
	}
	return !slices.Contains(remote, uint32(st.Type)), fitForHosts(d, root)
}

func fitForHosts(d *disk.Disk, root int) error {
	m, err := d.MountOf(root)
	if err != nil {
		return err
	}
	if unfit := unfitForHosts(m); unfit != nil {
		return unfit
	}
	return nil
}

// unfitForHosts says why a mount is not fit for a shared volume; nil if that cannot be told from here.
func unfitForHosts(m disk.Mount) *UnfitError {
	for _, o := range []string{"nolock", "local_lock=all", "local_lock=posix", "local_lock=flock"} {
		if slices.Contains(m.Options, o) {
			return &UnfitError{Lacks: "keeps locks on this host: it is mounted with the option " + o, Option: o}
		}
	}
	// Its client makes a file as long again as it has written it, though another host has shortened it since.
	if strings.HasPrefix(m.Source, `mfs\043`) {
		return &UnfitError{Lacks: "is MooseFS, on which a host does not see that another has shortened a file"}
	}
	// Linux' client gives a lock back when any descriptor of the file is closed.
	if m.Type == "cifs" || m.Type == "smb3" {
		return &UnfitError{Lacks: "is SMB, on which a host loses its lock of a file when it closes another descriptor of it"}
	}
	return nil
}
