//go:build linux && !portable

package volume

import (
	"slices"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

// Host is one that has a shared volume mounted.
type Host struct {
	layout.HostFile
	State string // "this one", "alive", "dead" (its files are to be repaired), "unknown"
}

// Hosts returns the hosts that have the volume in dir mounted for writing; none of a volume that is not
// shared.
func Hosts(dir string) (out []Host, err error) {
	d := &disk.Disk{}
	root, err := layout.OpenRoot(d, dir)
	if err != nil {
		return nil, err
	}
	defer d.Close(root)
	fd, err := d.Open(root, layout.HostsName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, disk.Ignore(err, unix.ENOENT)
	}
	defer d.Close(fd)
	hosts := layout.Hosts{Disk: d, Dir: fd}
	names, err := hosts.Names()
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	for _, name := range names {
		if x, ok := hostNow(hosts, name); ok {
			out = append(out, x)
		}
	}
	slices.SortStableFunc(out, func(a, b Host) int { return a.Since.Compare(b.Since) })
	return out, nil
}

// hostNow returns what is known of a host; ok is false if its file is gone.
func hostNow(hosts layout.Hosts, name string) (x Host, ok bool) {
	fd, err := hosts.Disk.Open(hosts.Dir, name, unix.O_RDONLY|disk.FileFlags, 0)
	if err != nil {
		return x, false
	}
	defer hosts.Disk.Close(fd)
	var fenced bool
	x.HostFile, _, fenced, err = hosts.Read(fd, nil)
	in, lerr := hosts.Disk.OFDLocked(fd, disk.Lock{Kind: disk.Alone, At: layout.LockByte, N: 1})
	switch {
	case err != nil && blockcrypt.ClassOf(err) == "" || lerr != nil:
		x.State = "unknown"
	case fenced, in.Kind != disk.Alone:
		x.State = "dead"
	default:
		x.State = "alive"
	}
	return x, true
}
