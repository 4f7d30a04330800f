package fs

import (
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// MountOptions of [Mount].
type MountOptions struct {
	Source     string   // shown by mount(8) and df(1): the ciphertext directory
	AllowOther bool     // other users than the one who mounts
	Options    []string // of mount(8): exec, noexec, suid, dev, …
	Logger     *slog.Logger
}

// maxWrite is the most that a request carries: the kernel's own limit.
const maxWrite = 1 << 20

// Server is a mounted volume.
type Server struct {
	dir  string
	loop *loop
}

// Mount mounts v at dir and returns when it can be used. The volume must have
// been opened with KernelTimes, unless it is read-only or shared. The caller closes it
// after Wait.
func Mount(v *volume.Volume, dir string, o MountOptions) (*Server, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	po := &fuse.MountOptions{
		MaxWrite:      maxWrite,
		MaxReadAhead:  maxWrite,
		MaxBackground: 64,
		EnableAcl:     o.AllowOther,
		Logger:        slog.NewLogLogger(o.Logger.Handler(), slog.LevelWarn),
		PanicHandler: func(p any) fuse.Status {
			o.Logger.Error("a request failed by a fault in kmsfs; please report it", "panic",
				fmt.Sprint(p), "stack", stack())
			return fuse.EIO
		},
		ExtraCapabilities: fuse.CAP_DONT_MASK | fuse.CAP_HANDLE_KILLPRIV_V2 | fuse.CAP_SETXATTR_EXT | fuse.CAP_DIRECT_IO_ALLOW_MMAP |
			fuse.CAP_NO_EXPORT_SUPPORT, // a handle of one mount must not name another file in the next
	}
	options := o.Options
	if o.AllowOther {
		// Several users: the kernel checks permissions, by mode and ACL. For one
		// user the backing filesystem does, and the kernel need not ask for a
		// directory's attributes again after each change.
		options = append(options, "allow_other", "default_permissions")
	}
	switch {
	case v.ReadOnly():
		options = append(options, "ro")
	case v.Shared(): // each write is the daemon's at once, and locks are those of all hosts
		po.EnableLocks = true
	default:
		po.ExtraCapabilities |= fuse.CAP_WRITEBACK_CACHE
	}
	fd, err := mountDevice(dir, o.Source, options)
	if err != nil {
		return nil, err
	}
	f := newFS(v, o.AllowOther)
	l, err := newLoop(fd, fuse.NewProtocolServer(f, po), o.Logger)
	if err != nil {
		unmountDevice(dir)
		unix.Close(fd)
		return nil, err
	}
	s := &Server{dir, l}
	f.waits, f.notify = s.loop, notifier{fd, s.loop.workers.Go, &s.loop.gate, &s.loop.closed}
	v.AttachKernel(f.notify)
	s.loop.slowSync, s.loop.timeGran = v.SyncWaits(), v.TimeGranularity()
	if err := s.loop.start(); err != nil {
		unmountDevice(dir)
		unix.Close(fd)
		return nil, err
	}
	if os.Geteuid() == 0 {
		raiseReadAhead(dir)
	}
	return s, nil
}

// Wait returns when the volume was unmounted and every request answered.
func (s *Server) Wait() { s.loop.wait() }

// Asked returns how many requests there were so far.
func (s *Server) Asked() uint64 { return s.loop.reads.Load() }

// Unmount unmounts; EBUSY while something is open.
func (s *Server) Unmount() error { return unmountDevice(s.dir) }

// raiseReadAhead lets the kernel read ahead as far as a request reaches; its
// default of 128 KiB costs a third of the sequential speed. A failure costs no
// more than that.
func raiseReadAhead(dir string) {
	var st unix.Stat_t
	if unix.Stat(dir, &st) == nil {
		name := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
		os.WriteFile(name, []byte(fmt.Sprint(maxWrite>>10)), 0)
	}
}

// Nobody else changes a volume that is mounted for writing, so the kernel may
// remember what it was told; beside a read-only mount another may write, and in a shared volume, where the
// volume itself remembers attributes for 0.1 s.
const (
	remember       = time.Minute
	rememberRead   = time.Second
	rememberShared = 900 * time.Millisecond
)
