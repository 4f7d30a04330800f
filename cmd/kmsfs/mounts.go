//go:build linux && !portable

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"kmsfs/fs"
	"kmsfs/fs/volume"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Mounts, as the kernel lists them in /proc/PID/mountinfo (proc(5)).

// mountInfo is a line of mountinfo. dev, "major:minor", is the filesystem's: it has the same
// number in every mount namespace, and no other filesystem of this kernel has it.
type mountInfo struct {
	id, dev, root, dir, fstype, source, options string // root: the part of it that is mounted there
}

// mounts returns all mounts that this process sees.
func mounts() ([]mountInfo, error) { return readMounts("/proc/self/mountinfo") }

// readMounts parses a mountinfo file, see proc(5).
func readMounts(path string) (out []mountInfo, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		left, right, ok := strings.Cut(s.Text(), " - ")
		a, b := strings.Fields(left), strings.Fields(right)
		if ok && len(a) >= 5 && len(b) >= 2 {
			out = append(out,
				mountInfo{a[0], a[2], unescape(a[3]), unescape(a[4]), b[0], unescape(b[1]),
					unescape(strings.Join(b[2:], " "))})
		}
	}
	return out, s.Err()
}

// errNotMounted says that a directory is not the root of a mounted volume.
var errNotMounted = errors.New("no kmsfs volume is mounted there")

// mountAt returns the volume that is mounted at dir, which may lead over symlinks. The mount is
// not looked into: it may be locked, dead, or another user's.
func mountAt(dir string) (*mountInfo, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		// The last step of "." and "M/." is within the mount, which may be locked.
		if cwd, rerr := os.Readlink("/proc/self/cwd"); rerr == nil {
			if !filepath.IsAbs(dir) {
				dir = filepath.Join(cwd, dir)
			}
			fd, err = unix.Open(filepath.Clean(dir), unix.O_PATH|unix.O_CLOEXEC, 0)
		}
	}
	if errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("the directory %s does not exist", dir)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	id, err := mountID(fd)
	if err != nil {
		return nil, err
	}
	real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, err
	}
	ms, err := mounts()
	if err != nil {
		return nil, err
	}
	for _, m := range ms {
		if m.id == id && m.dir == real && m.fstype == "fuse.kmsfs" {
			return &m, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", real, errNotMounted)
}

// mountID returns the ID, as in mountinfo, of the mount in which a file was opened.
func mountID(fd int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strings.TrimSpace(id), nil
		}
	}
	return "", errors.New("the kernel does not tell in which mount a file is")
}

// findMount returns what is mounted at dir, an absolute path without symlinks; nil if nothing
// is.
func findMount(dir string) (*mountInfo, error) {
	ms, err := mounts()
	var found *mountInfo
	for i, m := range ms {
		if m.dir == dir {
			found = &ms[i] // the last is on top
		}
	}
	return found, err
}

// mountOf returns where a device is mounted, "" if nowhere that this process sees.
func mountOf(dev string) (string, error) {
	ms, err := mounts()
	for _, m := range ms {
		if m.dev == dev {
			return m.dir, nil
		}
	}
	return "", err
}

// isMounted reports whether a volume is mounted anywhere that this process sees.
func isMounted(cipherDir string) bool {
	ms, err := mounts()
	return err != nil || slices.ContainsFunc(ms,
		func(m mountInfo) bool { return m.fstype == "fuse.kmsfs" && m.source == cipherDir })
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// isDead reports whether the daemon of a mount has gone. It asks the daemon: what the kernel
// remembers of the directory may still look fine.
func (m *mountInfo) isDead() bool {
	answer := make(chan error, 1)
	go func() {
		var s unix.Statfs_t
		answer <- unix.Statfs(m.dir, &s)
	}()
	for {
		select {
		case err := <-answer:
			return errors.Is(err, unix.ENOTCONN) ||
				errors.Is(err, unix.ECONNABORTED) // it is dying just now
		case <-time.After(100 * time.Millisecond):
			if m.isStuck() && m.abort() != nil {
				return true // it can still be taken out of sight
			}
		}
	}
}

// isStuck reports whether the daemon was killed while the kernel kept one of its threads: it
// does if the thread told it to drop a page that was on its way to the daemon
// (fuse_reverse_inval_inode waits for it). The mount then never comes to know that its daemon
// is dead, and programs that ask it wait for ever.
func (m *mountInfo) isStuck() bool {
	id, ok := readMark(m.dev)
	return ok && id.alive() && isKilled(id.pid)
}

// isKilled reports whether a process was killed and is not gone yet: its first
// thread has ended, or has a SIGKILL before it.
func isKilled(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	field := func(name string) string {
		_, rest, _ := strings.Cut(string(b), "\n"+name+":")
		line, _, _ := strings.Cut(rest, "\n")
		return strings.TrimSpace(line)
	}
	pending, err := strconv.ParseUint(field("SigPnd"), 16, 64)
	return err == nil && pending&(1<<(unix.SIGKILL-1)) != 0 || strings.HasPrefix(field("State"), "Z")
}

// abort ends the mount's connection: programs that wait for its daemon get an error.
func (m *mountInfo) abort() error {
	if os.Geteuid() == 0 {
		err := unix.Unmount(m.dir, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			return nil // it stays mounted while it is in use
		}
		return err
	}
	return os.WriteFile(filepath.Join(m.connection(), "abort"), []byte("1"), 0)
}

// connection is the directory in which the kernel shows the mount's connection, as long as the
// filesystem is mounted in any namespace.
func (m *mountInfo) connection() string {
	_, minor, _ := strings.Cut(m.dev, ":")
	return filepath.Join("/sys/fs/fuse/connections", minor)
}

func (m *mountInfo) unmount() error {
	if os.Geteuid() == 0 {
		return unix.Unmount(m.dir, unix.UMOUNT_NOFOLLOW)
	}
	return fs.Fusermount("-u", m.dir)
}

// cleanDead takes a dead mount away, with its mark and its socket.
func (m *mountInfo) cleanDead() error {
	if err := detach(m.dir); err != nil {
		return err
	}
	for _, path := range []func(string) (string, error){markPath, socketPath} {
		if p, err := path(m.dev); err == nil {
			os.Remove(p)
		}
	}
	return nil
}

// readOnly reports whether the daemon of a mount has the volume open for reading only.
func (m *mountInfo) readOnly() (bool, error) {
	var s stats
	if err := askMount(context.Background(), m.dev, http.MethodGet, "stats", &s); err == nil {
		return s.ReadOnly, nil
	}
	err := volume.Writer(m.source) // it does not answer here: if anybody writes, it is this one
	if errors.Is(err, volume.ErrLocked) {
		return false, nil
	}
	return err == nil, err
}

// detach takes a dead mount away, whatever still holds it.
func detach(dir string) error {
	if os.Geteuid() == 0 {
		return unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	return fs.Fusermount("-uz", dir)
}
