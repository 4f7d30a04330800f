package tests

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Holes are where they are said to be, also of what the kernel has not written
// yet, and sparse copies stay sparse.
func TestHoles(t *testing.T) {
	needTool(t, "rsync", "fallocate")
	m := newVolume(t)
	f := open(t, m.path("f"), os.O_RDWR|os.O_CREATE)
	for _, off := range []int64{0, 8 << 20} {
		if _, err := f.WriteAt(noise(10000), off); err != nil {
			t.Fatal(err)
		}
	}
	fd := int(f.Fd())
	hole, err := unix.Seek(fd, 0, unix.SEEK_HOLE)
	if err != nil || hole < 10000 || hole > 10000+8192 {
		t.Errorf("the hole begins at %d: %v", hole, err)
	}
	if data, err := unix.Seek(fd, hole, unix.SEEK_DATA); err != nil || data > 8<<20 || data < 8<<20-8192 {
		t.Errorf("the data begin again at %d: %v", data, err)
	}
	if end, err := unix.Seek(fd, 8<<20, unix.SEEK_HOLE); err != nil || end != 8<<20+10000 {
		t.Errorf("they end at %d: %v", end, err)
	}
	if _, err := unix.Seek(fd, 9<<20, unix.SEEK_DATA); !errors.Is(err, unix.ENXIO) {
		t.Error("behind the end:", err)
	}
	m.run(`cd "$M"; head -c 3M /dev/urandom >s; truncate -s 60M s; head -c 100K /dev/urandom >>s
		cp --sparse=always s "$B/outside"; cp --sparse=always "$B/outside" a; cp --sparse=auto s b; rsync -S s c; tar -Scf t.tar s; mkdir x; tar -xSf t.tar -C x
		cp --reflink=never s d; fallocate -d d
		sync -f .; for i in a b c x/s d; do cmp s $i; test "$(stat -c '%b*%B' $i | bc)" -lt 5000000 || { echo "$i is not sparse: $(stat -c %b $i)"; exit 1; }; done
		fallocate -p -o 1M -l 1M s; fallocate -l 1M new; test "$(stat -c %s new)" = 1048576; fallocate -z -o 4096 -l 4096 new
		! fallocate -c -o 0 -l 4096 s 2>/dev/null; ! fallocate -i -o 0 -l 4096 s 2>/dev/null
		! fallocate -l 1E s 2>/dev/null`)
	f.Close()
	m.remount()
	m.run(`cd "$M"; cmp s a && exit 1; cmp x/s d; test "$(stat -c '%b*%B' s | bc)" -lt 5000000`)
}

// What the kernel has only taken into its cache is not lost silently.
func TestDelayedErrors(t *testing.T) {
	base := t.TempDir()
	disk := loopDisk(t, base, "400M", "mkfs.ext4", "-q", "-m", "0")
	m := newVolumeOn(t, base, disk)
	m.faults = true
	b := noise(8 << 20)
	f := open(t, m.path("f"), os.O_RDWR|os.O_CREATE) // while there is space
	if _, err := f.Write(b[:4<<20]); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	fill(t, filepath.Join(disk, "filler"))
	if _, err := f.Write(b[4<<20:]); err != nil {
		t.Fatal("the kernel wrote at once: ", err)
	}
	for i := range 2 {
		if err := f.Sync(); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("fsync %d: %v", i+1, err)
		}
	}
	got := make([]byte, len(b))
	if n, err := f.ReadAt(got[:4<<20], 0); err != nil || !bytes.Equal(got[:n], b[:4<<20]) {
		t.Error("what was there before:", err)
	}
	eventually(t, "what could not be written", func() error { // the kernel is told behind the answer's back
		if _, err := f.ReadAt(got[7<<20:], 7<<20); !errors.Is(err, unix.EIO) {
			return fmt.Errorf("it reads with %v", err)
		}
		return nil
	})
	// Now that space is short, write itself fails.
	if out := m.runs(`echo x >"$M/small"; head -c 100000 /dev/zero >"$M/small2"`); out == nil {
		t.Error("writing to a full disk succeeds")
	}
	if out, err := m.try("info", m.cipher); err != nil {
		t.Error(out, err)
	}
	if err := os.Remove(filepath.Join(disk, "filler")); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b[4<<20:], 4<<20); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal("when there is space again:", err)
	}
	want(t, m.path("f"), b)
	m.remount()
	want(t, m.path("f"), b)
}

