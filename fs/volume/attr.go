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
func (n *Node) Attr() (st Attr, err error) {
	v := n.v
	clock := v.clock.Load()
	defer func() {
		if err == nil {
			n.tell(&st, clock)
		}
	}()
	f := n.file.Load()
	if f != nil {
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
	if n.IsDir() {
		err = n.withFD(func(fd int) error { return v.disk.Fstat(fd, &st) })
		n.fill(&st, -1, "")
		return st, err
	}
	err = n.find(func(dir int, name string) error {
		err := v.disk.Stat(dir, name, &st)
		if err == nil && !n.is(&st) {
			err = errMoved
		}
		return err
	})
	if err == nil {
		n.fill(&st, -1, "") // by a descriptor: the name may be another file's by now
	}
	if last, ok := n.kept(); ok && errors.Is(err, unix.ENOENT) {
		if err = v.disk.Fstat(last, &st); err == nil {
			n.fill(&st, -1, "")
		}
	}
	return st, err
}

// fill turns the ciphertext's stat into the plaintext's: sizes, inode number,
// the time that the kernel believes. The file is at dir/name.
func (n *Node) fill(st *Attr, dir int, name string) {
	st.Ino = n.v.foldIno(st.Dev, st.Ino)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		st.Size = max(0, blockcrypt.TargetLen(st.Size))
	case unix.S_IFREG:
		st.Blksize = blockcrypt.PageSize
		if f := n.file.Load(); f != nil && f.fill(st) {
			return
		}
		st.Size = n.plainSize(st.Size, func() (int, error) {
			if dir < 0 {
				return n.open(unix.O_RDONLY)
			}
			return n.v.disk.Open(dir, name, unix.O_RDONLY|disk.FileFlags, 0)
		})
	}
}

// plainSize computes the plaintext size from the ciphertext's length. Damage
// must not keep a file from being removed, so it has a size too: opening it
// fails.
func (n *Node) plainSize(length int64, open func() (int, error)) int64 {
	v := n.v
	size, err := v.geo.Plain(length, func(k int64) (int, error) {
		fd, err := open()
		if err != nil {
			return 0, err
		}
		defer v.disk.Close(fd)
		return cfile.SealedLen(&v.disk, v.geo, fd, k)
	})
	if err != nil {
		v.report(n.where(), "a file's length is wrong", err)
		return max(0, length-int64(v.geo.Header()))
	}
	return size
}

// foldIno folds the device into the inode number, if the tree spans several.
func (v *Volume) foldIno(dev, ino uint64) uint64 {
	x := dev ^ v.root.dev
	return ino ^ (x<<40 | x>>24)
}

// Birth returns when the node was made; ok is false where the backing filesystem
// does not say.
func (n *Node) Birth() (t unix.StatxTimestamp, ok bool, err error) {
	err = n.withFD(func(fd int) error {
		t, ok, err = n.v.disk.Birth(fd)
		return err
	})
	return t, ok, err
}

