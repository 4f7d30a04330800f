package tests

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3" // cobra's manual pages bring it along
	"golang.org/x/sys/unix"
)

// podman runs podman with a store of its own.
type podman struct {
	t     *testing.T
	flags []string
}

func newPodman(t *testing.T) *podman {
	dir := shortDir(t)
	// What podman has in memory; an empty cache in /var/lib/containers stays.
	const locks = "/dev/shm/libpod_lock"
	if _, err := os.Lstat(locks); os.IsNotExist(err) {
		t.Cleanup(func() { os.Remove(locks) })
	}
	driver := "vfs"
	if err := exec.Command("unshare", "-m", "bash", "-ec", `cd "$0"; mkdir l u w m; mount -t overlay o -o lowerdir=l,upperdir=u,workdir=w m`,
		t.TempDir()).Run(); err == nil {
		driver = "overlay"
	}
	p := &podman{t, []string{"--runtime=runc", "--cgroup-manager=cgroupfs", "--events-backend=file",
		"--storage-driver=" + driver, "--root=" + filepath.Join(dir, "root"), "--runroot=" + filepath.Join(dir, "run"),
		"--tmpdir=" + filepath.Join(dir, "tmp")}}
	t.Cleanup(func() {
		p.try("rm", "--force", "--all", "--time=0")
		if out, err := p.try("system", "reset", "--force"); err != nil {
			t.Errorf("podman system reset: %v\n%s", err, out)
		}
		unix.Unmount(filepath.Join(dir, "root", driver), unix.MNT_DETACH) // if it is a mount
	})
	return p
}

// shortDir returns a directory whose path is short, as podman wants it for its store.
func shortDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "kmsfs-pod-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func (p *podman) try(args ...string) (string, error) {
	b, err := exec.Command("podman", append(p.flags, args...)...).CombinedOutput()
	return string(b), err
}

func (p *podman) do(args ...string) string {
	p.t.Helper()
	out, err := p.try(args...)
	if err != nil {
		p.t.Fatalf("podman %q: %v\n%s", args, err, out)
	}
	return out
}

// run runs the image with these flags, the words of each string.
func (p *podman) run(flags string, args ...string) (string, error) {
	f := strings.Fields("run --network=none --ulimit=nofile=1024:1024 --ulimit=nproc=1024:1024 " + flags)
	return p.try(append(append(f, "kmsfs-test"), args...)...)
}

// image builds the image from packaging/Dockerfile on a new system like this one, with this machine's
// Go.
func (p *podman) image() {
	p.t.Helper()
	sh := func(script string, env ...string) {
		p.t.Helper()
		c := exec.Command("bash", "-euo", "pipefail", "-c", script)
		c.Env = append(os.Environ(), env...)
		if b, err := c.CombinedOutput(); err != nil {
			p.t.Fatalf("%v\n%s", err, b)
		}
	}
	system := shortDir(p.t)
	sh(`. /etc/os-release
		debootstrap --variant=minbase --include=fuse3,ca-certificates "$VERSION_CODENAME" "$D"`, "D="+system)
	out, err := exec.Command("go", "env", "GOROOT", "GOMODCACHE", "GOCACHE", "GOVERSION").Output()
	v := strings.Fields(string(out))
	if err != nil || len(v) != 4 {
		p.t.Fatal(err, v)
	}
	tar := `tar -C "$D" -c . | podman $F import $C - ` // --change
	sh(tar+"kmsfs-test-base", "D="+system, "F="+strings.Join(p.flags, " "), "C=")
	sh(tar+"kmsfs-test-go", "D="+system, "F="+strings.Join(p.flags, " "),
		"C=--change=ENV=PATH=/go/bin:/usr/sbin:/usr/bin:/sbin:/bin --change=ENV=GOPROXY=off --change=ENV=GOFLAGS=-mod=mod --change=ENV=GOTOOLCHAIN=local")
	p.do("build", "--isolation=chroot", "--network=host", "--layers=false", "-v", v[0]+":/go:ro", "-v", v[1]+":/root/go/pkg/mod",
		"-v", v[2]+":/root/.cache/go-build", "--build-arg=GO_IMAGE=localhost/kmsfs-test-go",
		"--build-arg=BASE_IMAGE=localhost/kmsfs-test-base", "--build-arg=VERSION=v1.2.3",
		"-f", "../packaging/Dockerfile", "-t", "kmsfs-test", "..")
}

// sidecar returns the arguments of kmsfs in docs/deploy/kubernetes.yml, and where its volumes stand.
func sidecar(t *testing.T) (args []string, paths map[string]string) {
	b, err := os.ReadFile("../docs/deploy/kubernetes.yml")
	if err != nil {
		t.Fatal(err)
	}
	var pod struct {
		Spec struct {
			InitContainers []struct {
				Args         []string
				VolumeMounts []struct {
					Name      string
					MountPath string `yaml:"mountPath"`
				} `yaml:"volumeMounts"`
			} `yaml:"initContainers"`
		}
	}
	if err := yaml.Unmarshal(b, &pod); err != nil || len(pod.Spec.InitContainers) != 1 {
		t.Fatal(err, pod)
	}
	paths = map[string]string{}
	for _, m := range pod.Spec.InitContainers[0].VolumeMounts {
		paths[m.Name] = m.MountPath
	}
	return pod.Spec.InitContainers[0].Args, paths
}

