package tests

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Several mounts of one shared volume on this host: each has its daemon and its locks, and all have the
// page cache in common. Real hosts are those of TestHosts.

// newShared makes a shared volume and mounts it n times.
func newShared(t *testing.T, n int) []*mounted {
	t.Helper()
	needFUSE(t)
	base := t.TempDir()
	first := &mounted{t: t, base: base, cipher: filepath.Join(base, "cipher"), dir: filepath.Join(base, "mnt0")}
	first.env = append(os.Environ(), "XDG_STATE_HOME="+filepath.Join(base, "state"),
		"XDG_CONFIG_HOME="+filepath.Join(base, "config"), "XDG_RUNTIME_DIR="+filepath.Join(base, "run"))
	if err := os.Mkdir(first.cipher, 0o755); err != nil {
		t.Fatal(err)
	}
	first.kmsfs("init", "--shared", first.cipher)
	var hosts []*mounted
	for i := range n {
		m := *first
		m.dir = filepath.Join(base, fmt.Sprint("mnt", i))
		if err := os.Mkdir(m.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(m.cleanup)
		m.mount()
		hosts = append(hosts, &m)
	}
	return hosts
}

// endShared unmounts all and demands that nothing is left, and nothing wrong.
func endShared(t *testing.T, hosts []*mounted) {
	t.Helper()
	for _, m := range hosts {
		if isMount(m.dir) {
			m.umount()
		}
	}
	if out := hosts[0].kmsfs("fsck", hosts[0].cipher); !strings.Contains(out, "nothing is wrong") {
		t.Errorf("fsck: %s", out)
	}
	if left, _ := os.ReadDir(filepath.Join(hosts[0].cipher, "kmsfs.hosts")); len(left) > 0 {
		t.Errorf("kmsfs.hosts has %v", left)
	}
}

// hostcheck is the program of that name, which is built once.
var hostcheck = sync.OnceValues(func() (string, error) {
	path := filepath.Join(filepath.Dir(binary), "hostcheck")
	c := exec.Command("go", "build", "-o", path, "./hostcheck")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := c.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return path, err
})

// checkHosts runs a workload on each host and judges it. A host may be killed meanwhile by during.
func checkHosts(t *testing.T, hosts []*mounted, workload string, seconds int, during func()) {
	t.Helper()
	program, err := hostcheck()
	if err != nil {
		t.Fatal(err)
	}
	dir := "w-" + workload
	if err := os.Mkdir(hosts[0].path(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	judge := []string{"judge", workload, ""}
	var wg sync.WaitGroup
	fails := make([]string, len(hosts))
	for i, m := range hosts {
		acks, err := os.Create(filepath.Join(m.base, fmt.Sprint("acks", i)))
		if err != nil {
			t.Fatal(err)
		}
		judge = append(judge, acks.Name())
		c := exec.Command(program, "run", workload, m.path(dir), fmt.Sprint(i), fmt.Sprint(seconds))
		c.Stdout = acks
		wg.Go(func() {
			defer acks.Close()
			var text strings.Builder
			c.Stderr = &text
			if err := c.Run(); err != nil {
				fails[i] = text.String()
			}
		})
	}
	if during != nil {
		during()
	}
	wg.Wait()
	for i, m := range hosts {
		if !isMount(m.dir) {
			continue // it was killed
		}
		if fails[i] != "" {
			t.Errorf("%s on host %d: %s", workload, i, fails[i])
		}
		judge[2] = m.path(dir)
		if out, err := exec.Command(program, judge...).CombinedOutput(); err != nil {
			t.Errorf("%s, judged on host %d: %s", workload, i, out)
		} else {
			t.Logf("%s: %s", workload, out)
		}
	}
}

func TestShared(t *testing.T) {
	hosts := newShared(t, 2)
	for _, w := range []string{"counter", "list", "append", "pages", "register", "names", "cut"} {
		t.Run(w, func(t *testing.T) { checkHosts(t, hosts, w, 2, nil) })
	}
	endShared(t, hosts)
}

// A daemon that is killed takes nothing with it that was acknowledged, and the other host goes on.
func TestSharedKill(t *testing.T) {
	for _, w := range []string{"counter", "list", "append", "pages"} {
		t.Run(w, func(t *testing.T) {
			hosts := newShared(t, 2)
			checkHosts(t, hosts, w, 3, func() {
				time.Sleep(time.Second)
				hosts[1].kill()
			})
			hosts[1].mount()
			eventually(t, "the dead host", func() error {
				if out := hosts[0].kmsfs("hosts", hosts[0].dir); strings.Contains(out, "dead") {
					return fmt.Errorf("%s", out)
				}
				return nil
			})
			endShared(t, hosts)
		})
	}
}

// SQLite in rollback mode works from two hosts, and git in turns.
func TestSharedPrograms(t *testing.T) {
	needTool(t, "sqlite3", "git")
	hosts := newShared(t, 2)
	a, b := hosts[0], hosts[1]
	a.run(`sqlite3 "$M/db" 'PRAGMA journal_mode=DELETE; CREATE TABLE t(host, n, UNIQUE(host, n));'`)
	const rows = 60
	var wg sync.WaitGroup
	for i, m := range hosts {
		wg.Go(func() {
			m.run(fmt.Sprintf(`for n in $(seq %d); do
	sqlite3 -cmd ".timeout 20000" "$M/db" "BEGIN IMMEDIATE; INSERT INTO t VALUES(%d, $n); COMMIT;"
done`, rows, i))
		})
	}
	wg.Wait()
	for _, m := range hosts {
		if got := m.run(`sqlite3 "$M/db" 'PRAGMA integrity_check; SELECT count(*) FROM t;'`); got != fmt.Sprintf("ok\n%d\n", 2*rows) {
			t.Errorf("%q", got)
		}
	}
	a.run(`git init -q "$M/repo"`)
	for i := range 6 {
		hosts[i%2].run(fmt.Sprintf(`cd "$M/repo"; echo %d >>file; git add file; git commit -qm %d; git fsck --strict`, i, i))
	}
	if got := b.run(`cd "$M/repo"; git log --oneline | wc -l; git status --short`); got != "6\n" {
		t.Errorf("%q", got)
	}
	endShared(t, hosts)
}

// Locks of programs hold between mounts: fcntl, OFD and flock, of ranges and of whole files.
func TestSharedLocks(t *testing.T) {
	hosts := newShared(t, 2)
	write(t, hosts[0].path("f"), noise(5000))
	a, b := open(t, hosts[0].path("f"), os.O_RDWR), open(t, hosts[1].path("f"), os.O_RDWR)
	defer a.Close()
	defer b.Close()
	lock := func(f *os.File, cmd int, kind int16, start, n int64) error {
		return unix.FcntlFlock(f.Fd(), cmd, &unix.Flock_t{Type: kind, Start: start, Len: n})
	}
	for _, x := range []struct {
		name         string
		first, other func() error
		free         func() error
		excludes     bool
	}{
		{"write beside write", func() error { return lock(a, unix.F_SETLK, unix.F_WRLCK, 10, 10) },
			func() error { return lock(b, unix.F_SETLK, unix.F_WRLCK, 19, 1) },
			func() error { return lock(a, unix.F_SETLK, unix.F_UNLCK, 0, 0) }, true},
		{"another range", func() error { return lock(a, unix.F_SETLK, unix.F_WRLCK, 10, 10) },
			func() error { return lock(b, unix.F_SETLK, unix.F_WRLCK, 20, 1) },
			func() error { return lock(a, unix.F_SETLK, unix.F_UNLCK, 0, 0) }, false},
		{"read beside read", func() error { return lock(a, unix.F_SETLK, unix.F_RDLCK, 0, 0) },
			func() error { return lock(b, unix.F_SETLK, unix.F_RDLCK, 0, 0) },
			func() error { return lock(a, unix.F_SETLK, unix.F_UNLCK, 0, 0) }, false},
		{"to the end", func() error { return lock(a, unix.F_OFD_SETLK, unix.F_WRLCK, 1<<40, 0) },
			func() error { return lock(b, unix.F_OFD_SETLK, unix.F_RDLCK, 1<<62+1<<61, 1) },
			func() error { return lock(a, unix.F_OFD_SETLK, unix.F_UNLCK, 0, 0) }, true},
		{"flock", func() error { return unix.Flock(int(a.Fd()), unix.LOCK_EX|unix.LOCK_NB) },
			func() error { return unix.Flock(int(b.Fd()), unix.LOCK_SH|unix.LOCK_NB) },
			func() error { return unix.Flock(int(a.Fd()), unix.LOCK_UN) }, true},
	} {
		if err := x.first(); err != nil {
			t.Fatalf("%s: %v", x.name, err)
		}
		if err := x.other(); (err != nil) != x.excludes {
			t.Errorf("%s: %v", x.name, err)
		}
		if err := x.free(); err != nil {
			t.Errorf("%s: %v", x.name, err)
		}
		if err := x.other(); err != nil {
			t.Errorf("%s, when it is free: %v", x.name, err)
		}
		lock(b, unix.F_SETLK, unix.F_UNLCK, 0, 0)
		lock(b, unix.F_OFD_SETLK, unix.F_UNLCK, 0, 0)
		unix.Flock(int(b.Fd()), unix.LOCK_UN)
	}
	// A close gives the locks back, and a lock that is waited for comes.
	if err := lock(a, unix.F_SETLK, unix.F_WRLCK, 0, 0); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- lock(b, unix.F_SETLKW, unix.F_WRLCK, 0, 0) }()
	select {
	case err := <-done:
		t.Errorf("it did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	a.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	b.Close()
	endShared(t, hosts)
}

// The commands of an operator: the list of hosts, refusals beside them, and the way there and back.
func TestSharedCommands(t *testing.T) {
	hosts := newShared(t, 2)
	m := hosts[0]
	write(t, m.path("f"), []byte("content"))
	if out := m.kmsfs("hosts", m.dir); strings.Count(out, "alive") != 2 {
		t.Errorf("hosts: %s", out)
	}
	out, err := m.try("share", "--end", m.cipher)
	if err == nil || !strings.Contains(out, "kmsfs hosts") {
		t.Errorf("share --end: %v, %s", err, out)
	}
	out, err = m.try("rekey", m.cipher)
	if err == nil || !strings.Contains(out, "other hosts") {
		t.Errorf("rekey: %v, %s", err, out)
	}
	if out := m.kmsfs("fsck", m.cipher); !strings.Contains(out, "nothing is wrong") {
		t.Errorf("fsck: %s", out)
	}
	endShared(t, hosts)
	m.kmsfs("share", "--end", m.cipher)
	m.mount()
	want(t, m.path("f"), []byte("content"))
	if out, err := hosts[1].try("mount", m.cipher, hosts[1].dir); err == nil {
		t.Errorf("a second mount of a volume that is not shared: %s", out)
	}
	if out, err := m.try("hosts", m.cipher); err == nil || !strings.Contains(out, "not a shared volume") {
		t.Errorf("hosts: %v, %s", err, out)
	}
	m.umount()
	m.kmsfs("share", m.cipher)
	for _, m := range hosts {
		m.mount()
		want(t, m.path("f"), []byte("content"))
	}
	endShared(t, hosts)
	// Two processes of one host meet, though one that was killed left its file, and say that nothing between
	// hosts was tested. What fails on one of them ends the check on both.
	dir := t.TempDir()
	peer := func() (outs []string, errs error) {
		var wg sync.WaitGroup
		var mu sync.Mutex
		for range 2 {
			wg.Go(func() {
				out, err := m.try("doctor", "--peer", "--within", "30s", dir)
				mu.Lock()
				defer mu.Unlock()
				outs, errs = append(outs, out), errors.Join(errs, err)
			})
		}
		wg.Wait()
		return outs, errs
	}
	if err := os.MkdirAll(filepath.Join(dir, "kmsfs.peer", "name"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "kmsfs.peer", "00000000000000000000000000000000.here.x"), nil)
	outs, err := peer()
	if all := strings.Join(outs, "\n"); err == nil || strings.Count(all, "hold between the hosts") != 8 ||
		strings.Count(all, "it failed on the other host") != 1 || strings.Count(all, "file exists") != 1 {
		t.Errorf("doctor --peer with a directory in the way: %v, %s", err, all)
	}
	if err := os.RemoveAll(filepath.Join(dir, "kmsfs.peer")); err != nil {
		t.Fatal(err)
	}
	outs, err = peer()
	if all := strings.Join(outs, "\n"); err != nil || strings.Count(all, "hold between the hosts") != 10 ||
		strings.Count(all, "both ran on this host") != 2 {
		t.Errorf("doctor --peer: %v, %s", err, all)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("doctor --peer left %v", left)
	}
}
