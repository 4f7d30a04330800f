package tests

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Real hosts: User-Mode Linux guests, each with its own kernel and caches, with the ciphertext on an
// NFS server, another guest. make test-shared runs these tests.

// laboratory is a directory with guests, which end with the test.
type laboratory struct {
	t      testing.TB
	dir    string
	guests map[string]*guest
}

type guest struct {
	lab     *laboratory
	name    string
	process *exec.Cmd
	mu      sync.Mutex
	asked   int // commands so far
}

const nfsLease = 10 // seconds

// newLaboratory starts a server and two clients with the export at /mnt/n and a shared volume in it.
func newLaboratory(t testing.TB) (lab *laboratory, hosts []*guest) {
	t.Helper()
	packages := os.Getenv("KMSFS_GUESTS")
	if packages == "" {
		t.Skip("make test-shared fetches what the guests need, and sets KMSFS_GUESTS")
	}
	needRoot(t)
	program, err := hostcheck()
	if err != nil {
		t.Fatal(err)
	}
	// A short path: a socket's has at most 107 bytes.
	dir, err := os.MkdirTemp("/tmp", "kmsfs-lab-")
	if err != nil {
		t.Fatal(err)
	}
	lab = &laboratory{t: t, dir: dir, guests: map[string]*guest{}}
	t.Cleanup(lab.end)
	share := filepath.Join(dir, "share")
	for _, d := range []string{share, filepath.Join(dir, "uml")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if packages, err = filepath.Abs(packages); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf(`set -e
ln -s %q %q
cp %q %q/kmsfs; cp %q %q/hostcheck; cp guests/init.sh %q/init.sh; chmod 755 %q/init.sh
printf '#!/bin/sh\nexport LD_LIBRARY_PATH=%s/root/usr/lib/x86_64-linux-gnu\nexec %s/root/sbin/modprobe -d %s/root/../mods "$@"\n' >%q/modprobe; chmod 755 %q/modprobe
head -c 32 /dev/urandom >%q/key; chmod 600 %q/key
truncate -s 1G %q/disk; mkfs.ext4 -q %q/disk`,
		filepath.Join(packages, "root"), filepath.Join(dir, "root"), binary, share, program, share, dir, dir,
		packages, packages, packages, share, share, share, share, dir, dir)
	if out, err := exec.Command("bash", "-c", script).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	lab.run("switch", packages+"/root/usr/bin/uml_switch", "-unix", filepath.Join(dir, "net"))
	for range 100 {
		if _, err := os.Stat(filepath.Join(dir, "net")); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	lab.start("server")
	var wg sync.WaitGroup
	for _, name := range []string{"h1", "h2"} {
		g := lab.add(name)
		hosts = append(hosts, g)
		wg.Go(func() { g.boot() })
	}
	wg.Wait()
	hosts[0].must("mkdir /mnt/n/v; kmsfs init --shared --key local:/mnt/share/key /mnt/n/v")
	for _, g := range hosts {
		g.mount()
	}
	return lab, hosts
}

// run starts a process of the laboratory. Its standard input never ends: the switch would.
func (lab *laboratory) run(name, program string, args ...string) *exec.Cmd {
	lab.t.Helper()
	log, err := os.Create(filepath.Join(lab.dir, name+".log"))
	if err != nil {
		lab.t.Fatal(err)
	}
	defer log.Close()
	c := exec.Command(program, args...)
	c.Env = append(os.Environ(), "LD_LIBRARY_PATH="+lab.dir+"/root/usr/lib/x86_64-linux-gnu")
	c.Stdout, c.Stderr = log, log
	in, err := c.StdinPipe()
	if err == nil {
		c.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
		err = c.Start()
	}
	if err != nil {
		lab.t.Fatal(err)
	}
	lab.t.Cleanup(func() {
		unix.Kill(-c.Process.Pid, unix.SIGKILL)
		in.Close()
		c.Wait()
	})
	return c
}

func (lab *laboratory) end() { os.RemoveAll(lab.dir) }

func (lab *laboratory) add(name string) *guest {
	g := &guest{lab: lab, name: name}
	lab.guests[name] = g
	return g
}

func (lab *laboratory) start(name string) *guest {
	lab.t.Helper()
	g := lab.add(name)
	g.boot()
	return g
}

// boot starts the guest's kernel, and returns when it runs commands.
func (g *guest) boot() {
	t, dir := g.lab.t, g.lab.dir
	t.Helper()
	number := map[string]int{"server": 1, "h1": 2, "h2": 3}[g.name]
	mine := filepath.Join(dir, "share", g.name)
	os.RemoveAll(mine)
	os.RemoveAll(filepath.Join(dir, "uml", g.name))
	if err := os.Mkdir(mine, 0o755); err != nil {
		t.Error(err)
		return
	}
	role, disk := "client", "ROLE=client"
	if number == 1 {
		role, disk = "server", "ubd0="+dir+"/disk"
	}
	g.asked = 0
	g.process = g.lab.run(g.name, dir+"/root/usr/bin/linux.uml", "mem=256M", "root=/dev/root", "rootfstype=hostfs",
		"rootflags=/", "ro", "init="+dir+"/init.sh", "LAB="+dir, "con=null", "con0=null,fd:2", "con1=null", "ssl=null",
		"uml_dir="+dir+"/uml", "umid="+g.name, "HN="+g.name, fmt.Sprint("IP=10.77.0.", number), "ROLE="+role,
		fmt.Sprint("LEASE=", nfsLease), disk,
		fmt.Sprintf("eth0=daemon,02:00:0a:4d:00:%02x,unix,%s/net", number, dir), "quiet")
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(mine, "ready")); err == nil {
			return
		}
		if time.Now().After(end) {
			log, _ := os.ReadFile(filepath.Join(dir, g.name+".log"))
			t.Errorf("the guest %s does not start:\n%s", g.name, log)
			return
		}
	}
}

