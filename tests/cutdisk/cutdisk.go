// Package cutdisk gives tests disks whose power fails.
package cutdisk

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Disk is a filesystem on a loop device.
type Disk struct {
	Kind string // mkfs' name of it, for ext4 also ext4-MODE of its journal
	Dir  string // where it is mounted

	t         testing.TB
	img, loop string
	dead      atomic.Bool
	copied    bool // the disk, at the cut
}

// New makes one, which the end of the test takes away. It needs root.
func New(t testing.TB, kind string) *Disk {
	d := &Disk{t: t, Kind: kind, Dir: filepath.Join(t.TempDir(), "mnt"),
		img: filepath.Join(t.TempDir(), "disk")}
	d.run("truncate", "-s", "512M", d.img)
	switch fs, _, _ := strings.Cut(kind, "-"); fs {
	case "ext4":
		d.run("mkfs.ext4", "-q", "-F", "-b", "4096", d.img)
	default:
		d.run("mkfs."+fs, "-q", "-f", d.img)
	}
	d.attach()
	t.Cleanup(func() {
		unix.Unmount(d.Dir, unix.MNT_DETACH) // where a failure left it
		d.run("losetup", "-d", d.loop)
	})
	if err := os.Mkdir(d.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *Disk) attach() {
	d.loop = d.run("losetup", "-f", "--show", d.img)
	// Or the loop device itself would keep pages from tearing.
	os.WriteFile(filepath.Join("/sys/block", filepath.Base(d.loop), "queue/stable_writes"), []byte("0"), 0)
}

func (d *Disk) run(args ...string) string {
	d.t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// Stable makes the disk one that wants pages to stay as they are while it writes them.
func (d *Disk) Stable() {
	if err := os.WriteFile(filepath.Join("/sys/block", filepath.Base(d.loop),
		"queue/stable_writes"), []byte("1"), 0); err != nil {
		d.t.Fatal(err)
	}
}

// Mkdir makes a directory in it.
func (d *Disk) Mkdir(name string) string {
	p := filepath.Join(d.Dir, name)
	if err := os.MkdirAll(p, 0o755); err != nil {
		d.t.Fatal(err)
	}
	return p
}

// Mount mounts it, after a cut with the recovery that comes with it.
func (d *Disk) Mount() {
	opts := "rw"
	if _, mode, ok := strings.Cut(d.Kind, "-"); ok {
		opts = "data=" + mode
	}
	d.run("mount", "-o", opts, d.loop, d.Dir)
	d.dead.Store(false)
}

// Umount unmounts; after a cut of btrfs the disk is the copy from then on.
func (d *Disk) Umount() {
	d.run("umount", d.Dir)
	if d.copied {
		d.copied = false
		d.run("losetup", "-d", d.loop)
		d.run("mv", d.img+".copy", d.img)
		d.attach()
	}
}

// Cut shuts the filesystem down without flushing its journal.
func (d *Disk) Cut() {
	if d.Kind == "btrfs" {
		// The superblock first, which leads to trees that are not overwritten soon.
		d.dead.Store(true)
		d.run("cp", "--sparse=always", d.img, d.img+".copy")
		d.copied = true
		return
	}
	f, err := os.Open(d.Dir)
	if err != nil {
		return
	}
	defer f.Close()
	d.dead.Store(true)
	const shutdown, noLogFlush = 0x8004587d, 2 // EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN
	how := uint32(noLogFlush)
	unix.Syscall(unix.SYS_IOCTL, f.Fd(), shutdown, uintptr(unsafe.Pointer(&how)))
}

// Dead reports whether it was cut since it was mounted.
func (d *Disk) Dead() bool { return d.dead.Load() }

// Writeback does what the kernel may do at any time, until stop is closed: it
// writes some pages of a file that matches the pattern, and commits the journal.
func (d *Disk) Writeback(r *rand.Rand, pattern string, stop <-chan struct{}) {
	other, err := os.Create(filepath.Join(d.Dir, "other"))
	if err != nil {
		return
	}
	defer other.Close()
	for {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(r.IntN(4)) * time.Millisecond):
		}
		files, _ := filepath.Glob(pattern)
		if len(files) == 0 {
			continue
		}
		if f, err := os.OpenFile(files[r.IntN(len(files))], os.O_RDWR, 0); err == nil {
			if st, err := f.Stat(); err == nil {
				pages := st.Size()/4096 + 1
				at := []int64{0, pages - 1, r.Int64N(pages)}[r.IntN(3)]
				unix.SyncFileRange(int(f.Fd()), at*4096, 4096*(1+r.Int64N(3)), unix.SYNC_FILE_RANGE_WRITE)
			}
			f.Close()
		}
		if r.IntN(3) == 0 {
			other.WriteAt([]byte{byte(r.Int())}, 0)
			other.Sync()
		}
	}
}

// Mixture reports whether content is what a file may be that had these versions
// since the first: as long as one of them or between two, or shorter if the first
// was not confirmed, and each byte that of a version, or 0 where one was shorter.
// Writes that were not confirmed may be there in part.
func Mixture(versions [][]byte, confirmed bool, got []byte) error {
	least, most := len(versions[0]), 0
	for _, v := range versions {
		least, most = min(least, len(v)), max(most, len(v))
	}
	if !confirmed {
		least = 0
	}
	if len(got) < least || len(got) > most {
		return fmt.Errorf("%d bytes, but it had %d to %d", len(got), least, most)
	}
	for i, c := range got {
		ok, grown := false, false
		for _, v := range versions {
			ok = ok || i < len(v) && v[i] == c
			grown = grown || i >= len(v)
		}
		if !ok && !(c == 0 && grown) {
			return fmt.Errorf("byte %d of %d is in no version", i, len(got))
		}
	}
	return nil
}
