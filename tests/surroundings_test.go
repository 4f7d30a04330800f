package tests

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A mount in its surroundings: mount namespaces, symlinks, users of the mount, its log.

// inNamespace begins a shell in a mount namespace of its own; say runs a script in it and
// returns its output.
func inNamespace(m *mounted) (say func(script string) string) {
	m.t.Helper()
	needRoot(m.t)
	needTool(m.t, "unshare")
	c := exec.Command("unshare", "-m", "--propagation", "private", "bash")
	c.Env = append(m.env, "M="+m.dir, "B="+m.base, "K="+binary)
	in, err := c.StdinPipe()
	out := filepath.Join(m.base, fmt.Sprintf("out-%p", c))
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() {
		in.Close()
		c.Wait()
	})
	return func(script string) string {
		m.t.Helper()
		fmt.Fprintf(in,
			"{ %s\n} >%s.part 2>&1 </dev/null; echo \"rc=$?\" >>%s.part; mv %s.part %s\n", script,
			out, out, out, out)
		var b []byte
		for until := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			if b, err = os.ReadFile(out); err == nil {
				break
			}
			if time.Now().After(until) {
				m.t.Fatalf("no answer to %s", script)
			}
		}
		os.Remove(out)
		return string(b)
	}
}

// Two mount namespaces have two volumes at one path, and share the state and the runtime
// directory: each command reaches the mount that it sees.
func TestSamePathInTwoNamespaces(t *testing.T) {
	m := newVolume(t)
	m.umount()
	other := inNamespace(m)
	write(t, filepath.Join(m.base, "empty"), nil)
	if out := other(`"$K" init --key local:$B/k2 $(mkdir $B/c2 && echo $B/c2) && "$K" mount $B/c2 $M && echo theirs >$M/f`); !strings.Contains(out, "rc=0") {
		t.Fatal(out)
	}
	m.mount()
	write(t, m.path("f"), []byte("ours\n"))
	m.kmsfs("lock", m.dir)
	if b, err := os.ReadFile(m.path("f")); err == nil {
		t.Errorf("after lock our file reads %q", b)
	}
	if out := other("cat $M/f"); !strings.HasPrefix(out, "theirs\n") {
		t.Errorf("their volume was locked: %s", out)
	}
	if out := other(`"$K" stats $M; "$K" lock $M && "$K" unlock $M && cat $M/f`); !strings.Contains(out, "theirs") || strings.Contains(out, "The volume is locked") {
		t.Errorf("in the other namespace: %s", out)
	}
	if out := m.kmsfs("stats", m.dir); !strings.Contains(out, "The volume is locked") {
		t.Errorf("ours is not locked any more: %s", out)
	}
	m.kmsfs("unlock", m.dir)
	want(t, m.path("f"), []byte("ours\n"))
	m.umount()
	if out := other(`cat $M/f; "$K" umount $M`); !strings.Contains(out, "theirs") ||
		!strings.Contains(out, "rc=0") {
		t.Errorf("after our umount: %s", out)
	}
}

// A mount that another namespace still has is not waited for; the message names a process
// of it.
func TestUmountWhileAnotherNamespaceHasIt(t *testing.T) {
	m := newVolume(t)
	write(t, m.path("f"), []byte("kept"))
	other := inNamespace(m)
	pid := strings.Fields(other("echo $$"))[0]
	begun := time.Now()
	out := m.kmsfs("umount", m.dir)
	if took := time.Since(begun); took > 20*time.Second {
		t.Errorf("umount took %v", took)
	}
	if !strings.Contains(out, "still mounted in another mount namespace") ||
		!strings.Contains(out, "("+pid+")") {
		t.Errorf("umount says %q", out)
	}
	if out := other("cat $M/f"); !strings.HasPrefix(out, "kept") {
		t.Errorf("in the other namespace: %s", out)
	}
	if out, err := m.try("mount", m.cipher, m.dir); err == nil ||
		!strings.Contains(out, "is writing to this volume") {
		t.Errorf("a second mount: %v %s", err, out)
	}
	if out := other(`"$K" umount $M`); !strings.Contains(out, "rc=0") {
		t.Errorf("umount there: %s", out)
	}
	m.mount()
	want(t, m.path("f"), []byte("kept"))
}

