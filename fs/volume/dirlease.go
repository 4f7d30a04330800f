//go:build linux && !portable

package volume

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

// hostLocks are the locks of kmsfs.lock by which hosts agree on names and on kmsfs.json. A directory has
// a byte of its own there, by its inode number.
type hostLocks struct {
	v    *Volume
	long sync.Mutex // held with the lock on long names

	mu   sync.Mutex // no other lock is taken under it, and no syscall is made
	dirs map[*directory]bool
}

const (
	entriesIdle = time.Second            // without a new entry, after which a directory's lock is given back
	entriesLook = 100 * time.Millisecond // between two looks whether others wait to remove it
	hostsWithin = 30 * time.Second       // in which other hosts give a lock back that is held for a moment only
)

// errHosts says that a lock that hosts hold for a moment only could not be had.
var errHosts = fmt.Errorf("another host has held a lock of the volume for more than %v: %w", hostsWithin, unix.EBUSY)

// take takes a lock of kmsfs.lock that others hold for a moment only; wanted, if it has bytes, is
// locked meanwhile.
func (h *hostLocks) take(l, wanted disk.Lock) error {
	d, fd := &h.v.disk, h.v.lockFD
	asked := false
	defer func() {
		if asked {
			wanted.Kind = disk.None
			d.OFDLock(fd, wanted)
		}
	}()
	end := time.Now().Add(hostsWithin)
	for pause := leasePause; ; pause = min(2*pause, leasePauses) {
		err := d.OFDLock(fd, l)
		if !disk.LockBusy(err) {
			return err
		}
		if time.Now().After(end) {
			return errHosts
		}
		if !asked && wanted.N > 0 {
			asked = d.OFDLock(fd, wanted) == nil
		}
		time.Sleep(pause)
	}
}

// give gives a lock back.
func (h *hostLocks) give(l disk.Lock) {
	l.Kind = disk.None
	h.v.disk.OFDLock(h.v.lockFD, l)
}

// lockLong keeps other hosts from making, moving and removing entries with long names while one of
// these is.
func (h *hostLocks) lockLong(names ...string) (unlock func(), err error) {
	long := false
	for _, name := range names {
		long = long || len(name) > blockcrypt.MostShort
	}
	if !h.v.Shared() || h.v.plain || !long {
		return func() {}, nil
	}
	h.long.Lock()
	l := disk.Lock{Kind: disk.Alone, At: layout.LongNameByte, N: 1}
	if err := h.take(l, disk.Lock{}); err != nil {
		h.long.Unlock()
		return nil, err
	}
	return func() {
		h.give(l)
		h.long.Unlock()
	}, nil
}

// entriesLock is the lock of a directory's entries, by its inode number.
func (d *directory) entriesLock(kind disk.LockKind) disk.Lock {
	return disk.Lock{Kind: kind, At: layout.DirBytes + int64(d.n.ino.Load()&layout.DirMask), N: 1}
}

// entriesWanted is the lock by which a host says that it waits to remove the directory.
func (d *directory) entriesWanted(kind disk.LockKind) disk.Lock {
	return disk.Lock{Kind: kind, At: layout.DirWantedBytes + int64(d.n.ino.Load()&layout.DirMask), N: 1}
}

// leaseEntries makes sure that no other host removes the directory, or what kmsfs keeps in it, while an
// entry is made, and returns its ID, which it makes if there is none. The lock is kept for a while.
// dirMu is held, and the directory's entries.
func (d *directory) leaseEntries() (id blockcrypt.ID, err error) {
	v := d.v
	late, err := v.peers.waited()
	if err != nil {
		return id, err
	}
	if d.leased && d.leasedAt == late {
		d.leaseUsed.Store(time.Now().UnixNano())
		return d.dirID, nil
	}
	fd, err := d.enter()
	if err != nil {
		return id, err
	}
	defer d.leave()
	if err := v.locks.take(d.entriesLock(disk.Shared), disk.Lock{}); err != nil {
		return id, err
	}
	if id, err = d.makeDirID(fd); err != nil {
		v.locks.give(d.entriesLock(disk.None))
		return id, err
	}
	d.dirID, d.hasID = id, true
	d.leased, d.leasedAt = true, late
	d.leaseUsed.Store(time.Now().UnixNano())
	v.locks.keep(d)
	return id, nil
}

