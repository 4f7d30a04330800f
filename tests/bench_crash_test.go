package tests

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/tests/cutdisk"
)

// gocryptfs is a volume of the peer that is nearest, to put through the same.
type gocryptfs struct {
	t           testing.TB
	cipher, dir string
	daemon      *exec.Cmd
}

func newGocryptfs(t testing.TB, cipherIn string) *gocryptfs {
	g := &gocryptfs{t: t, cipher: filepath.Join(cipherIn, "cipher"), dir: filepath.Join(t.TempDir(), "mnt")}
	for _, d := range []string{g.cipher, g.dir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("gocryptfs", "-q", "-init", "-scryptn", "10", "-extpass", "echo x",
		g.cipher).CombinedOutput(); err != nil {
		t.Fatalf("gocryptfs -init: %v\n%s", err, out)
	}
	g.mount()
	t.Cleanup(g.kill)
	return g
}

func (g *gocryptfs) path(elem ...string) string {
	return filepath.Join(append([]string{g.dir}, elem...)...)
}

func (g *gocryptfs) mount() {
	g.daemon = exec.Command("gocryptfs", "-q", "-fg", "-nosyslog", "-extpass", "echo x", g.cipher, g.dir)
	if err := g.daemon.Start(); err != nil {
		g.t.Fatal(err)
	}
	var up, s unix.Stat_t
	unix.Stat(filepath.Dir(g.dir), &up)
	for range 1000 {
		if unix.Stat(g.dir, &s) == nil && s.Dev != up.Dev {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	g.t.Fatal("gocryptfs does not mount")
}

func (g *gocryptfs) kill() {
	g.daemon.Process.Kill()
	g.daemon.Wait()
	unix.Unmount(g.dir, unix.MNT_DETACH)
}

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
