//go:build linux && !portable

package disk

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// PIDSpace names the PID namespace in which numbers of processes mean what they mean here; "" if that is
// not known.
func PIDSpace() string {
	space, _ := os.Readlink("/proc/self/ns/pid")
	return space
}

// NoProcess reports whether there is no process with this number.
func NoProcess(pid int) bool { return errors.Is(unix.Kill(pid, 0), unix.ESRCH) }

// Mount is a mount of a filesystem, with the octal escapes of /proc/self/mountinfo.
type Mount struct {
	Type    string // "nfs4", for example
	Source  string
	Options []string // of the mount and of the filesystem
}

// MountOf returns the mount that an open object is in; an empty one if it is not in this namespace.
func (d *Disk) MountOf(fd int) (Mount, error) {
	d.sees("statx")
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return Mount{}, err
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return Mount{}, err
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 6 && fields[0] == fmt.Sprint(st.Mnt_id) {
			last := len(fields) - 1
			return Mount{fields[last-2], fields[last-1], slices.Concat(strings.Split(fields[5], ","), strings.Split(fields[last], ","))}, nil
		}
	}
	return Mount{}, nil
}
