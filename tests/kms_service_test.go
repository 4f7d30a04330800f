package tests

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/keystore/keystoretest"
)

// Profile, Region and role come from flags, or from mount options where there is no
// environment.
func TestAWSOptions(t *testing.T) {
	const role = "arn:aws:iam::111122223333:role/kmsfs"
	v := newKMSVolume(t)
	write(t, v.path("f"), []byte("content"))
	v.umount()
	config := filepath.Join(v.base, "config.aws")
	write(t, config,
		[]byte("[profile there]\naws_access_key_id=AKIDPROFILE\naws_secret_access_key=s\nregion=eu-west-3\n"))
	v.env = append(v.env, "AWS_CONFIG_FILE="+config, "AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY=",
		"AWS_REGION=", "AWS_DEFAULT_REGION=")
	for _, options := range [][]string{
		{"--aws-profile", "there", "--aws-region", keystoretest.Region, "--aws-role-arn", role,
			"--key", "alias/k"},
		{"-o", "key=alias/k,aws_profile=there,aws_region=" + keystoretest.Region + ",aws_role_arn=" + role},
	} {
		v.srv.Refuse("AKIDPROFILE", "") // who assumes the role is the profile, who decrypts is not
		roles := v.srv.Calls("AssumeRole")
		v.options = options
		v.mount()
		v.srv.Refuse("AKIDPROFILE", "AccessDeniedException")
		want(t, v.path("f"), []byte("content"))
		if n := v.srv.Calls("AssumeRole") - roles; n == 0 {
			t.Errorf("%s: the role was not assumed", options)
		}
		v.umount()
	}
	if agents := strings.Join(v.srv.Agents(), "\n"); !strings.Contains(agents, "session kmsfs-") ||
		!strings.Contains(agents, "region "+keystoretest.Region) ||
		strings.Contains(agents, "region eu-west-3") {
		t.Errorf("no session is named after the machine, or another Region was called: %s", agents)
	}
	v.options = []string{"--aws-profile", "nowhere"}
	if out, err := v.try(append(append([]string{"mount"}, v.options...), v.cipher,
		v.dir)...); err == nil || !strings.Contains(out, "nowhere") {
		t.Errorf("a profile that is not there: %v, %s", err, out)
	}
}

// SIGHUP loads credentials again.
func TestHangup(t *testing.T) {
	v := newKMSVolume(t, "--audit", "strict")
	v.faults = true
	write(t, v.path("f"), []byte("content"))
	v.umount()
	creds := filepath.Join(v.base, "credentials")
	put := func(id string) {
		write(t, creds,
			fmt.Appendf(nil, "[default]\naws_access_key_id=%s\naws_secret_access_key=secret\n", id))
	}
	put("AKIDTEST")
	v.env = append(v.env, "AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY=",
		"AWS_SHARED_CREDENTIALS_FILE="+creds)
	v.mount()
	for _, id := range []string{"AKIDTEST", "AKIDOLD"} {
		v.srv.Refuse(id, "ExpiredTokenException")
	}
	put("AKIDOLD")
	if err := readErr(v.path("f"), syscall.EKEYEXPIRED)(); err != nil {
		t.Error(err)
	}
	refused := time.Now()
	put("AKIDNEW")
	if err := syscall.Kill(v.pid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "after SIGHUP", readErr(v.path("f"), nil))
	if d := time.Since(refused); d > 9*time.Second { // after 10 s it looks again by itself
		t.Errorf("SIGHUP did nothing for %v", d)
	}
}

