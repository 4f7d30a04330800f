package tests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The log begins with all that a report of a fault needs to know, and with no secret.
func TestLogOfMount(t *testing.T) {
	m := newVolume(t, "-o", "noatime,metrics_addr=127.0.0.1:0", "--key-grace", "5m")
	log := m.log()
	keys, err := filepath.Glob(filepath.Join(m.base, "config", "kmsfs", "*.key"))
	if err != nil || len(keys) != 1 {
		t.Fatal(keys, err)
	}
	secret, err := os.ReadFile(keys[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []string{"msg=mounted ", " version=", " go=go1", " kernel=", " format=1 ", " recipients=local ", " names=encrypted ",
		" header=1024 ", " ciphertext=" + m.cipher, " mountpoint=" + m.dir, " backing=", " descriptors=", " option_key-grace=5m0s",
		" option_metrics-addr=127.0.0.1:0"} {
		if !strings.Contains(log+" ", w) {
			t.Errorf("no %q in the log:\n%s", w, log)
		}
	}
	if strings.Contains(log, string(secret)) || strings.Contains(log, keys[0]) || strings.Contains(log, "option_key=") {
		t.Errorf("a secret, or where it lies, is in the log:\n%s", log)
	}
	m.umount()
	m.options = []string{"--log-format", "json", "--key", "local:" + keys[0]}
	if err := os.Remove(logOf(t, m)); err != nil {
		t.Fatal(err)
	}
	m.mount()
	write(t, filepath.Join(m.cipher, "strange"), nil)
	os.ReadDir(m.dir)
	lines := strings.Split(strings.TrimSpace(m.log()), "\n")
	for i, says := range []string{"mounted", "an entry is not shown"} {
		var event map[string]any
		if err := json.Unmarshal([]byte(lines[min(i, len(lines)-1)]), &event); err != nil || !strings.Contains(fmt.Sprint(event["msg"]), says) {
			t.Errorf("not an event %q: %v\n%s", says, err, lines)
		}
	}
	if out, err := m.try("mount", "--log-format", "xml", m.cipher, m.dir); err == nil || !strings.Contains(out, `want "text" or "json"`) {
		t.Errorf("%v: %s", err, out)
	}
}

func logOf(t *testing.T, m *mounted) string {
	t.Helper()
	logs, err := filepath.Glob(filepath.Join(m.base, "state", "kmsfs", "*.log"))
	if err != nil || len(logs) != 1 {
		t.Fatal(logs, err)
	}
	return logs[0]
}

// Under systemd the journal gets fields; a journal that is not there gets lines.
func TestJournal(t *testing.T) {
	needRoot(t)
	needTool(t, "unshare")
	m := newVolume(t)
	m.umount()
	journal := filepath.Join(t.TempDir(), "j")
	if err := os.Mkdir(journal, 0o755); err != nil {
		t.Fatal(err)
	}
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(journal, "socket"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	st, err := w.Stat()
	if err != nil {
		t.Fatal(err)
	}
	id := st.Sys().(*syscall.Stat_t)
	c := exec.Command("unshare", "-m", "bash", "-ec", `mkdir -p /run/systemd/journal
		mount -t tmpfs t /run/systemd; mkdir /run/systemd/journal; mount --bind "$J" /run/systemd/journal
		exec "$K" mount --foreground "$C" "$D"`)
	c.Env = append(m.env, fmt.Sprintf("JOURNAL_STREAM=%d:%d", id.Dev, id.Ino), "J="+journal, "K="+binary, "C="+m.cipher, "D="+m.dir)
	c.Stderr = w
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	buf := make([]byte, 1<<16)
	socket.SetReadDeadline(time.Now().Add(20 * time.Second))
	n, err := socket.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	event := string(buf[:n])
	for _, w := range []string{"MESSAGE=mounted; version: ", "PRIORITY=6\n", "KMSFS_VOLUME=", "KMSFS_MOUNTPOINT=" + m.dir, "KMSFS_KERNEL="} {
		if !strings.Contains(event, w) {
			t.Errorf("no %q in the journal:\n%s", w, event)
		}
	}
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
	var rest bytes.Buffer
	rest.ReadFrom(r)
	if strings.Contains(rest.String(), "msg=mounted") {
		t.Errorf("it is on stderr, too:\n%s", rest.String())
	}
}