// umount names a loop device and a filesystem below the mountpoint that keep a mount busy.
func TestUmountNamesWhatIsBusy(t *testing.T) {
	needRoot(t)
	needTool(t, "losetup")
	m := newVolume(t)
	m.run(`truncate -s 10M $M/img; mkdir $M/sub; mount -t tmpfs t $M/sub; losetup --show -f $M/img >$B/loop`)
	loop, _ := os.ReadFile(filepath.Join(m.base, "loop"))
	out, err := m.try("umount", m.dir)
	if err == nil || !strings.Contains(out, strings.TrimSpace(string(loop))) ||
		!strings.Contains(out, m.path("sub")) || !strings.Contains(out, "tmpfs") {
		t.Errorf("umount says %q (%v)", out, err)
	}
	m.run(`losetup -d $(cat $B/loop); umount $M/sub`)
	m.umount()
}

// A mountpoint can be named through symlinks, also while the volume is locked.
func TestMountpointThroughSymlinks(t *testing.T) {
	m := newVolume(t)
	m.run(`ln -s . $B/home; ln -s home/mnt $B/direct`)
	for _, name := range []string{"home/mnt", "direct", "home/home/direct", "mnt/"} {
		path := m.base + "/" + name
		m.kmsfs("lock", path)
		if out := m.kmsfs("stats", path); !strings.Contains(out, "The volume is locked") {
			t.Errorf("stats %s: %s", name, out)
		}
		m.kmsfs("unlock", path)
	}
	m.kmsfs("lock", m.dir)
	m.kmsfs("umount", filepath.Join(m.base, "direct"))
	m.mount()
	if out, err := m.try("lock", m.base); err == nil ||
		!strings.Contains(out, "no kmsfs volume is mounted there") {
		t.Errorf("a directory that is no mount: %v %s", err, out)
	}
	m.kill()
	m.mount()
}

// A daemon in the foreground goes on when the reader of its log goes, or does not read.
func TestLogWithoutReader(t *testing.T) {
	m := newVolume(t)
	m.faults = true
	m.umount()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(binary, "mount", "-f", m.cipher, m.dir)
	c.Env, c.Stderr = m.env, w
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	eventually(t, "the mount", func() error {
		if !isMount(m.dir) {
			return fmt.Errorf("it is not there")
		}
		return nil
	})
	write(t, m.path("f"), []byte("kept"))
	// More faults than a pipe holds lines of, while nobody reads.
	for i := range 2000 {
		write(t, filepath.Join(m.cipher, fmt.Sprintf("bad%060d", i)), nil)
	}
	faults := make(chan error, 1)
	go func() {
		_, err := os.ReadDir(m.dir)
		faults <- err
	}()
	select {
	case err := <-faults:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("a full log keeps the listing waiting")
		r.Close()
	}
	r.Close()
	for i := range 100 {
		write(t, filepath.Join(m.cipher, fmt.Sprintf("worse%060d", i)), nil)
	}
	if _, err := os.ReadDir(m.dir); err != nil {
		t.Error(err)
	}
	c.Process.Signal(unix.SIGHUP)
	want(t, m.path("f"), []byte("kept"))
	m.umount()
	if err := c.Wait(); err != nil {
		t.Error("the daemon:", err)
	}
}

// On a mount for one user the kernel does not know ACLs: the mode that stat shows follows them
// all the same, at once.
func TestACLShowsInMode(t *testing.T) {
	needTool(t, "setfacl")
	for _, options := range [][]string{nil, {"--allow-other"}} {
		m := newVolume(t, options...)
		m.run(`cd "$M"; : >f; chmod 600 f; stat f >/dev/null
			setfacl -m u:65534:rw f; test $(stat -c %a f) = 660; setfacl -m m::r f; test $(stat -c %a f) = 640
			setfacl --set u::rw,g::r,o::- f; test $(stat -c %a f) = 640; setfacl -m o::rwx f; test $(stat -c %a f) = 647
			mkdir d; stat d >/dev/null; setfacl -m u:65534:rwx,g::- d; test $(stat -c %A d) = drwxrwxr-x; chmod 700 d; getfacl -c d | grep -q mask::---`)
	}
}