// powerCut ends the guest's kernel at once.
func (g *guest) powerCut() { unix.Kill(-g.process.Process.Pid, unix.SIGKILL) }

// begin runs a script in the guest; wait returns its output, and an error if it failed or took too long.
func (g *guest) begin(script string) (wait func(atMost time.Duration) (string, error)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	base := func(what string) string {
		return filepath.Join(g.lab.dir, "share", g.name, fmt.Sprint(what, ".", g.asked))
	}
	cmd, out, rc := base("cmd"), base("out"), base("rc")
	g.asked++
	os.WriteFile(cmd, []byte(script), 0o644)
	os.WriteFile(cmd+".go", nil, 0o644)
	return func(atMost time.Duration) (string, error) {
		for end := time.Now().Add(atMost); ; time.Sleep(50 * time.Millisecond) {
			b, err := os.ReadFile(rc)
			if err == nil {
				text, _ := os.ReadFile(out)
				if code, _ := strconv.Atoi(strings.TrimSpace(string(b))); code != 0 {
					err = fmt.Errorf("exit code %d", code)
				}
				return string(text), err
			}
			if time.Now().After(end) {
				text, _ := os.ReadFile(out)
				return string(text), fmt.Errorf("not over after %v", atMost)
			}
		}
	}
}

func (g *guest) must(script string) string {
	g.lab.t.Helper()
	out, err := g.begin(script)(2 * time.Minute)
	if err != nil {
		g.lab.t.Fatalf("%s: %s: %v\n%s", g.name, script, err, out)
	}
	return out
}

func (g *guest) mount() {
	g.lab.t.Helper()
	g.must("mkdir -p /mnt/p; kmsfs mount --key local:/mnt/share/key /mnt/n/v /mnt/p")
}

// work runs a workload in the guest. Its acknowledgements go to the host at once, so that they
// outlive the guest.
func (g *guest) work(workload string, id, seconds int) (wait func(time.Duration) (string, error)) {
	return g.begin(fmt.Sprintf(`hostcheck run %s /mnt/p/w %d %d | dd of=/mnt/share/acks.%d bs=64k oflag=dsync status=none
exit ${PIPESTATUS[0]}`, workload, id, seconds, id))
}

