//go:build linux && !portable

package layout

import (
	"bytes"
	"errors"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume/internal/disk"
)

// Properties that the backing filesystem must have.

// An UnfitError says which property a backing filesystem lacks.
type UnfitError struct {
	Lacks  string // "has no symlinks", for example
	Option string // of its mount, by which it lacks that; "" if it is none
	Err    error  // of the call that showed it; nil if the call gave a wrong result
}

func (e *UnfitError) Error() string {
	s := "the filesystem of the ciphertext directory " + e.Lacks
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *UnfitError) Unwrap() error { return e.Err }

// CheckBacking tests in the empty directory dir whether its filesystem has the properties that a
// volume needs; the error, mostly an [UnfitError], names the first one that it lacks. The notes are
// about properties that programs may miss. It leaves the directory empty.
func CheckBacking(dir string, plainNames bool) (notes []string, err error) {
	d := &disk.Disk{}
	root, err := OpenRoot(d, dir)
	if err != nil {
		return nil, err
	}
	defer d.Close(root)
	return CheckBackingIn(d, root, plainNames)
}

const probeName = "kmsfs.probe"

// CheckBackingIn is [CheckBacking] in an empty directory that is open.
func CheckBackingIn(d *disk.Disk, root int, plainNames bool) (notes []string, err error) {
	long := probeName + "." + strings.Repeat("n", 255-len(probeName)-1)
	other := probeName + ".2"
	made := []string{probeName, other, long}
	defer func() {
		for _, name := range made {
			d.Unlink(root, name, 0)
		}
	}()
	fd, err := d.Open(root, probeName, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|disk.FileFlags, 0o600)
	if errors.Is(err, unix.EROFS) {
		return nil, &UnfitError{Lacks: "is read-only"}
	}
	if err != nil {
		return nil, &UnfitError{Lacks: "lets no file be made", Err: err}
	}
	defer d.Close(fd)
	if err := checkFile(d, fd); err != nil {
		return nil, err
	}
	if err := d.Mknod(root, other, unix.S_IFREG|0o400, 0); err != nil {
		return nil, &UnfitError{Lacks: "has no mknod", Err: err}
	}
	if err := d.Rename(root, probeName, root, other, 0); err != nil {
		return nil, &UnfitError{Lacks: "does not rename a file over another", Err: err}
	}
	if err := d.Symlink(LinksTarget, root, probeName); err != nil {
		return nil, &UnfitError{Lacks: "has no symlinks, in which kmsfs keeps directory IDs, long names and its marker", Err: err}
	}
	if t, err := d.Readlink(root, probeName); err != nil || t != LinksTarget {
		return nil, &UnfitError{Lacks: "does not keep the targets of symlinks", Err: err}
	}
	if !plainNames {
		if err := checkNames(d, root, long); err != nil {
			return nil, err
		}
	}
	if err := d.Fsync(root); err != nil {
		return nil, &UnfitError{Lacks: "does not sync directories", Err: err}
	}
	return backingNotes(d, fd), nil
}

// checkFile tests how a regular file is read, written, cut and locked.
func checkFile(d *disk.Disk, fd int) error {
	text, far := []byte("kmsfs"), int64(64<<10)
	if err := d.Pwrite(fd, text, far); err != nil {
		return &UnfitError{Lacks: "does not write behind the end of a file", Err: err}
	}
	got := make([]byte, far+int64(len(text))+1)
	n, err := d.Pread(fd, got, 0)
	if want := append(make([]byte, far), text...); err != nil || !bytes.Equal(got[:n], want) {
		return &UnfitError{Lacks: "does not read back what was written behind the end of a file", Err: err}
	}
	var st unix.Stat_t
	err = errors.Join(d.Truncate(fd, 100), d.Truncate(fd, 8192), d.Fstat(fd, &st))
	if err != nil || st.Size != 8192 {
		return &UnfitError{Lacks: "does not change the length of a file", Err: err}
	}
	if err := d.Fsync(fd); err != nil {
		return &UnfitError{Lacks: "does not sync files", Err: err}
	}
	if err := d.OFDLock(fd, disk.Lock{Kind: disk.Alone, At: LockByte, N: 1}); err != nil {
		return errNoLocks{err}
	}
	return nil
}

// checkNames tests whether encoded names are kept: up to 255 bytes, in upper and lower case.
func checkNames(d *disk.Disk, root int, long string) error {
	if err := d.Mknod(root, long, unix.S_IFREG|0o400, 0); err != nil {
		return &UnfitError{Lacks: "has no names of 255 bytes (init --plain-names does without)", Err: err}
	}
	var st unix.Stat_t
	if err := d.Stat(root, strings.ToUpper(long), &st); err == nil {
		return &UnfitError{Lacks: "takes upper and lower case for the same (init --plain-names does without)"}
	}
	return nil
}

// backingNotes says what programs may miss on a filesystem on which a volume works.
func backingNotes(d *disk.Disk, fd int) (notes []string) {
	var st unix.Stat_t
	if err := d.Chmod(fd, 0o640); err != nil || d.Fstat(fd, &st) != nil || st.Mode&0o777 != 0o640 {
		notes = append(notes, "the filesystem does not keep modes: files have those that it gives them")
	}
	if err := d.Setxattr(fd, "user.kmsfs.probe", []byte("x"), 0); err != nil {
		notes = append(notes, "the filesystem has no extended attributes, so the volume has none")
	}
	return notes
}

// TimeGranularity returns how exactly the filesystem keeps the times of files, in nanoseconds:
// a power of ten from 1 to 10^9. It sets the file's mtime to now.
func TimeGranularity(d *disk.Disk, fd int) uint32 {
	probe := unix.Timespec{Sec: 1e9, Nsec: 123456789}
	var was, st unix.Stat_t
	if d.Fstat(fd, &was) != nil || d.Utimens(fd, unix.Timespec{Nsec: unix.UTIME_OMIT},
		probe) != nil || d.Fstat(fd, &st) != nil {
		return 1
	}
	d.Utimens(fd, unix.Timespec{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(time.Now().UnixNano()))
	return GranularityOf(st.Mtim.Nsec)
}

// GranularityOf returns the greatest power of ten that divides nsec.
func GranularityOf(nsec int64) uint32 {
	g := int64(1)
	for g < 1e9 && nsec%(10*g) == 0 {
		g *= 10
	}
	return uint32(g)
}