// A daemon that root runs gives nobody what the filesystem keeps for root, nor
// more than a quota.
func TestReserveAndQuota(t *testing.T) {
	needRoot(t)
	needTool(t, "setpriv", "btrfs")
	as := `as() { setpriv --reuid 1234 --regid 1234 --clear-groups "$@"; }; chmod 1777 "$M"; `
	t.Run("reserve", func(t *testing.T) {
		base := openBase(t)
		disk := loopDisk(t, base, "64M", "mkfs.ext4", "-q", "-m", "30")
		m := newVolumeOn(t, base, disk, "--allow-other")
		m.faults = true
		m.run(as + `! as dd if=/dev/zero of="$M/f" bs=64K 2>/dev/null; ! as bash -c 'head -c 200000 /dev/zero >"$M/g"' 2>/dev/null
			test "$(stat -fc '%f*%S/1048576' "$C" | bc)" -ge 10 || { echo "the reserve was used:"; df -k "$C"; exit 1; }
			rm "$M/f"; as bash -c 'echo x >"$M/h"'; as ! fallocate -l 100M "$M/i" 2>/dev/null || true; as cat "$M/h"`)
	})
	t.Run("quota", func(t *testing.T) {
		base := openBase(t)
		disk := loopDisk(t, base, "600M", "mkfs.btrfs", "-q")
		if out, err := exec.Command("bash", "-ec",
			`cd "$0"; btrfs quota enable .; btrfs subvolume create -- sub >/dev/null; btrfs qgroup limit 20M sub`, disk).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		v := newVolumeOn(t, base, filepath.Join(disk, "sub"), "--allow-other")
		v.faults = true
		v.run(as + `as bash -c 'echo kept >"$M/kept"; sync "$M/kept"'
			out=$(as dd if=/dev/zero of="$M/f" bs=64K count=800 conv=fsync 2>&1) && { echo "50 MB fit in 20"; exit 1; }; grep -q 'Disk quota exceeded' <<<"$out" || { echo "$out"; exit 1; }
			out=$(as dd if=/dev/zero of="$M/g" bs=64K count=100 2>&1) && { echo "write succeeds beyond the quota"; exit 1; }
			rm -f "$M/f" "$M/g"; sync -f "$C"; test "$(cat "$M/kept")" = kept`)
	})
}

// A file that changes has another time, also where little space is left and the
// kernel's cache is not used.
func TestTimesNearFull(t *testing.T) {
	base := t.TempDir()
	disk := loopDisk(t, base, "60M", "mkfs.ext4", "-q")
	m := newVolumeOn(t, base, disk)
	m.run(`cd "$M"; echo one >f; touch -d @1000000000 f; echo two >>f; echo x >g; touch -d @1000000000 g; printf y | dd of=g conv=notrunc status=none; sleep 4`)
	for range 2 {
		m.remount()
		m.run(`cd "$M"; for i in f g; do test "$(stat -c %Y $i)" -gt 1500000000 || { echo "$i has its old time"; exit 1; }; done; find "$C" -type f -size +0 ! -name 'kmsfs.*' ! -newermt @1500000000 | grep . && exit 1; true`)
	}
}

// RLIMIT_FSIZE is the program's.
func TestFileSizeLimit(t *testing.T) {
	m := newVolume(t)
	m.run(`cd "$M"; trap '' XFSZ; (ulimit -f 8; ! head -c 20000 /dev/zero >f 2>/dev/null; test "$(stat -c %s f)" = 8192; ! fallocate -l 20000 g 2>/dev/null; ! truncate -s 20000 f 2>/dev/null); head -c 20000 /dev/zero >f`)
}

