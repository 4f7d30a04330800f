package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func umountCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "umount MOUNTPOINT",
		Short: "Unmount a volume; returns when everything is on the disk",
		Args:  cobra.ExactArgs(1),
		RunE:  func(_ *cobra.Command, args []string) error { return umount(args[0]) },
	}
	// As umount(8) calls its helper.
	c.Flags().BoolP("no-mtab", "n", false, "accepted for umount(8)")
	c.Flags().BoolP("verbose", "v", false, "accepted for umount(8)")
	c.Flags().MarkHidden("no-mtab")
	c.Flags().MarkHidden("verbose")
	return c
}

func umount(dir string) error {
	if isDead(dir) {
		if err := cleanDead(dir); err != nil {
			return fmt.Errorf("the dead mount at %s cannot be cleaned up: %w", dir, err)
		}
		fmt.Printf("Cleaned up a dead mount at %s.\n", dir)
		return nil
	}
	real, m, err := mountAt(dir)
	if err != nil {
		return err
	}
	d := daemonOf(real, m.source)
	if d.fd >= 0 {
		defer unix.Close(d.fd)
	}
	if err := unmountOnce(real); errors.Is(err, unix.EBUSY) {
		who := strings.Join(busy(real), ", ")
		if who == "" {
			who = "a process that we may not see, or a request that waits, perhaps for a key service"
		}
		return coded{hint(fmt.Errorf("%s is busy: in use by %s", real, who), "end what uses it, or leave the directory, and try again"), exitBusy}
	} else if err != nil {
		return fmt.Errorf("unmount %s: %w", real, err)
	}
	if other, err := mountOf(m.dev); err != nil {
		return err
	} else if other != "" {
		fmt.Printf("The volume is still mounted at %s.\n", other)
		return nil
	}
	return d.awaitEnd()
}

// isDead reports whether dir is a mount whose daemon has gone. It asks the
// daemon: what the kernel remembers of the directory may still look fine.
func isDead(dir string) bool {
	answer := make(chan error, 1)
	go func() {
		var s unix.Statfs_t
		answer <- unix.Statfs(dir, &s)
	}()
	for {
		select {
		case err := <-answer:
			return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) // it is dying just now
		case <-time.After(100 * time.Millisecond):
			if isStuck(dir) && abort(dir) != nil {
				return true // it can still be taken out of sight
			}
		}
	}
}

// mountAt returns the volume that is mounted at dir. Not even root may look into
// another user's mount, so the name is tried as it stands first.
func mountAt(dir string) (real string, m *mountInfo, err error) {
	if real, err = filepath.Abs(dir); err != nil {
		return "", nil, err
	}
	if m, err = findMount(real); err != nil {
		return "", nil, err
	}
	if m == nil {
		if real, err = filepath.EvalSymlinks(real); errors.Is(err, os.ErrNotExist) {
			return "", nil, fmt.Errorf("the directory %s does not exist", dir)
		} else if err != nil {
			return "", nil, err
		}
		if m, err = findMount(real); err != nil {
			return "", nil, err
		}
	}
	if m == nil || m.fstype != "fuse.kmsfs" {
		return "", nil, fmt.Errorf("no kmsfs volume is mounted at %s", real)
	}
	return real, m, nil
}

func unmountOnce(dir string) error {
	if os.Geteuid() == 0 {
		return unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
	}
	return fusermount("-u", dir)
}

// cleanDead takes a dead mount away, and its mark.
func cleanDead(dir string) error {
	if err := detach(dir); err != nil {
		return err
	}
	if abs, err := filepath.Abs(dir); err == nil {
		if path, err := markPath(abs); err == nil {
			os.Remove(path)
		}
	}
	return nil
}

// detach takes a dead mount away, whatever still holds it.
func detach(dir string) error {
	if os.Geteuid() == 0 {
		return unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	return fusermount("-uz", dir)
}

func fusermount(flag, dir string) error {
	out, err := exec.Command("fusermount3", flag, "--", dir).CombinedOutput()
	if err == nil {
		return nil
	}
	if strings.Contains(string(out), "busy") {
		return unix.EBUSY
	}
	return fmt.Errorf("fusermount3: %s", strings.TrimSpace(string(out)))
}

// mountInfo is a line of /proc/self/mountinfo.
type mountInfo struct{ dir, dev, fstype, source string }

// mounts returns all mounts that this process sees.
func mounts() (out []mountInfo, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		left, right, ok := strings.Cut(s.Text(), " - ")
		a, b := strings.Fields(left), strings.Fields(right)
		if ok && len(a) >= 5 && len(b) >= 2 {
			out = append(out, mountInfo{unescape(a[4]), a[2], b[0], unescape(b[1])})
		}
	}
	return out, s.Err()
}

// findMount returns what is mounted at dir, nil if nothing is.
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

// mountOf returns where a device is mounted, "" if nowhere.
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
	return err != nil || slices.ContainsFunc(ms, func(m mountInfo) bool { return m.fstype == "fuse.kmsfs" && m.source == cipherDir })
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

// mountMark is a file under the state directory by which umount finds the
// daemon of a mount: it holds the process ID with the time that it was started,
// and after a failure its error.
// A daemon that ends well removes it. A nil mark does nothing.
type mountMark struct{ path string }

