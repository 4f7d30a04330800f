package tests

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/keystore/keystoretest"
)

// Real hosts: User-Mode Linux guests, each with its own kernel and caches, with the ciphertext on the
// filesystem of a server, another guest. make test-shared runs these tests.

// A network filesystem is what a server has and the hosts mount: tests/guests/NAME.sh.
type networkFilesystem struct {
	name           string
	server, client int      // MiB of memory
	programs       []string // that must be installed
	disk           bool     // files lie on the server's disk one by one, so that it can be full
	quota          bool     // and that of a user counts
	stalls         bool     // for all, until a dead host is evicted
	evicts         int      // seconds after which that happens, if they are more than the lease
}

var (
	nfs       = networkFilesystem{"nfs", 256, 256, nil, true, true, false, 0} // tests/guests/fetch.sh brings it
	efs       = networkFilesystem{"efs", 256, 256, nil, true, true, false, 0}
	smb       = networkFilesystem{"smb", 512, 256, []string{"smbd", "smbpasswd", "mount.cifs"}, true, false, false, 0}
	cephfs    = networkFilesystem{"cephfs", 2048, 384, []string{"ceph-mon", "ceph-osd", "ceph-mds", "ceph"}, false, false, true, 60}
	glusterfs = networkFilesystem{"glusterfs", 512, 384, []string{"glusterd", "glusterfs"}, true, false, false, 0}
	moosefs   = networkFilesystem{"moosefs", 1536, 512, []string{"mfsmaster", "mfschunkserver", "mfsmount"}, false, false, false, 0}
)

// laboratory is a directory with guests, which end with the test.
type laboratory struct {
	t       testing.TB // of the part that runs
	whole   testing.TB // the processes end with it
	dir     string
	backing networkFilesystem
	guests  map[string]*guest
}

type guest struct {
	lab     *laboratory
	name    string
	process *exec.Cmd
	mu      sync.Mutex
	asked   int // commands so far
	dead    bool
}

const lease = 10 // seconds after which the server takes a silent client for dead

// newLaboratory starts a server and two clients with its filesystem at /mnt/n.
func newLaboratory(t testing.TB, backing networkFilesystem) (lab *laboratory, hosts []*guest) {
	t.Helper()
	packages := os.Getenv("KMSFS_GUESTS")
	if packages == "" {
		t.Skip("make fetches what the guests need, and sets KMSFS_GUESTS")
	}
	needRoot(t)
	keystoretest.Need(t, "amd64: Debian has User-Mode Linux for no other", runtime.GOARCH == "amd64")
	for _, p := range backing.programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Fatalf("make test-shared installs %s: %v", backing.name, err)
		}
	}
	program, err := hostcheck()
	if err != nil {
		t.Fatal(err)
	}
	// A short path: a socket's has at most 107 bytes.
	dir, err := os.MkdirTemp("/tmp", "kmsfs-lab-")
	if err != nil {
		t.Fatal(err)
	}
	lab = &laboratory{t: t, whole: t, dir: dir, backing: backing, guests: map[string]*guest{}}
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
chmod 755 %q
ln -s %q %q
cp %q %q/kmsfs; cp %q %q/hostcheck; cp guests/*.sh %q/; chmod 755 %q/*.sh
printf '#!/bin/sh\nexport LD_LIBRARY_PATH=%s/root/usr/lib/x86_64-linux-gnu\nexec %s/root/sbin/modprobe -d %s/root/../mods "$@"\n' >%q/modprobe; chmod 755 %q/modprobe
head -c 32 /dev/urandom >%q/key; chmod 600 %q/key
truncate -s 4G %q/disk; mkfs.ext4 -q -m 0 -O quota %q/disk`,
		dir, filepath.Join(packages, "root"), filepath.Join(dir, "root"), binary, share, program, share, dir, dir,
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
	return lab, hosts
}

// share makes a shared volume, and mounts it at /mnt/p of all hosts.
func share(hosts []*guest) {
	hosts[0].lab.t.Helper()
	hosts[0].must("mkdir /mnt/n/v; kmsfs init --shared --key local:/mnt/share/key /mnt/n/v")
	for _, g := range hosts {
		g.mount()
	}
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
	lab.whole.Cleanup(func() {
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
	number := map[string]int{"server": 1, "h1": 2, "h2": 3, "h3": 4}[g.name]
	mine := filepath.Join(dir, "share", g.name)
	os.RemoveAll(mine)
	os.RemoveAll(filepath.Join(dir, "uml", g.name))
	if err := os.Mkdir(mine, 0o755); err != nil {
		t.Error(err)
		return
	}
	role, disk, memory := "client", "ROLE=client", g.lab.backing.client
	if number == 1 {
		role, disk, memory = "server", "ubd0="+dir+"/disk", g.lab.backing.server
	}
	g.asked, g.dead = 0, false
	g.process = g.lab.run(g.name, dir+"/root/usr/bin/linux.uml", fmt.Sprintf("mem=%dM", memory), "root=/dev/root", "rootfstype=hostfs",
		"rootflags=/", "ro", "init="+dir+"/init.sh", "LAB="+dir, "con=null", "con0=null,fd:2", "con1=null", "ssl=null",
		"uml_dir="+dir+"/uml", "umid="+g.name, "HN="+g.name, fmt.Sprint("IP=10.77.0.", number), "ROLE="+role,
		"BACKING="+g.lab.backing.name, fmt.Sprint("LEASE=", lease), disk,
		fmt.Sprintf("eth0=daemon,02:00:0a:4d:00:%02x,unix,%s/net", number, dir), "quiet")
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(mine, "ready")); err == nil {
			g.wake()
			return
		}
		if time.Now().After(end) {
			log, _ := os.ReadFile(filepath.Join(dir, g.name+".log"))
			t.Errorf("the guest %s does not start:\n%s", g.name, log)
			return
		}
	}
}

// wake interrupts the guest's kernel every second, until the test ends. On a host with much to do User-Mode
// Linux can lose the signal of its timer, and would wait for it for good.
func (g *guest) wake() {
	stop, pid := make(chan struct{}), g.process.Process.Pid
	var done sync.WaitGroup
	done.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
				unix.Kill(pid, unix.SIGALRM)
			}
		}
	})
	g.lab.whole.Cleanup(func() { // before the process is waited for, and its number another's
		close(stop)
		done.Wait()
	})
}

// powerCut ends the guest's kernel at once.
func (g *guest) powerCut() {
	unix.Kill(-g.process.Process.Pid, unix.SIGKILL)
	g.dead = true
}

// again unmounts the volume, which may tell of an outage, and mounts it again when the server answers.
func (g *guest) again() {
	g.lab.t.Helper()
	if out, err := g.begin("kmsfs umount /mnt/p")(2 * time.Minute); err != nil {
		g.lab.t.Logf("%s: umount after an outage: %s", g.name, out)
	}
	g.must("for _ in $(seq 90); do stat /mnt/n/v && exit; sleep 1; done; exit 1")
	g.mount()
}

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
func (lab *laboratory) judge(g *guest, workload string) {
	lab.t.Helper()
	lab.t.Logf("%s, judged on %s: %s", workload, g.name,
		g.must(fmt.Sprintf("hostcheck judge %s /mnt/p/w /mnt/share/acks.*", workload)))
}