// Birth times, inode flags, and files without a name.
func TestInodes(t *testing.T) {
	needRoot(t)
	needTool(t, "lsattr", "python3")
	base := openBase(t)
	disk := loopDisk(t, base, "400M", "mkfs.ext4", "-q")
	m := newVolumeOn(t, base, disk, "--allow-other")
	m.run(`cd "$M"; echo x >f; mkdir d; ln -s f l
		for i in f d l; do b=$(stat -c %W $i); now=$(date +%s); test "$b" -gt 0 && test $((now - b)) -lt 60; done
		chattr +d f; test "$(lsattr f | cut -c7)" = d; chattr +d d; test "$(lsattr -d d | cut -c7)" = d; chattr -d f
		! chattr +a f 2>/dev/null
		chattr +i f; ! (echo y >>f) 2>/dev/null; ! rm -f f 2>/dev/null; ! mv f g 2>/dev/null; chattr -i f; echo y >>f; test "$(cat f)" = 'x
y'
		exec 5<>f 6<>f; seq 5000 >&5; chattr +i f; ! (echo y >>f) 2>/dev/null; sync f; seq 5000 | cmp - f; echo late >&6; ! sync f 2>/dev/null; for i in 1 2 3 4 5; do seq 5000 | cmp -s - f && break; sleep 0.1; done; seq 5000 | cmp - f; exec 6>&-; chattr -i f; exec 5>&-; seq 5000 | cmp - f
		python3 - <<'P'
import os, fcntl, struct, errno
fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o640)
os.write(fd, b"nameless" * 5000)
st = os.fstat(fd)
assert st.st_nlink == 0 and st.st_size == 40000 and st.st_mode & 0o777 == 0o640, st
root = os.open("/", os.O_RDONLY) # with a directory, linkat follows
os.link("/proc/self/fd/%d" % fd, "named", src_dir_fd=root, follow_symlinks=True)
os.write(fd, b"more")
os.close(fd)
assert open("named", "rb").read() == b"nameless" * 5000 + b"more"
fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o640)
try:
    os.link("/proc/self/fd/%d" % fd, "never", src_dir_fd=root, follow_symlinks=True)
    raise SystemExit("O_EXCL can be linked")
except FileNotFoundError:
    pass
fd = os.open("named", os.O_RDWR)
try:
    fcntl.ioctl(fd, 0x5413, b"\0" * 8)
    raise SystemExit("a terminal")
except OSError as e:
    assert e.errno == errno.ENOTTY, e
x = fcntl.ioctl(fd, 0x801c581f, b"\0" * 28)
assert len(x) == 28
P`)
	m.remount()
	m.run(`cd "$M"; test "$(stat -c %s named)" = 40004; test "$(ls | wc -l)" = 4`)
}

// Locks between processes, of all three kinds.
func TestLocks(t *testing.T) {
	needTool(t, "python3")
	m := newVolume(t)
	m.run(`cd "$M"; python3 - <<'P'
import fcntl, os, struct, subprocess, sys
open("f", "w").write("x" * 100)
other = """
import fcntl, os, struct, sys
fd = os.open("f", os.O_RDWR)
def free(f):
    try:
        f()
        return "1"
    except BlockingIOError:
        return "0"
lk = struct.pack("hhqqhh4x", fcntl.F_WRLCK, 0, 20, 10, 0, 0)
print(free(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)), free(lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)), free(lambda: fcntl.fcntl(fd, 37, lk)), sep="")
"""
def seen(): return subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True).stdout.strip()
assert seen() == "111", seen()
fd = os.open("f", os.O_RDWR)
fcntl.flock(fd, fcntl.LOCK_EX); assert seen() == "011", seen()
fcntl.flock(fd, fcntl.LOCK_UN)
fcntl.lockf(fd, fcntl.LOCK_EX, 5); assert seen() == "101", seen()
fcntl.lockf(fd, fcntl.LOCK_UN, 5)
fcntl.fcntl(fd, 37, struct.pack("hhqqhh4x", fcntl.F_WRLCK, 0, 8, 100, 0, 0)); assert seen() == "100", seen()
os.close(fd); assert seen() == "111", seen()
P`)
}

