//go:build linux && !portable

package volume

import (
	"errors"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/layout"
)

// Reasons why a file cannot be used as it is.
var errNeedsLease = errors.New("the file is being written, perhaps by another host")

// needsKey says that a file has other content, whose key is not at hand.
type needsKey struct {
	error
	hdr *blockcrypt.Header
}

// unsettled says that a file was left unfinished by another host.
type unsettled struct {
	error
	session uint64
}

// mostAhead is the length in bytes up to which a ciphertext file is read whole with its
// header.
const mostAhead = 16 << 10

// aheadFor is how long a read-only mount, beside which another may write, uses the data that
// it read with the header.
const aheadFor = time.Second

// readHeader reads and checks the header of a file of this length. The first block comes with
// it, and a small file as a whole.
func (c *content) readHeader(f *file, length int64) error {
	v := c.v
	sizes := v.sizes()
	n := min(length, mostAhead)
	if length > mostAhead {
		n = sizes.Read()
	}
	hdr, b, err := layout.ReadHeader(&v.disk, f.FD, int(n), n == length)
	if v.sessions.unwritten(err) && v.repairs() && f.rw && (f.lease.held || !v.Shared()) {
		v.log.Warn("a file was never written before the power failed; it is empty now", "at", c.n.where())
		if err := v.disk.Truncate(f.FD, 0); err != nil {
			return err
		}
		return v.disk.Datasync(f.FD)
	}
	if u, ok := errors.AsType[layout.Unwritten](err); ok && f.lease.held && !v.sessions.wasBad(u.Session) &&
		!(u.Session == 0 && v.repairs()) {
		return unsettled{err, u.Session}
	}
	if err != nil {
		return err
	}
	if err := layout.CheckHeader(hdr, sizes, v.cfg.Volume, v.vk); err != nil {
		return err
	}
	f.Geo = hdr.Geometry
	head := slices.Clone(b[:min(len(b), f.Geo.Header())])
	f.SetHeader(hdr, head)
	f.domain.Store(v.lists.of(hdr))
	f.Ahead.Store(&b)
	return nil
}

// takeState believes the state, or repairs the file. openMu is held.
func (c *content) takeState(f *file, length int64) error {
	v, s := c.v, f.Header.State
	dirty := f.Unfinished()
	if v.Shared() && (!v.o.ReadOnly || !f.lease.held) {
		return takeShared(c, f, length)
	}
	if v.o.ReadOnly && dirty {
		if err := f.BelievePartial(length); err != nil {
			return err
		}
		v.log.Warn("a file was being written when it was copied, or is now; the blocks that open are shown", "at", c.n.where(), "bytes", f.Size)
		return nil
	}
	bad := v.sessions.isBad(s.Session)
	if !v.o.ReadOnly {
		unsure := v.sessions.wasBad(s.Session) || v.doubts.of(c.n) && bad
		if unsure && f.Unconfirmed() || dirty && bad {
			return c.repair(f, length)
		}
		if dirty {
			return &blockcrypt.DamageError{Class: blockcrypt.BadState, Pos: blockcrypt.StateOffset,
				Detail: "the file was being written when it was copied here; kmsfs cat gives what opens"}
		}
	}
	return f.Believe(length, c.past, bad)
}

// takeShared is takeState in a volume that other hosts write, too.
func takeShared(c *content, f *file, length int64) error {
	s := &c.v.sessions
	bad := s.wasBad(f.Header.State.Session)
	if !f.Unfinished() && !(bad && f.Unconfirmed()) {
		err := f.Believe(length, c.past, false)
		if err != nil && !f.lease.held {
			return errNeedsLease
		}
		// A host whose disk was full has left a state of more than it could write.
		if blockcrypt.ClassOf(err) != blockcrypt.BadSize || !f.Unconfirmed() {
			return err
		}
	}
	switch {
	case !f.lease.held:
		return errNeedsLease
	case !f.rw:
		return unix.EACCES
	case bad, s.isBad(f.Header.State.Session): // of a host that is dead, or of this one
		return repairLocked(c, f, length)
	}
	return unsettled{&blockcrypt.DamageError{Class: blockcrypt.BadState, Pos: blockcrypt.StateOffset,
		Detail: "another host has left the file unfinished and is alive (kmsfs hosts), or the file was copied here while it was written; kmsfs cat gives what opens"},
		f.Header.State.Session}
}

// repair brings a file into order whose session ended badly. openMu is held, and nobody else has
// the file.
func (c *content) repair(f *file, length int64) error {
	if !f.rw {
		if err := f.needWrite(); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.unlock()
	return repairLocked(c, f, length)
}

// repairLocked is repair of a file that can be written; mu is held, or nobody else knows the file.
func repairLocked(c *content, f *file, length int64) error {
	v := c.v
	// The sync at the mount's begin does not cover a file of which a later one failed.
	done, err := f.Repair(length, v.doubts.of(c.n), v.ending)
	if err == nil && v.Shared() { // before another host has the lease
		err = f.SyncFailed(v.disk.Fsync(f.FD))
	}
	if err == nil && done.Changed {
		v.log.Warn("a file was repaired", "at", c.n.where(), "bytes", done.Size, "bytes it had", done.Was)
	}
	return err
}

// errEnding is why a repair stops: the next mount does it.
var errEnding = errors.New("the volume is being unmounted; the next mount repairs the file")
