package fs

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// meter counts the requests of a mount: how many of each kind there were, how long they took, and
// which errors they had. To count one costs some nanoseconds, and no lock.
type meter struct {
	ops           [opcodes]opMeter
	read, written atomic.Uint64 // bytes of files
	hot           hot
}

type opMeter struct {
	took   volume.Latency
	errors [maxErrno]atomic.Uint64
}

const maxErrno = 134 // errnos of Linux, and 0

// note counts a request and the status of its answer, 0 or a negative errno.
func (m *meter) note(opcode uint32, took time.Duration, status int32) {
	o := &m.ops[opcode%opcodes]
	o.took.Note(took)
	if status < 0 && -status < maxErrno {
		o.errors[-status].Add(1)
	}
}

// opNames are the kinds of requests, by their opcode in linux/fuse.h.
var opNames = [opcodes]string{1: "lookup", 2: "forget", 3: "getattr", 4: "setattr", 5: "readlink",
	6: "symlink", 8: "mknod", 9: "mkdir", 10: "unlink", 11: "rmdir", 12: "rename",
	13: "link", 14: "open", 15: "read", 16: "write", 17: "statfs", 18: "release", 20: "fsync",
	21: "setxattr", 22: "getxattr", 23: "listxattr", 24: "removexattr", 25: "flush", 26: "init",
	27: "opendir", 28: "readdir", 29: "releasedir", 30: "fsyncdir", 31: "getlk", 32: "setlk",
	33: "setlkw", 34: "access", 35: "create", 36: "interrupt", 37: "bmap", 38: "destroy",
	39: "ioctl", 40: "poll", 42: "batch_forget", 43: "fallocate", 44: "readdirplus", 45: "rename2",
	46: "lseek", 47: "copy_file_range", 48: "setupmapping", 50: "syncfs", 51: "tmpfile", 52: "statx"}

// Requests are those of one kind.
type Requests struct {
	Op string
	volume.Durations
	Errnos map[string]uint64 // by the errno's name
}

// Metrics are the counts of a mount since it was made.
type Metrics struct {
	Requests      []Requests // of kinds of which there was one
	InFlight      int        // requests that are being answered, or wait to be
	Read, Written uint64     // bytes of files
}

// Metrics returns the counts.
func (s *Server) Metrics() Metrics {
	m := &s.loop.meter
	out := Metrics{InFlight: int(s.loop.queue.busy.Load()), Read: m.read.Load(), Written: m.written.Load()}
	for op := range m.ops {
		o := &m.ops[op]
		r := Requests{Op: opNames[op], Durations: o.took.Durations(), Errnos: map[string]uint64{}}
		for e := range o.errors {
			if n := o.errors[e].Load(); n > 0 {
				r.Errnos[unix.ErrnoName(unix.Errno(e))] = n
			}
		}
		if r.Count > 0 && r.Op != "" {
			out.Requests = append(out.Requests, r)
		}
	}
	return out
}
