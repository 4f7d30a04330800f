package tests

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Several users: owners, umask, setgid directories, and setuid that goes with a
// foreign write.
func TestSeveralUsers(t *testing.T) {
	needRoot(t)
	needTool(t, "setpriv")
	base, err := os.MkdirTemp("", "kmsfs-users-") // where others may look in
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	if err := os.Chmod(base, 0o755); err != nil {
		t.Fatal(err)
	}
	m := newVolumeIn(t, base, "--allow-other")
	m.run(`cd "$M"; chmod 755 .; mkdir -m 1777 tmp; mkdir -m 2777 shared; chgrp 4321 shared; chmod 2777 shared
		as() { setpriv --reuid "$1" --regid "$1" --clear-groups bash -c "$2"; }
		as 1234 "umask 027; echo x >tmp/mine; mkdir tmp/dir; echo y >shared/f"
		test "$(stat -c %u:%g:%a tmp/mine)" = 1234:1234:640; test "$(stat -c %a tmp/dir)" = 750; test "$(stat -c %g shared/f)" = 4321
		! as 1235 "cat tmp/mine" 2>/dev/null; ! as 1235 "rm tmp/mine" 2>/dev/null; ! as 1235 "echo z >>tmp/mine" 2>/dev/null
		echo s >tmp/suid; chown 1234 tmp/suid; chmod 4777 tmp/suid; as 1235 "echo more >>tmp/suid"; test "$(stat -c %a tmp/suid)" = 777
		chmod 4777 tmp/suid; as 1235 "truncate -s 1 tmp/suid"; test "$(stat -c %a tmp/suid)" = 777`)
}

