//go:build linux && !portable

package transfer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
)

// exporter is an export under way.
type exporter struct {
	*copying
	v    *volume.Volume
	jobs chan exported

	// Of the goroutine that walks.
	dirs  []exported  // whose modes and times are set at the end
	links [][2]string // further names, each with the first
	late  []exported  // see IsLate
}

// exported is a file or a directory to be exported, with a lookup.
type exported struct {
	n  *volume.Node
	at string
	st volume.Attr
}

// Export copies the nodes with these paths below the volume, "." for all, to a directory, which is made
// if it does not exist. It goes on after an entry that fails; an error says that it did not.
func Export(ctx context.Context, v *volume.Volume, paths []string, dst string, o Options) (Counts, error) {
	if err := os.MkdirAll(dst, 0o700); err != nil {
		return Counts{}, err
	}
	ctx, c, err := begin(ctx, dst, o)
	if err != nil {
		return Counts{}, err
	}
	defer c.end()
	x := &exporter{copying: c, v: v}
	jobs, wait := crew(o.AtOnce, func(e exported) {
		if ctx.Err() == nil {
			x.file(ctx, e)
		}
		v.Forget(e.n.ID(), 1)
	})
	x.jobs = jobs
	for _, p := range Apart(paths) {
		x.path(ctx, p)
	}
	wait()
	for _, e := range x.late {
		if ctx.Err() == nil {
			x.file(ctx, e)
		}
		v.Forget(e.n.ID(), 1)
	}
	for _, l := range x.links {
		if ctx.Err() == nil {
			same, err := x.link(l[0], l[1])
			x.note(l[1], err, func(c *Counts) {
				if same {
					c.Same++
				} else {
					c.Files++
				}
			})
		}
	}
	for i := len(x.dirs) - 1; i >= 0; i-- { // from the bottom: the mode of one above can keep its owner out
		d := x.dirs[i]
		if ctx.Err() == nil {
			x.note(d.at, x.finishDir(d), func(c *Counts) { c.Dirs++ })
		}
		v.Forget(d.n.ID(), 1)
	}
	if err := context.Cause(ctx); err != nil {
		return x.counts, err
	}
	return x.counts, x.sync()
}

// sync makes all durable.
func (x *exporter) sync() error {
	d, err := x.root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}

// path exports the node with a plaintext path, and makes the directories above it.
func (x *exporter) path(ctx context.Context, p string) {
	n, at := x.v.Root(), "."
	for part := range strings.SplitSeq(path.Clean(p), "/") {
		if part == "." || part == "" {
			continue
		}
		c, _, _, err := x.v.Lookup(ctx, n, part)
		if err == nil && n != x.v.Root() {
			var st volume.Attr
			if st, err = n.Attr(); err == nil {
				err = x.dir(n, at, st)
			}
		}
		if err != nil {
			x.note(path.Join(at, part), err, nil)
			return
		}
		n, at = c, path.Join(at, part)
	}
	st, err := n.Attr()
	if err != nil {
		x.note(at, err, nil)
		return
	}
	x.entry(ctx, n, at, st)
}

// entry exports a node, and takes its lookup back when that was done.
func (x *exporter) entry(ctx context.Context, n *volume.Node, at string, st volume.Attr) {
	switch {
	case n.IsDir():
		if err := x.dir(n, at, st); err != nil {
			x.note(at, err, nil)
			return
		}
		x.below(ctx, n, at)
	case n.IsFile():
		if st.Nlink > 1 {
			key := [2]uint64{st.Dev, st.Ino}
			if first, ok := x.first[key]; ok {
				x.links = append(x.links, [2]string{first, at})
				x.v.Forget(n.ID(), 1)
				return
			}
			x.first[key] = at
		}
		if IsLate(at) {
			x.late = append(x.late, exported{n, at, st})
			return
		}
		select {
		case x.jobs <- exported{n, at, st}:
		case <-ctx.Done():
			x.v.Forget(n.ID(), 1)
		}
	default:
		x.note(at, x.special(n, at, st), func(c *Counts) { c.Others++ })
		x.v.Forget(n.ID(), 1)
	}
}

// below exports the entries of a directory.
func (x *exporter) below(ctx context.Context, n *volume.Node, at string) {
	d, err := n.OpenDir()
	if err != nil {
		x.note(at, err, nil)
		return
	}
	defer d.Close()
	err = d.Next(func(e volume.Entry) bool {
		if e.Name == "." || e.Name == ".." {
			return ctx.Err() == nil
		}
		to := path.Join(at, e.Name)
		c, st, _, err := d.Lookup(ctx, e)
		switch {
		case errors.Is(err, unix.ENOENT): // removed meanwhile
		case err != nil:
			x.note(to, err, nil)
		default:
			x.entry(ctx, c, to, st)
		}
		return ctx.Err() == nil
	})
	if err != nil {
		x.note(at, err, nil)
	}
}

// dir makes a directory in which the caller can make entries.
func (x *exporter) dir(n *volume.Node, at string, st volume.Attr) error {
	err := x.root.Mkdir(at, 0o700)
	if errors.Is(err, fs.ErrExist) {
		var now fs.FileInfo
		if now, err = x.root.Lstat(at); err == nil && !now.IsDir() {
			err = fmt.Errorf("another entry is in the way of this directory: %w", unix.ENOTDIR)
		} else if err == nil && now.Mode().Perm()&0o700 != 0o700 {
			err = x.root.Chmod(at, 0o700)
		}
	}
	if err == nil {
		x.dirs = append(x.dirs, exported{n, at, st})
	}
	return err
}

