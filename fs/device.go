package fs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// mountDevice mounts at dir and returns the connection: by mount(2) as root, by
// the fusermount3 program for others.
func mountDevice(dir, source string, options []string) (int, error) {
	if os.Geteuid() == 0 {
		return mountDirect(dir, source, options)
	}
	return mountHelped(dir, append([]string{"fsname=" + escape(source), "subtype=kmsfs"}, options...))
}

// escape protects what separates options.
func escape(s string) string { return strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(s) }

// Options of mount(8) that mount(2) takes as flags, and the flags that they set or clear.
var mountFlags = map[string]struct{ set, clear uintptr }{
	"ro": {set: unix.MS_RDONLY}, "rw": {clear: unix.MS_RDONLY}, "noexec": {set: unix.MS_NOEXEC},
	"exec":   {clear: unix.MS_NOEXEC},
	"nosuid": {set: unix.MS_NOSUID}, "suid": {clear: unix.MS_NOSUID}, "nodev": {set: unix.MS_NODEV},
	"dev":     {clear: unix.MS_NODEV},
	"noatime": {set: unix.MS_NOATIME}, "atime": {clear: unix.MS_NOATIME},
	"strictatime": {set: unix.MS_STRICTATIME}, "lazytime": {set: unix.MS_LAZYTIME},
	"sync": {set: unix.MS_SYNCHRONOUS}, "dirsync": {set: unix.MS_DIRSYNC},
}

func mountDirect(dir, source string, options []string) (int, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("open /dev/fuse", err)
	}
	flags, rest := splitOptions(unix.MS_NOSUID|unix.MS_NODEV, options)
	data := append([]string{fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,max_read=%d", fd,
		maxWrite)}, rest...)
	if err := unix.Mount(source, dir, "fuse.kmsfs", flags, strings.Join(data, ",")); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("mount", err)
	}
	return fd, nil
}

// splitOptions turns what mount(2) takes as flags into them.
func splitOptions(flags uintptr, options []string) (_ uintptr, rest []string) {
	for _, o := range options {
		if f, ok := mountFlags[o]; ok {
			flags = flags&^f.clear | f.set
		} else {
			rest = append(rest, o)
		}
	}
	return flags, rest
}

// Remount changes what mount(8) can change of a mount: ro, rw, exec, suid, dev and the
// like. Other flags stay, but for lazytime.
func Remount(dir string, options []string) error {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return os.NewSyscallError("statfs", err)
	}
	// The same bits as mount's, but for relatime, which is the default.
	const same = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_SYNCHRONOUS | unix.MS_NOATIME | unix.MS_NODIRATIME
	flags, _ := splitOptions(uintptr(s.Flags)&same, options)
	return os.NewSyscallError("mount", unix.Mount("", dir, "", unix.MS_REMOUNT|flags, ""))
}

// mountHelped lets fusermount3 mount, which sends the connection over a socket.
func mountHelped(dir string, options []string) (int, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "socket"), os.NewFile(uintptr(pair[1]), "socket")
	defer ours.Close()
	options = append(options, fmt.Sprintf("max_read=%d", maxWrite))
	c := exec.Command("fusermount3", "-o", strings.Join(options, ","), "--", dir)
	c.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	c.ExtraFiles = []*os.File{theirs}
	out, err := c.CombinedOutput()
	theirs.Close()
	if err != nil {
		return -1, fmt.Errorf("fusermount3: %s: %w", strings.TrimSpace(string(out)), err)
	}
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(ours.Fd()), make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("recvmsg", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, errors.New("fusermount3 sent no connection")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, errors.New("fusermount3 sent no connection")
	}
	return fds[0], nil
}

// unmountDevice unmounts; EBUSY while something is open.
func unmountDevice(dir string) error {
	if os.Geteuid() == 0 {
		return os.NewSyscallError("umount", unix.Unmount(dir, unix.UMOUNT_NOFOLLOW))
	}
	return Fusermount("-u", dir)
}

// Fusermount unmounts by fusermount3, with -u or -uz; EBUSY while something is open. The program tells
// why only in its message.
func Fusermount(flag, dir string) error {
	c := exec.Command("fusermount3", flag, "--", dir)
	c.Env = append(os.Environ(), "LC_ALL=C")
	out, err := c.CombinedOutput()
	said := strings.TrimSpace(string(out))
	switch {
	case err == nil:
		return nil
	case strings.HasSuffix(said, ": Device or resource busy"):
		return unix.EBUSY
	case said == "":
		return fmt.Errorf("fusermount3: %w", err)
	}
	return errors.New(said)
}
