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

// MountOptions returns the options of the mount that an open object is in, as mount(8) shows them.
func (d *Disk) MountOptions(fd int) ([]string, error) {
	d.sees("statx")
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return nil, err
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 6 && fields[0] == fmt.Sprint(st.Mnt_id) {
			return slices.Concat(strings.Split(fields[5], ","), strings.Split(fields[len(fields)-1], ",")), nil
		}
	}
	return nil, nil
}
