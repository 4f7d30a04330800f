//go:build linux && !portable

package layout

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume/internal/disk"
)

// One mount at a time writes to a volume. It holds two locks until it ends: flock(2) on
// the root directory, which every version of kmsfs takes, and an OFD lock on kmsfs.lock,
// which mounts on other hosts see too. kmsfs.lock stays for good, since a lock on a file
// that is replaced protects nothing.

const (
	// LockByte lies beyond the end of any file: SMB's locks are mandatory, and must not
	// meet what is read and written.
	LockByte = 1 << 62
	// lockSize is the length that the first mount gives kmsfs.lock. It stays the same, so that
	// later ones need no space.
	lockSize = 512
)

// ErrLocked says that another mount has the volume open for writing.
var ErrLocked = errors.New("another mount is writing to this volume")

// ErrLockFile says that kmsfs.lock could not be opened.
var ErrLockFile = errors.New("open " + LockName)

// LockedError says that another mount has the volume open for writing.
type LockedError struct {
	Host  string    `json:"host"` // its host name
	PID   int       `json:"pid"`
	Since time.Time `json:"since"`
	Boot  string    `json:"boot"` // its kernel's boot ID

	Shared bool `json:"-"` // the volume is shared: others may write beside it

	known bool
}

// Error names the host and the process, as far as kmsfs.lock says them: it is not
// authenticated.
func (e *LockedError) Error() string {
	if !e.known {
		return ErrLocked.Error()
	}
	return fmt.Sprintf("process %d on host %q is writing to this volume, since %s", e.PID, e.Host,
		e.Since.Local().Format(time.DateTime))
}

// Is makes the error one that errors.Is takes for [ErrLocked].
func (e *LockedError) Is(target error) bool { return target == ErrLocked }

// Elsewhere reports whether the other mount is known to be on another host.
func (e *LockedError) Elsewhere() bool { return e.known && e.Boot != bootID() }

// bootID names this run of this machine's kernel.
func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(bytes.TrimSpace(b))
}

// errNoLocks says that a filesystem cannot keep two hosts from writing at once.
type errNoLocks struct{ error }

func (e errNoLocks) Unwrap() error { return e.error }
func (e errNoLocks) Error() string {
	return fmt.Sprintf("the filesystem of the ciphertext directory cannot lock %s: %v", LockName, e.error)
}

// LockWriter takes both locks of the volume with this root. The descriptor that it returns
// holds the second one until it is closed; the first one belongs to root. Of a shared volume it takes
// only the second one, shared unless alone is set: flock is in the way of fcntl on some filesystems.
func LockWriter(d *disk.Disk, root int, shared, alone bool) (fd int, err error) {
	if shared {
		kind := disk.Shared
		if alone {
			kind = disk.Alone
		}
		return lockFile(d, root, kind)
	}
	if err := d.Flock(root, unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return -1, lockHolder(d, root)
	} else if err != nil {
		return -1, fmt.Errorf("lock the volume: %w", err)
	}
	if fd, err = lockFile(d, root, disk.Alone); err != nil {
		d.Flock(root, unix.LOCK_UN)
	}
	return fd, err
}

// lockFile takes the lock that other hosts see.
func lockFile(d *disk.Disk, root int, kind disk.LockKind) (int, error) {
	for {
		fd, err := openLock(d, root)
		if err != nil {
			return -1, err
		}
		if err = d.OFDLock(fd, disk.Lock{Kind: kind, At: LockByte, N: 1}); disk.LockBusy(err) {
			err = lockHolder(d, root)
		} else if err != nil {
			err = errNoLocks{err}
		}
		var have, now unix.Stat_t
		if err == nil {
			err = errors.Join(d.Fstat(fd, &have), d.Stat(root, LockName, &now))
		}
		if err == nil && have.Ino == now.Ino && have.Dev == now.Dev {
			if kind == disk.Alone {
				signLock(d, fd)
			}
			return fd, nil
		}
		d.Close(fd)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return -1, err
		}
		// It was removed, or exchanged, after it was opened: the new one counts.
	}
}

