package fs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

// fileSystem answers the kernel's requests.
type fileSystem struct {
	fuse.RawFileSystem // ENOSYS for what is not below
	v                  *volume.Volume
	files              table[*volume.Handle]
	dirs               table[*volume.Dir]
	timeout            time.Duration
	kernelChecks       bool // permissions
	waits              func(unique uint64)
	notify             notifier
}

func newFS(v *volume.Volume, kernelChecks bool) *fileSystem {
	f := &fileSystem{RawFileSystem: fuse.NewDefaultRawFileSystem(), v: v, timeout: remember, kernelChecks: kernelChecks, waits: func(uint64) {}}
	if v.ReadOnly() {
		f.timeout = rememberRead
	}
	return f
}

func (f *fileSystem) String() string { return "kmsfs" }

func stack() string { return string(debug.Stack()) }

// request is the context of a request that the kernel can interrupt, and whose
// worker gives its place away before it waits for a key service.
type request struct {
	context.Context
	cancel <-chan struct{}
	f      *fileSystem
	unique uint64
}

func (f *fileSystem) with(cancel <-chan struct{}, h *fuse.InHeader) context.Context {
	return &request{context.Background(), cancel, f, h.Unique}
}

func (r *request) Done() <-chan struct{} { return r.cancel }

func (r *request) Err() error {
	select {
	case <-r.cancel:
		return context.Canceled
	default:
		return nil
	}
}

func (r *request) Value(key any) any {
	if _, ok := key.(keystore.WaitsKey); ok {
		return func() { r.f.waits(r.unique) }
	}
	return nil
}

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
		out.SetEntryTimeout(f.timeout)
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
	if err := f.v.Locked(); err != nil {
		return nil, status(err)
	}
	n := f.v.Node(id)
	if n == nil {
		return nil, fuse.Status(syscall.ESTALE)
	}
	return n, fuse.OK
}

func (f *fileSystem) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	dir, s := f.node(h.NodeId)
	if !s.Ok() {
		return s
	}
	n, st, final, err := f.v.Lookup(f.with(cancel, h), dir, name)
	if s := status(err); s == fuse.ENOENT { // the kernel may remember that too
		out.SetEntryTimeout(f.timeout)
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
	n, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	if n.IsFile() && n.Gone() && in.Valid&^(fuse.FATTR_MTIME|fuse.FATTR_CTIME|fuse.FATTR_LOCKOWNER) == 0 {
		// The kernel writes the times of what it has just removed, as it lets go
		// of it: nobody will see them.
		if st, err := n.Attr(); err == nil {
			setAttr(&out.Attr, &st)
		}
		return fuse.OK
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
		Mask: unix.STATX_BASIC_STATS, Blksize: uint32(st.Blksize), Nlink: uint32(st.Nlink), Uid: st.Uid, Gid: st.Gid, Mode: uint16(st.Mode),
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

func (f *fileSystem) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.made(in.NodeId, out, func(dir *volume.Node) (*volume.Node, volume.Attr, error) {
		return f.v.Mknod(f.with(cancel, &in.InHeader), dir, name, in.Mode, in.Rdev, caller(&in.InHeader, in.Umask))
	})
}

func (f *fileSystem) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.made(in.NodeId, out, func(dir *volume.Node) (*volume.Node, volume.Attr, error) {
		return f.v.Mkdir(f.with(cancel, &in.InHeader), dir, name, in.Mode, caller(&in.InHeader, in.Umask))
	})
}

func (f *fileSystem) Symlink(cancel <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return f.made(h.NodeId, out, func(dir *volume.Node) (*volume.Node, volume.Attr, error) {
		return f.v.Symlink(f.with(cancel, h), dir, name, target, caller(h, 0))
	})
}

func (f *fileSystem) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.made(in.NodeId, out, func(dir *volume.Node) (*volume.Node, volume.Attr, error) {
		n, s := f.node(in.Oldnodeid)
		if !s.Ok() {
			return nil, volume.Attr{}, syscall.Errno(s)
		}
		return f.v.Link(f.with(cancel, &in.InHeader), n, dir, name)
	})
}

func (f *fileSystem) made(dir uint64, out *fuse.EntryOut, g func(*volume.Node) (*volume.Node, volume.Attr, error)) fuse.Status {
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

func (f *fileSystem) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, attr string, dest []byte) (uint32, fuse.Status) {
	n, s := f.node(h.NodeId)
	if !s.Ok() {
		return 0, s
	}
	v, err := n.Getxattr(attr)
	return answer(v, dest, err)
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

func (f *fileSystem) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, attr string, data []byte) fuse.Status {
	n, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	return status(n.Setxattr(attr, data, int(in.Flags), in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID != 0))
}

