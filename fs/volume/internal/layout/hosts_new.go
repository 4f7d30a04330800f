//go:build linux && !portable

package layout

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// Bytes that hosts lock in a shared volume, see FORMAT.md, section 6. Those of content files lie in
// the files themselves.
const (
	ConfigByte   = LockByte + 1 // of kmsfs.lock: kmsfs.json is changed
	LongNameByte = LockByte + 2 // of kmsfs.lock: an entry with a long name is made, moved or removed

	// By the last 60 bits of a directory's inode number, of kmsfs.lock.
	DirMask        = 1<<60 - 1
	DirBytes       = LockByte + 1<<61 // entries are made (shared), or the directory is removed (alone)
	DirWantedBytes = LockByte + 1<<60 // a host waits to remove it

	LeaseByte  = LockByte     // of a content file
	WantedByte = LockByte + 1 // a host waits for that
	FlockByte  = LockByte + 2 // flock(2) of programs

	FlockAskedByte    = LockByte + 3     // a program waits for flock(2)
	ProgramAskedBytes = LockByte + 1<<60 // and for byte x of fcntl(2): this one + x/2

	// Byte x of a program's fcntl lock is byte ProgramBytes + x of the content file, up to the last one,
	// which stands for all beyond.
	ProgramBytes = LockByte + 1<<61
	ProgramMost  = 1<<61 - 1
)

// RemoveUnwritten removes the file of a host that died before it had written it.
func (h Hosts) RemoveUnwritten(name string, fd int) error {
	if err := h.Disk.OFDLock(fd, disk.Lock{Kind: disk.Alone, At: LockByte, N: 1}); err != nil {
		return disk.Ignore(err, unix.EAGAIN)
	}
	if _, _, _, err := h.Read(fd, nil); !errors.Is(err, errUnwritten) {
		return nil
	}
	return h.Remove(name)
}

// Unwritten reports whether an error of Read says that the host has not written its file yet.
func (h Hosts) Unwritten(err error) bool { return errors.Is(err, errUnwritten) }

// ThisHost returns what this process says of itself.
func ThisHost() HostFile {
	name, _ := os.Hostname()
	return HostFile{Host: name, PID: os.Getpid(), Since: time.Now().Truncate(time.Second), Boot: pidSpace()}
}

// Ended reports whether the process that wrote the file is known to have ended: it was of this run of
// this machine's kernel, and of this PID namespace.
func (h HostFile) Ended() bool {
	if h.Boot != pidSpace() {
		return false
	}
	return disk.NoProcess(h.PID)
}

// pidSpace names where process numbers mean what they mean here.
func pidSpace() string {
	return bootID() + " " + disk.PIDSpace()
}

// Hosts is the directory with a file for each host that has a shared volume mounted.
type Hosts struct {
	Disk *disk.Disk
	Dir  int
}

