package tests

import (
	"bytes"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/keystore/keystoretest"
)

// A source tree copied in, compared after a remount, and the daemon's memory.
func TestSourceTree(t *testing.T) {
	m := newVolume(t)
	m.run(`src=$(go env GOROOT)/src; cp -a "$src" "$M/src"; diff -r "$src" "$M/src"`)
	if kib := rss(t, m.pid()); kib > 150<<10 && !raceEnabled {
		t.Errorf("the daemon has %d KiB", kib)
	} else {
		t.Logf("the daemon has %d KiB", kib)
	}
	m.remount()
	m.run(`src=$(go env GOROOT)/src; diff -r "$src" "$M/src"
		list() { (cd "$1" && find . -printf '%P %y %m %s %T@ %l\n' | sort); }
		diff <(list "$src" | grep -v '^ d') <(list "$M/src" | grep -v '^ d')  | grep -v ' d ' | grep '^[<>]' && exit 1
		# nothing of it stands in the ciphertext
		! grep -rqF 'Copyright 2009 The Go Authors' "$C"
		! ls -R "$C" | grep -q 'net'"$"`)
}

func TestGoBuild(t *testing.T) {
	m := newVolume(t)
	m.run(`mkdir -p "$M/m" "$M/cache" "$M/tmp"; cd "$M/m"
		printf 'module example.org/m\n\ngo 1.21\n' >go.mod
		printf 'package main\n\nimport "encoding/json"\n\nfunc main() { b, _ := json.Marshal("hello"); println(string(b)) }\n' >main.go
		export GOFLAGS=-mod=mod GOPROXY=off GOCACHE=$M/cache GOTMPDIR=$M/tmp CGO_ENABLED=0
		go build -o prog . && ./prog 2>&1 | grep -q hello && go vet ./... && go build -o prog2 . && cmp prog prog2`)
}

func TestGit(t *testing.T) {
	needTool(t, "git")
	m := newVolume(t)
	m.run(`git init -q "$B/src"; cd "$B/src"
		for i in $(seq 40); do mkdir -p "d$((i % 5))"; head -c $((i * 997)) /dev/urandom >"d$((i % 5))/f$i"; git add . ; git commit -qm "$i"; done
		git clone -q "file://$B/src" "$M/a"; git -C "$M/a" fsck --full --strict
		cd "$M/a"; for i in 1 2 3 4 5; do echo $i >new$i; git add new$i; git commit -qm "n$i"; done
		git gc -q --prune=now; git fsck --full --strict; git clone -q "$M/a" "$M/b"; test -z "$(git -C "$M/b" status --porcelain)"`)
	m.remount()
	m.run(`cd "$M/a"; git fsck --full --strict; test -z "$(git status --porcelain)"; diff -r --exclude=.git "$M/a" "$M/b"`)
}

func TestSQLite(t *testing.T) {
	needTool(t, "sqlite3")
	m := newVolume(t)
	for _, mode := range []string{"WAL", "DELETE", "TRUNCATE"} {
		var sql strings.Builder
		r := mrand.New(mrand.NewPCG(1, 2))
		fmt.Fprintf(&sql,
			"PRAGMA journal_mode=%s; PRAGMA synchronous=FULL; PRAGMA cache_size=-200;\nCREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB, h TEXT); CREATE INDEX i ON t(h);\n", mode)
		for range 120 {
			sql.WriteString("BEGIN;\n")
			for range r.IntN(20) {
				k := r.IntN(500)
				if r.IntN(3) == 0 {
					fmt.Fprintf(&sql, "DELETE FROM t WHERE k=%d;\n", k)
				} else {
					fmt.Fprintf(&sql, "INSERT OR REPLACE INTO t VALUES(%d, zeroblob(%d), '%x');\n",
						k, r.IntN(9000), r.Uint64())
				}
			}
			sql.WriteString([]string{"COMMIT;\n", "COMMIT;\n", "COMMIT;\n", "ROLLBACK;\n"}[r.IntN(4)])
		}
		sql.WriteString("PRAGMA integrity_check; SELECT count(*), sum(length(v)), group_concat(h) FROM t;\n")
		write(t, filepath.Join(m.base, "sql"), []byte(sql.String()))
		check := "PRAGMA integrity_check; SELECT count(*), sum(length(v)), group_concat(h) FROM t;"
		inside := m.run(`sqlite3 "$M/` + mode + `.db" <"$B/sql"`)
		outside := m.run(`sqlite3 "$B/` + mode + `.db" <"$B/sql"`)
		if inside != outside || !strings.Contains(inside, "\nok\n") {
			t.Fatalf("%s: another result inside than outside:\n%.300s\n%.300s", mode, inside, outside)
		}
		m.remount()
		if got, ref := m.run(`sqlite3 "$M/`+mode+`.db" '`+check+
			`'`), m.run(`sqlite3 "$B/`+mode+`.db" '`+check+`'`); got != ref {
			t.Fatalf("%s after a remount:\n%.300s\n%.300s", mode, got, ref)
		}
	}
}

