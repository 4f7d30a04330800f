//go:build linux && !portable

package volume

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// Faults of a volume that is to be written, besides its keys and damage.
var (
	ErrLocked   = layout.ErrLocked   // see LockedError
	ErrLockFile = layout.ErrLockFile // kmsfs.lock could not be opened
	ErrNotEmpty = errors.New("the directory is not empty")
)

// LockedError says that another mount has the volume open for writing.
type LockedError = layout.LockedError

// UnfitError says which property a backing filesystem lacks.
type UnfitError = layout.UnfitError

// CheckBacking tests in an empty directory whether its filesystem has the properties that a
// volume needs; an [UnfitError] names the first one that it lacks. The notes are about
// properties that programs may miss.
func CheckBacking(dir string, plainNames bool) (notes []string, err error) {
	return layout.CheckBacking(dir, plainNames)
}

// Writer returns a [LockedError] if a mount, of this host or of another one that shares the
// directory, has the volume in dir open for writing; nil if none has.
func Writer(dir string) error { return layout.Writer(dir) }

// Options of [Unlocked.Open]; the zero value is a read-write tree that keeps times by itself.
type Options struct {
	ReadOnly    bool
	KernelTimes bool          // the kernel's writeback cache is on: it owns the times of open files
	Logger      *slog.Logger  // none: nothing is logged
	Pool        int           // data keys made ahead, see [keystore.RingOptions]
	MaxAge      time.Duration // how long a proof that a key may be used is good for; 5 min if zero
	Grace       time.Duration // how long known keys are used while a key service cannot be reached; 1 h if zero
	FileLease   bool          // each open file's key is proven by itself
	Alone       bool          // of a shared volume: no other host may have it mounted
	// Stores opens the store of a recipient that another host has added to a shared volume. It may be nil.
	Stores     func(context.Context, blockcrypt.Recipient) (keystore.Store, error)
	NoPrefetch bool // no key is unwrapped before its file is opened

	// Set by tests only.
	hooks   disk.Hooks
	torn    bool          // pages can tear, on a filesystem in memory too
	fdLimit uint64        // of descriptors, instead of the process's own
	beat    time.Duration // instead of beatEvery
}

// base is what does not change while a volume is open, but for headers.
type base struct {
	disk        disk.Disk
	o           Options
	log         *slog.Logger
	cfg         *blockcrypt.Config
	headers     atomic.Pointer[layout.Sizes] // replaced while files are given other ones
	vk          *blockcrypt.VolumeKeys
	root        *Node
	rootD       int    // the root's descriptor, which holds one of the writer's locks
	lockFD      int    // of kmsfs.lock, which holds the other; -1 if read-only
	plain       bool   // names mode
	calm        bool   // a filesystem in memory: pages cannot tear, no S
	blurred     bool   // the filesystem's cache on this host may lack writes of other hosts
	super       bool   // running as root: new files are given to their users
	granularity uint32 // of the times of files on the disk, in nanoseconds
}

// sharing is what only a shared volume has.
type sharing struct {
	peers  peers
	leases leases
	locks  hostLocks
}

// Volume is an open encrypted tree.
type Volume struct {
	base
	namespace
	lists       lists
	nodes       nodeTable
	dirFDs      dirFDs
	descriptors descriptors
	sessions    sessions
	sharing
	doubts     doubts
	space      space
	access     access
	recipients Recipients
	reports    reports
	walker     walker
	settler    settler
	prefetch   prefetcher
	backing    backing

	clock atomic.Uint64 // counts changes of attributes, see told

	bg   sync.WaitGroup
	quit chan struct{} // closed by Close
}

// remote are filesystems whose disk is another host's, or may be: NFS, those in user space (GlusterFS,
// MooseFS and others), SMB, CephFS, Lustre, 9P.
var remote = []uint32{unix.NFS_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC, 0xff534d42, 0xfe534d42, 0x00c36400, 0x0bd00bd0, unix.V9FS_MAGIC}

// coherent are filesystems whose cache is as new as the last lock or open of a file: those of one host,
// and NFS.
var coherent = []int64{unix.NFS_SUPER_MAGIC, unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC}