// O_DIRECT is coherent with the cache, O_APPEND of several processes loses
// nothing, and mapped pages are written.
func TestWaysToWrite(t *testing.T) {
	needTool(t, "python3")
	m := newVolume(t)
	m.run(`cd "$M"; python3 - <<'P'
import mmap, os, random, subprocess, sys
r = random.Random(1)
size = 300000
want = bytearray(r.randbytes(size))
open("d", "wb").write(want)
direct, cached = os.open("d", os.O_RDWR | os.O_DIRECT), os.open("d", os.O_RDWR)
view = mmap.mmap(cached, size)
page = mmap.mmap(-1, 1 << 16)
for _ in range(600):
    n = 512 * r.randint(1, 60)
    off = 512 * r.randrange((size - n) // 512)
    k = r.randrange(5)
    data = r.randbytes(n)
    if k == 0:
        page[:n] = data
        assert os.pwritev(direct, [memoryview(page)[:n]], off) == n
        want[off:off + n] = data
    elif k == 1:
        os.pwrite(cached, data, off); want[off:off + n] = data
    elif k == 2:
        view[off:off + n] = data; want[off:off + n] = data
    elif k == 3:
        assert os.preadv(direct, [memoryview(page)[:n]], off) == n
        assert page[:n] == want[off:off + n], ("direct", off, n)
    else:
        assert os.pread(cached, n, off) == want[off:off + n], ("cached", off, n)
os.close(direct); os.close(cached)
view[100:200] = b"q" * 100; want[100:200] = b"q" * 100
view.flush(); view.close()
assert open("d", "rb").read() == want
writer = "import os,sys\nfd=os.open('a',os.O_WRONLY|os.O_APPEND|os.O_CREAT)\nfor i in range(500): os.write(fd,b'%s %05d\\n'%(sys.argv[1].encode(),i))"
ps = [subprocess.Popen([sys.executable, "-c", writer, str(i)]) for i in range(6)]
assert all(p.wait() == 0 for p in ps)
lines = open("a").read().splitlines()
assert len(lines) == 3000 and len(set(lines)) == 3000, len(lines)
P`)
	m.remount()
	m.run(`test "$(wc -l <"$M/a")" = 3000; test "$(head -c 200 "$M/d" | tail -c 100 | tr -d q | wc -c)" = 0`)
}

// An overlay whose upper and work directories lie on a volume.
func TestOverlayUpper(t *testing.T) {
	needRoot(t)
	m := newVolume(t, "--allow-other")
	m.run(`cd "$B"; mkdir -p lower/dir/sub lower/gone ov "$M/up" "$M/work"; echo low >lower/f; echo deep >lower/dir/sub/g; echo g >lower/gone/x
		o=lowerdir=$B/lower,upperdir=$M/up,workdir=$M/work,redirect_dir=on
		trap 'umount ov 2>/dev/null || true' EXIT
		try() { mount -t overlay overlay -o "$o" ov; }
		try || { echo "no overlay"; exit 1; }
		echo more >>ov/f; rm -r ov/gone; mkdir ov/gone; echo new >ov/gone/y; mv ov/dir ov/moved; ln ov/f ov/hard; mv ov/moved/sub/g ov/h; setfattr -n user.x -v y ov/h
		check() { test "$(cat ov/f)" = 'low
more'; test "$(ls ov/gone)" = y; test "$(ls ov | tr '\n' ' ')" = 'f gone h hard moved '; test "$(cat ov/h)" = deep; test -d ov/moved/sub; test "$(getfattr --only-values -n user.x ov/h)" = y; }
		check; umount ov; try; check; umount ov
		getfattr -m - -d "$M/up/gone" 2>/dev/null | grep -q trusted.overlay.opaque
		! grep -rq overlay "$C"; ! getfattr -hRm - -d "$C" 2>/dev/null | grep -q overlay`)
}

// inotify sees what happens through the mount.
func TestInotify(t *testing.T) {
	m := newVolume(t)
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, m.dir, unix.IN_ALL_EVENTS); err != nil {
		t.Fatal(err)
	}
	m.run(`cd "$M"; echo x >a; mv a b; chmod 600 b; rm b; mkdir d; rmdir d`)
	buf := make([]byte, 1<<16)
	n, err := unix.Read(fd, buf)
	if err != nil {
		t.Fatal(err)
	}
	got := map[uint32]int{}
	for b := buf[:n]; len(b) > 0; {
		mask := uint32(b[4]) | uint32(b[5])<<8 | uint32(b[6])<<16 | uint32(b[7])<<24
		got[mask&unix.IN_ALL_EVENTS]++
		b = b[16+int(b[12]):]
	}
	for name, c := range map[string]struct {
		mask uint32
		n    int
	}{"create": {unix.IN_CREATE, 2}, "modify": {unix.IN_MODIFY, 1},
		"close_write": {unix.IN_CLOSE_WRITE, 1}, "moved_from": {unix.IN_MOVED_FROM, 1},
		"moved_to": {unix.IN_MOVED_TO, 1}, "attrib": {unix.IN_ATTRIB, 1}, "delete": {unix.IN_DELETE, 2}} {
		if got[c.mask] != c.n {
			t.Errorf("%d times %s, want %d", got[c.mask], name, c.n)
		}
	}
}

