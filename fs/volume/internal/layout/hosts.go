package layout

import (
	"encoding/json"
	"errors"
	"io/fs"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// A HostFile is what a host that has a shared volume mounted says of itself.
type HostFile struct {
	Host     string    `json:"host"` // its host name
	PID      int       `json:"pid"`
	Since    time.Time `json:"since"`
	Boot     string    `json:"boot"`     // its kernel's boot ID and its PID namespace
	Moves    uint64    `json:"moves"`    // how often it moved a directory, see walker
	Beat     uint64    `json:"beat"`     // how often it was written
	Config   uint64    `json:"config"`   // generation of the kmsfs.json that the host uses
	Sessions string    `json:"sessions"` // as a marker has them: the only part that is authenticated
}

// hostSize is the length of a host file. A byte behind it says that the host is fenced.
const hostSize = 1024

// errUnwritten says that a host file was not written whole: its host has just begun, or died then.
var errUnwritten = errors.New("the file of a host was not written yet")

// readHost reads the file of a host.
func readHost(d *disk.Disk, fd int, vk *blockcrypt.VolumeKeys) (x HostFile, sessions []uint64, fenced bool, err error) {
	b := make([]byte, hostSize+1)
	n, err := d.Pread(fd, b, 0)
	if err != nil {
		return x, nil, false, err
	}
	if n < hostSize {
		return x, nil, false, errUnwritten
	}
	if json.Unmarshal(b[:hostSize], &x) != nil {
		return x, nil, n > hostSize, &blockcrypt.DamageError{Class: blockcrypt.BadMarker, Pos: 0,
			Detail: "the file of a host is damaged"}
	}
	if vk != nil {
		sessions, err = vk.OpenMarker(x.Sessions)
	} else {
		sessions, err = blockcrypt.ParseMarker(x.Sessions)
	}
	return x, sessions, n > hostSize, err
}

// A HostFound is a file in kmsfs.hosts.
type HostFound struct {
	Name     string // of the file
	Host     HostFile
	Sessions []uint64
	Alive    bool  // its owner has it locked
	Err      error // the file is damaged, or cannot be read
}

// FindHosts returns the files of all hosts; none of a volume that is not shared.
func FindHosts(d *disk.Disk, root int, vk *blockcrypt.VolumeKeys) (out []HostFound, err error) {
	dir, err := d.OpenDir(root, HostsName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close(dir)
	var names []string
	if err := d.Scan(dir, func(e disk.Dirent) error { names = append(names, e.Name); return nil }); err != nil {
		return nil, err
	}
	for _, name := range names {
		fd, err := d.OpenFile(dir, name)
		if err != nil {
			continue // it is gone by now
		}
		x := HostFound{Name: name, Alive: hostLocked(d, fd)}
		x.Host, x.Sessions, _, x.Err = readHost(d, fd, vk)
		if errors.Is(x.Err, errUnwritten) {
			x.Err = nil
		}
		d.Close(fd)
		out = append(out, x)
	}
	return out, nil
}
