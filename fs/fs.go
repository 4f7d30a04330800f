package fs

import (
	"context"
	"errors"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
)

// fileSystem answers the kernel's requests.
type fileSystem struct {
	fuse.RawFileSystem // ENOSYS for every operation that is not below
	v                  *volume.Volume
	files              table[*volume.Handle]
	dirs               table[*volume.Dir]
	timeout            time.Duration
	kernelChecks       bool // permissions
	waits              waits
	notify             notifier
}

// waits is told what a request waits for.
type waits interface {
	yield(unique uint64)        // a key service
	yieldForDisk(unique uint64) // perhaps the disk: the data that it reads is not in the page cache
	behind(unique uint64)       // another request of the same file
}

type nobody struct{}

func (nobody) yield(uint64)        {}
func (nobody) yieldForDisk(uint64) {}
func (nobody) behind(uint64)       {}

func newFS(v *volume.Volume, kernelChecks bool) *fileSystem {
	f := &fileSystem{RawFileSystem: fuse.NewDefaultRawFileSystem(), v: v, timeout: remember,
		kernelChecks: kernelChecks, waits: nobody{}}
	switch {
	case v.Shared():
		f.timeout = rememberShared
	case v.ReadOnly():
		f.timeout = rememberRead
	}
	return f
}

func (f *fileSystem) String() string { return "kmsfs" }

func stack() string { return string(debug.Stack()) }

// asked is the context of a request that the kernel can interrupt, and whose
// worker lets another read before it waits.
type asked struct {
	context.Context
	cancel <-chan struct{}
	f      *fileSystem
	unique uint64
}

func (f *fileSystem) with(cancel <-chan struct{}, h *fuse.InHeader) context.Context {
	return &asked{context.Background(), cancel, f, h.Unique}
}

func (r *asked) Done() <-chan struct{} { return r.cancel }

func (r *asked) Err() error {
	select {
	case <-r.cancel:
		return context.Canceled
	default:
		return nil
	}
}

func (r *asked) Value(key any) any {
	if key == (volume.WaitsKey{}) {
		return r
	}
	return nil
}

// ForKey implements [volume.Waits], as do ForDisk and Behind.
func (r *asked) ForKey()  { r.f.waits.yield(r.unique) }
func (r *asked) ForDisk() { r.f.waits.yieldForDisk(r.unique) }
func (r *asked) Behind()  { r.f.waits.behind(r.unique) }

// Attributes and entries.

func setAttr(out *fuse.Attr, st *volume.Attr) {
	*out = fuse.Attr{
		Ino: st.Ino, Size: uint64(st.Size), Blocks: uint64(st.Blocks),
		Atime: uint64(st.Atim.Sec), Atimensec: uint32(st.Atim.Nsec),
		Mtime: uint64(st.Mtim.Sec), Mtimensec: uint32(st.Mtim.Nsec),
		Ctime: uint64(st.Ctim.Sec), Ctimensec: uint32(st.Ctim.Nsec),
		Mode: st.Mode, Nlink: uint32(st.Nlink), Rdev: uint32(st.Rdev), Blksize: uint32(st.Blksize),
	}
	out.Uid, out.Gid = st.Uid, st.Gid
}

func (f *fileSystem) entry(out *fuse.EntryOut, n *volume.Node, st *volume.Attr, final bool) {
	out.NodeId, out.Generation = n.ID(), 1
	setAttr(&out.Attr, st)
	if final {
		if !f.v.Shared() || n.IsDir() { // else each open looks it up
			out.SetEntryTimeout(f.timeout)
		}
		out.SetAttrTimeout(f.attrTimeout(st))
	}
}

// attrTimeout is how long the kernel may believe attributes. A write takes
// setuid and setgid away without a word to the kernel.
func (f *fileSystem) attrTimeout(st *volume.Attr) time.Duration {
	if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
		return 0
	}
	return f.timeout
}

func (f *fileSystem) node(id uint64) (*volume.Node, fuse.Status) {
	if err := f.v.Suspended(); err != nil {
		return nil, status(err)
	}
	n := f.v.Node(id)
	if n == nil {
		return nil, fuse.Status(syscall.ESTALE)
	}
	return n, fuse.OK
}

func (f *fileSystem) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string,
	out *fuse.EntryOut) fuse.Status {
	dir, s := f.node(h.NodeId)
	if !s.Ok() {
		return s
	}
	n, st, final, err := f.v.Lookup(f.with(cancel, h), dir, name)
	if s := status(err); s == fuse.ENOENT { // the kernel may remember that too
		if !f.v.Shared() {
			out.SetEntryTimeout(f.timeout)
		}
		return fuse.OK
	} else if !s.Ok() {
		return s
	}
	f.entry(out, n, &st, final)
	return fuse.OK
}

