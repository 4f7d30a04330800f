// Package slowdisk gives tests a disk that takes its time: each kind of operation waits
// first, all of them in parallel, as on a cloud volume (0.5 to 1 ms) or on NFS (2 to 5 ms).
package slowdisk

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs" // the library of the filesystem under test; its loopback is a whole passthrough
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Latency is how long operations wait.
type Latency struct {
	Read, Write, Sync time.Duration
	Meta              time.Duration // lookup, open, create, unlink, rename, mkdir
	Open              time.Duration // open, besides Meta
}

// Disk is a directory that shows another one, with latency. Nothing in it is cached but
// attributes and entries, for a second.
type Disk struct {
	Dir string

	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

const variable = "KMSFS_TESTS_SLOWDISK"

// New shows backing with this latency. It needs root. The end of the test takes it away.
func New(t testing.TB, backing string, l Latency) *Disk {
	t.Helper()
	d := &Disk{Dir: filepath.Join(t.TempDir(), "slow"), t: t}
	if err := os.Mkdir(d.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	arg, err := json.Marshal([]string{d.Dir, backing})
	if err != nil {
		t.Fatal(err)
	}
	d.cmd = exec.Command(self)
	d.cmd.Env = append(os.Environ(), variable+"="+string(arg))
	d.cmd.Stderr = os.Stderr
	in, err := d.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d.in, d.out = in, bufio.NewReader(out)
	t.Cleanup(func() {
		unix.Unmount(d.Dir, unix.MNT_DETACH) // a failed test may have left something open
		d.in.Close()
		if err := d.cmd.Wait(); err != nil {
			t.Errorf("the slow disk: %v", err)
		}
	})
	d.Set(l)
	return d
}

// Set changes the latency of operations that begin from here on.
func (d *Disk) Set(l Latency) {
	d.t.Helper()
	b, err := json.Marshal(l)
	if err != nil {
		d.t.Fatal(err)
	}
	if _, err := fmt.Fprintf(d.in, "%s\n", b); err != nil {
		d.t.Fatal(err)
	}
	if s, err := d.out.ReadString('\n'); err != nil || s != "set\n" {
		d.t.Fatalf("the slow disk says %q: %v", s, err)
	}
}

// RunIfChild is called first in TestMain: in the process that [New] has started it serves
// the disk and ends the process.
func RunIfChild() {
	arg, ok := os.LookupEnv(variable)
	if !ok {
		return
	}
	if err := serve(arg); err != nil {
		fmt.Fprintln(os.Stderr, "slow disk:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serve(arg string) error {
	var dirs [2]string
	if err := json.Unmarshal([]byte(arg), &dirs); err != nil {
		return err
	}
	root, err := fs.NewLoopbackRoot(dirs[1])
	if err != nil {
		return err
	}
	second := time.Second
	o := fuse.MountOptions{AllowOther: true, DirectMount: true, MaxBackground: 256,
		MaxWrite: 1 << 20, DisabledCapabilities: fuse.CAP_PASSTHROUGH, FsName: "slowdisk", Name: "slowdisk"}
	s := &slow{RawFileSystem: fs.NewNodeFS(root,
		&fs.Options{AttrTimeout: &second, EntryTimeout: &second, NullPermissions: true, MountOptions: o})}
	s.latency.Store(&Latency{})
	server, err := fuse.NewServer(s, dirs[0], &o)
	if err != nil {
		return err
	}
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		return err
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); fmt.Println("set") {
		var l Latency
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			return err
		}
		s.latency.Store(&l)
	}
	server.Wait() // it is unmounted before standard input ends
	return nil
}

// slow waits before each operation of the filesystem that it wraps.
type slow struct {
	fuse.RawFileSystem
	latency atomic.Pointer[Latency]
}

func (s *slow) Read(c <-chan struct{}, in *fuse.ReadIn, b []byte) (fuse.ReadResult, fuse.Status) {
	time.Sleep(s.latency.Load().Read)
	return s.RawFileSystem.Read(c, in, b)
}

func (s *slow) Write(c <-chan struct{}, in *fuse.WriteIn, b []byte) (uint32, fuse.Status) {
	time.Sleep(s.latency.Load().Write)
	return s.RawFileSystem.Write(c, in, b)
}

func (s *slow) Fsync(c <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	time.Sleep(s.latency.Load().Sync)
	return s.RawFileSystem.Fsync(c, in)
}

func (s *slow) Lookup(c <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	time.Sleep(s.latency.Load().Meta)
	return s.RawFileSystem.Lookup(c, h, name, out)
}

func (s *slow) Unlink(c <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	time.Sleep(s.latency.Load().Meta)
	return s.RawFileSystem.Unlink(c, h, name)
}

func (s *slow) Rename(c <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	time.Sleep(s.latency.Load().Meta)
	return s.RawFileSystem.Rename(c, in, from, to)
}

func (s *slow) Mkdir(c <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	time.Sleep(s.latency.Load().Meta)
	return s.RawFileSystem.Mkdir(c, in, name, out)
}

func (s *slow) Open(c <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	l := s.latency.Load()
	time.Sleep(l.Meta + l.Open)
	r := s.RawFileSystem.Open(c, in, out)
	out.OpenFlags |= fuse.FOPEN_DIRECT_IO // each read is a read
	return r
}

func (s *slow) Create(c <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	time.Sleep(s.latency.Load().Meta)
	r := s.RawFileSystem.Create(c, in, name, out)
	out.OpenFlags |= fuse.FOPEN_DIRECT_IO
	return r
}