// What no program sees: a clock that is wrong and jumps, answers without a key.
// What one does: an answer for another key, or with a key of another length, as one
// errno and one line of the log.
func TestOddAnswers(t *testing.T) {
	v := newKMSVolume(t, "--audit", "strict")
	for i := range 8 {
		write(t, v.path(fmt.Sprint(i)), []byte("content"))
	}
	v.remount()
	for i, ahead := range []time.Duration{10 * time.Minute, 0, 10 * time.Minute, -10 * time.Minute} {
		v.srv.SetClock(ahead)
		want(t, v.path(fmt.Sprint(i)), []byte("content"))
	}
	v.srv.SetClock(0)
	empty := 3
	v.srv.Fail(func(string) *keystoretest.Failure {
		if empty--; empty >= 0 {
			return &keystoretest.Failure{Body: "{}"}
		}
		return nil
	})
	want(t, v.path("4"), []byte("content"))
	for i, body := range map[int]string{
		5: `{"KeyId":"arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab","Plaintext":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`,
		6: fmt.Sprintf(`{"KeyId":%q,"Plaintext":"AAAA"}`, v.arn),
	} {
		v.faults = true
		before := strings.Count(v.log(), "\n")
		v.srv.Fail(func(op string) *keystoretest.Failure { return &keystoretest.Failure{Body: body} })
		for range 3 {
			if err := readErr(v.path(fmt.Sprint(i)), syscall.EIO)(); err != nil {
				t.Errorf("%s: %v", body, err)
			}
		}
		v.srv.Fail(nil)
		if n := strings.Count(v.log(), "\n") - before; n != 1 {
			t.Errorf("%d lines in the log:\n%s", n, v.log())
		}
		want(t, v.path(fmt.Sprint(i)), []byte("content"))
	}
}

// A recipient that could not be had when a file was made lacks in it; fsck says so.
func TestMissingRecipient(t *testing.T) {
	v := newKMSVolume(t)
	v.umount()
	v.run(`rm -rf "$C"; mkdir "$C"`)
	second := v.srv.AddKey("alias/second")
	v.kmsfs("init", "--key", "alias/k", "--key", "alias/second", v.cipher)
	v.mount()
	v.faults = true
	write(t, v.path("both"), []byte("content"))
	v.umount()
	if out, err := v.try("fsck", v.cipher); err != nil || strings.Contains(out, "missing") {
		t.Errorf("fsck of a directory with both: %v\n%s", err, out)
	}
	v.mount()
	v.srv.SetState(second, "Disabled")
	for i := range 200 { // more than are made ahead
		write(t, v.path(fmt.Sprint("one", i)), []byte("content"))
	}
	if n := strings.Count(v.log(), "ERROR"); n == 0 || n > 3 {
		t.Errorf("%d lines in the log:\n%s", n, v.log())
	}
	v.umount()
	out, err := v.try("fsck", v.cipher)
	if n := strings.Count(out, "recipient aws-kms:"+second+" is missing"); err != nil || n < 100 ||
		n > 200 {
		t.Errorf("fsck says it of %d files, %v", n, err)
	}
	v.mount()
	want(t, v.path("one199"), []byte("content"))
}

// stats has the dollars, also in JSON.
func TestStatsDollars(t *testing.T) {
	v := newKMSVolume(t)
	for i := range 100 {
		write(t, v.path(fmt.Sprint(i)), []byte("content"))
	}
	var one, two struct {
		Cost    float64 `json:"cost_dollars"`
		Monthly float64 `json:"cost_dollars_a_month"`
		Calls   []struct{ Count float64 }
	}
	if err := json.Unmarshal([]byte(v.kmsfs("stats", "--json", v.dir)), &one); err != nil {
		t.Fatal(err)
	}
	calls := 0.0
	for _, c := range one.Calls {
		calls += c.Count
	}
	if calls < 100 || one.Cost < calls*2.9e-6 || one.Cost > calls*3.1e-6 ||
		one.Monthly < 700*one.Cost || one.Monthly > 750*one.Cost {
		t.Errorf("%v calls cost $%v, $%v a month", calls, one.Cost, one.Monthly)
	}
	if err := json.Unmarshal([]byte(v.kmsfs("stats", "--json", "--trails", "1", v.dir)),
		&two); err != nil || two.Cost < 7*one.Cost {
		t.Errorf("with a trail: $%v, %v", two.Cost, err)
	}
	if out := v.kmsfs("stats", v.dir); !strings.Contains(out, "a month") {
		t.Error(out)
	}
}