// Open gives the tree of a volume that [Found.Unlock] opened. It takes the volume's
// lock and the ring, which Close closes.
func (u *Unlocked) Open(o Options) (*Volume, error) {
	v := &Volume{
		base: base{
			disk: disk.Disk{Hooks: o.hooks}, o: o, log: o.Logger,
			cfg: u.Config, vk: u.keys, plain: u.Config.Names == blockcrypt.NamesPlain,
			rootD: u.root, lockFD: -1, super: unix.Geteuid() == 0,
		},
		quit: make(chan struct{}),
	}
	if v.log == nil {
		v.log = slog.New(slog.DiscardHandler)
	}
	v.reports.log = v.log
	v.disk.Took = v.backing.took
	v.namespace.v, v.descriptors.v = v, v
	v.access.v, v.access.writeWithin = v, writeWithin
	v.walker.v, v.leases.v, v.locks.v = v, v, v
	var err error
	sizes, err := layout.SizesOf(u.Config)
	if err != nil {
		return nil, err
	}
	if v.cfg.Shared && !o.ReadOnly {
		if err := fitForHosts(&v.disk, v.rootD); err != nil {
			return nil, err
		}
	}
	if !o.ReadOnly {
		if v.lockFD, err = layout.LockWriter(&v.disk, v.rootD, v.cfg.Shared, o.Alone); err != nil {
			return nil, err
		}
	}
	v.peers.died = func(sessions []uint64) {
		if err := v.disk.Syncfs(v.rootD); err != nil { // what only the page cache has must be on the disk before a repair believes it
			v.doubts.beginAll()
		}
		v.sessions.addBad(sessions)
		v.walker.again()
	}
	v.peers.lapsed = func() {
		for _, f := range v.nodes.files() {
			if f.n.locked() { // a program may go on to write under a lock that another has by now
				f.lease.stale.Store(true)
			}
		}
	}
	v.peers.moved = v.walker.moves.Load
	v.peers.met = func() uint64 { return v.recipients.follow(context.Background()) }
	v.sessions.d, v.sessions.root, v.sessions.vk, v.sessions.doubts = &v.disk, v.rootD, v.vk, &v.doubts
	v.space.d, v.space.root = &v.disk, v.rootD
	opened := false
	defer func() {
		if !opened {
			v.peers.end(false)
			v.unlockWriter()
		}
	}()
	var st unix.Stat_t
	if err := v.disk.Fstat(v.rootD, &st); err != nil {
		return nil, err
	}
	sfs, err := v.disk.Statfs(v.rootD)
	if err != nil {
		return nil, err
	}
	memory := sfs.Type == unix.TMPFS_MAGIC || sfs.Type == unix.RAMFS_MAGIC
	v.calm = memory && !o.torn
	v.disk.Fresh = v.cfg.Shared
	v.disk.Remote = slices.Contains(remote, uint32(sfs.Type))
	v.blurred = v.cfg.Shared && !memory && !slices.Contains(coherent, int64(sfs.Type))
	if memory {
		v.disk.NeverWaits()
	}
	v.root = newNode(v, 1, &st)
	v.root.lookups, v.root.dirFD = 1, v.rootD
	v.root.dirID, v.root.hasID, v.root.idSynced = u.Config.Volume, true, true
	v.nodes.init(v, v.root)
	v.disk.Idle = v.descriptors.giveUpIdle
	v.descriptors.settle = func() { v.settler.settle(v.settler.due(0)) }
	v.descriptors.fdLimits = newFDLimits(cmp.Or(o.fdLimit, processFDs()))
	v.dirFDs.d, v.dirFDs.most = &v.disk, v.descriptors.cached
	if !o.ReadOnly {
		if layout.LacksLinks(&v.disk, v.rootD) {
			v.log.Warn("this copy of the volume was made without symlinks: the volume's own symlinks and its names of more than 160 bytes are missing; kmsfs fsck tells more")
		}
		if err := dropRekeyed(&v.disk, v.rootD); err != nil {
			v.log.Warn("what a crash has left of kmsfs rekey cannot be removed", "error", err)
		}
		v.granularity = layout.TimeGranularity(&v.disk, v.lockFD)
		if err := v.beginSession(); err != nil {
			return nil, fmt.Errorf("begin to write to the volume: %w", err)
		}
	}
	if v.o.MaxAge == 0 {
		v.o.MaxAge = 5 * time.Minute
	}
	v.lists = lists{v, &domain{v: v}}
	v.lists.own.ring = v.lists.newRing(v.lists.own, u.stores,
		keystore.RingOptions{Sample: keystore.SampleOfVolume(u.Config.Volume, u.Config.Recipients)})
	v.recipients.v = v
	v.headers.Store(&sizes)
	v.recipients.now.Store(&listed{u.Config, u.stores, v.lists.renewed(u.Config, nil, u.ofDirectories)})
	u.root = -1
	v.disk.Adopt()
	if !v.lists.own.ring.MemoryLocked() {
		v.log.Info("data keys can be swapped out: RLIMIT_MEMLOCK is too low to lock their memory, 1 MiB is enough")
	}
	v.prefetch.start(v)
	v.access.renewKeys()
	if !o.ReadOnly {
		v.settler.start(v)
		if v.repairs() {
			v.walker.again()
		}
	}
	if v.cfg.Shared {
		v.bg.Go(v.leases.run)
		v.peers.start()
	}
	opened = true
	if o.Alone {
		if err := v.peers.alone(func() error { return nil }); err != nil {
			v.Close()
			return nil, err
		}
	}
	return v, nil
}

