package main

import (
	"bufio"
	"context"
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
	if _, err := os.Stat(dir); errors.Is(err, unix.ENOTCONN) {
		if err := detach(dir); err != nil {
			return fmt.Errorf("the dead mount at %s cannot be cleaned up: %w", dir, err)
		}
		fmt.Printf("Cleaned up a dead mount at %s.\n", dir)
		return nil
	} else if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the directory %s does not exist", dir)
	}
	real, err := filepath.EvalSymlinks(dir)
	if err == nil {
		real, err = filepath.Abs(real)
	}
	if err != nil {
		return err
	}
	m, err := findMount(real)
	if err != nil {
		return err
	}
	if m == nil || m.fstype != "fuse.kmsfs" {
		return fmt.Errorf("no kmsfs volume is mounted at %s", real)
	}
	daemon := writerOf(m.source)
	if err := unmountOnce(real); errors.Is(err, unix.EBUSY) {
		who := strings.Join(busy(real), ", ")
		if who == "" {
			who = "a process of another user"
		}
		return coded{hint(fmt.Errorf("%s is busy: in use by %s", real, who), "end what uses it, or leave the directory, and try again"), exitBusy}
	} else if err != nil {
		return fmt.Errorf("unmount %s: %w", real, err)
	}
	return awaitEnd(daemon, m.source)
}

func unmountOnce(dir string) error {
	if os.Geteuid() == 0 {
		return unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
	}
	return fusermount("-u", dir)
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
type mountInfo struct{ dir, fstype, source string }

// findMount returns what is mounted at dir, nil if nothing is.
func findMount(dir string) (*mountInfo, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found *mountInfo
	s := bufio.NewScanner(f)
	for s.Scan() {
		left, right, ok := strings.Cut(s.Text(), " - ")
		a, b := strings.Fields(left), strings.Fields(right)
		if ok && len(a) >= 5 && len(b) >= 2 && unescape(a[4]) == dir {
			found = &mountInfo{dir, b[0], unescape(b[1])} // the last is on top
		}
	}
	return found, s.Err()
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

// writerOf returns the process that holds the lock of a volume, 0 if none does.
func writerOf(cipherDir string) int {
	var st unix.Stat_t
	b, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Stat(cipherDir, &st) != nil {
		return 0
	}
	want := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) >= 6 && f[1] == "FLOCK" && f[5] == want {
			pid, _ := strconv.Atoi(f[4])
			return pid
		}
	}
	return 0
}

// awaitEnd returns when the daemon has ended: then everything is on the disk.
func awaitEnd(pid int, cipherDir string) error {
	if pid > 0 {
		fd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		if err == nil {
			defer unix.Close(fd)
			for {
				_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
				if !errors.Is(err, unix.EINTR) {
					return err
				}
			}
		}
	}
	// Without its number: until its lock is gone. A reader has none.
	fd, err := unix.Open(cipherDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
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
