package tests

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestHosts tests hosts with one volume on a network filesystem: what one wrote the others read, whatever
// all do, and when one dies, is cut off, or the server is.
func TestHosts(t *testing.T) {
	for _, backing := range []networkFilesystem{nfs, efs, cephfs, glusterfs} {
		t.Run(backing.name, func(t *testing.T) {
			lab, hosts := newLaboratory(t, backing)
			h := &hostsTest{lab: lab, hosts: hosts, a: hosts[0], b: hosts[1], seconds: 5}
			if s, err := strconv.Atoi(os.Getenv("KMSFS_HOST_SECONDS")); err == nil {
				h.seconds = s
			}
			h.all(t)
		})
	}
}

// A filesystem that is not fit for a shared volume is refused; a volume that is not shared works there, and
// refuses a second host.
func TestUnfitHosts(t *testing.T) {
	for _, c := range []struct {
		backing networkFilesystem
		why     string
	}{
		{moosefs, "is MooseFS, on which a host does not see that another has shortened a file"},
		{smb, "is SMB, on which a host loses its lock of a file when it closes another descriptor of it"},
	} {
		t.Run(c.backing.name, func(t *testing.T) {
			lab, hosts := newLaboratory(t, c.backing)
			h := &hostsTest{lab: lab, hosts: hosts, a: hosts[0], b: hosts[1]}
			for _, call := range []string{"doctor --peer /mnt/n", "init --shared --key local:/mnt/share/key /mnt/n"} {
				if out, err := h.a.begin("kmsfs " + call)(time.Minute); err == nil || !strings.Contains(out, c.why) {
					t.Errorf("kmsfs %s: %v, %s", call, err, out)
				}
			}
			if out := h.a.must("ls -A /mnt/n"); strings.Contains(out, "kmsfs") {
				t.Errorf("a refused init left %s", out)
			}
			h.run(t, "one writer", h.oneWriter)
		})
	}
}

type hostsTest struct {
	lab     *laboratory
	hosts   []*guest
	a, b    *guest
	seconds int // that a workload runs
}

// run is t.Run for a part of the test.
func (h *hostsTest) run(t *testing.T, name string, f func(*testing.T)) {
	t.Run(name, func(part *testing.T) {
		h.lab.t = part
		defer func() { h.lab.t = h.lab.whole }()
		f(part)
	})
}