// OpenHosts opens it, and makes it if it is missing.
func OpenHosts(d *disk.Disk, root int) (Hosts, error) {
	fd, err := d.Open(root, HostsName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOENT) {
		if err = MakeHosts(d, root); err == nil {
			fd, err = d.Open(root, HostsName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		}
	}
	return Hosts{d, fd}, err
}

// MakeHosts makes the directory with the owner and the mode of the root: a user who may write there can mount
// the volume.
func MakeHosts(d *disk.Disk, root int) error {
	var st unix.Stat_t
	if err := d.Fstat(root, &st); err != nil {
		return err
	}
	if err := disk.Ignore(d.Mkdir(root, HostsName, 0o700), unix.EEXIST); err != nil {
		return err
	}
	if unix.Geteuid() == 0 {
		if err := d.ChownAt(root, HostsName, int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	}
	return errors.Join(d.ChmodAt(root, HostsName, st.Mode&0o777), d.Fsync(root))
}

// Add makes the file of a host, locks it, and makes it durable.
func (h Hosts) Add(x HostFile) (name string, fd int, err error) {
	for {
		name, fd, err = h.add(x)
		if !disk.LockBusy(err) { // else another host took the new file for what a dead one has left
			return name, fd, err
		}
	}
}

func (h Hosts) add(x HostFile) (name string, fd int, err error) {
	name = blockcrypt.NewID().String()
	fd, err = h.Disk.Open(h.Dir, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|disk.FileFlags, 0o644)
	if err != nil {
		return "", -1, err
	}
	// The lock comes first: a file that nobody has locked is one of a dead host.
	err = h.Disk.OFDLock(fd, disk.Lock{Kind: disk.Alone, At: LockByte, N: 1})
	if err == nil {
		err = h.Write(fd, x)
	}
	if err == nil {
		err = h.Disk.Fsync(h.Dir)
	}
	if gone, ferr := h.Fenced(fd); err == nil && (gone || ferr != nil) {
		err = cmp.Or(ferr, error(unix.EAGAIN))
	}
	if err != nil {
		h.Disk.Unlink(h.Dir, name, 0)
		h.Disk.Close(fd)
		return "", -1, err
	}
	return name, fd, nil
}

// Write replaces what a host says of itself, durably.
func (h Hosts) Write(fd int, x HostFile) error {
	b, err := json.Marshal(x)
	if err != nil {
		return err
	}
	if len(b) >= hostSize { // a host name of absurd length
		return unix.ENAMETOOLONG
	}
	b = append(b, bytes.Repeat([]byte(" "), hostSize-1-len(b))...)
	if err := h.Disk.Pwrite(fd, append(b, '\n'), 0); err != nil {
		return err
	}
	return h.Disk.Datasync(fd)
}

// Read returns what a host says of itself, and whether it is fenced. The sessions are authenticated if
// vk is not nil.
func (h Hosts) Read(fd int, vk *blockcrypt.VolumeKeys) (x HostFile, sessions []uint64, fenced bool, err error) {
	h.Disk.ForgetPages(fd, 0, 0)
	return readHost(h.Disk, fd, vk)
}

// Fenced reports whether the file of a host says that it is fenced, or is gone: its owner asks.
func (h Hosts) Fenced(fd int) (bool, error) {
	var st unix.Stat_t
	if err := h.Disk.FstatFresh(fd, &st); err != nil {
		return errors.Is(err, unix.ESTALE), disk.Ignore(err, unix.ESTALE)
	}
	return st.Size > hostSize || st.Nlink == 0, nil
}

// FencedName is Fenced of the file with a name. changed is when that was written last, by the filesystem's
// clock.
func (h Hosts) FencedName(name string) (fenced bool, changed unix.Timespec, err error) {
	var dir, st unix.Stat_t
	if err := h.Disk.FstatFresh(h.Dir, &dir); err != nil { // else it would be the one that this host remembers
		return false, changed, err
	}
	err = h.Disk.StatFresh(h.Dir, name, &st)
	fenced = errors.Is(err, unix.ENOENT) || err == nil && st.Size > hostSize
	return fenced, st.Ctim, disk.Ignore(err, unix.ENOENT)
}

// Fence makes a host that is dead a fenced one, durably.
func (h Hosts) Fence(fd int) error {
	if err := h.Disk.Pwrite(fd, []byte("x"), hostSize); err != nil {
		return err
	}
	return h.Disk.Datasync(fd)
}

// Names lists the files of hosts.
func (h Hosts) Names() (names []string, err error) {
	dir, err := h.Disk.Open(h.Dir, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer h.Disk.Close(dir)
	err = h.Disk.Scan(dir, func(e disk.Dirent) error {
		if _, ok := blockcrypt.ParseID(strings.TrimSpace(e.Name)); ok {
			names = append(names, e.Name)
		}
		return nil
	})
	return names, err
}

// Open opens the file of a host, to lock it.
func (h Hosts) Open(name string) (int, error) {
	return h.Disk.Open(h.Dir, name, unix.O_RDWR|disk.FileFlags, 0)
}

// Remove removes the file of a host, whose files are in order.
func (h Hosts) Remove(name string) error {
	if err := disk.Ignore(h.Disk.Unlink(h.Dir, name, 0), unix.ENOENT); err != nil {
		return err
	}
	return h.Disk.Fsync(h.Dir)
}

// hostLocked reports whether the owner of a host file has it locked.
func hostLocked(d *disk.Disk, fd int) bool {
	in, err := d.OFDLocked(fd, disk.Lock{Kind: disk.Shared, At: LockByte, N: 1})
	return err == nil && in.Kind == disk.Alone
}

// LeaseToRead takes the lease of a content file, shared with others that read, and says that it is wanted
// while a host has it to write.
func LeaseToRead(d *disk.Disk, fd int) error {
	err := d.OFDLock(fd, disk.Lock{Kind: disk.Shared, At: LeaseByte, N: 1})
	if disk.LockBusy(err) {
		d.OFDLock(fd, disk.Lock{Kind: disk.Shared, At: WantedByte, N: 1})
	} else {
		d.OFDLock(fd, disk.Lock{Kind: disk.None, At: WantedByte, N: 1})
	}
	return err
}
