package tests

import (
	"testing"

	"kmsfs/tests/cutdisk"
)

// BenchmarkCrashes counts what SIGKILL and power cuts cost, on kmsfs and on
// gocryptfs: files that do not have what fsync (and, where only the daemon died,
// close) answered for, or cannot be read, or hold what was never written.
func BenchmarkCrashes(b *testing.B) {
	needRoot(b)
	needTool(b, "gocryptfs")
	rounds := crashRounds(20)
	for b.Loop() {
		disk := func() *cutdisk.Disk { d := cutdisk.New(b, "ext4"); d.Mount(); return d }
		d := disk()
		m := newVolumeOn(b, b.TempDir(), d.Dir)
		m.faults = true
		p := disk()
		for _, c := range []struct {
			what string
			crashes
		}{
			{"SIGKILL, kmsfs", crash(newVolume(b), nil, rounds)},
			{"SIGKILL, gocryptfs", crash(newGocryptfs(b, b.TempDir()), nil, rounds)},
			{"power cut, kmsfs", crash(m, d, rounds)},
			{"power cut, gocryptfs", crash(newGocryptfs(b, p.Dir), p, rounds)},
		} {
			b.Logf("%-22s %d rounds, %d files looked at, %d MiB confirmed: %d lost or damaged",
				c.what, rounds, c.looked, c.confirmed>>20, len(c.faults))
			for i := range min(len(c.faults), 3) {
				b.Logf("  %.160s", c.faults[i])
			}
		}
	}
}
