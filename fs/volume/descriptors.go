//go:build linux && !portable

package volume

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Descriptors. A daemon has one for each open file and directory of all programs, and a
// process may have only so many (RLIMIT_NOFILE). Programs' files and directories stay below
// that, so that what needs one for a moment (a listing, a rename, a size) always gets it, and
// calls to a key service too.

const (
	mostDirFDs = 1024 // directories that are kept open without being in use
	mostKept   = 1024 // descriptors that programs do not get
)

// descriptors keeps programs' files and directories below the limit of the process.
type descriptors struct {
	v      *Volume
	settle func() // settles all files that programs have closed
	fdLimits
}

// fdLimits are derived from the limit of the process.
type fdLimits struct {
	files  int64 // from so many open descriptors on, no file is opened for a program
	dirs   int64 // likewise, no directory
	cached int   // dirFDs.most
	closed int   // closed files that wait for the settler
}

func newFDLimits(limit uint64) fdLimits {
	n := int64(min(limit, 1<<30))
	kept := min(n/4, mostKept)
	return fdLimits{files: n - kept, dirs: n - kept/2, cached: int(min(n/8, mostDirFDs)),
		closed: int(min(n/8, settleMost))}
}

// processFDs returns how many descriptors the process may have.
func processFDs() uint64 {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 1024
	}
	return r.Cur
}

// roomForFile returns nil if a file may be opened for a program, else ENFILE. It closes what
// is not in use first. No lock is held.
func (d *descriptors) roomForFile() error { return d.room(d.files) }

// roomForDir is roomForFile for an open directory.
func (d *descriptors) roomForDir() error { return d.room(d.dirs) }

func (d *descriptors) room(most int64) error {
	if d.v.disk.Descriptors() < most {
		return nil
	}
	d.giveUpIdle()
	if d.v.disk.Descriptors() >= most && !d.v.o.ReadOnly { // files keep theirs until they are settled
		d.settle()
		d.settleOpen()
		d.giveUpIdle()
	}
	if d.v.disk.Descriptors() < most {
		return nil
	}
	d.v.report("descriptors",
		"programs have too many files open on the mount; raise the limit of the daemon (ulimit -n)",
		unix.ENFILE)
	return unix.ENFILE
}

// settleOpen settles the files that programs have open, after one sync, as far as they do not
// change meanwhile.
func (d *descriptors) settleOpen() {
	files := d.v.nodes.files()
	changes := make([]uint64, len(files))
	for i, f := range files {
		f.mu.RLock()
		changes[i] = f.Changes()
		f.mu.RUnlock()
	}
	if d.v.syncAll() != nil {
		return
	}
	for i, f := range files {
		f.mu.Lock()
		if f.FD >= 0 && f.rw && !f.closed && !f.Broken() && !f.Keyless() && !f.n.Gone() &&
			!d.v.doubts.of(f.n) && !d.v.Shared() {
			f.failed("settling", f.SettleWhole(changes[i]))
		}
		f.unlock()
	}
}

// giveUpIdle closes descriptors that are not in use, of directories and of files that are
// open, and reports whether there were any. The caller may hold any lock but nodeTable.mu and
// dirFDs.mu.
func (d *descriptors) giveUpIdle() (some bool) {
	some = d.v.dirFDs.closeIdle()
	for _, f := range d.v.nodes.files() {
		some = f.park(false) || some
	}
	if some {
		return true
	}
	for _, f := range d.v.nodes.files() { // all were used of late
		some = f.park(true) || some
	}
	return some
}

// park closes the descriptor of a file that programs have open, if the disk has all of it:
// wake opens it again by its name. used says that it is done though the file was used since
// the last attempt.
func (f *file) park(used bool) bool {
	if f.used.Swap(false) && !used || !f.mu.TryLock() {
		return false
	}
	defer f.unlock()
	var st unix.Stat_t
	switch {
	case f.lease.held || f.lease.wanting || f.FD < 0 || f.closed || f.Broken() || f.Times().Touched || f.syncing > 0 || f.Unsettled():
		return false
	case f.Header != nil && (f.Keyless() || f.Partial || !f.Synced() ||
		f.Unconfirmed() && f.v.sessions.isBad(f.Header.State.Session)):
		return false // if its writeback fails, this descriptor is the one to hear of it
	case !f.n.named() || f.n.linked.Load() || f.v.disk.Fstat(f.FD, &st) != nil || st.Nlink != 1:
		return false // no name surely leads to it, now and after an unlink
	}
	f.closeFDs()
	f.parked.Store(true)
	return true
}

// named reports whether a name is known that leads to the node.
func (n *Node) named() bool {
	n.v.nodes.mu.Lock()
	defer n.v.nodes.mu.Unlock()
	return !n.gone && len(n.links) > 0
}

// wake opens the descriptor of a file again that park has closed.
func (f *file) wake() error {
	if !f.used.Load() {
		f.used.Store(true)
	}
	if !f.parked.Load() {
		return nil
	}
	f.mu.RLock()
	parked, rw := f.FD < 0 && !f.closed, f.rw
	f.mu.RUnlock()
	if !parked {
		return nil
	}
	f.v.descriptors.roomForFile() // if there is none, what is kept for short uses serves
	flags := unix.O_RDONLY
	if rw {
		flags = unix.O_RDWR
	}
	var st unix.Stat_t
	fd, err := f.n.openStat(flags, &st)
	if errors.Is(err, unix.EACCES) {
		fd, err = f.n.openForced(flags, &st)
	}
	if rw && errors.Is(err, unix.EPERM) { // it has become immutable
		rw = false
		fd, err = f.n.open(unix.O_RDONLY)
	}
	if err != nil {
		return f.failed("opening it again", err)
	}
	f.mu.Lock()
	defer f.unlock()
	switch {
	case f.FD >= 0 || f.closed:
		f.v.disk.Close(fd)
	case f.rw && !rw && flags == unix.O_RDONLY: // needWrite was faster: the next attempt opens for writing
		f.v.disk.Close(fd)
	default:
		f.FD, f.rw = fd, rw
		f.parked.Store(false)
	}
	return nil
}

// lockAwake takes mu with the descriptor open.
func (f *file) lockAwake() error {
	for {
		if err := f.wake(); err != nil {
			return err
		}
		f.mu.Lock()
		if f.FD >= 0 {
			return nil
		}
		closed := f.closed
		f.unlock() // just now
		if closed {
			return errClosed
		}
	}
}

// awake holds mu for reading with the descriptor open, until unlock is called.
func (f *file) awake() (unlock func(), err error) {
	for {
		if err := f.wake(); err != nil {
			return nil, err
		}
		f.mu.RLock()
		if f.FD >= 0 || f.closed {
			return f.mu.RUnlock, nil
		}
		f.mu.RUnlock() // just now
	}
}
