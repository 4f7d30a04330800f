//go:build !linux || portable

// Package disk reads a ciphertext tree on systems other than Linux, or with the build tag portable,
// by which tests try that on Linux. Nothing in the tree is changed, and no symlink is followed.
package disk

import (
	"errors"
	"io"
	"io/fs"
	"os"
	slash "path"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// Disk reads the ciphertext tree.
type Disk struct{}

// Directories and files have numbers, which are the whole process's, as descriptors are.
var table struct {
	mu   sync.Mutex
	open []opened // by number
}

// opened is a directory or a file, or neither: then the number is free.
type opened struct {
	dir  *os.Root
	file *os.File
}

// Info is what is known of an object.
type Info struct {
	Mode    fs.FileMode // type and permissions
	Size    int64
	Stored  int64  // bytes that the disk has for it: Size, since that is not known
	Links   uint64 // 1, since that is not known
	ModTime time.Time
}

func infoOf(st fs.FileInfo) Info { return Info{st.Mode(), st.Size(), st.Size(), 1, st.ModTime()} }

// Dirent is one entry of a directory.
type Dirent struct {
	Name string
	Type uint32 // see TypeOf
}

func (d *Disk) add(o opened) int {
	table.mu.Lock()
	defer table.mu.Unlock()
	for fd := range table.open {
		if table.open[fd] == (opened{}) {
			table.open[fd] = o
			return fd
		}
	}
	table.open = append(table.open, o)
	return len(table.open) - 1
}

func (d *Disk) at(fd int) opened {
	table.mu.Lock()
	defer table.mu.Unlock()
	return table.open[fd]
}

// bare takes the path from an error: callers name the file.
func bare(err error) error {
	if p, ok := errors.AsType[*os.PathError](err); ok {
		return p.Err
	}
	return err
}

// OpenRoot opens the root of a tree by its path, which may lead over symlinks.
func (d *Disk) OpenRoot(path string) (int, error) {
	st, err := os.Stat(path)
	if err == nil && !st.IsDir() {
		err = syscall.ENOTDIR
	}
	if err != nil {
		return -1, bare(err)
	}
	r, err := os.OpenRoot(path)
	if err != nil {
		return -1, bare(err)
	}
	return d.add(opened{dir: r}), nil
}

// OpenFilePath opens a file for reading by a path that the user gave.
func (d *Disk) OpenFilePath(path string) (int, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO is not waited for
	if err != nil {
		return -1, bare(err)
	}
	return d.add(opened{file: f}), nil
}

// OpenFile opens the entry of a directory for reading; it is no symlink.
func (d *Disk) OpenFile(dir int, name string) (int, error) {
	return d.openIn(d.at(dir).dir, name)
}

// OpenFileBelow opens the file with a path below a directory for reading; no part of the path may be a
// symlink.
func (d *Disk) OpenFileBelow(dir int, path string) (int, error) {
	in, err := d.OpenDir(dir, slash.Dir(path))
	if err != nil {
		return -1, err
	}
	defer d.Close(in)
	return d.OpenFile(in, slash.Base(path))
}

func (d *Disk) openIn(r *os.Root, name string) (int, error) {
	st, err := r.Lstat(name)
	if err == nil && st.Mode()&fs.ModeSymlink != 0 {
		err = syscall.ELOOP
	}
	if err != nil {
		return -1, bare(err)
	}
	f, err := r.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return -1, bare(err)
	}
	if now, err := f.Stat(); err != nil || !os.SameFile(st, now) { // put there meanwhile
		f.Close()
		return -1, errors.Join(err, syscall.ELOOP)
	}
	return d.add(opened{file: f}), nil
}

// OpenDir opens the directory with a path below another one; no part of the path may be a symlink.
func (d *Disk) OpenDir(dir int, path string) (int, error) {
	r := d.at(dir).dir
	path = filepath.FromSlash(path)
	for p := path; p != "." && p != ""; p = filepath.Dir(p) {
		st, err := r.Lstat(p)
		if err == nil && !st.IsDir() {
			err = syscall.ENOTDIR
		}
		if err != nil {
			return -1, bare(err)
		}
	}
	if path == "" {
		path = "."
	}
	below, err := r.OpenRoot(path)
	if err != nil {
		return -1, bare(err)
	}
	return d.add(opened{dir: below}), nil
}

// Close closes a directory or a file.
func (d *Disk) Close(fd int) error {
	o := d.at(fd)
	table.mu.Lock()
	table.open[fd] = opened{}
	table.mu.Unlock()
	if o.dir != nil {
		return o.dir.Close()
	}
	return o.file.Close()
}

// Info returns what is known of an open object.
func (d *Disk) Info(fd int) (Info, error) {
	o := d.at(fd)
	if o.dir != nil {
		return d.InfoAt(fd, ".")
	}
	st, err := o.file.Stat()
	if err != nil {
		return Info{}, err
	}
	return infoOf(st), nil
}

// InfoAt returns what is known of an entry of a directory. It does not follow a symlink.
func (d *Disk) InfoAt(dir int, name string) (Info, error) {
	st, err := d.at(dir).dir.Lstat(name)
	if err != nil {
		return Info{}, bare(err)
	}
	return infoOf(st), nil
}

// Has reports whether a directory has an entry.
func (d *Disk) Has(dir int, name string) bool {
	_, err := d.InfoAt(dir, name)
	return err == nil
}

// Pread reads at an offset; it reads less only at the end of the file.
func (d *Disk) Pread(fd int, b []byte, off int64) (int, error) {
	n, err := d.at(fd).file.ReadAt(b, off)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, bare(err)
}

// PreadOr is Pread.
func (d *Disk) PreadOr(_ func(), fd int, b []byte, off int64) (int, error) {
	return d.Pread(fd, b, off)
}

// NextData returns off: not every system tells of holes. They are read as zeros.
func (d *Disk) NextData(_ int, off int64) (int64, error) { return off, nil }

// NextHole returns [End].
func (d *Disk) NextHole(_ int, _ int64) (int64, error) { return End, nil }

// Readlink returns the target of a symlink.
func (d *Disk) Readlink(dir int, name string) (string, error) {
	target, err := d.at(dir).dir.Readlink(name)
	return target, bare(err)
}

// Scan calls f for every entry of a directory, until f fails. With io.EOF f ends it without an
// error.
func (d *Disk) Scan(dir int, f func(Dirent) error) error {
	o, err := d.at(dir).dir.Open(".")
	if err != nil {
		return err
	}
	defer o.Close()
	for {
		es, err := o.ReadDir(1000)
		for _, e := range es {
			if err := f(Dirent{e.Name(), typeOf(e.Type())}); err != nil {
				if err == io.EOF {
					return nil
				}
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// TypeOf returns the type of an entry, 0 if it is another one than these.
func (d *Disk) TypeOf(_ int, e Dirent) uint32 { return e.Type }

func typeOf(m fs.FileMode) uint32 {
	switch {
	case m.IsRegular():
		return TypeFile
	case m.IsDir():
		return TypeDir
	case m&fs.ModeSymlink != 0:
		return TypeLink
	}
	return 0
}

// NotSymlink reports whether Readlink has failed since the entry is no symlink.
func NotSymlink(err error) bool {
	return errors.Is(err, syscall.EINVAL) || !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission)
}
