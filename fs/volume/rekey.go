//go:build linux && !portable

package volume

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// RekeyOptions of [Volume.Rekey].
type RekeyOptions struct {
	AtOnce   int                 // files at the same time; 1 if zero
	headers  bool                // only those that have headers of the former size
	Progress func(Rekeyed)       // told now and then, by one goroutine at a time; it may be nil
	Failed   func(string, error) // told of each file that has its old key, likewise
}

// Rekeyed counts what [Volume.Rekey] has done.
type Rekeyed struct {
	Files   int64 `json:"files"`   // that were looked at
	Changed int64 `json:"changed"` // that have a new data key
	Failed  int64 `json:"failed"`
}

// Why a file has its old data key.
var (
	ErrInUse     = errors.New("a program has it open, or has changed it meanwhile")
	ErrLinks     = errors.New("it has several names, which would become several files")
	ErrImmutable = errors.New("it is immutable or append-only")
	ErrAbsent    = errors.New("a new key cannot be wrapped for a recipient that the file has")
)

// Rekey gives the files below a node, or the node itself, new data keys: their content is encrypted
// again into a new ciphertext file, which then takes the place of the old one. Mode, owner, times
// and extended attributes stay; the inode is another one. It needs the space of the files that are
// changed at the same time. Files that programs have open keep their keys. Where a power cut
// interrupts it, each file is the old one or the new one. When it returns without an error, all is
// durable.
func (ns *namespace) Rekey(ctx context.Context, n *Node, o RekeyOptions) (done Rekeyed, err error) {
	v := ns.v
	if v.o.ReadOnly {
		return done, unix.EROFS
	}
	err = v.peers.alone(func() error {
		done, err = rekeyAlone(ctx, ns, n, o)
		return err
	})
	return done, err
}

// rekeyAlone is Rekey while no other host has the volume mounted.
func rekeyAlone(ctx context.Context, ns *namespace, n *Node, o RekeyOptions) (done Rekeyed, err error) {
	v := ns.v
	if err := v.Wait(ctx); err != nil { // files of a session that did not end well are repaired first
		return done, err
	}
	var mu sync.Mutex
	count := func(changed bool, at string, err error) {
		mu.Lock()
		defer mu.Unlock()
		done.Files++
		if changed {
			done.Changed++
		}
		if err != nil {
			done.Failed++
			if o.Failed != nil {
				o.Failed(at, err)
			}
		}
		if o.Progress != nil {
			o.Progress(done)
		}
	}
	file := func(ctx context.Context, n *Node) {
		changed, err := rekey(ctx, n, o.headers)
		gone := errors.Is(err, unix.ENOENT) && keystore.KindOf(err) == 0 && !n.named() && n.file.Load() == nil
		if err != nil && (ctx.Err() != nil || gone) {
			return // interrupted, or removed meanwhile
		}
		count(changed, n.PlainPath(), err)
	}
	err = ns.eachFile(ctx, n, o.AtOnce, sweep{file, func(at string, err error) { count(false, at, err) }})
	if err == nil {
		err = v.syncAll()
	}
	if err == nil && v.Shared() {
		err = v.disk.Syncfs(v.rootD)
	}
	return done, err
}

// rekeyTries is how often a file is tried that is in use: the kernel writes a time back a moment
// after a file was closed.
const rekeyTries = 5

// rekey gives one file a new data key. An empty one has none.
func rekey(ctx context.Context, n *Node, headers bool) (changed bool, err error) {
	if headers { // most of the time without its key
		if h, err := n.header(); err == nil && h != nil && h.Geometry != n.v.sizes().Former {
			return false, nil
		}
	}
	for try := range rekeyTries {
		if changed, err = tryRekey(ctx, n, headers); !errors.Is(err, ErrInUse) || ctx.Err() != nil {
			break
		}
		time.Sleep(time.Duration(try) * 20 * time.Millisecond)
	}
	return changed, err
}

func tryRekey(ctx context.Context, n *Node, headers bool) (changed bool, err error) {
	n.v.access.letGo(n.id) // what the kernel holds back belongs to the old file
	old, err := n.Open(ctx, false)
	if err != nil {
		return false, err
	}
	defer old.Release()
	x := &rekeying{v: n.v, n: n, old: old.f}
	if err := x.begin(headers); err != nil || x.header == nil {
		return false, err
	}
	if err := x.make(ctx); err != nil {
		return false, err
	}
	defer x.closeNew()
	for _, step := range []func() error{
		func() error { return x.copyContent(ctx, old) },
		x.copyAttributes,
		func() error { return n.v.disk.Fsync(x.new.FD) },
		x.replace,
	} {
		if err := step(); err != nil {
			return false, errors.Join(err, x.remove())
		}
	}
	x.old.domain.Load().ring.Forget(x.header.File, x.header.Recipients)
	n.v.access.letGo(n.id) // its attributes are others
	return true, nil
}