// root's attributes of security.* that the kernel does not interpret are kept, encrypted, as
// Samba needs it for Windows ACLs.
func TestSecurityAttributes(t *testing.T) {
	needRoot(t)
	needTool(t, "setfattr", "getfattr")
	m := newVolume(t, "--allow-other")
	m.run(`cd "$M"; : >f; setfattr -n security.NTACL -v "a windows acl" f; test "$(getfattr --only-values -n security.NTACL f)" = "a windows acl"
		getfattr -d -m - f | grep -q security.NTACL
		! setfattr -n security.selinux -v x f 2>/dev/null; ! setfattr -n security.SMACK64EXEC -v x f 2>/dev/null
		! getfattr -d -m - $C/* 2>/dev/null | grep -q NTACL`)
	m.remount()
	m.run(`test "$(getfattr --only-values -n security.NTACL $M/f)" = "a windows acl"; setfattr -x security.NTACL $M/f`)
	if out := m.run(`getfattr -d -m - $M/f`); strings.Contains(out, "NTACL") {
		t.Errorf("it was not removed: %s", out)
	}
	m.umount()
	m.kmsfs("fsck", m.cipher)
}

// The time of a file does not move when the kernel forgets it, though the disk keeps whole
// seconds.
func TestCoarseTimes(t *testing.T) {
	base := openBase(t)
	disk := loopDisk(t, base, "60M", "mkfs.ext4", "-q", "-I", "128")
	m := newVolumeOn(t, base, disk)
	times := func() string {
		return m.run(`cd $M; stat -c '%n %.Y' * d/*`)
	}
	m.run(`cd $M; mkdir d; echo x >f; echo y >g; touch -d @1000000000.123456789 g; ln -s t s; : >d/a`)
	before := times()
	m.remount()
	if after := times(); before != after || !strings.Contains(before, "1000000000.000000000") {
		t.Errorf("before and after a remount:\n%s\n%s", before, after)
	}
}

// A copy that was made without its symlinks says so.
func TestCopyWithoutSymlinks(t *testing.T) {
	needTool(t, "rsync")
	m := newVolume(t)
	long := strings.Repeat("n", 200)
	m.run(`cd $M; echo x >short; echo x >` + long + `; ln -s short link`)
	m.umount()
	m.run(`rsync -r --no-links $C/ $B/copy/ 2>/dev/null; rsync -a $C/ $B/whole/`)
	out, err := m.try("fsck", filepath.Join(m.base, "copy"))
	if err == nil || !strings.Contains(out, "made without symlinks") ||
		!strings.Contains(out, "long entry is lost") {
		t.Errorf("fsck of the copy: %v\n%s", err, out)
	}
	m.kmsfs("fsck", filepath.Join(m.base, "whole"))
	b, err := os.ReadFile("../docs/backups.md")
	if err != nil || !bytes.Contains(b, []byte("symlinks")) || !bytes.Contains(b, []byte("--links")) {
		t.Error("docs/backups.md does not say what a backup must copy")
	}
}

// A write that was lost to a full disk can be made again, wherever it begins.
func TestRetryOfLostWrite(t *testing.T) {
	base := openBase(t)
	disk := loopDisk(t, base, "300M", "mkfs.ext4", "-q", "-m", "0")
	m := newVolumeOn(t, base, disk)
	m.faults = true
	f := open(t, m.path("f"), os.O_RDWR|os.O_CREATE)
	old, late := noise(40000), noise(3<<20)
	if _, err := f.Write(old); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	m.run(`fallocate -l $(( $(df --output=avail -B1 ` + disk + ` | tail -1) - 300000 )) ` + disk + `/fill`)
	if _, err := f.WriteAt(late, 40000); err == nil { // the kernel's cache takes it
		if err := f.Sync(); err == nil {
			t.Fatal("the disk was not full")
		}
	}
	if err := os.Remove(filepath.Join(disk, "fill")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 10)
	if _, err := f.ReadAt(b, 39980); err != nil || !bytes.Equal(b, old[39980:39990]) {
		t.Errorf("durable bytes: %v", err)
	}
	if _, err := f.WriteAt(late, 40000); err != nil {
		t.Fatalf("the write again: %v", err)
	}
	f.Sync() // the kernel may tell once more of the first time
	if err := f.Sync(); err != nil {
		t.Error("fsync:", err)
	}
	if err := f.Close(); err != nil {
		t.Error("close:", err)
	}
	m.remount()
	want(t, m.path("f"), append(old, late...))
}
