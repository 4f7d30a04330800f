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

// fdLimits are derived from the limit of the process.
type fdLimits struct {
	files  int64 // from so many open descriptors on, no file is opened for a program
	dirs   int64 // likewise, no directory
	cached int   // directories that are kept open without being in use
	closed int   // closed files that wait for the settler
}

func newFDLimits(limit uint64) fdLimits {
	n := int64(min(limit, 1<<30))
	kept := min(n/4, mostKept)
	return fdLimits{files: n - kept, dirs: n - kept/2, cached: int(min(n/8, mostDirFDs)), closed: int(min(n/8, settleMost))}
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
func (v *Volume) roomForFile() error { return v.room(v.fdLimits.files) }

// roomForDir is roomForFile for an open directory.
func (v *Volume) roomForDir() error { return v.room(v.fdLimits.dirs) }

func (v *Volume) room(most int64) error {
	if v.fds.Load() < most {
		return nil
	}
	v.closeIdleDirs()
	if v.fds.Load() >= most && !v.o.ReadOnly {
		v.settler.settle(v.settler.due(0)) // closed files keep theirs until they are settled
	}
	if v.fds.Load() < most {
		return nil
	}
	v.report("descriptors", "programs have too many files open on the mount; raise the limit of the daemon (ulimit -n)", unix.ENFILE)
	return unix.ENFILE
}

// closeIdleDirs closes the descriptors of directories that are not in use, and reports
// whether there were any.
func (v *Volume) closeIdleDirs() bool {
	v.fdMu.Lock()
	defer v.fdMu.Unlock()
	return v.closeDirsDownTo(0)
}

// closeDirsDownTo closes the least recently used directories until only n are open without
// being in use. fdMu is held.
func (v *Volume) closeDirsDownTo(n int) (some bool) {
	for e := v.dirLRU.list.Back(); e != nil && v.dirLRU.list.Len() > n; {
		prev, node := e.Prev(), e.Value.(*Node)
		if node.dirRefs == 0 {
			v.closeDirLocked(node)
			some = true
		}
		e = prev
	}
	return some
}

// noDescriptor reports whether a call failed since the process or the system has no
// descriptor left.
func noDescriptor(err error) bool { return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) }