func (h *hostsTest) all(t *testing.T) {
	h.run(t, "one writer", h.oneWriter)
	h.run(t, "peer", h.peer)
	share(h.hosts)
	for _, w := range []string{"counter", "reopened", "list", "append", "pages", "register", "names", "replaced", "cut"} {
		h.run(t, w, func(t *testing.T) { h.work(t, w, h.hosts) })
	}
	h.run(t, "SQLite and git", h.programs)
	h.run(t, "lock of the last host", h.lastHost)
	h.run(t, "build", h.build)
	h.run(t, "removed while open", h.removed)
	if h.lab.backing.disk {
		h.run(t, "full disk", h.full)
	}
	if h.lab.backing.quota {
		h.run(t, "quota", h.quota)
	}
	h.run(t, "clocks apart", func(t *testing.T) {
		const turn = "date -s @$(($(date +%%s) %s 300)) >/dev/null"
		h.b.must(fmt.Sprintf(turn, "+"))
		h.work(t, "list", h.hosts)
		h.b.must("echo x >/mnt/p/timed")
		for _, g := range h.hosts { // a file has the time of the filesystem, not of the host that wrote it
			g.must(fmt.Sprintf("t=$(stat -c %%Y /mnt/p/timed); now=%s; [ $((t - now)) -lt 60 -a $((now - t)) -lt 60 ]",
				strings.TrimSpace(h.a.must("date +%s"))))
		}
		h.b.must(fmt.Sprintf(turn, "-"))
	})
	h.run(t, "daemon killed", func(t *testing.T) {
		h.begin()
		wait := h.works("append", h.hosts, h.seconds+10)
		h.sleep()
		h.a.must("pkill -9 -x kmsfs; umount -l /mnt/p; kmsfs mount --key local:/mnt/share/key /mnt/n/v /mnt/p")
		wait(t, h.b)
		h.judge("append")
	})
	for _, w := range []string{"counter", "list", "append"} {
		h.run(t, "power cut during "+w, func(t *testing.T) {
			h.begin()
			wait := h.works(w, h.hosts, h.seconds+40)
			h.sleep()
			h.a.powerCut()
			h.survive(t, wait, h.b)
			h.lab.judge(h.b, w)
			h.a.boot()
			h.a.mount()
			h.judge(w)
		})
	}
	h.run(t, "power cut of all hosts", func(t *testing.T) {
		h.begin()
		h.works("append", h.hosts, h.seconds+40)
		h.sleep()
		for _, g := range h.hosts {
			g.powerCut()
		}
		for _, g := range h.hosts {
			g.boot()
			g.mount()
		}
		h.judge("append")
	})
	// Shorter and longer than the lease. The host that was away may fail, and be mounted again.
	times := []int{lease - 2, 3 * lease}
	if h.lab.backing.evicts > 0 {
		times = append(times, h.lab.backing.evicts)
	}
	for _, away := range times {
		h.run(t, fmt.Sprintf("network away for %d s", away), func(t *testing.T) {
			h.begin()
			wait := h.works("append", h.hosts, away+h.seconds+20)
			h.sleep()
			h.a.begin(fmt.Sprintf("ip link set eth0 down; sleep %d; $LAB/connect.sh", away))
			wait(t, h.b)
			h.lab.judge(h.b, "append")
			h.a.again()
			h.judge("append")
		})
	}
	h.run(t, "power cut of the server", func(t *testing.T) {
		h.begin()
		wait := h.works("append", h.hosts, h.seconds+60)
		h.sleep()
		server := h.lab.guests["server"]
		server.powerCut()
		server.boot()
		wait(t)
		for _, g := range h.hosts {
			g.again()
		}
		h.judge("append")
	})
	h.run(t, "three hosts, of which one dies", func(t *testing.T) {
		third := h.lab.start("h3")
		third.mount()
		three := append(h.hosts[:2:2], third)
		h.work(t, "counter", three)
		h.begin()
		wait := h.works("counter", three, h.seconds+40)
		h.sleep()
		third.powerCut()
		h.survive(t, wait, h.a, h.b)
		h.judge("counter")
	})
	h.run(t, "end", h.end)
}

// begin makes the directory in which a workload works.
func (h *hostsTest) begin() {
	for _, g := range h.hosts {
		g.must("mountpoint -q /mnt/p")
	}
	h.a.must("rm -rf /mnt/p/w; mkdir /mnt/p/w; rm -f /mnt/share/acks.*; sleep 1.2")
}

func (h *hostsTest) sleep() { time.Sleep(time.Duration(h.seconds) * time.Second) }

// works runs a workload on hosts. wait waits for all; those that it names must succeed.
func (h *hostsTest) works(workload string, hosts []*guest, seconds int) (wait func(t *testing.T, sound ...*guest)) {
	waits := map[*guest]func(time.Duration) (string, error){}
	for i, g := range hosts {
		waits[g] = g.work(workload, i, seconds)
	}
	return func(t *testing.T, sound ...*guest) {
		t.Helper()
		for _, g := range sound {
			if out, err := waits[g](time.Duration(seconds+150) * time.Second); err != nil {
				t.Errorf("%s: %v: %s", g.name, err, out)
			}
			delete(waits, g)
		}
		for g, wait := range waits {
			if !g.dead {
				out, err := wait(time.Duration(seconds+150) * time.Second)
				t.Logf("%s: %v %s", g.name, err, out)
			}
		}
	}
}