// rsync has nothing to do the second time, nor after a remount: sizes and times
// do not move by themselves.
func TestRsyncTwice(t *testing.T) {
	needTool(t, "rsync")
	m := newVolume(t)
	m.run(`src=$(go env GOROOT)/src/crypto; rsync -a "$src/" "$M/r/"; sleep 5`) // long enough to settle
	again := `src=$(go env GOROOT)/src/crypto; rsync -ani "$src/" "$M/r/"`
	for _, when := range []string{"at once", "after dropped caches", "after a remount"} {
		switch when {
		case "after dropped caches":
			if os.Geteuid() == 0 {
				m.run(`sync; echo 3 >/proc/sys/vm/drop_caches`)
			}
		case "after a remount":
			m.remount()
		}
		if out := m.run(again); out != "" {
			t.Errorf("%s rsync has something to do:\n%s", when, out)
		}
	}
	m.run(`head -c 100000 /dev/urandom >"$B/x"; rsync -a "$B/x" "$M/x"; printf changed | dd of="$B/x" bs=1 seek=50000 conv=notrunc status=none
		rsync -aI --inplace --no-whole-file "$B/x" "$M/x"; cmp "$B/x" "$M/x"`)
}

// Random operations on a mount against files on the backing filesystem, from
// several goroutines.
func TestModelMounted(t *testing.T) {
	m := newVolume(t)
	ref := filepath.Join(m.base, "ref")
	if err := os.Mkdir(ref, 0o755); err != nil {
		t.Fatal(err)
	}
	boundaries := []int64{0, 1, 3039, 3040, 3041, 4064, 4096, 7104, 7105, 65536, 1 << 20, 1<<20 + 5000}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			r := mrand.New(mrand.NewPCG(uint64(g), 5))
			for range 15 {
				name := fmt.Sprintf("f%d-%d", g, r.IntN(3))
				if err := onBoth(filepath.Join(m.dir, name), filepath.Join(ref, name), r,
					boundaries, 200); err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
			}
		})
	}
	wg.Wait()
	m.remount()
	m.run(`diff -r "$M" "$B/ref"`)
}

// onBoth does the same to two files and compares.
func onBoth(a, b string, r *mrand.Rand, boundaries []int64, ops int) error {
	flags := os.O_RDWR | os.O_CREATE
	if r.IntN(4) == 0 {
		flags |= os.O_TRUNC
	}
	var fs [2]*os.File
	for i, p := range []string{a, b} {
		f, err := os.OpenFile(p, flags, 0o644)
		if err != nil {
			return err
		}
		defer f.Close()
		fs[i] = f
	}
	for range ops {
		off := boundaries[r.IntN(len(boundaries))] + r.Int64N(9)
		data := noise(1 + r.IntN(10000))
		kind := r.IntN(10)
		var out [2][]byte
		for i, f := range fs {
			var err error
			switch {
			case kind < 5:
				_, err = f.WriteAt(data, off)
			case kind < 7:
				buf := make([]byte, len(data))
				n, _ := f.ReadAt(buf, off)
				out[i] = buf[:n]
			case kind < 8:
				err = f.Truncate(off)
			case kind < 9:
				if off%3 == 0 {
					err = f.Sync()
				}
			default:
				st, serr := f.Stat()
				err = serr
				if err == nil {
					out[i] = fmt.Append(nil, st.Size())
				}
			}
			if err != nil {
				return fmt.Errorf("%s: %w", f.Name(), err)
			}
		}
		if !bytes.Equal(out[0], out[1]) {
			return fmt.Errorf("operation %d at %d: %d bytes here, %d there", kind, off, len(out[0]),
				len(out[1]))
		}
	}
	return nil
}