func (f *fileSystem) Forget(id, count uint64) { f.v.Forget(id, count) }

func (f *fileSystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	st, err := n.Attr()
	if err != nil {
		return status(err)
	}
	setAttr(&out.Attr, &st)
	out.SetTimeout(f.attrTimeout(&st))
	return fuse.OK
}

func (f *fileSystem) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	n := f.v.Node(in.NodeId)
	if n == nil {
		return fuse.Status(syscall.ESTALE)
	}
	const times = fuse.FATTR_ATIME | fuse.FATTR_MTIME | fuse.FATTR_CTIME | fuse.FATTR_LOCKOWNER | fuse.FATTR_FH
	if err := f.v.Suspended(); err != nil && in.Valid&^times != 0 { // the kernel writes the times of earlier writes
		return status(err)
	}
	if n.IsFile() && n.Gone() && in.Valid&^(fuse.FATTR_MTIME|fuse.FATTR_CTIME|fuse.FATTR_LOCKOWNER) == 0 {
		// The kernel writes the times of a file that it has just removed, as it lets go
		// of it: nobody will see them.
		if st, err := n.Attr(); err == nil {
			setAttr(&out.Attr, &st)
		}
		return fuse.OK
	}
	if in.Valid&^(fuse.FATTR_MTIME|fuse.FATTR_CTIME|fuse.FATTR_LOCKOWNER|fuse.FATTR_FH) == 0 &&
		in.Valid&fuse.FATTR_MTIME != 0 {
		if st, ok := n.KeepMtime(unix.Timespec{Sec: int64(in.Mtime), Nsec: int64(in.Mtimensec)}); ok {
			setAttr(&out.Attr, &st) // for no time: the kernel asks before it believes them
			return fuse.OK
		}
	}
	set := volume.SetAttr{KillPriv: in.Valid&fuse.FATTR_KILL_SUIDGID != 0}
	if v, ok := in.GetSize(); ok {
		size := int64(v)
		set.Size = &size
	}
	if v, ok := in.GetMode(); ok {
		set.Mode = &v
	}
	if v, ok := in.GetUID(); ok {
		set.UID = &v
	}
	if v, ok := in.GetGID(); ok {
		set.GID = &v
	}
	if in.Valid&fuse.FATTR_ATIME != 0 {
		set.Atime = timespec(in.Atime, in.Atimensec, in.Valid&fuse.FATTR_ATIME_NOW != 0)
	}
	if in.Valid&fuse.FATTR_MTIME != 0 {
		set.Mtime = timespec(in.Mtime, in.Mtimensec, in.Valid&fuse.FATTR_MTIME_NOW != 0)
	}
	st, err := n.SetAttr(f.with(cancel, &in.InHeader), set)
	if err != nil {
		return status(err)
	}
	setAttr(&out.Attr, &st)
	out.SetTimeout(f.attrTimeout(&st))
	return fuse.OK
}

func timespec(sec uint64, nsec uint32, now bool) *unix.Timespec {
	if now {
		return &unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	return &unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
}

// Statx is asked for the birth time.
func (f *fileSystem) Statx(_ <-chan struct{}, in *fuse.StatxIn, out *fuse.StatxOut) fuse.Status {
	n, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	st, err := n.Attr()
	if err != nil {
		return status(err)
	}
	born, ok, err := n.Birth()
	if err != nil {
		return status(err)
	}
	out.Statx = fuse.Statx{
		Mask: unix.STATX_BASIC_STATS, Blksize: uint32(st.Blksize), Nlink: uint32(st.Nlink),
		Uid: st.Uid, Gid: st.Gid, Mode: uint16(st.Mode),
		Ino: st.Ino, Size: uint64(st.Size), Blocks: uint64(st.Blocks),
		Atime: sxTime(st.Atim), Ctime: sxTime(st.Ctim), Mtime: sxTime(st.Mtim),
		RdevMajor: unix.Major(st.Rdev), RdevMinor: unix.Minor(st.Rdev),
	}
	if ok {
		out.Mask |= unix.STATX_BTIME
		out.Btime = fuse.SxTime{Sec: uint64(born.Sec), Nsec: born.Nsec}
	}
	out.SetTimeout(f.attrTimeout(&st))
	return fuse.OK
}

func sxTime(t unix.Timespec) fuse.SxTime {
	return fuse.SxTime{Sec: uint64(t.Sec), Nsec: uint32(t.Nsec)}
}

// Access is asked where the kernel does not check permissions by itself.
func (f *fileSystem) Access(_ <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	n, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	return status(n.Access(in.Mask))
}

func (f *fileSystem) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	s, err := f.v.Statfs()
	if err != nil {
		return status(err)
	}
	out.Blocks, out.Bfree, out.Bavail, out.Files, out.Ffree = s.Blocks, s.Bfree, s.Bavail, s.Files, s.Ffree
	out.Bsize, out.NameLen, out.Frsize = uint32(s.Bsize), uint32(s.Namelen), uint32(s.Frsize)
	return fuse.OK
}