// survive waits for a workload beside which a host dies. On the others it must succeed, unless the filesystem
// makes them wait for longer than they can be sure to be alive.
func (h *hostsTest) survive(t *testing.T, wait func(*testing.T, ...*guest), others ...*guest) {
	t.Helper()
	if h.lab.backing.stalls {
		others = nil
	}
	wait(t, others...)
}

func (h *hostsTest) judge(workload string) {
	h.lab.t.Helper()
	for _, g := range h.hosts {
		h.lab.judge(g, workload)
	}
}

// work runs a workload on hosts at the same time, and judges it.
func (h *hostsTest) work(t *testing.T, workload string, hosts []*guest) {
	h.begin()
	h.works(workload, hosts, h.seconds)(t, hosts...)
	h.judge(workload)
}

// A volume that is not shared refuses a second host, until the first one is gone.
func (h *hostsTest) oneWriter(t *testing.T) {
	h.a.must("mkdir /mnt/n/plain /mnt/q; kmsfs init --key local:/mnt/share/key /mnt/n/plain; kmsfs mount --key local:/mnt/share/key /mnt/n/plain /mnt/q; echo first >/mnt/q/f")
	const mount = "mkdir -p /mnt/q; kmsfs mount --key local:/mnt/share/key /mnt/n/plain /mnt/q"
	if out, err := h.b.begin(mount)(time.Minute); err == nil || !strings.Contains(out, "on host \"h1\" is writing to this volume") {
		t.Errorf("the second host: %v, %s", err, out)
	}
	h.a.must("kmsfs umount /mnt/q")
	if out := h.b.must(mount + " >/dev/null; cat /mnt/q/f; kmsfs umount /mnt/q"); out != "first\n" {
		t.Errorf("%q", out)
	}
}

func (h *hostsTest) peer(t *testing.T) {
	const doctor = "mkdir -p /mnt/n/peer; kmsfs doctor --peer /mnt/n/peer"
	wait := h.a.begin(doctor)
	out := h.b.must(doctor)
	also, err := wait(time.Minute)
	if err != nil || strings.Contains(out+also, "both ran on this host") || strings.Count(out+also, "hold between the hosts") != 10 {
		t.Errorf("%v: %s%s", err, out, also)
	}
}

func (h *hostsTest) programs(t *testing.T) {
	a, b := h.a, h.b
	a.must(`sqlite3 /mnt/p/db 'PRAGMA journal_mode=DELETE; CREATE TABLE t(host, n, UNIQUE(host, n));'`)
	insert := func(host int) string { // and print what was there
		return fmt.Sprintf(`for n in $(seq 15); do
	sqlite3 -cmd ".timeout 60000" /mnt/p/db "BEGIN IMMEDIATE; SELECT $n, group_concat(host || '.' || n, ' ') FROM t; INSERT INTO t VALUES(%d, $n); COMMIT;" || exit 1
done`, host)
	}
	wait := a.begin(insert(0))
	theirs := b.must(insert(1))
	ours, err := wait(2 * time.Minute)
	if err != nil {
		t.Errorf("%v: %s", err, ours)
	}
	for _, g := range h.hosts {
		if out := g.must(`sqlite3 /mnt/p/db 'PRAGMA integrity_check; SELECT count(*) FROM t;'`); out != "ok\n30\n" {
			t.Errorf("%s: %q\nhost 0:\n%s\nhost 1:\n%s", g.name, out, ours, theirs)
		}
	}
	const identity = "export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.org GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example.org; "
	a.must("git init -q /mnt/p/repo")
	for i := range 4 {
		h.hosts[i%2].must(fmt.Sprintf(identity+"cd /mnt/p/repo && echo %d >>file && git add file && git commit -qm %d && git fsck --strict", i, i))
	}
	if out := b.must("cd /mnt/p/repo && git log --oneline | wc -l && git status --short"); out != "4\n" {
		t.Errorf("%q", out)
	}
}

