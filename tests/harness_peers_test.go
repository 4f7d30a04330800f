package tests

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/tests/slowdisk"
)

// gocryptfs is a volume of the peer that is nearest, to put through the same.
type gocryptfs struct {
	t           testing.TB
	cipher, dir string
	daemon      *exec.Cmd
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

// system is what a benchmark runs on.
type system struct {
	name string
	dir  string
	stop func()
}

// slowSystems mounts the disk itself, the peers that are there, and kmsfs, each on a slow disk
// of its own.
func slowSystems(b *testing.B) (out []system) {
	disk := func() string { return slowdisk.New(b, shmDir(b), cloud).Dir }
	out = append(out, system{"raw", disk(), func() {}})
	if _, err := exec.LookPath("gocryptfs"); err == nil {
		g := newGocryptfs(b, disk())
		out = append(out, system{"gocryptfs", g.dir, g.kill})
	}
	if _, err := exec.LookPath("securefs"); err == nil {
		out = append(out, newSecurefs(b, disk()))
	}
	m := newVolumeOn(b, b.TempDir(), disk())
	return append(out, system{"kmsfs", m.dir, func() {}})
}

func newSecurefs(b *testing.B, cipher string) system {
	dir := filepath.Join(b.TempDir(), "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	if out, err := exec.Command("securefs", "create", "--pass", "x", cipher).CombinedOutput(); err != nil {
		b.Fatalf("securefs create: %v\n%s", err, out)
	}
	c := exec.Command("securefs", "mount", "--pass", "x", cipher, dir)
	if err := c.Start(); err != nil {
		b.Fatal(err)
	}
	var up, s unix.Stat_t
	unix.Stat(filepath.Dir(dir), &up)
	for range 1000 {
		if unix.Stat(dir, &s) == nil && s.Dev != up.Dev {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	stop := func() {
		unix.Unmount(dir, unix.MNT_DETACH)
		c.Wait()
	}
	b.Cleanup(sync.OnceFunc(stop))
	return system{"securefs", dir, stop}
}