func (f *fileSystem) RemoveXAttr(_ <-chan struct{}, h *fuse.InHeader, attr string) fuse.Status {
	n, s := f.node(h.NodeId)
	if !s.Ok() {
		return s
	}
	return status(n.Removexattr(attr))
}

// Files.

func writes(flags uint32) bool { return flags&syscall.O_ACCMODE != syscall.O_RDONLY }

// accessOf returns what opening with these flags asks for.
func accessOf(flags uint32) uint32 {
	switch flags & syscall.O_ACCMODE {
	case syscall.O_RDONLY:
		return unix.R_OK
	case syscall.O_WRONLY:
		return unix.W_OK
	}
	return unix.R_OK | unix.W_OK
}

func (f *fileSystem) opened(out *fuse.OpenOut, h *volume.Handle, writes bool) {
	out.Fh = f.files.put(h)
	switch {
	case f.v.ReadOnly():
	case writes && f.v.NearFull():
		out.OpenFlags |= fuse.FOPEN_DIRECT_IO // so that write itself fails
	default:
		out.OpenFlags |= fuse.FOPEN_KEEP_CACHE
	}
}

func (f *fileSystem) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	dir, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	n, st, h, err := f.v.Create(f.with(cancel, &in.InHeader), dir, name, in.Mode, caller(&in.InHeader, in.Umask), in.Flags&syscall.O_EXCL != 0, writes(in.Flags))
	if err != nil {
		return status(err)
	}
	f.entry(&out.EntryOut, n, &st, true)
	f.opened(&out.OpenOut, h, writes(in.Flags))
	return fuse.OK
}

func (f *fileSystem) Tmpfile(cancel <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	dir, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	n, st, h, err := f.v.Tmpfile(f.with(cancel, &in.InHeader), dir, in.Mode, caller(&in.InHeader, in.Umask), writes(in.Flags))
	if err != nil {
		return status(err)
	}
	f.entry(&out.EntryOut, n, &st, true)
	f.opened(&out.OpenOut, h, writes(in.Flags))
	return fuse.OK
}

func (f *fileSystem) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	if !f.kernelChecks {
		if err := n.Access(accessOf(in.Flags)); err != nil {
			return status(err)
		}
	}
	h, err := n.Open(f.with(cancel, &in.InHeader), writes(in.Flags))
	if err != nil {
		return status(err)
	}
	f.opened(out, h, writes(in.Flags))
	return fuse.OK
}

func (f *fileSystem) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n, err := f.files.get(in.Fh).Read(buf[:min(int(in.Size), len(buf))], int64(in.Offset))
	if err != nil {
		return nil, status(err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

func (f *fileSystem) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	h := f.files.get(in.Fh)
	if in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0 {
		if err := h.Node().KillPriv(false); err != nil {
			return 0, status(err)
		}
	}
	if in.WriteFlags&fuse.WRITE_CACHE != 0 {
		err := h.WriteDelayed(f.with(cancel, &in.InHeader), data, int64(in.Offset))
		if err != nil { // the kernel goes on showing what is lost
			f.notify.dropPages(in.NodeId, int64(in.Offset), int64(len(data)))
		}
		return uint32(len(data)), status(err)
	}
	n, err := h.Write(f.with(cancel, &in.InHeader), data, int64(in.Offset))
	if err == nil {
		h.TouchNow() // the kernel keeps the time of what its cache writes only
	}
	return uint32(n), status(err)
}

func (f *fileSystem) Fallocate(cancel <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	h := f.files.get(in.Fh)
	if err := killPriv(h, &in.InHeader); err != nil {
		return status(err)
	}
	return status(h.Fallocate(f.with(cancel, &in.InHeader), in.Mode, int64(in.Offset), int64(in.Length)))
}

// Lseek is asked for data and holes. The kernel does not write first what it
// holds back, so it is made to.
func (f *fileSystem) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	h := f.files.get(in.Fh)
	if h.Node().Writing() {
		f.waits(in.Unique)
		if err := f.notify.WriteBack(in.NodeId); err != nil {
			return status(err)
		}
	}
	at, err := h.Seek(int64(in.Offset), int(in.Whence))
	out.Offset = uint64(at)
	return status(err)
}

