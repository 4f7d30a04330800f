//go:build linux && !portable

package cfile

import (
	"bytes"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
)

// Sync is fsync(2). The owner's lock is held when it is called and when it returns; unlocked
// calls its argument without it, so that others go on while the disk works.
func (f *File) Sync(unlocked func(func() error) error) error {
	if f.phase == Broken {
		return unix.EIO
	}
	if f.Keyless() {
		return syncKeyless(f)
	}
	if err := f.trim(); err != nil {
		return err
	}
	if f.phase == Fresh && (f.Flags()&blockcrypt.Dirty != 0 || f.Header.State.Size != f.Size) {
		// A fresh file's state goes with the same sync: clean, at its exact length.
		if err := f.writeState(cleanFlags(f)); err != nil {
			return err
		}
	}
	size, cuts, changes, wrote := f.Size, f.cuts, f.changes, f.wrote
	f.Confirm()                       // confirmed counts from here
	if !f.times.Near(f.times.Mtime) { // else it can wait for the file's last close
		if err := f.PutMtime(); err != nil {
			return err
		}
	}
	fd := f.FD
	err := unlocked(func() error { return f.Disk.Fsync(fd) })
	if f.SyncFailed(err); err != nil {
		return err
	}
	f.synced, f.covered = max(f.synced, int64(changes)), max(f.covered, wrote)
	if f.cuts == cuts {
		f.durable = max(f.durable, size)
	}
	if f.phase != Cutting || f.Keyless() {
		return nil
	}
	if f.cuts != cuts { // of a truncation that this sync did not cover
		if err := f.datasync(); err != nil {
			return err
		}
	}
	if err := f.writeState(f.Flags() &^ blockcrypt.Cut); err != nil {
		return err
	}
	return f.datasync()
}

// syncKeyless is Sync of a file whose key was wiped: nothing has changed since it was settled.
func syncKeyless(f *File) error {
	if f.Unfinished() {
		return unix.EIO // it could not be settled: nothing is confirmed
	}
	f.Confirm()
	err := f.Disk.Fsync(f.FD)
	if f.SyncFailed(err); err == nil {
		f.durable, f.synced = f.Size, int64(f.changes)
	}
	return err
}

// cleanFlags are the flags of a clean state: sparse goes when no hole is left.
func cleanFlags(f *File) uint32 {
	if f.holes.none() {
		return 0
	}
	return f.Flags() & blockcrypt.Sparse
}

// Rest brings a fresh file into the form that a closed one has, and puts the
// time back.
func (f *File) Rest() error {
	if f.Keyless() {
		return nil // it was brought into order before the key went
	}
	if err := f.trim(); err != nil {
		return f.host.Failed("close", err)
	}
	if f.phase == Fresh && f.Flags()&blockcrypt.Dirty != 0 {
		if err := f.writeState(cleanFlags(f)); err != nil {
			return f.host.Failed("close", err)
		}
	}
	return f.PutMtime()
}

// Settle brings a file whose data a sync has made durable, up to the change
// with the number changes, into its final form: clean, at its exact length,
// with its own time. It does nothing where the file has changed since.
func (f *File) Settle(changes uint64) error {
	if !f.Unsettled() || f.changes != changes {
		return nil
	}
	f.Confirm()
	f.confirmed, f.durable, f.synced = f.Size, f.Size, int64(f.changes)
	if err := f.writeState(cleanFlags(f)); err != nil {
		return err
	}
	if !f.reservedBeyond() || f.overlong {
		if err := f.Disk.Truncate(f.FD, f.Geo.Exact(f.Size)); err != nil {
			return err
		}
		f.Whole, f.overlong, f.reserved = false, false, 0
	}
	return f.PutMtime()
}