// Access checks the permissions of the user who runs the mount, as access(2)
// does; mask is of unix.R_OK, W_OK, X_OK. Where several users are let in, the
// kernel checks instead.
func (n *Node) Access(mask uint32) error {
	if mask&unix.W_OK != 0 && n.v.o.ReadOnly {
		return unix.EROFS
	}
	if n.v.super {
		mask &= unix.X_OK // root may read and write everything
	}
	if mask == 0 {
		return nil
	}
	return n.withFD(func(fd int) error { return n.v.disk.Access(fd, mask) })
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
func (n *Node) SetAttr(ctx context.Context, s SetAttr) (Attr, error) {
	if n.v.o.ReadOnly {
		return Attr{}, unix.EROFS
	}
	if s.Size != nil {
		if err := n.truncate(ctx, *s.Size); err != nil {
			return Attr{}, err
		}
	}
	if s.KillPriv {
		if err := n.KillPriv(false); err != nil {
			return Attr{}, err
		}
	}
	// What settling writes later would drop these bits again.
	if s.Mode != nil || s.UID != nil || s.GID != nil {
		if f := n.file.Load(); f != nil {
			if err := f.settleNow(); err != nil {
				return Attr{}, err
			}
		}
	}
	var err error
	if s.UID != nil || s.GID != nil {
		err = n.withFD(func(fd int) error { return n.v.disk.Chown(fd, orMinusOne(s.UID), orMinusOne(s.GID)) })
	}
	if err == nil && s.Mode != nil {
		err = n.withFD(func(fd int) error { return n.v.disk.Chmod(fd, *s.Mode&0o7777) })
	}
	if err == nil && (s.Atime != nil || s.Mtime != nil) {
		err = n.setTimes(s.Atime, s.Mtime)
	}
	n.change()
	if err != nil {
		return Attr{}, err
	}
	return n.Attr()
}

func orMinusOne(p *uint32) int {
	if p == nil {
		return -1
	}
	return int(*p)
}

func (n *Node) setTimes(atime, mtime *unix.Timespec) error {
	omit := unix.Timespec{Nsec: unix.UTIME_OMIT}
	a, m := omit, omit
	if atime != nil {
		a = *atime
	}
	if mtime != nil {
		m = *mtime
	}
	set := func(fd int) error { return n.v.disk.Utimens(fd, a, m) }
	if f := n.file.Load(); f != nil {
		f.mu.Lock()
		if !f.closed && f.FD >= 0 {
			defer f.unlock()
			err := set(f.FD)
			if err == nil && mtime != nil {
				f.SetMtime(*mtime)
			}
			return err
		}
		f.unlock()
	}
	return n.withFD(set)
}

// KillPriv takes setuid, setgid of an executable, and capabilities away, as a
// write by somebody else does. Where root does not run the mount, the backing
// filesystem does so itself. Outsider says that they are not in the file's group:
// then setgid goes from a file that nobody executes, too.
func (n *Node) KillPriv(outsider bool) error {
	if !n.v.super {
		return nil
	}
	defer n.change()
	return n.withFD(func(fd int) error {
		var st unix.Stat_t
		if err := n.v.disk.Fstat(fd, &st); err != nil {
			return err
		}
		drop := privileges(st.Mode)
		if outsider {
			drop |= st.Mode & unix.S_ISGID
		}
		if drop != 0 {
			if err := n.v.disk.Chmod(fd, st.Mode&0o7777&^drop); err != nil {
				return err
			}
		}
		err := n.v.disk.Removexattr(fd, capabilityName)
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
var ofKernel = []string{"security.selinux", "security.ima", "security.evm", "security.apparmor", "security.bpf", "security.landlock"}

// refused reports whether an attribute is one that a volume does not take.
func refused(name string) bool {
	return slices.Contains(ofKernel, name) || strings.HasPrefix(name, "security.SMACK64") || strings.HasPrefix(name, "security.bpf.")
}

func (n *Node) attrName(name string) (string, error) {
	if passes(name) {
		return name, nil
	}
	if refused(name) {
		return "", unix.EOPNOTSUPP
	}
	if enc, err := n.v.vk.EncodeAttr(name); err == nil {
		if len(enc) > 255 {
			return "", unix.ERANGE
		}
		return enc, nil
	}
	return "", unix.EOPNOTSUPP
}

// Getxattr returns the value of an attribute.
func (n *Node) Getxattr(name string) (value []byte, err error) {
	enc, err := n.attrName(name)
	if err != nil {
		return nil, err
	}
	err = n.withFD(func(fd int) error {
		value, err = n.v.disk.Getxattr(fd, enc)
		return err
	})
	if err != nil || enc == name {
		return value, err
	}
	value, err = n.v.vk.OpenValue(name, value)
	if err != nil {
		n.v.report(n.where(), "an extended attribute cannot be read", err)
	}
	return value, err
}

// Setxattr sets an attribute; flags are those of setxattr(2). With killSGID the
// file's setgid bit goes, as where somebody who is not in its group sets an ACL.
func (n *Node) Setxattr(name string, value []byte, flags int, killSGID bool) error {
	if n.v.o.ReadOnly {
		return unix.EROFS
	}
	enc, err := n.attrName(name)
	if err != nil {
		return err
	}
	if enc != name {
		if value, err = n.v.vk.SealValue(name, value); err != nil {
			return err
		}
	}
	if f := n.file.Load(); name == capabilityName && f != nil {
		if err := f.settleNow(); err != nil {
			return err
		}
	}
	err = n.withFD(func(fd int) error {
		err := n.v.disk.Setxattr(fd, enc, value, flags)
		if err == nil && killSGID {
			err = n.killSGID(fd)
		}
		return err
	})
	n.aclChanged(name)
	return err
}

func (n *Node) killSGID(fd int) error {
	var st unix.Stat_t
	if err := n.v.disk.Fstat(fd, &st); err != nil || st.Mode&unix.S_ISGID == 0 {
		return err
	}
	return n.v.disk.Chmod(fd, st.Mode&0o7777&^unix.S_ISGID)
}

// Removexattr removes an attribute.
func (n *Node) Removexattr(name string) error {
	if n.v.o.ReadOnly {
		return unix.EROFS
	}
	enc, err := n.attrName(name)
	if err != nil {
		return err
	}
	err = n.withFD(func(fd int) error { return n.v.disk.Removexattr(fd, enc) })
	n.aclChanged(name)
	return err
}

func (n *Node) aclChanged(name string) {
	if name == aclDefaultName {
		n.dirMu.Lock()
		n.acl = aclUnknown
		n.dirMu.Unlock()
	}
}

// Listxattr returns the names of the attributes, each with a NUL behind it.
func (n *Node) Listxattr() ([]byte, error) {
	var raw []byte
	err := n.withFD(func(fd int) (err error) {
		raw, err = n.v.disk.Listxattr(fd)
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
		case strings.HasPrefix(plain, "user."), strings.HasPrefix(plain, "trusted."), strings.HasPrefix(plain, "security."+blockcrypt.Reserved):
			if plain, err = n.v.vk.DecodeAttr(plain); err != nil {
				n.v.report(n.where(), "an extended attribute is not shown", err)
				continue
			}
		default:
			continue
		}
		out = append(append(out, plain...), 0)
	}
	return out, nil
}
