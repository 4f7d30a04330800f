package tests

import (
	"testing"

	"kmsfs/tests/cutdisk"
)

// The daemon is killed while programs write: everything that fsync or close has
// answered for is there after the next mount, nothing is unreadable, and nothing
// is there that was never written.
func TestKilledWhileWriting(t *testing.T) {
	wantWhole(t, newVolume(t), nil, crashRounds(10))
}

// The power fails while programs write: everything that fsync has answered for is
// there after the next mount.
func TestPowerCutWhileWriting(t *testing.T) {
	needRoot(t)
	disk := cutdisk.New(t, "ext4")
	disk.Mount()
	m := newVolumeOn(t, t.TempDir(), disk.Dir)
	m.faults = true // the disk's
	wantWhole(t, m, disk, crashRounds(5))
	disk.Umount()
}
