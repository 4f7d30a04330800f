//go:build linux && !portable

package volume

import (
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

// Shared reports whether other hosts may write to the volume at the same time.
func (b *base) Shared() bool { return b.cfg.Shared }

func leaseLock(kind disk.LockKind) disk.Lock {
	return disk.Lock{Kind: kind, At: layout.LeaseByte, N: 1}
}

func wantedLock(kind disk.LockKind) disk.Lock {
	return disk.Lock{Kind: kind, At: layout.WantedByte, N: 1}
}

// leaveFD gives the locks of the file's descriptor back, which another one is about to replace. It could
// only read.
func (l *lease) leaveFD() {
	d, fd := &l.f.v.disk, l.f.FD
	if l.held {
		d.OFDLock(fd, leaseLock(disk.None))
		l.held = false
	}
	if l.wanting {
		d.OFDLock(fd, wantedLock(disk.None))
		l.wanting = false
	}
}
