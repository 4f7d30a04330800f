//go:build linux && !portable

package volume

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/disk"
)

// Attr returns what stat says of the node.
func (a *attributes) Attr() (st Attr, err error) {
	v := a.v
	clock := v.clock.Load()
	defer func() {
		if err == nil {
			a.tell(&st, clock)
		}
	}()
	f := a.n.file.Load()
	if f != nil {
		f.lease.look()
		if done, err := f.attr(&st, false); done {
			return st, err
		}
		defer func() {
			// Somebody changes it, and no name leads to it: then it has to be waited for.
			if err == nil {
				return
			}
			if done, ferr := f.attr(&st, true); done {
				err = ferr
			}
		}()
	}
	if a.n.IsDir() {
		err = a.n.withFD(func(fd int) error { return v.disk.Fstat(fd, &st) })
		a.fill(&st, -1, "")
		return st, err
	}
	err = a.n.find(func(dir int, name string) error {
		err := v.disk.Stat(dir, name, &st)
		if err == nil && !a.n.is(&st) {
			err = errMoved
		}
		return err
	})
	if err == nil {
		err = a.fill(&st, -1, "") // by a descriptor: the name may be another file's by now
	}
	if last, ok := a.n.kept(); ok && errors.Is(err, unix.ENOENT) {
		if err = v.disk.Fstat(last, &st); err == nil {
			err = a.fill(&st, -1, "")
		}
	}
	return st, err
}

// fill turns the ciphertext's stat into the plaintext's: sizes, inode number,
// the time that the kernel believes. The file is at dir/name.
func (a *attributes) fill(st *Attr, dir int, name string) error {
	st.Ino = a.v.foldIno(st.Dev, st.Ino)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		st.Size = max(0, blockcrypt.TargetLen(st.Size))
	case unix.S_IFREG:
		st.Blksize = blockcrypt.PageSize
		if f := a.n.file.Load(); f != nil {
			if a.v.Shared() { // the file remembers the time that is told
				f.lease.look()
				if done, err := f.attr(st, false); done {
					return err
				}
			}
			if f.showing.fill(st) {
				return nil
			}
		}
		size, err := a.plainSize(st.Size, func() (fd int, err error) {
			if dir < 0 {
				fd, err = a.n.open(unix.O_RDONLY)
			} else {
				fd, err = a.v.disk.Open(dir, name, unix.O_RDONLY|disk.FileFlags, 0)
			}
			if errors.Is(err, unix.EACCES) {
				var now unix.Stat_t
				fd, err = a.n.openForced(unix.O_RDONLY, &now)
			}
			return fd, err
		})
		if err != nil {
			return err
		}
		st.Size = size
	}
	return nil
}

// plainSize computes the plaintext size from the ciphertext's length, and where that does not suffice
// from the file that open opens. Damage must not keep a file from being removed, so it has a size too: opening
// it fails.
func (a *attributes) plainSize(length int64, open func() (int, error)) (int64, error) {
	v, fd := a.v, -1
	defer func() {
		if fd >= 0 {
			v.disk.Close(fd)
		}
	}()
	opened := func() (err error) {
		if fd < 0 {
			fd, err = open()
		}
		return err
	}
	sizes := v.sizes()
	geo, err := sizes.New, error(nil)
	if sizes.Mixed() && length > 0 {
		if err = opened(); err == nil {
			geo, err = sizes.Of(&v.disk, fd)
		}
	}
	size := int64(0)
	if err == nil {
		size, err = geo.Plain(length, func(k int64) (int, error) {
			if err := opened(); err != nil {
				return 0, err
			}
			return cfile.SealedLen(&v.disk, geo, fd, k)
		})
	}
	if blockcrypt.ClassOf(err) != "" || errors.Is(err, unix.EIO) {
		if !v.Shared() { // else it is being written, perhaps
			v.report(a.n.where(), "a file's length is wrong", err)
		}
		return max(0, length-int64(geo.Header())), nil
	}
	return size, err
}

// Birth returns when the node was made; ok is false where the backing filesystem
// does not say.
func (a *attributes) Birth() (t unix.StatxTimestamp, ok bool, err error) {
	err = a.n.withFD(func(fd int) error {
		t, ok, err = a.v.disk.Birth(fd)
		return err
	})
	return t, ok, err
}

// Access checks the permissions of the user who runs the mount, as access(2)
// does; mask is of unix.R_OK, W_OK, X_OK. Where several users are let in, the
// kernel checks instead.
func (a *attributes) Access(mask uint32) error {
	if mask&unix.W_OK != 0 && a.v.o.ReadOnly {
		return unix.EROFS
	}
	if a.v.super {
		mask &= unix.X_OK // root may read and write everything
	}
	if mask == 0 {
		return nil
	}
	return a.n.withFD(func(fd int) error { return a.v.disk.Access(fd, mask) })
}