// unlockWriter gives the locks of [layout.LockWriter] back.
func (v *Volume) unlockWriter() {
	if v.lockFD >= 0 {
		v.disk.Close(v.lockFD)
		v.disk.Flock(v.rootD, unix.LOCK_UN)
		v.lockFD = -1
	}
}

// KeyCounts returns what was done with keys so far.
func (v *Volume) KeyCounts() (sum keystore.Counts) {
	ds := v.lists.now()
	for _, d := range slices.Concat(ds.all, ds.dropped) { // they never sink
		sum = sum.Plus(d.ring.Counts())
	}
	return sum
}

// KeyStates returns what is known of the recipients that are trusted.
func (v *Volume) KeyStates() (out []keystore.StoreState) {
	for _, d := range v.lists.now().all {
		for _, s := range d.ring.States() {
			i := slices.IndexFunc(out, func(x keystore.StoreState) bool { return x.URI == s.URI })
			switch {
			case i < 0:
				out = append(out, s)
			case out[i].Error == nil && s.Error != nil: // of several lists: the worst
				out[i] = s
			}
		}
	}
	return out
}

// ReadOnly reports whether the tree can be changed.
func (v *Volume) ReadOnly() bool { return v.o.ReadOnly }

// TimeGranularity returns how exactly the disk keeps the times of files, in nanoseconds: a
// power of ten, at most 10^9; 0 for a read-only volume.
func (v *Volume) TimeGranularity() uint32 { return v.granularity }

// SyncWaits reports whether fsync waits for a disk: not on a tmpfs.
func (v *Volume) SyncWaits() bool { return !v.calm }

// Statfs passes the backing filesystem's figures on; names have up to 255 bytes.
func (v *Volume) Statfs() (unix.Statfs_t, error) {
	s, err := v.disk.Statfs(v.rootD)
	s.Namelen = 255
	return s, err
}

// Close settles every file, makes all durable and ends the session. Handles
// must have been released.
func (v *Volume) Close() error {
	v.walker.stop()
	close(v.quit)
	v.bg.Wait()
	var err error
	if !v.o.ReadOnly {
		v.settler.stop()
		err = v.endSession()
	}
	err = errors.Join(err, v.peers.end(err != nil))
	v.lists.close()
	for _, f := range v.nodes.files() { // that could not be settled
		f.mu.Lock()
		f.closed = true
		f.closeFDs()
		f.unlock()
	}
	v.dirFDs.closeAll()
	v.nodes.closeRemoved()
	v.unlockWriter()
	v.disk.Close(v.rootD)
	return err
}

// closeRings wipes all keys.
func (l *lists) close() {
	ds := l.now()
	for _, d := range slices.Concat(ds.all, ds.dropped) {
		d.ring.Close()
	}
}

func (v *Volume) endSession() error {
	if v.peers.fenced.Load() {
		v.log.Error("the volume is given up", "error", errFenced)
		return errFenced
	}
	err := v.syncAll()
	files := v.nodes.files()
	errs := make([]error, len(files))
	sideBySide(files, func(i int, f *file) {
		f.mu.Lock()
		defer f.unlock()
		switch {
		case v.Shared():
			errs[i] = f.failed("settling", f.lease.giveBack())
		case !f.closed && f.rw && !f.Broken() && !f.n.Gone():
			errs[i] = f.failed("settling", errors.Join(f.Rest(), f.Settle(f.Changes())))
		}
	})
	if err = errors.Join(err, errors.Join(errs...)); err == nil {
		err = v.syncAll()
	}
	if err == nil && v.sessions.isStuck() {
		err = errStuck
	}
	if err != nil {
		v.log.Error("the session could not be ended well; the next mount repairs what is left",
			"error", err)
		return err
	}
	return v.sessions.end()
}

// Vitals are what monitoring asks of a volume.
type Vitals struct {
	// Err says why the volume is not well, nil if it is: its keys may not be used any more, or an error
	// left a file that the next mount has to repair. A volume that is suspended is well.
	Err error
	// Faults are how many were logged, by their kind: "damage-" and the class, "key-" and the kind of
	// a key service's failure, "other".
	Faults      map[string]uint64
	Descriptors int64 // of the ciphertext, that are open
	// Backing is how long the filesystem of the ciphertext took: for a "read" of pages that are not in
	// its page cache, a "sync", and to "settle" pages before they are overwritten.
	Backing map[string]Durations
}

// Vitals returns them.
func (v *Volume) Vitals() Vitals {
	out := Vitals{Descriptors: v.disk.Descriptors(), Backing: v.backing.durations()}
	// Somebody may have no right to the keys of a directory, and all is well.
	if r := v.lists.own.refusal.Load(); r != nil && v.Suspended() == nil {
		out.Err = r.err
	}
	if v.sessions.isStuck() {
		out.Err = errors.Join(out.Err, errStuck)
	}
	v.reports.mu.Lock()
	defer v.reports.mu.Unlock()
	out.Faults = maps.Clone(v.reports.kinds)
	return out
}