// Entries of directories.

func caller(h *fuse.InHeader, umask uint32) volume.Caller {
	return volume.Caller{UID: h.Uid, GID: h.Gid, Umask: umask}
}

func (f *fileSystem) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string,
	out *fuse.EntryOut) fuse.Status {
	return f.made(in.NodeId, out, func(dir *volume.Node) (*volume.Node, volume.Attr, error) {
		return f.v.Mknod(f.with(cancel, &in.InHeader), dir, name,
			volume.NewNode{Mode: in.Mode, Rdev: in.Rdev, Caller: caller(&in.InHeader, in.Umask)})
	})
}

func (f *fileSystem) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string,
	out *fuse.EntryOut) fuse.Status {
	return f.made(in.NodeId, out, func(dir *volume.Node) (*volume.Node, volume.Attr, error) {
		return f.v.Mkdir(f.with(cancel, &in.InHeader), dir, name, in.Mode, caller(&in.InHeader, in.Umask))
	})
}

func (f *fileSystem) Symlink(cancel <-chan struct{}, h *fuse.InHeader, target, name string,
	out *fuse.EntryOut) fuse.Status {
	return f.made(h.NodeId, out, func(dir *volume.Node) (*volume.Node, volume.Attr, error) {
		return f.v.Symlink(f.with(cancel, h), dir, name, target, caller(h, 0))
	})
}

func (f *fileSystem) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string,
	out *fuse.EntryOut) fuse.Status {
	return f.made(in.NodeId, out, func(dir *volume.Node) (*volume.Node, volume.Attr, error) {
		n, s := f.node(in.Oldnodeid)
		if !s.Ok() {
			return nil, volume.Attr{}, syscall.Errno(s)
		}
		return f.v.Link(f.with(cancel, &in.InHeader), n, dir, name)
	})
}

func (f *fileSystem) made(dir uint64, out *fuse.EntryOut,
	g func(*volume.Node) (*volume.Node, volume.Attr, error)) fuse.Status {
	d, s := f.node(dir)
	if !s.Ok() {
		return s
	}
	n, st, err := g(d)
	if err != nil {
		return status(err)
	}
	f.entry(out, n, &st, true)
	return fuse.OK
}

func (f *fileSystem) Unlink(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	dir, s := f.node(h.NodeId)
	if !s.Ok() {
		return s
	}
	return status(f.v.Unlink(dir, name))
}

func (f *fileSystem) Rmdir(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	dir, s := f.node(h.NodeId)
	if !s.Ok() {
		return s
	}
	return status(f.v.Rmdir(dir, name))
}

func (f *fileSystem) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	from, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	to, s := f.node(in.Newdir)
	if !s.Ok() {
		return s
	}
	return status(f.v.Rename(from, oldName, to, newName, in.Flags))
}

func (f *fileSystem) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	n, s := f.node(h.NodeId)
	if !s.Ok() {
		return nil, s
	}
	t, err := f.v.Readlink(n)
	return []byte(t), status(err)
}

// Extended attributes.

func (f *fileSystem) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, attr string,
	dest []byte) (uint32, fuse.Status) {
	n, s := f.node(h.NodeId)
	if !s.Ok() {
		return 0, s
	}
	if value := virtual[attr]; value != nil {
		v, err := value(n)
		return answer([]byte(v), dest, err)
	}
	v, err := n.Getxattr(attr)
	return answer(v, dest, err)
}