// SetAttr is what [Node.SetAttr] changes; nil leaves a thing as it is.
type SetAttr struct {
	Size         *int64
	Mode         *uint32
	UID, GID     *uint32
	Atime, Mtime *unix.Timespec // Nsec may be UTIME_NOW
	KillPriv     bool           // setuid, setgid and capabilities go
}

// SetAttr changes what s names, and returns the new attributes.
func (a *attributes) SetAttr(ctx context.Context, s SetAttr) (Attr, error) {
	if a.v.o.ReadOnly {
		return Attr{}, unix.EROFS
	}
	if s.Size != nil {
		if err := a.n.truncate(ctx, *s.Size); err != nil {
			return Attr{}, err
		}
	}
	if s.KillPriv {
		if err := a.KillPriv(false); err != nil {
			return Attr{}, err
		}
	}
	// What settling writes later would drop these bits again.
	if s.Mode != nil || s.UID != nil || s.GID != nil {
		if f := a.n.file.Load(); f != nil {
			if err := f.settleNow(); err != nil {
				return Attr{}, err
			}
		}
	}
	var err error
	if s.UID != nil || s.GID != nil {
		err = a.set(func(fd int) error {
			return a.v.disk.Chown(fd, orMinusOne(s.UID),
				orMinusOne(s.GID))
		})
	}
	if err == nil && s.Mode != nil {
		err = a.set(func(fd int) error { return a.v.disk.Chmod(fd, *s.Mode&0o7777) })
	}
	if err == nil && (s.Atime != nil || s.Mtime != nil) {
		err = a.setTimes(s.Atime, s.Mtime)
	}
	a.change()
	if err != nil {
		return Attr{}, err
	}
	return a.Attr()
}

func orMinusOne(p *uint32) int {
	if p == nil {
		return -1
	}
	return int(*p)
}

func (a *attributes) setTimes(atime, mtime *unix.Timespec) error {
	omit := unix.Timespec{Nsec: unix.UTIME_OMIT}
	at, mt := omit, omit
	if atime != nil {
		at = *atime
	}
	if mtime != nil {
		mt = *mtime
	}
	set := func(fd int) error { return a.v.disk.Utimens(fd, at, mt) }
	a.steady.RLock()
	defer a.steady.RUnlock()
	defer a.change()
	if f := a.n.file.Load(); f != nil {
		f.mu.Lock()
		if !f.closed && f.FD >= 0 {
			defer f.unlock()
			err := set(f.FD)
			if err == nil && mtime != nil {
				f.SetMtime(*mtime)
				if a.v.Shared() && !f.AtRest() {
					f.showing.set(f.Times().Mtime)
				}
			}
			return err
		}
		f.unlock()
	}
	return a.n.withFD(set)
}

// KillPriv takes setuid, setgid of an executable, and capabilities away, as a
// write by somebody else does. Where root does not run the mount, the backing
// filesystem does so itself. Outsider says that they are not in the file's group:
// then setgid goes from a file that nobody executes, too.
func (a *attributes) KillPriv(outsider bool) error {
	if !a.v.super {
		return nil
	}
	return a.set(func(fd int) error {
		var st unix.Stat_t
		if err := a.v.disk.Fstat(fd, &st); err != nil {
			return err
		}
		drop := privileges(st.Mode)
		if outsider {
			drop |= st.Mode & unix.S_ISGID
		}
		if drop != 0 {
			if err := a.v.disk.Chmod(fd, st.Mode&0o7777&^drop); err != nil {
				return err
			}
		}
		err := a.v.disk.Removexattr(fd, capabilityName)
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
		return err
	})
}

// privileges returns which bits of a mode a write by somebody else takes away.
func privileges(mode uint32) uint32 {
	drop := mode & unix.S_ISUID
	if mode&unix.S_IXGRP != 0 {
		drop |= mode & unix.S_ISGID
	}
	return drop
}

// Extended attributes.

const (
	capabilityName = "security.capability"
	aclAccessName  = "system.posix_acl_access"
	aclDefaultName = "system.posix_acl_default"
)

// ChangesMode reports whether setting or removing an attribute can change the mode of the
// object.
func ChangesMode(name string) bool { return passes(name) }

// passes reports whether an attribute stands in the ciphertext as it is: the
// kernel must read it.
func passes(name string) bool {
	return name == capabilityName || name == aclAccessName || name == aclDefaultName
}

// ofKernel are the attributes of security.* that security modules of the kernel set and read
// by themselves (linux/xattr.h). Encrypted they would mean nothing to them.
var ofKernel = []string{"security.selinux", "security.ima", "security.evm", "security.apparmor",
	"security.bpf", "security.landlock"}

// refused reports whether an attribute is one that a volume does not take.
func refused(name string) bool {
	return slices.Contains(ofKernel, name) || strings.HasPrefix(name, "security.SMACK64") ||
		strings.HasPrefix(name, "security.bpf.")
}