// The inode flags of chattr(1); everything else is for devices.
func (f *fileSystem) Ioctl(_ <-chan struct{}, in *fuse.IoctlIn, inbuf []byte, _ *fuse.IoctlOut, outbuf []byte) fuse.Status {
	n, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	if (in.Cmd == unix.FS_IOC_SETFLAGS || in.Cmd == volume.FSSetXAttr) && n.Writing() {
		// What was written before the file became immutable belongs to it.
		f.waits(in.Unique)
		if err := f.notify.WriteBack(in.NodeId); err != nil {
			return status(err)
		}
	}
	switch in.Cmd {
	case unix.FS_IOC_GETFLAGS:
		flags, err := n.Flags()
		return answerIoctl(outbuf, flags, err)
	case unix.FS_IOC_SETFLAGS:
		var flags uint32
		if _, err := binary.Decode(inbuf, binary.NativeEndian, &flags); err != nil {
			return fuse.EINVAL
		}
		return status(n.SetFlags(flags))
	case volume.FSGetXAttr:
		x, err := n.FSXAttr()
		return answerIoctl(outbuf, x, err)
	case volume.FSSetXAttr:
		var x volume.FSXAttr
		if _, err := binary.Decode(inbuf, binary.NativeEndian, &x); err != nil {
			return fuse.EINVAL
		}
		return status(n.SetFSXAttr(x))
	}
	return fuse.Status(syscall.ENOTTY)
}

func answerIoctl(outbuf []byte, x any, err error) fuse.Status {
	if err == nil {
		if _, eerr := binary.Encode(outbuf, binary.NativeEndian, x); eerr != nil {
			return fuse.EINVAL
		}
	}
	return status(err)
}

// killPriv takes setuid and the like away where anybody but root changes the content
// in a way for which the kernel has no flag that says so.
func killPriv(h *volume.Handle, in *fuse.InHeader) error {
	if in.Uid == 0 {
		return nil
	}
	outsider := false
	if st, err := h.Node().Attr(); err == nil && st.Mode&unix.S_ISGID != 0 {
		outsider = in.Gid != st.Gid && !slices.Contains(groupsOf(in.Pid), st.Gid)
	}
	return h.Node().KillPriv(outsider)
}

// groupsOf returns the supplementary groups of a process, which requests do not carry.
func groupsOf(pid uint32) (groups []uint32) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil
	}
	_, rest, _ := strings.Cut(string(b), "\nGroups:")
	line, _, _ := strings.Cut(rest, "\n")
	for _, s := range strings.Fields(line) {
		if g, err := strconv.ParseUint(s, 10, 32); err == nil {
			groups = append(groups, uint32(g))
		}
	}
	return groups
}

// maxCopy is the most that one answer can say.
const maxCopy = 1<<32 - 4096

func (f *fileSystem) CopyFileRange(cancel <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	h := f.files.get(in.FhOut)
	if err := killPriv(h, &in.InHeader); err != nil {
		return 0, status(err)
	}
	n, err := h.CopyFrom(f.with(cancel, &in.InHeader), f.files.get(in.FhIn), int64(in.OffIn), int64(in.OffOut), int64(min(in.Len, maxCopy)))
	return uint32(n), status(err)
}

// Flush is asked at each close. It must be answered: without it (ENOSYS) close
// would say yes even where the daemon is dead and the kernel has thrown the
// written pages away.
func (f *fileSystem) Flush(_ <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	return status(f.files.get(in.Fh).Flush())
}

func (f *fileSystem) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return status(f.files.get(in.Fh).Fsync())
}

func (f *fileSystem) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	f.files.take(in.Fh).Release() // what fails is in the log: the kernel takes no answer
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
	if err := errors.Join(f.v.Locked(), d.SeekTo(int64(in.Offset))); err != nil {
		return status(err)
	}
	return status(d.Next(func(e volume.Entry) bool { return out.AddDirEntry(dirEntry(e)) }))
}

func dirEntry(e volume.Entry) fuse.DirEntry {
	return fuse.DirEntry{Mode: e.Type, Name: e.Name, Ino: e.Ino, Off: uint64(e.Off)}
}

func (f *fileSystem) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	d := f.dirs.get(in.Fh)
	if err := errors.Join(f.v.Locked(), d.SeekTo(int64(in.Offset))); err != nil {
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