// virtual are the attributes of the mount itself, which getfattr -n shows. They are not listed, so that
// no tool copies them, and cannot be set.
var virtual = map[string]func(*volume.Node) (string, error){
	"user.kmsfs.cipher_path": func(n *volume.Node) (string, error) { return n.CipherPath(), nil },
	"user.kmsfs.file_id": func(n *volume.Node) (string, error) {
		return ofHeader(n, func(h *blockcrypt.Header) string { return h.File.String() })
	},
	// Those of a directory are the ones that its new files get.
	"user.kmsfs.recipients": func(n *volume.Node) (string, error) {
		if n.IsDir() {
			uris, err := n.Keys()
			return strings.Join(uris, " "), err
		}
		return ofHeader(n, func(h *blockcrypt.Header) string {
			var uris []string
			for _, r := range h.Recipients {
				uris = append(uris, r.URI)
			}
			return strings.Join(uris, " ")
		})
	},
	"user.kmsfs.state": func(n *volume.Node) (string, error) {
		return ofHeader(n, func(h *blockcrypt.Header) string {
			switch s := h.State; {
			case s.Flags&(blockcrypt.Dirty|blockcrypt.Cut) != 0:
				return "being written"
			case s.Floor < s.Size:
				return "closed"
			}
			return "settled"
		})
	},
}

// ofHeader is a virtual attribute of files that have content: others have none.
func ofHeader(n *volume.Node, value func(*blockcrypt.Header) string) (string, error) {
	if !n.IsFile() {
		return "", unix.ENODATA
	}
	h, err := n.Header()
	if err != nil {
		return "", err
	}
	if h == nil {
		return "", unix.ENODATA
	}
	return value(h), nil
}

func (f *fileSystem) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	n, s := f.node(h.NodeId)
	if !s.Ok() {
		return 0, s
	}
	v, err := n.Listxattr()
	return answer(v, dest, err)
}

// answer copies v to dest; one of no length asks only for v's.
func answer(v, dest []byte, err error) (uint32, fuse.Status) {
	if err != nil {
		return 0, status(err)
	}
	if len(dest) > 0 && len(dest) < len(v) {
		return uint32(len(v)), fuse.ERANGE
	}
	copy(dest, v)
	return uint32(len(v)), fuse.OK
}

func (f *fileSystem) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, attr string,
	data []byte) fuse.Status {
	n, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	if virtual[attr] != nil {
		return fuse.EPERM
	}
	err := n.Setxattr(attr, data, int(in.Flags), in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID != 0)
	return f.attrSet(n, attr, err)
}

// attrSet ends a request that has set or removed an extended attribute. Its answer carries no
// attributes, and an ACL has a part in the mode: the kernel is told to ask again.
func (f *fileSystem) attrSet(n *volume.Node, attr string, err error) fuse.Status {
	if err == nil && volume.ChangesMode(attr) {
		err = f.notify.forgetAttr(n.ID())
	}
	return status(err)
}

func (f *fileSystem) RemoveXAttr(_ <-chan struct{}, h *fuse.InHeader, attr string) fuse.Status {
	n, s := f.node(h.NodeId)
	if !s.Ok() {
		return s
	}
	if virtual[attr] != nil {
		return fuse.EPERM
	}
	return f.attrSet(n, attr, n.Removexattr(attr))
}

// Open directories.

func (f *fileSystem) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	d, err := n.OpenDir()
	if err != nil {
		return status(err)
	}
	out.Fh = f.dirs.put(d)
	return fuse.OK
}

func (f *fileSystem) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	d := f.dirs.get(in.Fh)
	if err := errors.Join(f.v.Suspended(), d.SeekTo(int64(in.Offset))); err != nil {
		return status(err)
	}
	return status(d.Next(func(e volume.Entry) bool { return out.AddDirEntry(dirEntry(e)) }))
}

func dirEntry(e volume.Entry) fuse.DirEntry {
	return fuse.DirEntry{Mode: e.Type, Name: e.Name, Ino: e.Ino, Off: uint64(e.Off)}
}

func (f *fileSystem) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn,
	out *fuse.DirEntryList) fuse.Status {
	d := f.dirs.get(in.Fh)
	if err := errors.Join(f.v.Suspended(), d.SeekTo(int64(in.Offset))); err != nil {
		return status(err)
	}
	ctx := f.with(cancel, &in.InHeader)
	return status(d.Next(func(e volume.Entry) bool {
		slot := out.AddDirLookupEntry(dirEntry(e))
		if slot == nil {
			return false
		}
		if e.Name == "." || e.Name == ".." {
			return true
		}
		if f.v.Shared() && e.Type == unix.S_IFREG { // the kernel looks it up again, see entry
			return true
		}
		// One that cannot be looked up stays in the list; its own lookup says why.
		if n, st, final, err := d.Lookup(ctx, e); err == nil {
			f.entry(slot, n, &st, final)
		}
		return true
	}))
}

func (f *fileSystem) ReleaseDir(in *fuse.ReleaseIn) { f.dirs.take(in.Fh).Close() }

func (f *fileSystem) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return status(f.dirs.get(in.Fh).Sync())
}