// rekeying is a file that gets a new data key.
type rekeying struct {
	v *Volume
	n *Node

	old     *file
	header  *blockcrypt.Header // of old; nil if it is empty
	size    int64
	changes uint64 // of its content, when the copy began
	listed  uint64 // the generation of the recipients for which the new key is wrapped
	clock   uint64 // of its attributes, when they were copied

	flags uint32 // of the inode, that the new one gets

	name string // of the new ciphertext file, in the root
	new  *file
}

// begin looks whether the file can get a new key now.
func (x *rekeying) begin(headers bool) error {
	if headers && !x.hasFormer() {
		return x.dropHeader()
	}
	if err := x.old.settleNow(); err != nil {
		return err
	}
	if flags, err := x.n.Flags(); err == nil {
		if flags&(flagImmutable|flagAppend) != 0 {
			return ErrImmutable
		}
		x.flags = flags & (flagNoDump | flagNoAtime)
	}
	if x.n.lost.any.Load() {
		return unix.EIO
	}
	x.old.mu.RLock()
	defer x.old.mu.RUnlock()
	if x.old.Header == nil {
		return nil
	}
	h := *x.old.Header
	x.header, x.size, x.changes = &h, x.old.Size, x.old.Changes()
	if x.old.writers > 0 || x.old.handles > 1 {
		return ErrInUse
	}
	return nil
}

// hasFormer reports whether the file has a header of the former size.
func (x *rekeying) hasFormer() bool {
	x.old.mu.RLock()
	defer x.old.mu.RUnlock()
	sizes := x.v.sizes()
	return sizes.Mixed() && x.old.Header != nil && x.old.Header.Geometry == sizes.Former
}

// dropHeader cuts an empty file that has only a header, of the former size.
func (x *rekeying) dropHeader() error {
	f := x.old
	f.mu.RLock()
	empty := f.Header == nil
	f.mu.RUnlock()
	if !empty {
		return nil
	}
	if err := f.needWrite(); err != nil {
		return err
	}
	if err := f.lockAwake(); err != nil {
		return err
	}
	defer f.unlock()
	var st unix.Stat_t
	if err := x.v.disk.Fstat(f.FD, &st); err != nil || f.Header != nil || st.Size == 0 {
		return err
	}
	if err := x.v.disk.Truncate(f.FD, 0); err != nil {
		return err
	}
	return x.v.disk.Utimens(f.FD, st.Atim, st.Mtim)
}

// make makes the new file, with a data key at hand.
func (x *rekeying) make(ctx context.Context) error {
	now := x.v.recipients.now.Load()
	x.listed = now.cfg.Generation
	d, err := x.v.lists.target(&x.n.content)
	if err != nil {
		return err
	}
	key, err := d.newKey(ctx)
	if err != nil {
		return err
	}
	set := now.set(d)
	has := func(list []blockcrypt.Recipient, uri string) bool {
		i := set.at(uri)
		return slices.ContainsFunc(list, func(r blockcrypt.Recipient) bool { return set.at(r.URI) == i })
	}
	for _, r := range set.recipients {
		if has(x.header.Recipients, r.URI) && !has(key.Wrapped, r.URI) {
			key.Wipe()
			return fmt.Errorf("%w: %s: its key is not at hand, or its service does not answer", ErrAbsent, r.URI)
		}
	}
	var id [8]byte
	rand.Read(id[:])
	x.name = layout.RekeyPrefix + hex.EncodeToString(id[:])
	fd, err := x.v.disk.Open(x.v.rootD, x.name,
		unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|disk.FileFlags, 0o600)
	if err != nil {
		key.putBack()
		return err
	}
	x.new = x.n.newFile(fd, true, &Attr{})
	x.new.BelieveEmpty()
	x.new.handles, x.new.writers = 1, 1
	takes(x.new, key)
	return nil
}

// copyContent copies the plaintext, and makes it durable.
func (x *rekeying) copyContent(ctx context.Context, old *Handle) error {
	to := &Handle{x.new, true}
	for at := int64(0); at < x.size; {
		n, err := to.CopyFrom(ctx, old, at, at, x.size-at)
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF // it has become shorter
		}
		if err != nil {
			return err
		}
		at += n
	}
	f := x.new
	f.mu.Lock()
	defer f.unlock()
	if err := f.Rest(); err != nil {
		return err
	}
	if err := x.v.disk.Datasync(f.FD); err != nil {
		return err
	}
	return f.SettleWhole(f.Changes()) // all of it counts as confirmed, as it does in the old file
}

