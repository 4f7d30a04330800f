package fs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// Locks of programs. The kernel sends them for a shared volume only; else it keeps them itself.

// programLock returns what a request asks for. The owner of locks by flock(2) is the open file. The kernel's
// number of it may be another's before this one's release is asked for; the handle's is not.
func programLock(in *fuse.LkIn) volume.ProgramLock {
	owner, flock := in.Owner, in.LkFlags&fuse.LK_FLOCK != 0
	if flock {
		owner = in.Fh
	}
	return volume.ProgramLock{Owner: owner, Flock: flock, Kind: int16(in.Lk.Typ), First: int64(in.Lk.Start), Last: int64(min(in.Lk.End, 1<<63-1))}
}

func (f *fileSystem) GetLk(_ <-chan struct{}, in *fuse.LkIn, out *fuse.LkOut) fuse.Status {
	n, s := f.node(in.NodeId)
	if !s.Ok() {
		return s
	}
	l, err := n.TestLock(programLock(in))
	if err != nil {
		return status(err)
	}
	// The process is another host's, perhaps: there is no number for it here.
	out.Lk = fuse.FileLock{Start: uint64(l.First), End: uint64(l.Last), Typ: uint32(l.Kind)}
	if l.Kind == unix.F_UNLCK {
		out.Lk = in.Lk
		out.Lk.Typ = unix.F_UNLCK
	}
	return fuse.OK
}

func (f *fileSystem) SetLk(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return f.setLock(cancel, in, false)
}

func (f *fileSystem) SetLkw(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return f.setLock(cancel, in, true)
}

func (f *fileSystem) setLock(cancel <-chan struct{}, in *fuse.LkIn, wait bool) fuse.Status {
	n := f.v.Node(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	l := programLock(in)
	l.Wait = wait
	return status(n.Lock(f.with(cancel, &in.InHeader), l))
}
