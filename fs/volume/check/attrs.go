//go:build linux && !portable

package check

import (
	"context"
	"errors"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

// hasWriter reports whether a mount is writing to the volume now.
func (c *checker) hasWriter() bool {
	return errors.Is(c.Writer(), volume.ErrLocked)
}

// checkAttrs opens the extended attributes that are encrypted.
func (c *checker) checkAttrs(fd int, e disk.Dirent, j checkJob) {
	if c.Keys == nil {
		return
	}
	p, err := c.Disk.Open(fd, e.Name, unix.O_PATH, 0)
	if err != nil {
		return // of a file, checkFile says so
	}
	defer c.Disk.Close(p)
	raw, err := c.Disk.Listxattr(p)
	if err != nil || len(raw) == 0 || e.Type == disk.TypeLink {
		return
	}
	for name := range strings.SplitSeq(string(raw), "\x00") {
		if _, rest, _ := strings.Cut(name, "."); !strings.HasPrefix(rest,
			blockcrypt.Reserved) { // ACLs and capabilities are not encrypted; a mount shows no others
			continue
		}
		f := Finding{Path: j.cpath, Name: j.ppath, Grade: Damaged,
			What:   string(blockcrypt.BadValue),
			Advice: "set the attribute again, or remove it with setfattr"}
		attr, err := c.Keys.DecodeAttr(name)
		if err != nil {
			f.Detail = "the name of an extended attribute does not decode"
			c.found(f)
			continue
		}
		v, err := c.Disk.Getxattr(p, name)
		if err == nil {
			_, err = c.Keys.OpenValue(attr, v)
		}
		if err != nil {
			f.Detail = "the value of an extended attribute does not open"
			c.found(f)
		}
	}
}

// leaseWithin is how long a check waits for the hosts that write to a file of a shared volume.
const leaseWithin = 10 * time.Second

// leaseToRead keeps all hosts from writing to a file of a shared volume until the descriptor is closed.
func (c *checker) leaseToRead(ctx context.Context, fd int) bool {
	for end := time.Now().Add(leaseWithin); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(5 * time.Millisecond) {
		if layout.LeaseToRead(c.Disk, fd) == nil {
			c.Disk.ForgetPages(fd, 0, 0)
			return true
		}
	}
	return false
}