// copyAttributes copies all that the ciphertext file has besides its content.
func (x *rekeying) copyAttributes() error {
	unlock, err := x.old.awake()
	if err != nil {
		return err
	}
	defer unlock()
	x.clock = x.n.changed.Load()
	d, from, to := &x.v.disk, x.old.FD, x.new.FD
	var st, now unix.Stat_t
	if err := errors.Join(d.Fstat(from, &st), d.Fstat(to, &now)); err != nil {
		return err
	}
	if st.Nlink != 1 {
		return ErrLinks
	}
	if st.Uid != now.Uid || st.Gid != now.Gid {
		if err := d.Chown(to, int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	}
	// An ACL that the root's default gave it.
	err = d.Removexattr(to, aclAccessName)
	if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	if x.flags != 0 {
		var flags uint32
		err := d.Ioctl(to, unix.FS_IOC_GETFLAGS, unsafe.Pointer(&flags))
		if flags |= x.flags; err == nil {
			err = d.Ioctl(to, unix.FS_IOC_SETFLAGS, unsafe.Pointer(&flags))
		}
		if err != nil {
			return err
		}
	}
	if err := x.copyXattrs(from, to); err != nil {
		return err
	}
	if err := d.Chmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	// Capabilities last: a change of the owner takes them away.
	capability, err := d.Getxattr(from, capabilityName)
	if err == nil {
		err = d.Setxattr(to, capabilityName, capability, 0)
	}
	if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	if t := x.old.Times(); t.Touched { // the disk does not have it yet
		st.Mtim = t.Mtime
	}
	return d.Utimens(to, st.Atim, st.Mtim)
}

// copyXattrs copies extended attributes as they are: their encryption does not depend on the file.
func (x *rekeying) copyXattrs(from, to int) error {
	raw, err := x.v.disk.Listxattr(from)
	if err != nil {
		return disk.Ignore(err, unix.EOPNOTSUPP)
	}
	for name := range strings.SplitSeq(string(raw), "\x00") {
		_, rest, _ := strings.Cut(name, ".")
		if name != aclAccessName && !strings.HasPrefix(rest, blockcrypt.Reserved) {
			continue // of a security module, which gives the new file its own; or the capabilities
		}
		v, err := x.v.disk.Getxattr(from, name)
		if err == nil {
			err = x.v.disk.Setxattr(to, name, v, 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// replace puts the new file into the place of the old one, if nobody has changed that meanwhile.
func (x *rekeying) replace() error {
	n := x.n
	at, ok := n.place()
	if !ok {
		return unix.ENOENT
	}
	// No recipient is taken out meanwhile, as if this file did not have it.
	x.v.recipients.stable.RLock()
	defer x.v.recipients.stable.RUnlock()
	if x.v.recipients.generation() != x.listed {
		return ErrInUse // for other recipients by now: once more
	}
	defer x.v.lockDirs(at.dir, at.dir)()
	// The directory's requests wait for this, so this waits for none of the file's.
	if !n.steady.TryLock() {
		return ErrInUse
	}
	defer n.steady.Unlock()
	if !n.openMu.TryLock() {
		return ErrInUse
	}
	defer n.openMu.Unlock()
	f := x.old
	if !f.mu.TryLock() {
		return ErrInUse
	}
	defer f.unlock()
	if f.handles > 1 || f.writers > 0 || f.closed || f.FD < 0 || f.Broken() || f.Changes() != x.changes ||
		n.changed.Load() != x.clock || n.file.Load() != f || x.v.nodes.at(at) != n {
		return ErrInUse
	}
	dir, err := at.dir.enter()
	if err != nil {
		return err
	}
	defer at.dir.leave()
	var was, st unix.Stat_t
	if err := errors.Join(x.v.disk.Fstat(f.FD, &was), x.v.disk.Fstat(x.new.FD, &st)); err != nil {
		return err
	}
	if was.Nlink != 1 {
		return ErrLinks
	}
	if st.Dev != n.dev {
		return unix.EXDEV
	}
	n.moving.Add(1)
	err = x.v.disk.Rename(x.v.rootD, x.name, dir, at.cname, 0)
	if err == nil {
		x.v.nodes.replaced(n, st.Ino)
		n.past, n.sound = cfile.Past{}, n.content.v.sessions.sound()
		n.dropHalf()
		f.wipe()
		f.closed = true
		f.closeFDs()
		n.file.Store(nil)
		n.release()
	}
	n.moving.Add(-1)
	n.change()
	return err
}

// remove removes the new file, which did not take the other's place.
func (x *rekeying) remove() error {
	return disk.Ignore(x.v.disk.Unlink(x.v.rootD, x.name, 0), unix.ENOENT)
}

// closeNew forgets the new file: the next open reads it.
func (x *rekeying) closeNew() {
	f := x.new
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wipe()
	f.closed = true
	f.closeFDs()
}

// dropRekeyed removes what a crash has left of Rekey.
func dropRekeyed(d *disk.Disk, root int) error {
	var left []string
	err := d.Scan(root, func(e disk.Dirent) error {
		if strings.HasPrefix(e.Name, layout.RekeyPrefix) {
			left = append(left, e.Name)
		}
		return nil
	})
	for _, name := range left {
		err = errors.Join(err, d.Unlink(root, name, 0))
	}
	return err
}