// openLock opens kmsfs.lock and makes it if it is not there, as in a volume of an earlier
// version.
func openLock(d *disk.Disk, root int) (int, error) {
	for {
		fd, err := d.Open(root, LockName, unix.O_RDWR|disk.FileFlags, 0)
		if errors.Is(err, unix.ENOENT) {
			if err = MakeRootEntries(d, root); err == nil || errors.Is(err, unix.EEXIST) {
				continue
			}
		}
		if err != nil {
			return -1, fmt.Errorf("%w: %w", ErrLockFile, err)
		}
		var st unix.Stat_t
		if err = d.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
			err = fmt.Errorf("%w: it is not a regular file", ErrLockFile)
		} else if err == nil && st.Nlink > 1 {
			err = fmt.Errorf("%w: it has another name, too", ErrLockFile)
		}
		if err != nil {
			d.Close(fd)
			return -1, err
		}
		return fd, nil
	}
}

// makeLock makes kmsfs.lock, for all users who may write to the root directory: each of them
// can mount the volume.
func makeLock(d *disk.Disk, root int) error {
	fd, err := d.Open(root, LockName, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|disk.FileFlags, 0o644)
	if err != nil {
		return err
	}
	defer d.Close(fd)
	var st unix.Stat_t
	if err := d.Fstat(root, &st); err != nil {
		return err
	}
	if unix.Geteuid() == 0 {
		d.Chown(fd, int(st.Uid), int(st.Gid))
	} else {
		d.Chown(fd, -1, int(st.Gid)) // if the user is in the group
	}
	return d.Chmod(fd, 0o644|st.Mode&0o022)
}

// signLock writes into kmsfs.lock which process holds it. A failure is ignored: another mount then
// cannot name the holder, or names the one before.
func signLock(d *disk.Disk, fd int) {
	host, _ := os.Hostname()
	b, err := json.Marshal(LockedError{Host: host, PID: os.Getpid(),
		Since: time.Now().Truncate(time.Second), Boot: bootID()})
	if err != nil || len(b) >= lockSize {
		return
	}
	b = append(b, bytes.Repeat([]byte(" "), lockSize-1-len(b))...)
	if d.Pwrite(fd, append(b, '\n'), 0) == nil {
		d.SendPages(fd, 0, lockSize) // so that another host reads it soon
	}
}

// lockHolder returns the error that names the writer of the volume, by the last signature.
func lockHolder(d *disk.Disk, root int) error {
	if e := hostHolder(d, root); e != nil {
		return e
	}
	e := &LockedError{}
	fd, err := d.Open(root, LockName, unix.O_RDONLY|disk.FileFlags, 0)
	if err != nil {
		return e
	}
	defer d.Close(fd)
	b := make([]byte, lockSize)
	n, err := d.Pread(fd, b, 0)
	if err != nil || json.Unmarshal(b[:n], e) != nil || e.PID <= 0 || strings.TrimSpace(e.Host) == "" {
		return &LockedError{}
	}
	e.known = true
	return e
}

// hostHolder names a host that has a shared volume mounted, this one rather than another; nil if no host
// is found.
func hostHolder(d *disk.Disk, root int) (e *LockedError) {
	hosts, err := FindHosts(d, root, nil)
	if err != nil {
		return nil
	}
	for _, h := range hosts {
		boot, _, _ := strings.Cut(h.Host.Boot, " ")
		if h.Alive && h.Err == nil && (e == nil || boot == bootID()) {
			e = &LockedError{Host: h.Host.Host, PID: h.Host.PID, Since: h.Host.Since, Boot: boot, Shared: true, known: true}
		}
	}
	return e
}

// WriterOf returns a [LockedError] if a mount has the volume open for writing, as far as this user
// can see, else nil or another error.
func WriterOf(d *disk.Disk, root int) error {
	// By descriptors of its own: a lock belongs to an open file description.
	fd, err := d.Open(root, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.Close(fd)
	if err := d.Flock(fd, unix.LOCK_SH|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return lockHolder(d, root)
	} else if err != nil {
		return err
	}
	lock, err := d.Open(root, LockName, unix.O_RDONLY|disk.FileFlags, 0)
	if err != nil {
		return nil // no mount has it, or none that this user can see
	}
	defer d.Close(lock)
	in, err := d.OFDLocked(lock, disk.Lock{Kind: disk.Alone, At: LockByte, N: 1})
	if err == nil && in.Kind != disk.None {
		return lockHolder(d, root)
	}
	return nil
}

// Writer returns a [LockedError] if a mount, of this host or of another one that shares the
// directory, has the volume in dir open for writing; nil if none has.
func Writer(dir string) error {
	d := &disk.Disk{}
	root, err := OpenRoot(d, dir)
	if err != nil {
		return err
	}
	defer d.Close(root)
	return WriterOf(d, root)
}
