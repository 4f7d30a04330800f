package tests

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// PostgreSQL under load, stopped in the middle, recovered, and every index
// compared with its table.
func TestPostgres(t *testing.T) {
	needSoak(t)
	needRoot(t)
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if len(bins) == 0 {
		t.Fatal("PostgreSQL is missing: make soak installs it")
	}
	base := openBase(t)
	m := newVolumeIn(t, base, "--allow-other")
	m.env = append(m.env, "PG="+bins[len(bins)-1])
	m.run(`mkdir "$M/pg" "$B/sock"; chown postgres "$M/pg" "$B/sock"; chmod 700 "$M/pg"; cd /
		as() { runuser -u postgres -- env PGHOST="$B/sock" PGDATA="$M/pg/data" PATH="$PG:$PATH" "$@"; }
		start() { as pg_ctl -w -t 120 -l "$B/sock/log" -o "-k $B/sock -c listen_addresses= -c shared_buffers=32MB" start >/dev/null; }
		trap 'as pg_ctl -w -m immediate stop >/dev/null 2>&1 || true' EXIT
		as initdb -k -A trust >/dev/null; start; as createdb bench; as pgbench -q -i -s 10 bench 2>/dev/null
		sums='select count(distinct s) from (select sum(abalance) s from pgbench_accounts union all select sum(bbalance) from pgbench_branches union all select sum(tbalance) from pgbench_tellers union all select sum(delta) from pgbench_history) x'
		for i in 1 2 3; do
			(as pgbench -n -c 4 -j 2 -T 12 bench >/dev/null 2>&1 || true) &
			sleep 8; as pg_ctl -w -m immediate stop >/dev/null; wait; start
			test "$(as psql -Atc "$sums" bench)" = 1
		done
		as psql -qc 'create extension amcheck' bench
		test "$(as psql -Atc "select count(bt_index_check(c.oid, true)) from pg_index i join pg_class c on c.oid = i.indexrelid join pg_am a on a.oid = c.relam where a.amname = 'btree'" bench)" -gt 50
		as pg_ctl -w stop >/dev/null; as pg_checksums --check | grep -q 'Bad checksums:  *0'`)
	m.remount()
}

// Images of virtual machines: converted to and fro they stay sparse and the same,
// and writes past the cache, discards and zeroing do what they do elsewhere.
func TestQemuImages(t *testing.T) {
	needSoak(t)
	needTool(t, "qemu-img", "qemu-io")
	m := newVolume(t)
	m.run(`cd "$M"; truncate -s 1G raw
		for at in 0 100 300 900; do head -c 5M /dev/urandom | dd of=raw bs=1M seek=$at conv=notrunc status=none; done
		qemu-img convert -O qcow2 raw a.qcow2; qemu-img convert -O raw a.qcow2 back; qemu-img convert -O raw -S 4k raw again
		cmp raw back; cmp raw again; qemu-img compare -q raw a.qcow2; qemu-img check -q a.qcow2
		for f in back again a.qcow2; do test "$(du -m $f | cut -f1)" -lt 25; done
		qemu-img create -q -f raw -o preallocation=falloc full 50M; test "$(du -m full | cut -f1)" -ge 50
		qemu-io -f qcow2 -t none -c "write -P 7 1M 4M" -c "discard 2M 1M" -c "read -P 7 1M 1M" -c "read -P 0 2M 1M" a.qcow2
		qemu-io -f raw -t none -c "write -P 9 3M 64k" -c "write -z -u 0 1M" -c "discard 100M 1M" -c "read -P 9 3M 64k" -c "read -P 0 0 1M" -c "read -P 0 100M 1M" raw`)
	m.remount()
	m.run(`cd "$M"; qemu-img check -q a.qcow2; qemu-io -f raw -c "read -P 9 3M 64k" raw`)
}

// stress-ng's stressors of files and of input and output, each verifying what
// it wrote. What fails on the backing filesystem too does not count.
func TestStressNG(t *testing.T) {
	needSoak(t)
	needRoot(t)
	needTool(t, "stress-ng")
	m := newVolume(t, "--allow-other")
	var names []string
	for _, class := range []string{"filesystem", "io"} {
		out, _ := exec.Command("stress-ng", "--class", class+"?").CombinedOutput()
		_, list, _ := strings.Cut(string(out), ":")
		names = append(names, strings.Fields(list)...)
	}
	if len(names) < 30 {
		t.Fatalf("stress-ng knows only %q", names)
	}
	ref := filepath.Join(m.base, "ref")
	if err := os.Mkdir(ref, 0o755); err != nil {
		t.Fatal(err)
	}
	run := func(name, dir string) (string, error) {
		c := exec.Command("timeout", "60", "stress-ng", "--"+name, "2", "--timeout", "4s",
			"--verify", "--temp-path", dir)
		c.Env, c.Dir = append(os.Environ(), "HOME="+m.base), m.base // some leave files where they run
		out, err := c.CombinedOutput()
		return string(out), err
	}
	for _, name := range names {
		if strings.HasPrefix(name, "ioport") || name == "binderfs" || name == "ramfs" {
			continue // not about a directory
		}
		if out, err := run(name, m.dir); err != nil {
			if refOut, refErr := run(name, ref); refErr != nil {
				t.Logf("%s fails on the backing filesystem too: %.200s", name, refOut)
			} else {
				t.Errorf("%s: %v\n%s", name, err, out)
			}
		}
	}
	m.remount()
}