// The image is built, and mounts a volume for another container, as a sidecar does, with no capability but
// SYS_ADMIN; and as a user other than root.
func TestContainers(t *testing.T) {
	needRoot(t)
	needFUSE(t)
	needTool(t, "podman", "runc", "debootstrap", "unshare")
	p := newPodman(t)
	p.image()
	if out, err := p.run("--rm", "version"); err != nil || !strings.HasPrefix(out, "kmsfs 1.2.3,") {
		t.Fatalf("%v: %s", err, out)
	}
	dir := t.TempDir()
	for _, d := range []string{"cipher", "state", "shared/plain"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	shared := filepath.Join(dir, "shared")
	for _, flags := range []uintptr{unix.MS_BIND, unix.MS_SHARED} {
		if err := unix.Mount(shared, shared, "", flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { unix.Unmount(shared, unix.MNT_DETACH) })
	args, paths := sidecar(t)
	volumes := fmt.Sprintf("-v %s/cipher:%s -v %s/state:%s", dir, paths["cipher"], dir, paths["state"])
	if out, err := p.run("--rm --cap-drop=all "+volumes, "init", paths["cipher"]); err != nil {
		t.Fatalf("init: %v\n%s", err, out)
	}
	var local []string // without AWS
	for _, a := range args {
		if !strings.HasPrefix(a, "--key=") {
			local = append(local, a)
		}
	}
	if len(local) != len(args)-1 {
		t.Fatalf("the sidecar has no --key: %q", args)
	}
	mount := "--device=/dev/fuse --cap-drop=all " + volumes
	for _, c := range []struct{ flags, says string }{
		{"--rm --cap-drop=all --cap-add=SYS_ADMIN " + volumes, "--device /dev/fuse"},
		{"--rm " + mount, "--cap-add SYS_ADMIN"},
		{"--rm --cap-add=SYS_ADMIN " + mount + " -v " + shared + "/plain:/shared/plain:rshared", "name a directory in it"},
	} {
		if out, err := p.run(c.flags+" -v "+shared+":"+paths["shared"], local...); err == nil || !strings.Contains(out, c.says) {
			t.Errorf("%s: %v, %s", c.flags, err, out)
		}
	}

	if out, err := p.run("-d --name=sidecar --cap-add=SYS_ADMIN "+mount+" -v "+shared+":"+paths["shared"]+":rshared", local...); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	eventually(t, "the mount of the sidecar", func() error {
		if !isMount(filepath.Join(shared, "plain")) {
			return errors.New(p.do("logs", "sidecar"))
		}
		return nil
	})
	out, err := p.run("--rm --user=4321 --cap-drop=all -v "+shared+":/data:rslave --entrypoint=/bin/sh", "-c",
		"cd /data/plain && id -u && cat f 2>&1; mkdir sub 2>&1; ls -ld .")
	if err != nil || !strings.Contains(out, "4321") || !strings.Contains(out, "No such file") || !strings.Contains(out, "Permission denied") {
		t.Errorf("another user in another container: %v, %s", err, out)
	}
	if out, err := p.run("--rm --cap-drop=all -v "+shared+":/data:rslave --entrypoint=/bin/sh", "-c",
		"cd /data/plain && echo content >f && ls"); err != nil || out != "f\n" {
		t.Errorf("another container: %v, %s", err, out)
	}
	p.do("stop", "--time=30", "sidecar")
	if code := strings.TrimSpace(p.do("inspect", "--format={{.State.ExitCode}}", "sidecar")); code != "0" {
		t.Errorf("the sidecar ended with %s: %s", code, p.do("logs", "sidecar"))
	}
	if isMount(filepath.Join(shared, "plain")) {
		t.Error("the mount is still there")
	}

	// A user other than root mounts by fusermount3. The device's mode is 0666 where udev made it.
	node := filepath.Join(dir, "fuse")
	if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(node, 0o666), exec.Command("chown", "-R", "10001:10001", dir+"/cipher", dir+"/state").Run()); err != nil {
		t.Fatal(err)
	}
	out, err = p.run("--rm --user=10001:10001 --cap-drop=all --cap-add=SYS_ADMIN --entrypoint=/bin/sh --device="+node+":/dev/fuse "+volumes,
		"-c", `mkdir /tmp/p; kmsfs mount /cipher /tmp/p && cat /tmp/p/f && echo more >>/tmp/p/f && kmsfs umount /tmp/p && kmsfs fsck /cipher`)
	if err != nil || !strings.Contains(out, "\ncontent\n") || !strings.Contains(out, "nothing is wrong") {
		t.Errorf("a user other than root: %v, %s", err, out)
	}
}