// SettleNow is [File.Settle] with a sync of this file alone.
func (f *File) SettleNow() error {
	if f.phase == Fresh || f.Keyless() {
		return f.Rest()
	}
	if !f.Unsettled() {
		return nil
	}
	if err := f.datasync(); err != nil {
		return err
	}
	return f.Settle(f.changes)
}

// SettleWhole is [File.Rest] and [File.Settle] of a file that a sync has made durable as it is, up
// to the change with the number changes. When it returns without an error, the state says so too,
// of a file that was closed before and is clean already.
func (f *File) SettleWhole(changes uint64) error {
	if f.changes != changes {
		return nil
	}
	if err := f.Rest(); err != nil {
		return err
	}
	if err := f.Settle(changes); err != nil {
		return err
	}
	if f.Header != nil && f.Unconfirmed() && !f.Unsettled() {
		f.Confirm()
		f.confirmed, f.durable = f.Size, f.Size
		if err := f.writeState(cleanFlags(f)); err != nil {
			return err
		}
		if err := f.PutMtime(); err != nil {
			return err
		}
	}
	f.synced = int64(f.changes)
	return nil
}

// Restamp writes the state again, if another session than the present one wrote it and it says
// that something may not be on the disk.
func (f *File) Restamp() error {
	if f.phase == Broken || f.Header == nil || f.Keyless() ||
		f.Header.State.Session == f.host.Session() || !f.Unconfirmed() {
		return nil
	}
	return f.writeState(f.Flags())
}

// AtRest reports whether all changes were brought to rest by [File.ComeToRest], or none was made since
// the state was believed.
func (f *File) AtRest() bool { return f.rested == int64(f.changes) && !f.Unsettled() }

// ComeToRest brings the file into its final form, durably, so that another host can go on with it. If
// the content changed, the state has another generation then. The file keeps the time mtime; if that is
// nil, it has the one of its last write.
func (f *File) ComeToRest(mtime *unix.Timespec) error {
	switch {
	case f.phase == Broken:
		return unix.EIO
	case f.AtRest():
		return nil
	case f.Keyless():
		return unix.EKEYEXPIRED // its changes were settled before the key went, or cannot be
	}
	if f.times.anyTime = mtime == nil; mtime != nil {
		f.times.Mtime = *mtime
	}
	defer func() { f.times.anyTime = false }()
	if err := f.trim(); err != nil {
		return err
	}
	if f.Header == nil {
		return restWith(f, func() error { return f.PutMtime() })
	}
	fresh := f.phase == Fresh
	if fresh || f.Unsettled() { // the state says that all is confirmed, which a repair relies on
		if err := f.datasync(); err != nil {
			return err
		}
	}
	switch {
	case fresh: // it has its exact length already
		f.Confirm()
		f.durable = f.Size
	case f.Unsettled():
		return restWith(f, func() error { return f.Settle(f.changes) })
	}
	return restWith(f, func() error {
		if err := f.writeState(cleanFlags(f)); err != nil {
			return err
		}
		return f.PutMtime()
	})
}

// restWith makes the last change of a file that comes to rest, and all durable.
func restWith(f *File, last func() error) error {
	if err := last(); err != nil {
		return err
	}
	if err := f.SyncFailed(f.Disk.Fsync(f.FD)); err != nil {
		return err
	}
	f.Confirm()
	f.durable, f.synced, f.rested, f.covered = f.Size, int64(f.changes), int64(f.changes), f.wrote
	return nil
}

// GiveUp makes the file broken: the data on the disk may be another host's by now.
func GiveUp(f *File) { f.enter(Broken) }

// SameHead reports whether the file on the disk, whose first bytes are given, is as it was left: its state
// is the one that was believed or written last.
func SameHead(f *File, head []byte) bool {
	return f.phase != Unread && f.phase != Partial && f.Header != nil && bytes.Equal(f.head, head)
}

// HeadOf returns a copy of the header's bytes as they are on the disk; none of an empty file.
func HeadOf(f *File) []byte { return bytes.Clone(f.head) }