// A user without privileges: fusermount3 mounts, and files of the user's own
// that their mode does not let their owner read or write are repaired all the same.
func TestUnprivileged(t *testing.T) {
	needRoot(t)
	needTool(t, "setpriv", "unshare", "fusermount3")
	base, err := os.MkdirTemp("", "kmsfs-user-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	script := `set -euo pipefail; cd "$B"; chmod 755 .; cp "$K" kmsfs; chmod 755 kmsfs
		# a device that everybody may open, as distributions have it, for this test alone
		mknod fuse c 10 229; chmod 666 fuse; mount --bind fuse /dev/fuse
		mkdir home; chown 1:1 home
		cat >home/script <<'S'
			set -euo pipefail; cd "$HOME"; mkdir cipher mnt; K=../kmsfs
			trap '$K umount mnt 2>/dev/null || fusermount3 -uz mnt 2>/dev/null || true' EXIT
			$K init cipher; $K mount cipher mnt
			# the daemon's memory is closed, to its own user too
			pid=$(cut -d' ' -f1 .local/state/kmsfs/mounts/*); test -d /proc/$pid; for f in mem environ maps; do
				(exec 9</proc/$$/$f); ! (exec 9</proc/$pid/$f) 2>/dev/null || { echo "/proc/PID/$f is open"; exit 1; }; done
			echo x >mnt/f; cat mnt/f; mkdir mnt/d; mv mnt/f mnt/d/g; test "$(stat -c %u mnt/d/g)" = 1
			echo secret >mnt/ro; chmod 444 mnt/ro; ! (echo y >>mnt/ro) 2>/dev/null; test "$(cat mnt/ro)" = secret
			echo secret >mnt/wo; chmod 200 mnt/wo; ! cat mnt/wo 2>/dev/null; printf more >>mnt/wo
			echo secret >mnt/no; chmod 000 mnt/no; ! cat mnt/no 2>/dev/null; ! (echo y >>mnt/no) 2>/dev/null
			mkdir mnt/shut; chmod 500 mnt/shut; ! touch mnt/shut/x 2>/dev/null; chmod 755 mnt/shut; rmdir mnt/shut
			mkdir mnt/dark mnt/full; echo x >mnt/full/x; chmod 000 mnt/dark mnt/full; mv mnt/dark mnt/darker; ! ls mnt/full 2>/dev/null; ! rmdir mnt/full 2>/dev/null; mv mnt/full mnt/fuller
			rmdir mnt/darker; chmod 755 mnt/fuller; test "$(cat mnt/fuller/x)" = x; mkdir mnt/dark; echo y >mnt/dark/y; rm mnt/dark/y; chmod 000 mnt/dark; rmdir mnt/dark
			fallocate -l 100000 mnt/reserved; fallocate -p -o 0 -l 50000 mnt/reserved; cp --sparse=always mnt/reserved mnt/copy; cmp mnt/reserved mnt/copy; chattr +d mnt/copy 2>/dev/null || true; rm mnt/reserved mnt/copy
			# what is being written when the daemon dies
			exec 7>mnt/open; printf 'fsynced' >&7; sync mnt/open; printf ' and more' >&7; chmod 444 mnt/open
			kill -9 "$(cut -d' ' -f1 .local/state/kmsfs/mounts/*)"; exec 7>&- || true; sleep 0.3
			$K mount cipher mnt
			test "$(head -c 7 mnt/open)" = fsynced; test "$(stat -c %a mnt/open mnt/ro mnt/wo mnt/no | tr '\n' ' ')" = '444 444 200 0 '
			chmod 600 mnt/wo; test "$(cat mnt/wo)" = 'secret
more'
			$K umount mnt
			! ls -A cipher | grep kmsfs.mounted
			echo all well
S
		HOME=$B/home setpriv --reuid 1 --regid 1 --clear-groups bash home/script # fusermount3 wants a user with a name`
	c := exec.Command("unshare", "-m", "bash", "-c", script)
	c.Env = append(slices.DeleteFunc(os.Environ(),
		func(s string) bool { return strings.HasPrefix(s, "XDG_") }), "B="+base, "K="+binary)
	if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "all well") {
		logs, _ := filepath.Glob(filepath.Join(base, "home/.local/state/kmsfs/*.log"))
		for _, l := range logs {
			b, _ := os.ReadFile(l)
			t.Logf("%s", b)
		}
		t.Fatalf("%v\n%s", err, out)
	}
}

// Without /dev/fuse mount says so, in one line.
func TestNoDevice(t *testing.T) {
	needRoot(t)
	needTool(t, "unshare")
	base := t.TempDir()
	c := exec.Command("unshare", "-m", "bash", "-c",
		`cd "$B"; mkdir cipher mnt; "$K" init cipher >/dev/null && mount -t tmpfs none /dev && "$K" mount cipher mnt`)
	c.Env = append(os.Environ(), "B="+base, "K="+binary, "XDG_STATE_HOME="+base+"/state",
		"XDG_CONFIG_HOME="+base+"/config")
	out, err := c.CombinedOutput()
	if err == nil || !strings.HasPrefix(string(out), "kmsfs: error: /dev/fuse is missing") ||
		strings.Count(string(out), "\n") != 2 {
		t.Errorf("%v: %s", err, out)
	}
}

// Groups, sticky directories and ACLs, as the kernel checks them for the user,
// and the bits that go when somebody else writes: also of files that settle later.
func TestGroupsAndACLs(t *testing.T) {
	needRoot(t)
	needTool(t, "setpriv", "setfacl", "setcap", "getcap")
	base := openBase(t)
	m := newVolumeIn(t, base, "--allow-other", "-o", "suid")
	m.run(`cd "$M"; chmod 755 .
		as() { local u=$1 g=$2; shift 2; setpriv --reuid "$u" --regid "$u" --groups "$g" bash -c "$1"; }
		mode() { test "$(stat -c %a "$1")" = "$2" || { echo "$1 has mode $(stat -c %a "$1"), not $2"; exit 1; }; }
		# a supplementary group may write, enter a setgid directory, and keeps setgid there
		mkdir g; chgrp 4321 g; chmod 2770 g; as 1234 4321 "echo x >g/f; mkdir g/d; echo y >>g/f"
		test "$(stat -c %u:%g g/f)" = 1234:4321; test "$(stat -c %g:%a g/d)" = 4321:2755; ! as 1234 77 "echo x >>g/f" 2>/dev/null
		as 1234 4321 "chmod 2775 g/f"; mode g/f 2775
		echo x >own; chown 1234:4321 own; as 1234 77 "chmod 2755 own"; mode own 755 # not in the group: the bit does not stay
		as 1234 4321 "chmod 2755 own"; mode own 2755
		as 1234 77 "setfacl -m u:99:r own"; test "$(stat -c %A own | cut -c7)" != s # an ACL set by who is not in the group
		# sticky
		mkdir -m 1777 t; as 1234 77 "echo x >t/mine"; ! as 1235 77 "rm -f t/mine" 2>/dev/null; ! as 1235 77 "mv t/mine t/yours" 2>/dev/null; as 1234 77 "rm t/mine"
		# default ACLs are inherited, the umask is not applied then
		mkdir acl; setfacl -d -m u:1234:rwx,g::rx,o::- acl; (umask 077; echo x >acl/f; mkdir acl/d; mkfifo acl/p)
		getfacl -p acl/f | grep -q '^user:1234:rwx'; mode acl/f 660; getfacl -p acl/d | grep -q '^default:user:1234:rwx'; mode acl/p 660
		chmod 755 acl; as 1234 77 "echo y >>acl/f; cat acl/f >/dev/null"; ! as 1235 77 "cat acl/f" 2>/dev/null
		# what a foreign write, truncation or chown takes away: setuid, setgid, capabilities
		all() { echo s >$1; chown 1234:4321 $1; setcap cap_net_raw+ep $1; chmod 6777 $1; setcap cap_net_raw+ep $1; }
		for how in "echo more >>F" "truncate -s 1 F" "truncate -s 100 F" "fallocate -l 9999 F" "fallocate -p -l 1 F" "dd if=/dev/zero of=F bs=1 count=1 conv=notrunc status=none" ">F" \
			"dd if=/dev/zero of=F bs=4096 count=1 oflag=direct conv=notrunc status=none" "cp t.src F"; do
			rm -f t.src; echo src >t.src; all F; as 1235 77 "$how"; mode F 777; test -z "$(getcap F)" || { echo "$how leaves $(getcap F)"; exit 1; }; rm F
		done
		for how in "fallocate -l 9999 F" "fallocate -p -l 1 F"; do # and of who is in the group, setgid without execution stays
			all F; chmod 2766 F; as 1235 77 "$how"; mode F 766; chmod 2766 F; as 1235 4321 "$how"; mode F 2766; rm F
		done
		all F; chown 99 F; mode F 777; test -z "$(getcap F)"; rm F
		# and what stays: through settling, a remount, and the end of a truncation
		head -c 50000 /dev/urandom >S; sync S; truncate -s 20001 S; chown 1234 S; chmod 4755 S; setcap cap_net_raw+ep S; mode S 4755; sleep 5; mode S 4755; test -n "$(getcap S)"`)
	m.remount()
	m.run(`cd "$M"; test "$(stat -c %a S)" = 4755; test -n "$(getcap S)"; test "$(stat -c %a own)" = 755`)
}