func markPath(mountPoint string) (string, error) {
	dir, err := statePath()
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(mountPoint))
	return filepath.Join(dir, "mounts", hex.EncodeToString(sum[:16])), nil
}

func markMounted(mountPoint string) (*mountMark, error) {
	path, err := markPath(mountPoint)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o700)
	}
	if err == nil {
		err = os.WriteFile(path, fmt.Appendf(nil, "%d %s\n", os.Getpid(), startOf(os.Getpid())), 0o600)
	}
	if err != nil {
		return nil, err
	}
	return &mountMark{path}, nil
}

func (m *mountMark) ended(err error) {
	if m == nil {
		return
	}
	mine := fmt.Sprintf("%d %s\n", os.Getpid(), startOf(os.Getpid()))
	if b, rerr := os.ReadFile(m.path); rerr != nil || string(b) != mine {
		return // of the next mount by now
	}
	if err == nil {
		os.Remove(m.path)
	} else {
		os.WriteFile(m.path, fmt.Appendf(nil, "%s%v\n", mine, err), 0o600)
	}
}

// daemon is the process behind a mount, as far as it is known.
type daemon struct {
	fd        int    // a pidfd, -1 if it is not known
	mark      string // its mark
	cipherDir string
}

func daemonOf(mountPoint, cipherDir string) *daemon {
	d := &daemon{fd: -1, cipherDir: cipherDir}
	mark, pid, start, ok := marked(mountPoint)
	if !ok {
		return d
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return d
	}
	if startOf(pid) != start { // the number is another process's by now
		unix.Close(fd)
		return d
	}
	d.fd, d.mark = fd, mark
	return d
}

// marked returns which process a mount's mark names, and when that was started.
func marked(mountPoint string) (mark string, pid int, start string, ok bool) {
	mark, err := markPath(mountPoint)
	if err != nil {
		return "", 0, "", false
	}
	b, err := os.ReadFile(mark)
	if err != nil {
		return "", 0, "", false // of another user, perhaps
	}
	first, _, _ := strings.Cut(string(b), "\n")
	id, start, _ := strings.Cut(first, " ")
	pid, err = strconv.Atoi(id)
	return mark, pid, start, err == nil
}

// startOf returns when a process was started, in the kernel's ticks.
func startOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The name, in parentheses, may hold anything.
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 20 {
		return ""
	}
	return f[19]
}

// isStuck reports whether dir's daemon was killed while the kernel kept one of its
// threads: it does where the thread told it to drop a page that was on its way to
// the daemon (fuse_reverse_inval_inode waits for it). The mount then never comes to
// know that its daemon is dead, and who asks it waits for ever.
func isStuck(dir string) bool {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return false
	}
	m, err := findMount(dir)
	if err != nil || m == nil || m.fstype != "fuse.kmsfs" {
		return false
	}
	_, pid, start, ok := marked(dir)
	return ok && startOf(pid) == start && isKilled(pid)
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

// abort ends a mount's connection: who waits for its daemon gets an error.
func abort(dir string) error {
	if os.Geteuid() == 0 {
		err := unix.Unmount(dir, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			return nil // it stays mounted where it is in use
		}
		return err
	}
	m, err := findMount(dir)
	if err != nil || m == nil {
		return err
	}
	_, minor, _ := strings.Cut(m.dev, ":")
	return os.WriteFile(filepath.Join("/sys/fs/fuse/connections", minor, "abort"), []byte("1"), 0)
}

// awaitEnd returns when the daemon has ended, and whether everything is on the disk.
func (d *daemon) awaitEnd() error {
	if d.fd < 0 {
		return d.awaitLock()
	}
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}}, -1)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	b, err := os.ReadFile(d.mark)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	os.Remove(d.mark)
	_, why, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	if why == "" {
		why = "the daemon ended early"
	}
	return hint(fmt.Errorf("unmounted, but not everything is known to be on the disk: %s", why), "see the log; the next mount repairs what was being written")
}

// awaitLock waits for the daemon of another user: until the volume's lock is
// free. A read-only mount has none, and leaves nothing to wait for.
func (d *daemon) awaitLock() error {
	fd, err := unix.Open(d.cipherDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	return unix.Flock(fd, unix.LOCK_SH)
}

// busy names the processes that keep a mount busy, as far as we may see.
func busy(dir string) []string {
	var out []string
	pids, _ := filepath.Glob("/proc/[0-9]*")
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for _, p := range pids {
		if ctx.Err() != nil {
			break
		}
		if filepath.Base(p) == strconv.Itoa(os.Getpid()) {
			continue
		}
		links, _ := filepath.Glob(p + "/fd/*")
		links = append(links, p+"/cwd", p+"/root", p+"/exe")
		if slices.ContainsFunc(links, func(l string) bool { return below(l, dir) }) || maps(p, dir) {
			name, _ := os.ReadFile(p + "/comm")
			out = append(out, fmt.Sprintf("%s (%s)", strings.TrimSpace(string(name)), filepath.Base(p)))
		}
	}
	return out
}

func below(link, dir string) bool {
	t, err := os.Readlink(link)
	return err == nil && (t == dir || strings.HasPrefix(t, dir+"/"))
}

func maps(proc, dir string) bool {
	b, err := os.ReadFile(proc + "/maps")
	return err == nil && strings.Contains(string(b), " "+dir+"/")
}