// judge judges a workload on a host.
func (g *guest) judge(workload string) {
	g.lab.t.Helper()
	g.lab.t.Logf("%s, judged on %s: %s", workload, g.name,
		g.must(fmt.Sprintf("hostcheck judge %s /mnt/p/w /mnt/share/acks.0 /mnt/share/acks.1", workload)))
}

// begin makes the directory in which a workload works.
func beginWork(hosts []*guest) { hosts[0].must("rm -rf /mnt/p/w; mkdir /mnt/p/w; sleep 1.2") }

// TestHosts tests two hosts on NFS: what one wrote the other reads, whatever both do, and when one dies.
func TestHosts(t *testing.T) {
	_, hosts := newLaboratory(t)
	a, b := hosts[0], hosts[1]
	seconds := 5
	if s, err := strconv.Atoi(os.Getenv("KMSFS_HOST_SECONDS")); err == nil {
		seconds = s
	}
	t.Run("peer", func(t *testing.T) {
		wait := a.begin("mkdir -p /mnt/n/peer; kmsfs doctor --peer /mnt/n/peer")
		out := b.must("mkdir -p /mnt/n/peer; kmsfs doctor --peer /mnt/n/peer")
		if also, err := wait(time.Minute); err != nil || strings.Contains(out+also, "both ran on this host") {
			t.Errorf("%v: %s%s", err, out, also)
		}
	})
	for _, w := range []string{"counter", "list", "append", "pages", "register", "names", "cut"} {
		t.Run(w, func(t *testing.T) {
			beginWork(hosts)
			var waits []func(time.Duration) (string, error)
			for i, g := range hosts {
				waits = append(waits, g.work(w, i, seconds))
			}
			for i, wait := range waits {
				if out, err := wait(time.Duration(seconds+60) * time.Second); err != nil {
					t.Errorf("%s: %v: %s", hosts[i].name, err, out)
				}
			}
			a.judge(w)
			b.judge(w)
		})
	}
	t.Run("SQLite and git", func(t *testing.T) {
		a.must(`sqlite3 /mnt/p/db 'PRAGMA journal_mode=DELETE; CREATE TABLE t(host, n, UNIQUE(host, n));'`)
		insert := func(host int) string {
			return fmt.Sprintf(`for n in $(seq 15); do
	sqlite3 -cmd ".timeout 60000" /mnt/p/db "BEGIN IMMEDIATE; INSERT INTO t VALUES(%d, $n); COMMIT;" || exit 1
done`, host)
		}
		wait := a.begin(insert(0))
		b.must(insert(1))
		if out, err := wait(2 * time.Minute); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		for _, g := range hosts {
			if out := g.must(`sqlite3 /mnt/p/db 'PRAGMA integrity_check; SELECT count(*) FROM t;'`); out != "ok\n30\n" {
				t.Errorf("%s: %q", g.name, out)
			}
		}
		const identity = "export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.org GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example.org; "
		a.must("git init -q /mnt/p/repo")
		for i := range 4 {
			hosts[i%2].must(fmt.Sprintf(identity+"cd /mnt/p/repo && echo %d >>file && git add file && git commit -qm %d && git fsck --strict", i, i))
		}
		if out := b.must("cd /mnt/p/repo && git log --oneline | wc -l && git status --short"); out != "4\n" {
			t.Errorf("%q", out)
		}
	})
	for _, w := range []string{"counter", "list", "append"} {
		t.Run("power cut during "+w, func(t *testing.T) {
			beginWork(hosts)
			a.work(w, 0, seconds+40)
			wait := b.work(w, 1, seconds+40)
			time.Sleep(time.Duration(seconds) * time.Second)
			a.powerCut()
			out, err := wait(3 * time.Minute)
			if err != nil {
				t.Errorf("the host that lives: %v: %s", err, out)
			}
			b.judge(w)
			a.boot()
			a.mount()
			a.judge(w)
		})
	}
	// Shorter and longer than the server's lease. The host that was away may fail, and be mounted again.
	for _, away := range []int{8, 30} {
		t.Run(fmt.Sprintf("network away for %d s", away), func(t *testing.T) {
			beginWork(hosts)
			first := a.work("append", 0, away+seconds+20)
			wait := b.work("append", 1, away+seconds+20)
			time.Sleep(time.Duration(seconds) * time.Second)
			a.begin(fmt.Sprintf(`ip link set eth0 down; sleep %d; ip link set eth0 up
for k in 1 3; do ip neigh replace 10.77.0.$k lladdr 02:00:0a:4d:00:0$k nud permanent dev eth0; done`, away))
			if out, err := wait(3 * time.Minute); err != nil {
				t.Errorf("the other host: %v: %s", err, out)
			}
			out, err := first(3 * time.Minute)
			t.Logf("the host that was away: %v %s", err, out)
			b.judge("append")
			a.begin("kmsfs umount /mnt/p")(time.Minute)
			a.mount()
			a.judge("append")
		})
	}
	eventuallyFor(t, time.Minute, "the dead hosts", func() error {
		if out := a.must("kmsfs hosts /mnt/p"); strings.Contains(out, "dead") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	for _, g := range hosts {
		g.must("kmsfs umount /mnt/p")
	}
	if out := a.must("kmsfs fsck --key local:/mnt/share/key /mnt/n/v; ls /mnt/n/v/kmsfs.hosts"); !strings.HasSuffix(out, "nothing is wrong\n") {
		t.Errorf("fsck, and the files of hosts that are left: %s", out)
	}
}

func eventuallyFor(t *testing.T, d time.Duration, what string, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(time.Second) {
		if err = f(); err == nil {
			return
		}
	}
	t.Errorf("%s: %v", what, err)
}

// BenchmarkHosts prints what a shared volume costs on NFS: beside one that is not shared and NFS alone, on
// one host and on two, and how often two hosts take turns. Operations and MiB a second.
func BenchmarkHosts(b *testing.B) {
	_, hosts := newLaboratory(b)
	one, two := hosts[0], hosts[1]
	one.must("mkdir /mnt/n/plain /mnt/n/raw /mnt/q; kmsfs init --key local:/mnt/share/key /mnt/n/plain; kmsfs mount --key local:/mnt/share/key /mnt/n/plain /mnt/q; mkdir /mnt/p/one /mnt/p/two")
	for range 2 {
		for _, x := range [][2]string{{"NFS", "/mnt/n/raw"}, {"plain", "/mnt/q"}, {"shared", "/mnt/p/one"}} {
			b.Logf("%-7s %s", x[0], strings.TrimSpace(one.must("hostcheck time "+x[1]+" 4")))
		}
		wait := one.begin("hostcheck time /mnt/p/one 4")
		other := two.must("hostcheck time /mnt/p/two 4")
		mine, err := wait(time.Minute)
		b.Logf("both    %s and %s %v", strings.TrimSpace(mine), strings.TrimSpace(other), err)
	}
	for _, dir := range []string{"/mnt/n/raw", "/mnt/p"} {
		one.must("mkdir " + dir + "/turns; sleep 1.2")
		run := func(id int) string {
			return fmt.Sprintf("hostcheck run counter %s/turns %d 5 | wc -l", dir, id)
		}
		alone := strings.TrimSpace(one.must(run(0)))
		wait := one.begin(run(0))
		other := two.must(run(1))
		mine, err := wait(time.Minute)
		b.Logf("additions under a lock in 5 s in %s: %s alone, then %s and %s %v", dir, alone,
			strings.TrimSpace(mine), strings.TrimSpace(other), err)
	}
	for _, g := range hosts {
		g.must("kmsfs umount /mnt/p")
	}
	one.must("kmsfs umount /mnt/q")
}
