package tests

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// release makes a release of the working tree with the version 1.2.3 and returns the directory.
// In CI it has one system for restoring only, since each takes a minute.
func release(t *testing.T, tree string, env ...string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "dist")
	c := exec.Command("sh", filepath.Join(tree, "packaging", "release.sh"), out)
	c.Env = append(append(os.Environ(), "VERSION=v1.2.3", "SOURCE_DATE_EPOCH=1700000000", "RESTORE=windows/amd64"), env...)
	if b, err := c.CombinedOutput(); err != nil {
		t.Fatalf("release: %v\n%s", err, b)
	}
	return out
}

// A release has everything for each architecture, is the same when it is built elsewhere, and its
// packages are installed, used and removed in a system of their own.
func TestRelease(t *testing.T) {
	needRoot(t)
	needFUSE(t)
	needTool(t, "unshare", "dpkg", "rpm", "rsync", "sha256sum", "qemu-aarch64")
	tree, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	dist := release(t, tree)
	var names []string
	entries, err := os.ReadDir(dist)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	wanted := []string{"SHA256SUMS",
		"kmsfs-1.2.3-1.aarch64.rpm", "kmsfs-1.2.3-1.x86_64.rpm", "kmsfs_1.2.3_amd64.deb", "kmsfs_1.2.3_arm64.deb",
		"kmsfs-1.2.3-linux-amd64", "kmsfs-1.2.3-linux-amd64.cdx.json", "kmsfs-1.2.3-linux-arm64",
		"kmsfs-1.2.3-linux-arm64.cdx.json", "kmsfs-1.2.3-windows-amd64.exe", "kmsfs-1.2.3-windows-amd64.exe.cdx.json"}
	for _, w := range wanted {
		if !slices.Contains(names, w) {
			t.Errorf("the release lacks %s: %q", w, names)
		}
	}
	sh := func(script string, env ...string) string {
		t.Helper()
		c := exec.Command("unshare", "-m", "bash", "-euc", script)
		c.Dir, c.Env = dist, append(os.Environ(), env...)
		b, err := c.CombinedOutput()
		if err != nil {
			t.Errorf("%v\n%s", err, b)
		}
		return string(b)
	}
	sh("sha256sum --quiet -c SHA256SUMS")
	for name, says := range map[string]string{"kmsfs-1.2.3-linux-amd64.cdx.json": `"CycloneDX"`,
		"kmsfs-1.2.3-linux-arm64.cdx.json": "github.com/hanwen/go-fuse/v2"} {
		if b, err := os.ReadFile(filepath.Join(dist, name)); err != nil || !strings.Contains(string(b), says) {
			t.Errorf("%s: no %s, %v", name, says, err)
		}
	}

	t.Run("arm64", func(t *testing.T) {
		out := sh(`K="qemu-aarch64 $PWD/kmsfs-1.2.3-linux-arm64"; cd "$B"; echo text >a
			$K version; $K encrypt --key local:k a b; $K decrypt --key local:k b -`, "B="+t.TempDir())
		if !strings.Contains(out, "kmsfs 1.2.3,") || !strings.Contains(out, "linux/arm64") || !strings.HasSuffix(out, "\ntext\n") {
			t.Errorf("%s", out)
		}
	})

	t.Run("reproducible", func(t *testing.T) {
		copied := t.TempDir()
		sh(`rsync -a --exclude .git --exclude bin --exclude dist --exclude .venv "$T/" "$C/"`, "T="+tree, "C="+copied)
		// The compiler is tried in soak only: to compile everything again takes minutes.
		archs, flags := runtime.GOARCH, ""
		if os.Getenv("KMSFS_SOAK") != "" {
			archs, flags = "amd64 arm64", "-a"
		}
		again := release(t, copied, "ARCHS="+archs, "RESTORE=", "BUILDFLAGS="+flags, "TZ=Asia/Tokyo", "LC_ALL=C")
		os.Remove(filepath.Join(again, "SHA256SUMS")) // it has both
		if out := sh(`cd "$A"; for f in *; do cmp "$f" "$D/$f"; done; ls | wc -l`, "A="+again, "D="+dist); strings.TrimSpace(out) !=
			map[int]string{1: "4", 2: "8"}[len(strings.Fields(archs))] {
			t.Errorf("%s", out)
		}
	})

	for _, p := range []struct{ kind, pkg, install, remove string }{
		{"deb", "kmsfs_1.2.3_amd64.deb", "dpkg --force-unsafe-io --no-triggers -i /tmp/$P", "dpkg --no-triggers -r kmsfs"},
		{"rpm", "kmsfs-1.2.3-1.x86_64.rpm", "rpm -i --nodeps --force-debian /tmp/$P", "rpm -e kmsfs"},
	} {
		t.Run(p.kind, func(t *testing.T) {
			if runtime.GOARCH != "amd64" {
				t.Skip("the package that is tried is for amd64")
			}
			// The system's own tree below, and what is changed in memory.
			out := sh(`
				mount -t tmpfs t "$B"; mkdir "$B"/up "$B"/work "$B"/root; R=$B/root
				mount -t overlay o -o lowerdir=/,upperdir="$B/up",workdir="$B/work" "$R"
				mount --rbind /dev "$R/dev"; mount -t proc p "$R/proc"; mount -t tmpfs t "$R/tmp"
				cp "$D/$P" "$R/tmp"
				chroot "$R" bash -euxc "$SCRIPT" 2>&1`, "B="+t.TempDir(), "D="+dist, "P="+p.pkg,
				"HOME=/root", "XDG_STATE_HOME=", "XDG_CONFIG_HOME=", "XDG_RUNTIME_DIR=",
				"INSTALL="+p.install, "REMOVE="+p.remove, "SCRIPT="+packageScript)
			if !strings.HasSuffix(out, "\nall done\n") {
				t.Errorf("%s", out)
			}
		})
	}
}

// packageScript installs $P, uses it, removes it while it is in use, and puts it back.
const packageScript = `
	! command -v kmsfs
	eval $INSTALL
	kmsfs version | grep -q '^kmsfs 1.2.3,'
	test -x /sbin/mount.fuse.kmsfs
	test "$(stat -c %a /usr/share/doc/kmsfs /usr/share/doc/kmsfs/README.md | xargs)" = "755 644"
	zcat /usr/share/man/man1/kmsfs-mount.1.gz | grep -q '^.TH "KMSFS-MOUNT" "1" "Nov 2023" "kmsfs 1.2.3"'
	zcat /usr/share/man/man8/mount.fuse.kmsfs.8.gz | grep -q KMSFS-MOUNT
	bash -n /usr/share/bash-completion/completions/kmsfs
	! command -v systemd-analyze || systemd-analyze verify /usr/lib/systemd/system/kmsfs@.service
	mkdir /srv/c /srv/p
	kmsfs init /srv/c
	echo '/srv/c /srv/p fuse.kmsfs defaults 0 0' >>/etc/fstab
	mount /srv/p
	echo hello >/srv/p/f
	eval $REMOVE >/tmp/removed 2>&1
	grep 'these mounts go on' /tmp/removed
	grep '^  /srv/p$' /tmp/removed
	test ! -e /usr/bin/kmsfs -a ! -e /usr/share/doc/kmsfs -a ! -e /usr/share/man/man1/kmsfs.1.gz
	test "$(cat /srv/p/f)" = hello
	echo more >>/srv/p/f
	umount /srv/p
	eval $INSTALL
	kmsfs fsck /srv/c
	mount /srv/p
	test "$(cat /srv/p/f | xargs)" = 'hello more'
	umount /srv/p
	eval $REMOVE
	echo all done
`