// A full disk: an error, nothing lost, and it goes on when there is space again.
func TestFullDisk(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	cipher := filepath.Join(base, "cipher")
	if err := os.Mkdir(cipher, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", cipher, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(cipher, 0); err != nil {
			t.Error(err)
		}
	})
	m := newVolumeIn(t, base)
	m.faults = true
	keep := noise(1 << 20)
	write(t, m.path("keep"), keep)
	for range 10 {
		f, err := os.Create(m.path("big"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Write(noise(16 << 20))
		err = errors.Join(err, f.Sync(), f.Close())
		if err == nil {
			t.Fatal("16 MiB fit on 8")
		}
		want(t, m.path("keep"), keep)
		// A removed file makes room at once.
		if err := os.Remove(m.path("big")); err != nil {
			t.Fatal(err)
		}
		write(t, m.path("after"), keep)
		if err := os.Remove(m.path("after")); err != nil {
			t.Fatal(err)
		}
	}
	write(t, m.path("after"), keep)
	// The log has it once a minute for each kind of request, not once for each file.
	fill := filepath.Join(cipher, "fill")
	if err := os.WriteFile(fill, make([]byte, 16<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	failed := 0
	for i := range 20 {
		if os.WriteFile(m.path(fmt.Sprint("more", i)), noise(10000), 0o600) != nil {
			failed++
		}
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(m.log(), "no space left on device"); failed == 0 || n == 0 || n > 5 {
		t.Errorf("the log tells of the full disk %d times:\n%s", n, m.log())
	}
	m.remount()
	want(t, m.path("keep"), keep)
	want(t, m.path("after"), keep)
}

// Bits flipped under a mounted volume: EIO, and the log names the file.
func TestFlippedBit(t *testing.T) {
	m := newVolume(t)
	m.faults = true
	b := noise(100000)
	write(t, m.path("f"), b)
	write(t, m.path("g"), b)
	m.umount()
	stored := m.ciphertexts(2)[0]
	c, err := os.ReadFile(stored)
	if err != nil {
		t.Fatal(err)
	}
	c[50000] ^= 1
	write(t, stored, c)
	m.mount()
	bad := 0
	for _, n := range []string{"f", "g"} {
		got, err := os.ReadFile(m.path(n))
		switch {
		case err == nil && bytes.Equal(got, b):
		case errors.Is(err, syscall.EIO) && bytes.HasPrefix(b, got):
			bad++
		default:
			t.Errorf("%s: %d bytes, %v", n, len(got), err)
		}
	}
	if bad != 1 || !strings.Contains(m.log(), filepath.Base(stored)) {
		t.Errorf("%d files are damaged; log: %s", bad, m.log())
	}
	m.run(`rm "$M/f" "$M/g"`)
}

// What ordinary programs do with files.
func TestPOSIX(t *testing.T) {
	m := newVolume(t)
	m.run(`cd "$M"
		mkdir d; echo x >d/f; ln d/f d/g; test "$(stat -c %h d/f)" = 2; ln -s ../d/f d/s; test "$(cat d/s)" = x; test "$(readlink d/s)" = ../d/f
		mv d/f d/h; mkdir e; mv d/h e/; cat e/h d/g >/dev/null
		chmod 640 e/h; test "$(stat -c %a e/h)" = 640; touch -d '2001-02-03 04:05:06.789012345' e/h; test "$(stat -c %.9Y e/h)" = 981173106.789012345
		mkfifo p; test -p p; truncate -s 5G big; test "$(stat -c %s big)" = 5368709120; printf end | dd of=big bs=1 seek=5000000000 conv=notrunc status=none
		test "$(dd if=big bs=1 skip=5000000000 count=3 status=none)" = end; test "$(stat -c %b big)" -lt 1000; rm big
		n=$(printf 'x%.0s' $(seq 255)); echo long >"$n"; test "$(cat "$n")" = long; mv "$n" short; test "$(cat short)" = long; ! echo y >"${n}y"
		printf 'a\nb' >"new
line"; test -e "new
line"; rm "new
line"
		echo 1 >a; echo 2 >b; mv a b; test "$(cat b)" = 1; ! test -e a
		for i in 1 2 3 4 5; do (for j in $(seq 50); do echo "$i $j" >>log; done) & done; wait; test "$(wc -l <log)" = 250
		head -c 3000000 /dev/urandom >src; cp src copy; cmp src copy; cp --reflink=never --sparse=never copy copy2; cmp src copy2; rm src copy copy2
		rm -r d e; df . >/dev/null; test "$(ls | sort | tr '\n' ' ')" = "b log p short "`)
	// Unlinked while open.
	f, err := os.Create(m.path("gone"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Remove(m.path("gone")); err != nil {
		t.Fatal(err)
	}
	b := noise(50000)
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Chmod(0o600), f.Truncate(40000),
		unix.Futimes(int(f.Fd()), []unix.Timeval{{Sec: 1}, {Sec: 2}})); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 40000)
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, b[:40000]) {
		t.Error("the content of an unlinked file:", err)
	}
	if st, err := f.Stat(); err != nil || st.Size() != 40000 || st.Mode().Perm() != 0o600 {
		t.Error(st, err)
	}
	// The modification time alone, which the kernel writes by itself too.
	if err := unix.UtimesNanoAt(int(f.Fd()), "", []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: 7}},
		unix.AT_EMPTY_PATH); err != nil {
		t.Error(err)
	}
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Error("after setting its time:", err)
	}
	// A shared map, after its descriptor is closed.
	write(t, m.path("map"), make([]byte, 10000))
	g, err := os.OpenFile(m.path("map"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(g.Fd()), 0, 10000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	g.Close()
	f.Close()
	copy(mem[5000:], "through the map")
	if err := errors.Join(unix.Msync(mem, unix.MS_SYNC), unix.Munmap(mem)); err != nil {
		t.Fatal(err)
	}
	m.remount()
	if got, err := os.ReadFile(m.path("map")); err != nil ||
		string(got[5000:5015]) != "through the map" || len(got) != 10000 {
		t.Error("the map:", err)
	}
}

func TestXattrsMounted(t *testing.T) {
	m := newVolume(t)
	write(t, m.path("f"), []byte("x"))
	if err := unix.Setxattr(m.path("f"), "user.colour", []byte("a secret value"), 0); errors.Is(err,
		unix.EOPNOTSUPP) {
		keystoretest.Need(t, "user attributes on the temporary directory's filesystem", false)
	} else if err != nil {
		t.Fatal(err)
	}
	m.remount()
	b := make([]byte, 100)
	if n, err := unix.Getxattr(m.path("f"), "user.colour", b); err != nil ||
		string(b[:n]) != "a secret value" {
		t.Errorf("%q, %v", b[:max(n, 0)], err)
	}
	if n, err := unix.Listxattr(m.path("f"), b); err != nil || string(b[:n]) != "user.colour\x00" {
		t.Errorf("%q, %v", b[:max(n, 0)], err)
	}
	if _, err := unix.Getxattr(m.path("f"), "user.other", b); err != unix.ENODATA {
		t.Error(err)
	}
}

func TestSignalsAndLocks(t *testing.T) {
	m := newVolume(t)
	write(t, m.path("f"), []byte("x"))
	if out, err := m.try("mount", m.cipher, filepath.Join(m.base, "state")); err == nil ||
		strings.Count(out, "\n") > 2 {
		t.Errorf("a second mount: %s", out)
	}
	if err := syscall.Kill(m.pid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "SIGTERM did not end the mount well", func() error { // the marker goes at the very end
		if _, err := os.Lstat(filepath.Join(m.cipher, "kmsfs.mounted")); err == nil || isMount(m.dir) {
			return errors.New("it is still there")
		}
		return nil
	})
	eventually(t, "the daemon's lock", func() error {
		if out, err := m.try("mount", m.cipher, m.dir); err != nil {
			return errors.New(out)
		}
		return nil
	})
	want(t, m.path("f"), []byte("x"))
}

// Descriptors of the caller are not the daemon's: a pipe ends when they do.
func TestDaemonLetsGo(t *testing.T) {
	m := newVolume(t)
	m.umount()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := exec.Command(binary, "mount", m.cipher, m.dir)
	c.Env, c.ExtraFiles = m.env, []*os.File{w, w}
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	w.Close()
	r.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := r.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the daemon holds a descriptor of its caller")
	}
}

func TestManyEntries(t *testing.T) {
	m := newVolume(t)
	var want []string
	for i := range 5000 {
		name := fmt.Sprintf("entry-%d", i)
		want = append(want, name)
		if err := os.WriteFile(m.path(name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m.remount()
	es, err := os.ReadDir(m.dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range es {
		got = append(got, e.Name())
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%d entries of %d", len(got), len(want))
	}
}
