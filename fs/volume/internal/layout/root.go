// Package layout knows how a volume lies in its ciphertext directory: the entries of the root with
// the lock and the marker of sessions, the two places of a directory's ID, long names, and the
// headers of files. Mounts, fsck and the commands for single files find these through it. The
// rules are those of FORMAT.md.
package layout

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// ErrNotVolume says that a directory has no kmsfs.json.
var ErrNotVolume = errors.New("not a kmsfs volume: it has no kmsfs.json")

// LockName is a file in the root, by whose locks a mount that writes keeps others out. A copy of it
// does no harm.
const LockName = "kmsfs.lock"

// LinksName is a symlink in the root. A copy of the volume that has kmsfs.lock and lacks
// it was made by a tool that leaves symlinks out: the volume's symlinks and its long names
// are missing too, and of the symlinks nothing else would tell.
const LinksName = "kmsfs.links"

// LinksTarget is its target.
const LinksTarget = "copies of this directory need its symlinks"

// RekeyPrefix begins the name of a file in the root that takes the place of another one when it is
// whole. One that no mount is writing was left by a crash.
const RekeyPrefix = blockcrypt.Reserved + "rekey."

// HostsName is the directory in the root of a shared volume in which each host that has it mounted for
// writing has a file.
const HostsName = blockcrypt.Reserved + "hosts"

// RootNames are the entries that only the root has.
var RootNames = []string{blockcrypt.ConfigName, MarkerName, LockName, LinksName, HostsName}

// LacksLinks reports whether the volume seems to have been copied without its symlinks.
func LacksLinks(d *disk.Disk, root int) bool {
	_, locked := d.InfoAt(root, LockName)
	_, links := d.InfoAt(root, LinksName)
	return locked == nil && errors.Is(links, fs.ErrNotExist)
}

// IsOwn reports whether a ciphertext name is reserved: that of an entry of kmsfs' own, or of an
// entry with a long name.
func IsOwn(name string) bool { return strings.HasPrefix(name, blockcrypt.Reserved) }

// OpenRoot opens the root of a volume.
func OpenRoot(d *disk.Disk, dir string) (int, error) {
	fd, err := d.OpenRoot(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return -1, fmt.Errorf("the directory %s does not exist", dir)
	case errors.Is(err, syscall.ENOTDIR):
		return -1, fmt.Errorf("%s is not a directory", dir)
	case err != nil:
		return -1, fmt.Errorf("%s: %w", dir, err)
	}
	return fd, nil
}

// ReadConfig reads kmsfs.json, without authenticating it.
func ReadConfig(d *disk.Disk, root int) (*blockcrypt.Config, error) {
	refresh(d, root)
	fd, err := d.OpenFile(root, blockcrypt.ConfigName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotVolume
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", blockcrypt.ConfigName, err)
	}
	defer d.Close(fd)
	st, err := d.Info(fd)
	if err != nil {
		return nil, err
	}
	if !st.Mode.IsRegular() || st.Size > 4<<20 {
		return nil, &blockcrypt.DamageError{Class: blockcrypt.BadConfig, Pos: -1,
			Detail: "kmsfs.json is no file of a sensible size"}
	}
	b := make([]byte, st.Size)
	n, err := d.Pread(fd, b, 0)
	if err != nil {
		return nil, err
	}
	return blockcrypt.ParseConfig(b[:n])
}