// A host has a file open while another changes it under a lock, and closes it. The server of NFS may then
// delegate reading to the first, which does not look at what its cache has when it takes a lock.
func (h *hostsTest) lastHost(t *testing.T) {
	for i := range 3 {
		file := fmt.Sprint("/mnt/p/delegated", i)
		h.a.must("head -c 20000 /dev/zero >" + file + "; rm -f /mnt/share/opened /mnt/share/written")
		wait := h.b.begin(fmt.Sprintf(`cat %s >/dev/null; exec 3<>%s; exec 4<%s; touch /mnt/share/opened
while [ ! -e /mnt/share/written ]; do sleep 0.1; done; sleep 1.5
flock 3; head -c 3 <&4`, file, file, file))
		h.a.must(fmt.Sprintf(`while [ ! -e /mnt/share/opened ]; do sleep 0.1; done
flock %s -c 'printf new | dd of=%s conv=notrunc status=none'; touch /mnt/share/written`, file, file))
		if out, err := wait(time.Minute); err != nil || out != "new" {
			t.Errorf("under the lock: %v, %q", err, out)
		}
	}
}

// One host builds a program while the other reads all of its files.
func (h *hostsTest) build(t *testing.T) {
	h.a.must(`mkdir /mnt/p/build && cd /mnt/p/build
for i in $(seq 8); do echo "int f$i(void) { return $i; }" >f$i.c; done
(for i in $(seq 8); do echo "int f$i(void);"; done; echo 'int main(void) { return 0'; for i in $(seq 8); do echo " + f$i()"; done; echo '; }') >main.c
printf 'prog: main.o%s\n\tcc -o $@ $^\n' "$(seq -f ' f%g.o' -s '' 8)" >Makefile`)
	wait := h.b.begin(`while [ ! -e /mnt/p/build/done ]; do
	find /mnt/p/build -type f -exec cat {} + >/dev/null 2>>/tmp/read
	sleep 0.1
done
grep -Ev 'No such file or directory|Stale file handle' /tmp/read; rm /tmp/read; /mnt/p/build/prog; echo $?`)
	h.a.must("cd /mnt/p/build && make -s && touch done")
	if out, err := wait(2 * time.Minute); err != nil || out != "36\n" {
		t.Errorf("the host that reads: %v, %s", err, out)
	}
}

// A file that another host removes while it is open is still there, or stale; its name is gone.
func (h *hostsTest) removed(t *testing.T) {
	h.a.must("echo content >/mnt/p/removed; rm -f /mnt/share/opened")
	wait := h.b.begin(`exec 3</mnt/p/removed; touch /mnt/share/opened
while [ -e /mnt/share/opened ]; do sleep 0.1; done
cat <&3; cat /mnt/p/removed; echo again >/mnt/p/removed && cat /mnt/p/removed`)
	h.a.must("while [ ! -e /mnt/share/opened ]; do sleep 0.1; done; rm /mnt/p/removed /mnt/share/opened")
	out, err := wait(time.Minute)
	lines := strings.Split(out, "\n")
	if err != nil || len(lines) != 4 || lines[0] != "content" && !strings.HasSuffix(lines[0], ": Stale file handle") ||
		!strings.HasSuffix(lines[1], "/mnt/p/removed: No such file or directory") || lines[2] != "again" {
		t.Errorf("%v: %q", err, out)
	}
}

// The server's disk is full, then a user's quota: programs get the error of it, what was synced before is
// there, and work goes on when there is space.
func (h *hostsTest) full(t *testing.T) {
	server := h.lab.guests["server"]
	h.a.must("mkdir /mnt/p/full")
	server.must("fallocate -l $(($(df --output=avail -BM /media | tail -n 1 | tr -d ' M') - 24))M /media/filler")
	h.fill(t, "/mnt/p/full", "", "No space left on device", "rm /media/filler")
	for _, g := range h.hosts {
		g.must("kmsfs umount /mnt/p")
		g.mount()
	}
	h.a.must("rmdir /mnt/p/full")
}