// A large directory lists each entry that stays once, while others come and go,
// and from any position again.
func TestLargeDirectory(t *testing.T) {
	m := newVolume(t)
	const n = 100_000
	dir := m.path("d")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range n { // by link: what counts is the directory
		name := filepath.Join(dir, fmt.Sprint("stays", i))
		if i%20000 == 0 {
			write(t, filepath.Join(m.dir, fmt.Sprint("f", i)), nil)
		}
		if err := os.Link(filepath.Join(m.dir, fmt.Sprint("f", i/20000*20000)), name); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			p := filepath.Join(dir, fmt.Sprint("goes", i%500))
			os.WriteFile(p, nil, 0o644)
			os.Remove(p)
		}
	}()
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	seen := map[string]int{}
	buf := make([]byte, 32<<10)
	type place struct {
		off  int64
		next string
	}
	var places []place
	var off int64
	for {
		k, err := unix.Getdents(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if k == 0 {
			break
		}
		for b := buf[:k]; len(b) > 0; {
			size := int(b[16]) | int(b[17])<<8
			name := string(b[19:size])
			name, _, _ = strings.Cut(name, "\x00")
			if strings.HasPrefix(name, "stays") {
				if seen[name]++; len(seen)%5000 == 0 {
					places = append(places, place{off, name})
				}
			}
			off = 0
			for i := range 8 {
				off |= int64(b[8+i]) << (8 * i)
			}
			b = b[size:]
		}
	}
	close(stop)
	<-done
	if len(seen) != n {
		t.Errorf("%d of %d entries", len(seen), n)
	}
	for name, k := range seen {
		if k != 1 {
			t.Errorf("%s %d times", name, k)
		}
	}
	for _, p := range places {
		if _, err := unix.Seek(fd, p.off, 0); err != nil {
			t.Fatal(err)
		}
		k, err := unix.Getdents(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(buf[:k], []byte(p.next+"\x00")) {
			t.Errorf("%s is not where it was", p.next)
		}
	}
	if kib := rss(t, m.pid()); kib > 250<<10 && !raceEnabled {
		t.Errorf("the daemon has %d KiB", kib)
	}
}

// Sizes and times do not move by themselves.
func TestTimesStay(t *testing.T) {
	needRoot(t)
	needTool(t, "git")
	m := newVolume(t)
	list := `(cd "$M/t" && find . -type f -printf '%P %s %T@\n' | sort)`
	m.run(`mkdir "$M/t"; cd "$M/t"; for i in $(seq 2000); do head -c $((i * 7)) /dev/zero >f$i; done; ` + list + ` >"$B/before"
		git init -q .; git add .; git commit -qm x; git update-index -q --refresh`)
	for _, when := range []string{"true", "sync; echo 3 >/proc/sys/vm/drop_caches",
		"sleep 6; echo 3 >/proc/sys/vm/drop_caches", "remount"} {
		if when == "remount" {
			m.remount()
		} else {
			m.run(when)
		}
		m.run(list + ` | grep -v '^.git/' | diff "$B/before" - >"$B/diff" || { head -5 "$B/diff"; exit 1; }
			test -z "$(git -C "$M/t" status --porcelain)"`)
	}
}

// remount changes what it changes elsewhere.
func TestRemountOptions(t *testing.T) {
	needRoot(t)
	m := newVolume(t, "--allow-other", "-o", "suid,dev,exec")
	m.run(`cd "$M"; echo x >f; grep " $M " /proc/self/mounts | grep -qv 'nosuid\|nodev'`)
	m.kmsfs("mount", "-o", "remount,ro,noexec", m.cipher, m.dir)
	m.run(`cd "$M"; grep " $M fuse.kmsfs ro,noexec" /proc/self/mounts >/dev/null; ! (echo y >f) 2>/dev/null; test "$(cat f)" = x`)
	// As mount(8) gives back what it finds in /proc/mounts.
	m.kmsfs("mount", "-o",
		"noexec,noatime,remount,rw,nosuid,user_id=0,group_id=0,default_permissions,allow_other,max_read=1048576", m.cipher, m.dir)
	m.run(`cd "$M"; grep " $M fuse.kmsfs rw,nosuid,noexec,noatime" /proc/self/mounts >/dev/null; echo y >f`)
	m.umount()
	m.options = append(m.options, "--read-only")
	m.mount()
	if out, err := m.try("mount", "-o", "remount,rw", m.cipher, m.dir); err == nil ||
		!strings.Contains(out, "mounted read-only") {
		t.Errorf("%v: %s", err, out)
	}
	m.run(`test "$(cat "$M/f")" = y`)
}