// The daemon writes no core dump.
func TestNoCoreDump(t *testing.T) {
	v := newKMSVolume(t)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", v.pid()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); strings.HasPrefix(line, "Max core file size") &&
			(f[4] != "0" || f[5] != "0") {
			t.Error(line)
		}
	}
}

// A user who is asked before a key is taken away, and says no, keeps it.
func TestKeyQuestionOnTerminal(t *testing.T) {
	v := newKMSVolume(t)
	for _, args := range [][]string{{"key", "disable", "alias/k"},
		{"key", "schedule-deletion", "alias/k", "--days", "7"}} {
		x := v.onTerminal(args...)
		x.expect("[yes/no] ", "no\n")
		if code, shown := x.end(); code == 0 || !strings.Contains(shown, "not done") {
			t.Errorf("%s: exit %d, %q", args, code, shown)
		}
	}
	if out := v.kmsfs("key", "show", "alias/k"); !strings.Contains(out, `"Enabled"`) ||
		!strings.Contains(out, "depends on it") {
		t.Error(out)
	}
	x := v.onTerminal("key", "disable", v.arn)
	x.expect("[yes/no] ", "yes\n")
	if code, shown := x.end(); code != 0 || !strings.Contains(shown, "is disabled") {
		t.Errorf("yes: exit %d, %q", code, shown)
	}
	v.kmsfs("key", "enable", v.arn)
}

// Root is told of the volumes of other users too, wherever they have their homes.
func TestKeyOfOtherUsers(t *testing.T) {
	needRoot(t)
	needTool(t, "unshare")
	v := newKMSVolume(t)
	c := exec.Command("unshare", "-m", "bash", "-c", `set -e
		mount -t tmpfs none /home; mount -t tmpfs none /srv; cp /etc/passwd "$B/passwd"
		echo "keeper:x:54321:54321::/srv/keeper:/bin/sh" >>"$B/passwd"; mount --bind "$B/passwd" /etc/passwd
		for h in /home/eve /srv/keeper; do mkdir -p $h/.local/state/kmsfs; done
		mv "$B"/state/kmsfs/*.json /home/eve/.local/state/kmsfs; "$K" key show alias/k
		mv /home/eve/.local/state/kmsfs/*.json /srv/keeper/.local/state/kmsfs; "$K" key show alias/k`)
	c.Env = append(v.env, "B="+v.base, "K="+binary)
	if out, err := c.CombinedOutput(); err != nil || strings.Count(string(out), "depends on it") != 2 {
		t.Errorf("%v: %s", err, out)
	}
}

// A signal that the program handles does not end an open that waits for KMS; one
// that kills it does.
func TestSignalsWhileWaiting(t *testing.T) {
	v := newKMSVolume(t)
	for _, name := range []string{"a", "b"} {
		write(t, v.path(name), []byte("content"))
	}
	v.remount()
	v.srv.SetLatency(time.Second)
	c := make(chan os.Signal, 99)
	signal.Notify(c, syscall.SIGUSR1)
	defer signal.Stop(c)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid, begun := unix.Gettid(), time.Now()
	go func() {
		for range 5 {
			time.Sleep(100 * time.Millisecond)
			unix.Tgkill(os.Getpid(), tid, unix.SIGUSR1)
		}
	}()
	fd, err := unix.Open(v.path("a"), unix.O_RDONLY, 0)
	if err != nil || time.Since(begun) < time.Second {
		t.Errorf("open, with signals: %v, after %v", err, time.Since(begun))
	}
	unix.Close(fd)
	select {
	case <-c:
	case <-time.After(10 * time.Second):
		t.Error("no signal came")
	}
	// It is told of the first signal alone.
	v.srv.Fail(func(string) *keystoretest.Failure { return &keystoretest.Failure{Hang: true} })
	cat := exec.Command("sh", "-c", `trap : USR1; exec 3<"$1"`, "sh", v.path("b"))
	if err := cat.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	cat.Process.Signal(syscall.SIGUSR1)
	time.Sleep(300 * time.Millisecond)
	begun = time.Now()
	cat.Process.Kill()
	cat.Wait()
	if d := time.Since(begun); d > 10*time.Second { // its deadline is 15 s
		t.Errorf("it was gone %v after it was killed", d)
	}
	v.srv.Fail(nil)
	want(t, v.path("b"), []byte("content"))
}