// finishDir gives a directory all that the volume's has.
func (x *exporter) finishDir(d exported) error {
	f, err := x.root.Open(d.at)
	if err != nil {
		return err
	}
	defer f.Close()
	return x.attributes(int(f.Fd()), d.n, &d.st)
}

// file exports one file.
func (x *exporter) file(ctx context.Context, j exported) {
	if now, err := x.root.Lstat(j.at); err == nil && now.Mode().IsRegular() && now.Size() == j.st.Size &&
		now.ModTime().Equal(time.Unix(j.st.Mtim.Unix())) && x.whole(j.n) == nil {
		x.note(j.at, nil, func(c *Counts) { c.Same++ })
		return
	}
	tmp := Temporary(j.at)
	copied, err := x.copy(ctx, j, tmp)
	there := err == nil || errors.Is(err, ErrIncomplete) || errors.Is(err, ErrAttributes)
	if there {
		if rerr := x.root.Rename(tmp, j.at); rerr != nil {
			err, there = rerr, false
		}
	}
	if !there {
		x.root.Remove(tmp)
	}
	x.note(j.at, err, func(c *Counts) { c.Files++; c.Bytes += copied })
}

// whole returns ErrIncomplete if a file is being written.
func (x *exporter) whole(n *volume.Node) error {
	h, err := n.Header()
	if err != nil || h == nil {
		return err
	}
	if h.State.Flags&(blockcrypt.Dirty|blockcrypt.Cut) != 0 {
		return ErrIncomplete
	}
	return nil
}

// copy copies a file to a new one. Of a file that is being written it returns ErrIncomplete, and it
// is there all the same.
func (x *exporter) copy(ctx context.Context, j exported, tmp string) (copied int64, err error) {
	h, err := j.n.Open(ctx, false)
	if err != nil {
		return 0, err
	}
	defer h.Release()
	if err := x.root.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	f, err := x.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	d := data{h.Seek, func(b []byte, off int64) (int, error) { return h.Read(ctx, b, off) }}
	copied, end, err := d.copyTo(ctx, j.st.Size, func(b []byte, off int64) error {
		_, err := f.WriteAt(b, off)
		return err
	})
	if err != nil {
		return copied, err
	}
	st, err := j.n.Attr() // the size may be another one by now
	if err != nil {
		return copied, err
	}
	if size := max(st.Size, end); size > end {
		if err := f.Truncate(size); err != nil {
			return copied, err
		}
	}
	return copied, errors.Join(x.attributes(int(f.Fd()), j.n, &st), x.whole(j.n))
}

// link makes a further name of a file that was exported; same says that it was there.
func (x *exporter) link(first, at string) (same bool, err error) {
	a, err := x.root.Lstat(first)
	if err != nil {
		return false, fmt.Errorf("another name of %s: %w", first, err)
	}
	if b, err := x.root.Lstat(at); err == nil {
		if os.SameFile(a, b) {
			return true, nil
		}
		if err := x.root.Remove(at); err != nil {
			return false, err
		}
	}
	return false, x.root.Link(first, at)
}

// special exports a symlink, a pipe, a socket or a device.
func (x *exporter) special(n *volume.Node, at string, st volume.Attr) error {
	link, target := st.Mode&unix.S_IFMT == unix.S_IFLNK, ""
	if link {
		var err error
		if target, err = x.v.Readlink(n); err != nil {
			return err
		}
	}
	if now, err := x.root.Lstat(at); err == nil {
		if now.IsDir() {
			return fmt.Errorf("a directory is there: %w", unix.EISDIR)
		}
		if err := x.root.Remove(at); err != nil {
			return err
		}
	}
	dir, err := x.root.Open(path.Dir(at))
	if err != nil {
		return err
	}
	defer dir.Close()
	fd, name := int(dir.Fd()), path.Base(at)
	if link {
		err = unix.Symlinkat(target, fd, name)
	} else {
		err = unix.Mknodat(fd, name, st.Mode, int(st.Rdev))
	}
	if err != nil {
		return err
	}
	if !x.user {
		if err := unix.Fchownat(fd, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	if !link {
		if err := unix.Fchmodat(fd, name, st.Mode&0o7777, 0); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d/%s", fd, name),
		[]unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

// attributes gives an open file owner, mode, extended attributes and times: as many as it takes, or
// ErrAttributes.
func (x *exporter) attributes(fd int, n *volume.Node, st *volume.Attr) error {
	var lacks attributeErrors
	if !x.user {
		lacks.note(unix.Fchown(fd, int(st.Uid), int(st.Gid)), "the owner")
	}
	lacks.note(unix.Fchmod(fd, st.Mode&0o7777), "the mode") // after chown, which takes bits away
	names, err := n.Listxattr()
	if !errors.Is(err, unix.EOPNOTSUPP) {
		lacks.note(err, "the extended attributes")
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		if name == "" || x.user && rootOnly(name) {
			continue
		}
		v, err := n.Getxattr(name)
		if err == nil {
			err = unix.Fsetxattr(fd, name, v, 0)
		}
		lacks.note(err, name)
	}
	lacks.note(unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd),
		[]unix.Timespec{st.Atim, st.Mtim}, 0), "the times")
	return lacks.err()
}