func (h *hostsTest) quota(t *testing.T) {
	server := h.lab.guests["server"]
	server.must("setquota -u 1000 0 16384 0 0 /media") // KiB
	const as = "export HOME=/tmp/user; setpriv --reuid 1000 --regid 1000 --clear-groups "
	h.a.must("mkdir /mnt/n/quota; chown 1000:1000 /mnt/n/quota")
	for i, g := range h.hosts {
		g.must("mkdir -p /tmp/user/plain; cp /mnt/share/key /tmp/user; chown -R 1000:1000 /tmp/user; chmod 666 /dev/fuse")
		if i == 0 {
			g.must(as + "kmsfs init --shared --key local:/tmp/user/key /mnt/n/quota")
		}
		g.must(as + "kmsfs mount --key local:/tmp/user/key /mnt/n/quota /tmp/user/plain")
	}
	h.fill(t, "/tmp/user/plain", as, "Disk quota exceeded", "setquota -u 1000 0 0 0 0 /media")
	for _, g := range h.hosts {
		g.must(as + "kmsfs umount /tmp/user/plain")
	}
}

// fill writes files on both hosts, by the command as, until why is in the way; more makes room at the server.
func (h *hostsTest) fill(t *testing.T, dir, as, why, more string) {
	fill := func(host int) string {
		return fmt.Sprintf(`cat >/tmp/fill <<'END'
for i in $(seq 40); do
	yes %d.$i | head -c 1M | dd of=%s/%d.$i bs=64k iflag=fullblock conv=fsync status=none || break
	echo synced %d.$i
done
END
%s bash /tmp/fill`, host, dir, host, host, as)
	}
	wait := h.a.begin(fill(0))
	theirs := h.b.must(fill(1))
	ours, err := wait(2 * time.Minute)
	for _, out := range []string{ours, theirs} {
		if err != nil || strings.Count(out, "synced") == 0 || !strings.Contains(out, why) {
			t.Errorf("a full disk: %v, %s", err, out)
		}
	}
	h.lab.guests["server"].must(more)
	check := ""
	for line := range strings.Lines(ours + theirs) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "synced "); ok {
			check += fmt.Sprintf("yes %s | head -c 1M | cmp - %s/%s || exit 1\n", name, dir, name)
		}
	}
	for _, g := range h.hosts {
		g.must(fmt.Sprintf("cat >/tmp/check <<'END'\n%secho %s >%s/after.%s; rm %s/after.%s\nEND\n%s bash /tmp/check",
			check, g.name, dir, g.name, dir, g.name, as))
	}
	for i, g := range h.hosts { // what an error left in disorder is of no concern then
		g.must(fmt.Sprintf("%s sh -c 'rm %s/%d.*'", as, dir, i))
	}
}

// At the end no host is dead, and nothing is wrong or left.
func (h *hostsTest) end(t *testing.T) {
	eventuallyFor(t, 2*time.Minute, "the dead hosts", func() error {
		if out := h.a.must("kmsfs hosts /mnt/p"); strings.Contains(out, "dead") || strings.Count(out, "alive") != len(h.hosts) {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	for _, g := range h.hosts {
		g.must("kmsfs umount /mnt/p")
	}
	if out := h.a.must("kmsfs fsck --key local:/mnt/share/key /mnt/n/v; ls /mnt/n/v/kmsfs.hosts"); !strings.HasSuffix(out, "nothing is wrong\n") {
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
	_, hosts := newLaboratory(b, nfs)
	share(hosts)
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
		run := "hostcheck turns " + dir + "/turns 5"
		alone := strings.TrimSpace(one.must(run))
		wait := one.begin(run)
		other := two.must(run)
		mine, err := wait(time.Minute)
		b.Logf("in turns for 5 s in %s: alone %s; then %s and %s %v", dir, alone,
			strings.TrimSpace(mine), strings.TrimSpace(other), err)
	}
	for _, g := range hosts {
		g.must("kmsfs umount /mnt/p")
	}
	one.must("kmsfs umount /mnt/q")
}