// lock ends what waits for KMS, and then everything is refused, also what the kernel
// knew.
func TestLockEndsWaiting(t *testing.T) {
	v := newKMSVolume(t)
	v.run(`mkdir "$M/d"; echo x >"$M/d/f"; echo x >"$M/g"`)
	v.remount()
	v.run(`ls -l "$M/d" >/dev/null; stat "$M/d" "$M/g" >/dev/null`)
	v.srv.Fail(func(string) *keystoretest.Failure { return &keystoretest.Failure{Hang: true} })
	got := make(chan error, 2)
	go func() { got <- readErr(v.path("g"), syscall.EKEYEXPIRED)() }()
	go func() {
		for i := 0; ; i++ { // more than are made ahead
			f, err := os.Create(v.path(fmt.Sprint("new", i)))
			if err != nil {
				if !errors.Is(err, syscall.EKEYEXPIRED) {
					got <- err
				} else {
					got <- nil
				}
				return
			}
			f.WriteString("x")
			f.Close()
		}
	}()
	time.Sleep(500 * time.Millisecond)
	begun := time.Now()
	v.kmsfs("lock", v.dir)
	for range 2 {
		if err := <-got; err != nil {
			t.Error("who waited:", err)
		}
	}
	if d := time.Since(begun); d > 10*time.Second { // their deadline is 15 s
		t.Errorf("it took %v", d)
	}
	for what, err := range map[string]error{"stat of a file": statErr(v.path("g")),
		"of a directory": statErr(v.path("d")), "a listing": listErr(v.path("d"))} {
		if !errors.Is(err, syscall.EKEYEXPIRED) {
			t.Errorf("%s, locked: %v", what, err)
		}
	}
	v.srv.Fail(nil)
	v.kmsfs("unlock", v.dir)
	want(t, v.path("d/f"), []byte("x\n"))
	want(t, v.path("g"), []byte("x\n"))
}

// A reload that finds no credentials fails and says why; the mount keeps those that it has.
// Relative paths mean the same after the daemon has left the directory.
func TestReloadKeepsGoodCredentials(t *testing.T) {
	v := newKMSVolume(t, "--key-grace", "0", "--key-max-age", "2s")
	v.faults = true
	write(t, v.path("f"), []byte("content"))
	v.umount()
	creds := filepath.Join(v.base, "credentials")
	write(t, creds, []byte("[default]\naws_access_key_id=AKIDTEST\naws_secret_access_key=secret\n"))
	v.env = append(v.env, "AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY=",
		"AWS_SHARED_CREDENTIALS_FILE=credentials", "AWS_EC2_METADATA_DISABLED=true")
	v.run(`cd $B && ` + binary + ` mount --key-grace 0 --key-max-age 2s cipher mnt`)
	want(t, v.path("f"), []byte("content"))
	if err := os.Rename(creds, creds+".away"); err != nil {
		t.Fatal(err)
	}
	if out, err := v.try("reload", v.dir); err == nil ||
		!strings.Contains(out, "the old credentials stay: ") ||
		!strings.Contains(out, "none are configured") {
		t.Errorf("reload: %v, %s", err, out)
	}
	time.Sleep(4 * time.Second)
	want(t, v.path("f"), []byte("content"))
	if err := os.Rename(creds+".away", creds); err != nil {
		t.Fatal(err)
	}
	v.kmsfs("reload", v.dir)
	want(t, v.path("f"), []byte("content"))
	if log := v.log(); !strings.Contains(log, "could not be loaded again") ||
		!strings.Contains(log, "were loaded again") {
		t.Errorf("the log does not tell of the reloads:\n%s", log)
	}
}
