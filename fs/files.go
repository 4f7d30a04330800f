package fs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

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

func (f *fileSystem) opened(out *fuse.OpenOut, h *volume.Handle, flags uint32) {
	out.Fh = f.files.put(h)
	writes := writes(flags)
	switch {
	case f.v.ReadOnly() || h.Reread() || h.Foreign(): // the kernel reads the content again
	case f.v.Shared() && flags&syscall.O_APPEND != 0:
		out.OpenFlags |= fuse.FOPEN_DIRECT_IO // the end is where the daemon finds it
	case writes && !f.v.Shared() && f.v.NearFull(): // the kernel holds nothing back of a shared volume
		out.OpenFlags |= fuse.FOPEN_DIRECT_IO // so that write itself fails
	default:
		out.OpenFlags |= fuse.FOPEN_KEEP_CACHE
	}
}

// gone is status of an error of an open. If another host has removed the file since it was looked up, the
// kernel looks the name up again: with O_CREAT, the file is made.
func (f *fileSystem) gone(err error) fuse.Status {
	if f.v.Shared() && errors.Is(err, unix.ENOENT) {
		err = unix.ESTALE
	}
	return status(err)
}

func (f *fileSystem) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string,
	out *fuse.CreateOut) fuse.Status {
	dir, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	n, st, h, err := f.v.Create(f.with(cancel, &in.InHeader), dir, name, volume.NewFile{
		NewNode: volume.NewNode{Mode: in.Mode, Caller: caller(&in.InHeader, in.Umask)},
		Excl:    in.Flags&syscall.O_EXCL != 0, Write: writes(in.Flags)})
	if err != nil {
		return status(err)
	}
	f.entry(&out.EntryOut, n, &st, true)
	f.opened(&out.OpenOut, h, in.Flags)
	return fuse.OK
}

func (f *fileSystem) Tmpfile(cancel <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	dir, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	n, st, h, err := f.v.Tmpfile(f.with(cancel, &in.InHeader), dir, in.Mode,
		caller(&in.InHeader, in.Umask), writes(in.Flags))
	if err != nil {
		return status(err)
	}
	f.entry(&out.EntryOut, n, &st, true)
	f.opened(&out.OpenOut, h, in.Flags)
	return fuse.OK
}

func (f *fileSystem) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	if !f.kernelChecks {
		if err := n.Access(accessOf(in.Flags)); err != nil {
			return f.gone(err)
		}
	}
	h, err := n.Open(f.with(cancel, &in.InHeader), writes(in.Flags))
	if err != nil {
		return f.gone(err)
	}
	if f.v.Shared() && !h.AsTold() {
		f.notify.forgetAttr(n.ID())
	}
	f.opened(out, h, in.Flags)
	return fuse.OK
}

func (f *fileSystem) Read(cancel <-chan struct{}, in *fuse.ReadIn,
	buf []byte) (fuse.ReadResult, fuse.Status) {
	n, err := f.files.get(in.Fh).Read(f.with(cancel, &in.InHeader),
		buf[:min(int(in.Size), len(buf))], int64(in.Offset))
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
	if f.v.Shared() && in.Flags&syscall.O_APPEND != 0 {
		return f.append(cancel, in, h, data)
	}
	n, err := h.WriteThrough(f.with(cancel, &in.InHeader), data, int64(in.Offset))
	return uint32(n), status(err)
}

// append writes at the end of a file of a shared volume, which may be elsewhere than the kernel
// believes.
func (f *fileSystem) append(cancel <-chan struct{}, in *fuse.WriteIn, h *volume.Handle, data []byte) (uint32, fuse.Status) {
	off, n, err := h.Append(f.with(cancel, &in.InHeader), data)
	if err != nil {
		return 0, status(err)
	}
	f.notify.forgetAttr(in.NodeId)
	f.notify.dropPages(in.NodeId, off, int64(n)) // that other descriptors have read
	return uint32(n), fuse.OK
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
		f.waits.yield(in.Unique)
		if err := f.notify.WriteBack(in.NodeId); err != nil {
			return status(err)
		}
	}
	at, err := h.Seek(int64(in.Offset), int(in.Whence))
	out.Offset = uint64(at)
	return status(err)
}

// Ioctl gets and sets inode flags and attributes, of chattr(1) and xfs_io(1); everything else is for
// devices.
func (f *fileSystem) Ioctl(_ <-chan struct{}, in *fuse.IoctlIn, inbuf []byte, _ *fuse.IoctlOut,
	outbuf []byte) fuse.Status {
	n, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	if (in.Cmd == unix.FS_IOC_SETFLAGS || in.Cmd == volume.FSSetXAttr) && n.Writing() {
		// Data that was written before the file became immutable belongs to it.
		f.waits.yield(in.Unique)
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
		return f.flagsSet(n, n.SetFlags(flags))
	case volume.FSGetXAttr:
		x, err := n.FSXAttr()
		return answerIoctl(outbuf, x, err)
	case volume.FSSetXAttr:
		var x volume.FSXAttr
		if _, err := binary.Decode(inbuf, binary.NativeEndian, &x); err != nil {
			return fuse.EINVAL
		}
		return f.flagsSet(n, n.SetFSXAttr(x))
	}
	return fuse.Status(syscall.ENOTTY)
}

// flagsSet ends a request that has set inode flags, which changes the ctime.
func (f *fileSystem) flagsSet(n *volume.Node, err error) fuse.Status {
	if err == nil {
		err = f.notify.forgetAttr(n.ID())
	}
	return status(err)
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
	n, err := h.CopyFrom(f.with(cancel, &in.InHeader), f.files.get(in.FhIn), int64(in.OffIn),
		int64(in.OffOut), int64(min(in.Len, maxCopy)))
	return uint32(n), status(err)
}

// Flush is asked at each close. It must be answered: without it (ENOSYS) close
// would say yes even where the daemon is dead and the kernel has thrown the
// written pages away.
func (f *fileSystem) Flush(_ <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	h := f.files.get(in.Fh)
	err := h.Flush()
	h.Node().DropLocks(in.LockOwner, false)
	return status(err)
}

func (f *fileSystem) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return status(f.files.get(in.Fh).Fsync())
}

// releaseFlock is FUSE_RELEASE_FLOCK_UNLOCK (linux/fuse.h): the open file had locks by flock(2).
const releaseFlock = 1 << 1

func (f *fileSystem) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	h := f.files.get(in.Fh)
	n := h.Node()
	h.Release() // what fails is in the log: the kernel takes no answer
	if in.ReleaseFlags&releaseFlock != 0 {
		n.DropLocks(in.Fh, true)
	}
	f.files.take(in.Fh) // only now another open gets the number, which is the owner of locks
}
