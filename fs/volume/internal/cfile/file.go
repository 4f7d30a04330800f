//go:build linux && !portable

package cfile

import (
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// Host is what a file that is written needs of the volume around it. Its methods are called while
// the file's lock is held, and take no lock of a file or a node.
type Host interface {
	// Session returns the number that states name.
	Session() uint64
	// NewFile makes the header and the keys of new content, from a data key at hand.
	NewFile() (*blockcrypt.Header, *blockcrypt.FileKeys, error)
	// TakeSpace calls take, which takes n bytes of space for the file.
	TakeSpace(n int64, take func() error) error
	// Failed tells of a failure of op, and returns err.
	Failed(op string, err error) error
	// Broke is told when disk and memory differ after an error, so that this session cannot end
	// well; bySync says that a sync failed.
	Broke(bySync bool)
}

// Rules are those that depend on the mount.
type Rules struct {
	Calm        bool // pages cannot tear: no S
	KernelTimes bool // the kernel owns the times of open files
}

// File is a ciphertext file that can be written. It follows FORMAT.md, section 4: when a call
// returns, with or without an error, a power cut at any moment of it leaves confirmed bytes
// readable. Its owner has one lock for it, held for writing across each call of its methods, for
// reading across those of [Content]; none says otherwise.
type File struct {
	pages

	holes    holes
	reserved int64 // this many bytes of the ciphertext file have their space, as far as is known
	overlong bool  // the ciphertext still has pages behind its end
}

// freshFor is how long nothing of a new file counts as confirmed without fsync.
const freshFor = 30 * time.Second

// Opened is a ciphertext file that was opened.
type Opened struct {
	FD    int
	Mtime unix.Timespec
}

// New returns an open file whose header was not read yet, of a tree on d.
func New(d *disk.Disk, g blockcrypt.Geometry, o Opened, r Rules, h Host) *File {
	f := &File{}
	f.Disk, f.Geo, f.FD = d, g, o.FD
	f.rules, f.host = r, h
	f.tail.k = -1
	f.born = time.Now()
	f.covered = -1
	if f.times.Mtime, f.times.near = o.Mtime, mtimeNear; d.Remote {
		f.times.near = mtimeNearRemote
	}
	return f
}

// BelieveEmpty takes a file of no bytes for an empty one.
func (p *pages) BelieveEmpty() { p.enter(Empty) }

// BelievePartial shows the blocks that open of an unfinished file of this length, which is
// not changed.
func (p *pages) BelievePartial(length int64) error {
	if err := p.LookThrough(length); err != nil {
		return err
	}
	p.enter(Partial)
	return nil
}

// Believe takes the clean state of a file of this length. If it was closed in a session that is
// not known to have ended well, unsynced, only its floor is known to be on the disk; past then says
// whether something of it can be confirmed.
func (f *File) Believe(length int64, past Past, unsynced bool) error {
	empty, err := f.Accept(length)
	if err != nil {
		return err
	}
	if empty {
		f.Header, f.Keys, f.head = nil, nil, nil
		f.enter(Empty)
		return nil
	}
	s, d := f.Header.State, &f.durability
	d.confirmed, d.durable, d.synced = s.Size, s.Size, int64(d.changes)
	same := past.file == f.Header.File
	if same && past.key.drawn {
		f.key = past.key
	}
	if unsynced {
		d.durable, d.synced = s.Floor, -1
		if same && !past.born.IsZero() && time.Since(past.born) < freshFor && s.Floor == 0 &&
			s.Session == f.host.Session() {
			d.confirmed, d.born = 0, past.born
			f.enter(Fresh)
			return nil
		}
	}
	f.enter(Settled)
	return nil
}

// Unsettled reports whether the file on the disk is not yet in its final form.
func (f *File) Unsettled() bool {
	if f.Keyless() {
		return false
	}
	switch f.phase {
	case Dirty, Growing, Cutting:
		return true
	case Fresh:
		return f.Flags()&blockcrypt.Dirty != 0 || f.overlong
	case Settled:
		return f.overlong || f.Whole && !f.reservedBeyond()
	default:
		return false
	}
}

// begin gives an empty file its header in memory: the first run carries it to the disk. Of a file
// that will have size bytes with it, the state is that of a closed one, if size is not 0.
func (f *File) begin(flags uint32, size int64) error {
	hdr, keys, err := f.host.NewFile()
	if err != nil {
		return err
	}
	keys.SetState(hdr, blockcrypt.State{Session: f.host.Session(), Generation: 1, Size: size, Flags: flags})
	head, err := hdr.Encode()
	if err != nil {
		return err
	}
	f.Header, f.Keys, f.head, f.Geo = hdr, keys, head, hdr.Geometry
	f.confirmed, f.durable, f.Whole = 0, 0, false
	f.born = time.Now()
	f.key.drawn = false
	f.holes = holes{known: true}
	f.tail.k = -1
	f.enter(Fresh)
	return nil
}

// abandon undoes begin after the first run could not be written. Some of it may
// be on the disk, so the next attempt takes another key.
func (f *File) abandon() {
	f.becomeEmpty()
	if err := f.Disk.Truncate(f.FD, 0); err != nil {
		f.host.Failed("emptying the file again", err)
		f.enter(Broken)
	}
}

// becomeEmpty forgets the content's keys.
func (f *File) becomeEmpty() {
	f.Header, f.Keys, f.head = nil, nil, nil
	f.Size, f.confirmed, f.durable, f.Whole = 0, 0, 0, false
	f.tail.k, f.holes, f.overlong, f.reserved = -1, holes{}, false, 0
	f.cuts++
	f.enter(Empty)
}

// Confirm notes that all bytes that the file has may be confirmed from here on.
func (f *File) Confirm() {
	f.confirmed = max(f.confirmed, f.Size)
	if f.phase == Fresh && f.Size > 0 {
		if f.Flags()&blockcrypt.Dirty != 0 {
			f.enter(Dirty)
		} else {
			f.enter(Settled)
		}
	}
}

// growOld ends the time in which nothing of the file counts as confirmed: when the file is
// old enough, or when its state is of an earlier session, which may leave the marker at any
// time.
func (f *File) growOld() {
	if f.phase == Fresh && (time.Since(f.born) > freshFor || f.Header.State.Session != f.host.Session()) {
		f.Confirm()
	}
}
