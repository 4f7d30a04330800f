//go:build linux && !portable

package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

// ErrChanged says that a file was changed while it was read.
var ErrChanged = errors.New("the file was changed while it was imported; the copy may be a mix of old and new")

// importer is an import under way.
type importer struct {
	*copying
	v    *volume.Volume
	jobs chan source

	// Of the goroutine that walks.
	dirs  []source // whose modes and times are set at the end
	links []source // further names of files
	late  []source // see IsLate
}

// source is an entry to be imported.
type source struct {
	at  string // its path
	st  *syscall.Stat_t
	to  *volume.Node // the directory that it goes to, held by a lookup; of a directory itself
	was string       // of a further name: the first
}

// Import copies a directory into a volume that is open for writing, below its root. It goes on after an
// entry that fails; an error says that it did not. All is durable when the volume was closed.
func Import(ctx context.Context, v *volume.Volume, src string, o Options) (Counts, error) {
	ctx, c, err := begin(ctx, src, o)
	if err != nil {
		return Counts{}, err
	}
	defer c.end()
	x := &importer{copying: c, v: v}
	jobs, wait := crew(o.AtOnce, func(s source) {
		if ctx.Err() == nil {
			x.file(ctx, s)
		}
	})
	x.jobs = jobs
	x.below(ctx, source{at: ".", to: v.Root()})
	wait()
	for _, s := range x.late {
		if ctx.Err() == nil {
			x.file(ctx, s)
		}
	}
	for _, l := range x.links {
		if ctx.Err() == nil {
			x.link(ctx, l)
		}
	}
	for i := len(x.dirs) - 1; i >= 0; i-- { // from the bottom: the mode of one above can keep its owner out
		d := x.dirs[i]
		if ctx.Err() == nil {
			x.note(d.at, x.finishDir(ctx, d), func(c *Counts) { c.Dirs++ })
		}
		v.Forget(d.to.ID(), 1)
	}
	return x.counts, context.Cause(ctx)
}

// below imports the entries of a directory.
func (x *importer) below(ctx context.Context, in source) {
	d, err := x.root.Open(in.at)
	if err != nil {
		x.note(in.at, err, nil)
		return
	}
	defer d.Close()
	for ctx.Err() == nil {
		entries, err := d.ReadDir(1000)
		for _, e := range entries {
			if ctx.Err() == nil {
				x.entry(ctx, in.to, path.Join(in.at, e.Name()))
			}
		}
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			x.note(in.at, err, nil)
			return
		}
	}
}

// entry imports an entry into a directory.
func (x *importer) entry(ctx context.Context, to *volume.Node, at string) {
	fi, err := x.root.Lstat(at)
	if errors.Is(err, fs.ErrNotExist) {
		return // removed meanwhile
	}
	if err != nil {
		x.note(at, err, nil)
		return
	}
	s := source{at: at, st: fi.Sys().(*syscall.Stat_t), to: to}
	switch s.st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if s.to, err = x.dir(ctx, to, path.Base(at)); err != nil {
			x.note(at, err, nil)
			return
		}
		x.dirs = append(x.dirs, s)
		x.below(ctx, s)
	case unix.S_IFREG:
		if s.st.Nlink > 1 {
			key := [2]uint64{uint64(s.st.Dev), s.st.Ino}
			if first, ok := x.first[key]; ok {
				s.was = first
				x.links = append(x.links, s)
				return
			}
			x.first[key] = at
		}
		if IsLate(at) {
			x.late = append(x.late, s)
			return
		}
		select {
		case x.jobs <- s:
		case <-ctx.Done():
		}
	default:
		x.note(at, x.special(ctx, s), func(c *Counts) { c.Others++ })
	}
}

// dir makes a directory, or looks it up if it exists.
func (x *importer) dir(ctx context.Context, in *volume.Node, name string) (*volume.Node, error) {
	n, _, err := x.v.Mkdir(ctx, in, name, 0o700, volume.Caller{})
	if errors.Is(err, unix.EEXIST) {
		if n, _, _, err = x.v.Lookup(ctx, in, name); err == nil && !n.IsDir() {
			x.v.Forget(n.ID(), 1)
			err = fmt.Errorf("another entry is in the way of this directory: %w", unix.ENOTDIR)
		}
	}
	return n, err
}

