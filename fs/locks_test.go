package fs

import (
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// A lock by flock(2) is the open file's, and not the kernel's number of it, which a new one may have before
// the release of the old one is asked for. A lock by fcntl(2) is the process's.
func TestLockOwner(t *testing.T) {
	in := &fuse.LkIn{Fh: 7, Owner: 9, LkFlags: fuse.LK_FLOCK}
	if l := programLock(in); !l.Flock || l.Owner != 7 {
		t.Errorf("flock: %+v", l)
	}
	in.LkFlags = 0
	if l := programLock(in); l.Flock || l.Owner != 9 {
		t.Errorf("fcntl: %+v", l)
	}
}