func (a *attributes) attrName(name string) (string, error) {
	if passes(name) {
		return name, nil
	}
	if refused(name) {
		return "", unix.EOPNOTSUPP
	}
	if enc, err := a.v.vk.EncodeAttr(name); err == nil {
		if len(enc) > 255 {
			return "", unix.ERANGE
		}
		return enc, nil
	}
	return "", unix.EOPNOTSUPP
}

// Getxattr returns the value of an attribute.
func (a *attributes) Getxattr(name string) (value []byte, err error) {
	enc, err := a.attrName(name)
	if err != nil {
		return nil, err
	}
	err = a.n.withFD(func(fd int) error {
		value, err = a.v.disk.Getxattr(fd, enc)
		return err
	})
	if err != nil || enc == name {
		return value, err
	}
	value, err = a.v.vk.OpenValue(name, value)
	if err != nil {
		a.v.report(a.n.where(), "an extended attribute cannot be read", err)
	}
	return value, err
}

// Setxattr sets an attribute; flags are those of setxattr(2). With killSGID the
// file's setgid bit goes, as where somebody who is not in its group sets an ACL.
func (a *attributes) Setxattr(name string, value []byte, flags int, killSGID bool) error {
	if a.v.o.ReadOnly {
		return unix.EROFS
	}
	enc, err := a.attrName(name)
	if err != nil {
		return err
	}
	if enc != name {
		if value, err = a.v.vk.SealValue(name, value); err != nil {
			return err
		}
	}
	if f := a.n.file.Load(); name == capabilityName && f != nil {
		if err := f.settleNow(); err != nil {
			return err
		}
	}
	err = a.set(func(fd int) error {
		err := a.v.disk.Setxattr(fd, enc, value, flags)
		if err == nil && killSGID {
			err = a.killSGID(fd)
		}
		return err
	})
	a.n.aclChanged(name)
	return err
}

func (a *attributes) killSGID(fd int) error {
	var st unix.Stat_t
	if err := a.v.disk.Fstat(fd, &st); err != nil || st.Mode&unix.S_ISGID == 0 {
		return err
	}
	return a.v.disk.Chmod(fd, st.Mode&0o7777&^unix.S_ISGID)
}

// Removexattr removes an attribute.
func (a *attributes) Removexattr(name string) error {
	if a.v.o.ReadOnly {
		return unix.EROFS
	}
	enc, err := a.attrName(name)
	if err != nil {
		return err
	}
	err = a.set(func(fd int) error { return a.v.disk.Removexattr(fd, enc) })
	a.n.aclChanged(name)
	return err
}

func (d *directory) aclChanged(name string) {
	if name == aclDefaultName {
		d.dirMu.Lock()
		d.acl = aclUnknown
		d.dirMu.Unlock()
	}
}

// Listxattr returns the names of the attributes, each with a NUL behind it.
func (a *attributes) Listxattr() ([]byte, error) {
	var raw []byte
	err := a.n.withFD(func(fd int) (err error) {
		raw, err = a.v.disk.Listxattr(fd)
		return err
	})
	if err != nil {
		return nil, err
	}
	var out []byte
	for name := range bytes.SplitSeq(raw, []byte{0}) {
		plain := string(name)
		switch {
		case plain == "":
			continue
		case passes(plain):
		case strings.HasPrefix(plain, "user."), strings.HasPrefix(plain,
			"trusted."), strings.HasPrefix(plain, "security."+blockcrypt.Reserved):
			if plain, err = a.v.vk.DecodeAttr(plain); err != nil {
				a.v.report(a.n.where(), "an extended attribute is not shown", err)
				continue
			}
		default:
			continue
		}
		out = append(append(out, plain...), 0)
	}
	return out, nil
}

// KeepMtime is [Node.SetAttr] of the modification time as the kernel writes it back, where
// nothing has to be done for it now: ok is false if something has to. Attributes are as they
// were told last.
func (a *attributes) KeepMtime(t unix.Timespec) (st Attr, ok bool) {
	told := a.told.Load()
	if !a.v.o.KernelTimes || told == nil || told.st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 { // a write may have taken these
		return st, false
	}
	st = told.st
	f := a.n.file.Load()
	if f == nil {
		return st, t == st.Mtim && a.changed.Load() <= told.clock
	}
	if !f.mu.TryLock() {
		return st, false
	}
	defer f.unlock()
	if times := f.Times(); f.closed || times.Mtime != t && (f.writers == 0 || !times.Near(t)) {
		return st, false
	}
	f.Times().Keep(t)
	f.current().fill(&st)
	return st, true
}

// set changes attributes by a descriptor of the object.
func (a *attributes) set(f func(fd int) error) error {
	a.steady.RLock()
	defer a.steady.RUnlock()
	defer a.change()
	return a.n.withFD(f)
}