// finishDir gives a directory all that the source has.
func (x *importer) finishDir(ctx context.Context, d source) error {
	f, err := x.root.Open(d.at)
	if err != nil {
		return err
	}
	defer f.Close()
	mode := d.st.Mode & 0o7777
	a := volume.SetAttr{Mode: &mode}
	if !x.user {
		a.UID, a.GID = &d.st.Uid, &d.st.Gid
	}
	_, err = d.to.SetAttr(ctx, a)
	return errors.Join(err, x.attributes(ctx, d.to, f, d.st))
}

// there returns the node of an entry, with a lookup; nil if there is none.
func (x *importer) there(ctx context.Context, in *volume.Node, name string) (*volume.Node, volume.Attr, error) {
	n, st, _, err := x.v.Lookup(ctx, in, name)
	if errors.Is(err, unix.ENOENT) {
		return nil, st, nil
	}
	return n, st, err
}

// file imports one file.
func (x *importer) file(ctx context.Context, s source) {
	name := path.Base(s.at)
	n, now, err := x.there(ctx, s.to, name)
	if err != nil {
		x.note(s.at, err, nil)
		return
	}
	if n != nil {
		x.v.Forget(n.ID(), 1)
		if n.IsFile() && now.Size == s.st.Size && now.Mtim == unix.Timespec(s.st.Mtim) {
			x.note(s.at, nil, func(c *Counts) { c.Same++ })
			return
		}
	}
	tmp := path.Base(Temporary(s.at))
	copied, err := x.copy(ctx, s, tmp)
	there := err == nil || errors.Is(err, ErrChanged) || errors.Is(err, ErrAttributes)
	if there {
		if rerr := x.v.Rename(s.to, tmp, s.to, name, 0); rerr != nil {
			err, there = rerr, false
		}
	}
	if !there {
		x.v.Unlink(s.to, tmp)
	}
	x.note(s.at, err, func(c *Counts) { c.Files++; c.Bytes += copied })
}

// copy copies a file to a new one of the volume. Of a file that was changed meanwhile it returns
// ErrChanged, and it is there all the same.
func (x *importer) copy(ctx context.Context, s source, tmp string) (copied int64, err error) {
	f, err := x.root.OpenFile(s.at, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe by now, perhaps
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var before, after unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &before); err != nil {
		return 0, err
	}
	if before.Ino != s.st.Ino || before.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, errors.New("another file is there by now")
	}
	if err := x.v.Unlink(s.to, tmp); err != nil && !errors.Is(err, unix.ENOENT) {
		return 0, err
	}
	caller := volume.Caller{}
	if !x.user {
		caller.UID, caller.GID = before.Uid, before.Gid
	}
	n, _, h, err := x.v.Create(ctx, s.to, tmp, volume.NewFile{Excl: true, Write: true,
		NewNode: volume.NewNode{Mode: before.Mode & 0o777, Caller: caller}})
	if err != nil {
		return 0, err
	}
	defer x.v.Forget(n.ID(), 1)
	copied, err = x.content(ctx, h, f, before.Size)
	if err := errors.Join(err, h.Release()); err != nil {
		return copied, err
	}
	if mode := before.Mode & 0o7777; mode&^0o777 != 0 { // writing takes these bits away
		if _, err := n.SetAttr(ctx, volume.SetAttr{Mode: &mode}); err != nil {
			return copied, err
		}
	}
	st := syscall.Stat_t(s.stat(&before))
	err = x.attributes(ctx, n, f, &st)
	if ferr := unix.Fstat(int(f.Fd()), &after); ferr != nil || after.Size != before.Size || after.Mtim != before.Mtim {
		err = errors.Join(err, ErrChanged)
	}
	return copied, err
}

// stat is what was found when the file was opened, as package syscall has it.
func (s source) stat(now *unix.Stat_t) syscall.Stat_t {
	st := *s.st
	st.Uid, st.Gid, st.Mode, st.Size = now.Uid, now.Gid, now.Mode, now.Size
	st.Atim, st.Mtim = syscall.Timespec(now.Atim), syscall.Timespec(now.Mtim)
	return st
}