// makeDirID returns the ID that the directory has on the disk, in both places. No host removes it
// meanwhile; another one may make it.
func (d *directory) makeDirID(fd int) (id blockcrypt.ID, err error) {
	for range maxRaces {
		id, ok, lost, err := d.lookDirID(fd)
		switch {
		case err != nil:
			return id, err
		case ok && lost:
			return id, layout.MendDirID(&d.v.disk, fd, id)
		case ok:
			return id, nil
		}
		if id, err = layout.NewDirID(&d.v.disk, fd); !errors.Is(err, unix.EEXIST) {
			return id, err
		}
	}
	return id, unix.EBUSY
}

// lockForRemoval keeps other hosts from making entries in the directory. Its entries are held for
// writing.
func (d *directory) lockForRemoval() (unlock func(), err error) {
	if !d.v.Shared() || d.v.plain {
		return func() {}, nil
	}
	h := &d.v.locks
	h.drop(d)
	d.dirMu.Lock()
	d.leased = false
	d.dirMu.Unlock()
	h.give(d.entriesLock(disk.None)) // two hosts that keep theirs would wait for each other
	l := d.entriesLock(disk.Alone)
	if err := h.take(l, d.entriesWanted(disk.Shared)); err != nil {
		h.give(l)
		return nil, err
	}
	return func() { h.give(l) }, nil
}

func (h *hostLocks) keep(d *directory) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.dirs == nil {
		h.dirs = map[*directory]bool{}
	}
	h.dirs[d] = true
}

// keeps reports whether this host has the lock of d.leaseEntries, so that the ID is the one it knows.
func (h *hostLocks) keeps(d *directory) bool {
	late, err := h.v.peers.leases()
	d.dirMu.Lock()
	defer d.dirMu.Unlock()
	return err == nil && d.leased && d.leasedAt == late
}

func (h *hostLocks) drop(d *directory) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.dirs, d)
}

// check gives the locks of directories back in which no entries were made of late, or that another host
// waits to remove.
func (h *hostLocks) check() {
	h.mu.Lock()
	all := slices.Collect(maps.Keys(h.dirs))
	h.mu.Unlock()
	for _, d := range all {
		if !d.leaseChecked.Swap(true) { // one that waits holds no other up
			h.v.bg.Go(func() {
				defer d.leaseChecked.Store(false)
				d.checkEntries()
			})
		}
	}
}

// checkEntries gives the lock of the directory's entries back, if it is not used, or wanted.
func (d *directory) checkEntries() {
	h := &d.v.locks
	if time.Since(time.Unix(0, d.leaseUsed.Load())) < entriesIdle {
		in, err := h.v.disk.OFDLocked(h.v.lockFD, d.entriesWanted(disk.Alone))
		if err != nil || in.Kind == disk.None {
			return
		}
	}
	d.entries.Lock() // while an entry is made the lock stays
	defer d.entries.Unlock()
	d.dirMu.Lock()
	defer d.dirMu.Unlock()
	if d.leased {
		d.leased = false
		h.drop(d)
		h.give(d.entriesLock(disk.None))
	}
}

// fresh makes this host see the entries that a directory has now. If it was removed, that is ENOENT
// just after it was looked up; else ESTALE, by which the kernel looks its path up again.
func (d *directory) fresh(fd int) error {
	var st unix.Stat_t
	err := d.v.disk.FstatFresh(fd, &st)
	if err == nil && st.Nlink == 0 {
		err = unix.ESTALE
	}
	if errors.Is(err, unix.ESTALE) && time.Since(time.Unix(0, d.lookedUp.Load())) < justNow {
		err = unix.ENOENT
	}
	return err
}

// vanished reports whether an error says that the directory itself was removed.
func vanished(err error) bool { return errors.Is(err, unix.ESTALE) || errors.Is(err, unix.ENOENT) }

// lookDirID reads the ID of a directory; lost says that one of its places is.
func (d *directory) lookDirID(fd int) (id blockcrypt.ID, ok, lost bool, err error) {
	if d.v.Shared() {
		if err := d.fresh(fd); err != nil {
			return id, false, false, err
		}
	}
	x, err := layout.ReadDirID(&d.v.disk, fd)
	if err != nil {
		return id, false, false, err
	}
	return x.Resolve()
}

// justNow is how long the kernel takes from a lookup of a directory to the request in it.
const justNow = 20 * time.Millisecond
