//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
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
		Long: `Unmount a volume. The command returns when everything is on the disk. If another
mount namespace, a container's for example, still has the mount, it says so and
returns at once, as umount(8) does: the volume stays mounted there.`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return umount(args[0]) },
	}
	// As umount(8) calls its helper.
	c.Flags().BoolP("no-mtab", "n", false, "accepted for umount(8)")
	c.Flags().BoolP("verbose", "v", false, "accepted for umount(8)")
	c.Flags().MarkHidden("no-mtab")
	c.Flags().MarkHidden("verbose")
	return c
}

func umount(dir string) error {
	m, err := mountAt(dir)
	if err != nil {
		return err
	}
	if m.isDead() {
		if err := m.cleanDead(); err != nil {
			return fmt.Errorf("the dead mount at %s cannot be cleaned up: %w", m.dir, err)
		}
		fmt.Printf("Cleaned up a dead mount at %s.\n", m.dir)
		return nil
	}
	d := daemonOf(m)
	defer d.close()
	if err := m.unmount(); errors.Is(err, unix.EBUSY) {
		return coded{hint(fmt.Errorf("%s is busy: in use by %s", m.dir, m.users()),
			"end what uses it, or leave the directory, and try again"), exitBusy}
	} else if err != nil {
		return fmt.Errorf("unmount %s: %w", m.dir, err)
	}
	if other, err := mountOf(m.dev); err != nil {
		return err
	} else if other != "" {
		fmt.Printf("The volume is still mounted at %s.\n", other)
		return nil
	}
	others, err := d.awaitEnd()
	if others != "" {
		fmt.Printf("Unmounted here. The volume is still mounted in another mount namespace, or used by one, of %s; it is closed when that ends.\n", others)
	}
	return err
}

// users names what keeps a mount busy, as far as this user may see: processes, filesystems
// mounted below it, and loop devices.
func (m *mountInfo) users() string {
	out := m.mountedBelow()
	out = append(out, m.loopDevices()...)
	out = append(out, m.processes()...)
	if len(out) == 0 {
		return "a process that this user may not see, or a request that waits, perhaps for a key service"
	}
	return strings.Join(out, ", ")
}

func (m *mountInfo) has(path string) bool {
	return path == m.dir || strings.HasPrefix(path, m.dir+"/")
}

// mountedBelow names filesystems that are mounted at a directory of the mount.
func (m *mountInfo) mountedBelow() (out []string) {
	ms, _ := mounts()
	for _, x := range ms {
		if x.dir != m.dir && m.has(x.dir) {
			out = append(out, fmt.Sprintf("the %s mounted at %s", x.fstype, x.dir))
		}
	}
	return out
}

// loopDevices names loop devices whose files are in the mount.
func (m *mountInfo) loopDevices() (out []string) {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && m.has(strings.TrimSuffix(string(b), "\n")) {
			out = append(out, "the loop device /dev/"+strings.Split(f, "/")[3])
		}
	}
	return out
}

// lookAtMost bounds a search in /proc.
const lookAtMost = 5 * time.Second

// processes names the processes that have something of the mount open.
func (m *mountInfo) processes() (out []string) {
	eachProcess(func(proc string) bool {
		links, _ := filepath.Glob(proc + "/fd/*")
		links = append(links, proc+"/cwd", proc+"/root", proc+"/exe")
		if slices.ContainsFunc(links,
			func(l string) bool { t, err := os.Readlink(l); return err == nil && m.has(t) }) ||
			m.mapped(proc) {
			out = append(out, nameOf(proc))
		}
		return true
	})
	return out
}

func (m *mountInfo) mapped(proc string) bool {
	b, err := os.ReadFile(proc + "/maps")
	return err == nil && strings.Contains(string(b), " "+m.dir+"/")
}

// otherNamespaces names one process of each other mount namespace that has the mount, or an
// overlay on it; "" if there is none. Of others, which this user may not look into or which
// have no process, only the connection tells, or the daemon, which is asked if ask is set.
func (m *mountInfo) otherNamespaces(ask bool) string {
	own, _ := os.Readlink("/proc/self/ns/mnt")
	seen := map[string]bool{own: true}
	var out []string
	eachProcess(func(proc string) bool {
		ns, err := os.Readlink(proc + "/ns/mnt")
		if err != nil || seen[ns] {
			return true
		}
		seen[ns] = true
		ms, err := readMounts(proc + "/mountinfo")
		if err == nil && slices.ContainsFunc(ms, func(x mountInfo) bool { return x.dev == m.dev }) {
			out = append(out, nameOf(proc))
		}
		return len(out) < 10
	})
	if len(out) == 0 {
		ms, _ := mounts()
		for _, x := range ms {
			if x.fstype == "overlay" && (strings.Contains(x.options, "="+m.dir) ||
				strings.Contains(x.options, ":"+m.dir)) {
				out = append(out, "the overlay mounted at "+x.dir)
			}
		}
	}
	if len(out) == 0 {
		if _, err := os.Stat(m.connection()); err == nil || ask && serves(m.dev) {
			out = append(out, "a process that this user may not see")
		}
	}
	return strings.Join(out, ", ")
}

// eachProcess calls f with the directory in /proc of every other process, until it returns
// false.
func eachProcess(f func(proc string) bool) {
	pids, _ := filepath.Glob("/proc/[0-9]*")
	ctx, cancel := context.WithTimeout(context.Background(), lookAtMost)
	defer cancel()
	for _, p := range pids {
		if ctx.Err() != nil || filepath.Base(p) != strconv.Itoa(os.Getpid()) && !f(p) {
			return
		}
	}
}

func nameOf(proc string) string {
	name, _ := os.ReadFile(proc + "/comm")
	return fmt.Sprintf("%s (%s)", strings.TrimSpace(string(name)), filepath.Base(proc))
}