// content copies the data of a file, and leaves holes.
func (x *importer) content(ctx context.Context, h *volume.Handle, f *os.File, size int64) (copied int64, err error) {
	fd := int(f.Fd())
	d := data{
		func(off int64, whence int) (int64, error) { return unix.Seek(fd, off, whence) },
		func(b []byte, off int64) (int, error) {
			n, err := f.ReadAt(b, off)
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return n, err
		},
	}
	copied, end, err := d.copyTo(ctx, size, func(b []byte, off int64) error {
		for len(b) > 0 {
			n, err := h.Write(ctx, b, off)
			if err != nil {
				return err
			}
			b, off = b[n:], off+int64(n)
		}
		return nil
	})
	if err == nil && size > end {
		_, err = h.Node().SetAttr(ctx, volume.SetAttr{Size: &size})
	}
	return copied, err
}

// link makes a further name of a file that was imported.
func (x *importer) link(ctx context.Context, s source) {
	name := path.Base(s.at)
	same, err := false, error(nil)
	n := x.v.Root()
	var looked []*volume.Node
	for part := range strings.SplitSeq(s.was, "/") {
		if n, _, _, err = x.v.Lookup(ctx, n, part); err != nil {
			err = fmt.Errorf("another name of %s: %w", s.was, err)
			break
		}
		looked = append(looked, n)
	}
	if err == nil {
		var old *volume.Node
		if old, _, err = x.there(ctx, s.to, name); old != nil {
			looked = append(looked, old)
			if same = old == n; !same && err == nil {
				err = x.v.Unlink(s.to, name)
			}
		}
	}
	if err == nil && !same {
		var linked *volume.Node
		if linked, _, err = x.v.Link(ctx, n, s.to, name); err == nil {
			looked = append(looked, linked)
		}
	}
	for _, n := range looked {
		x.v.Forget(n.ID(), 1)
	}
	x.note(s.at, err, func(c *Counts) {
		if same {
			c.Same++
		} else {
			c.Files++
		}
	})
}

// special imports a symlink, a pipe, a socket or a device.
func (x *importer) special(ctx context.Context, s source) error {
	link, target := s.st.Mode&unix.S_IFMT == unix.S_IFLNK, ""
	if link {
		var err error
		if target, err = x.root.Readlink(s.at); err != nil {
			return err
		}
	}
	name := path.Base(s.at)
	old, _, err := x.there(ctx, s.to, name)
	if err != nil {
		return err
	}
	if old != nil {
		x.v.Forget(old.ID(), 1)
		if old.IsDir() {
			return fmt.Errorf("a directory is there: %w", unix.EISDIR)
		}
		if err := x.v.Unlink(s.to, name); err != nil {
			return err
		}
	}
	caller := volume.Caller{}
	if !x.user {
		caller.UID, caller.GID = s.st.Uid, s.st.Gid
	}
	var n *volume.Node
	if link {
		n, _, err = x.v.Symlink(ctx, s.to, name, target, caller)
	} else {
		n, _, err = x.v.Mknod(ctx, s.to, name, volume.NewNode{Mode: s.st.Mode, Rdev: uint32(s.st.Rdev), Caller: caller})
	}
	if err != nil {
		return err
	}
	defer x.v.Forget(n.ID(), 1)
	at, mt := unix.Timespec(s.st.Atim), unix.Timespec(s.st.Mtim)
	_, err = n.SetAttr(ctx, volume.SetAttr{Atime: &at, Mtime: &mt})
	return err
}

// attributes gives a file or a directory extended attributes and times: as many as it takes, or
// ErrAttributes.
func (x *importer) attributes(ctx context.Context, n *volume.Node, f *os.File, st *syscall.Stat_t) error {
	fd := int(f.Fd())
	var lacks attributeErrors
	names := make([]byte, 64<<10) // XATTR_LIST_MAX
	k, err := unix.Flistxattr(fd, names)
	if !errors.Is(err, unix.EOPNOTSUPP) {
		lacks.note(err, "the extended attributes")
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:max(0, k)]), "\x00"), "\x00") {
		if name == "" || x.user && rootOnly(name) ||
			strings.HasPrefix(name, "security.") && name != "security.capability" {
			continue // of a security module, which gives the copy its own
		}
		v := make([]byte, 64<<10) // XATTR_SIZE_MAX
		m, err := unix.Fgetxattr(fd, name, v)
		if err == nil {
			err = n.Setxattr(name, v[:m], 0, false)
		}
		lacks.note(err, name)
	}
	at, mt := unix.Timespec(st.Atim), unix.Timespec(st.Mtim)
	_, err = n.SetAttr(ctx, volume.SetAttr{Atime: &at, Mtime: &mt})
	lacks.note(err, "the times")
	return lacks.err()
}
