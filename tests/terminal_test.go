package tests

import (
	"fmt"
	"strings"
	"testing"
)

// Passphrases are asked for on the terminal and not shown there; an error
// is said in a line.
func TestPassphraseOnTerminal(t *testing.T) {
	m := newVolume(t)
	m.umount()
	m.run(`rm -rf "$C"; mkdir "$C"`)

	x := m.onTerminal("init", "--key", "passphrase", m.cipher)
	x.expect("Passphrase: ", "correct horse\n")
	x.expect("again: ", "another\n")
	if code, shown := x.end(); code == 0 || !strings.Contains(shown, "the passphrases differ") ||
		strings.Contains(shown, "another") {
		t.Errorf("differing ones: exit %d, %q", code, shown)
	}
	x = m.onTerminal("init", "--key", "passphrase", m.cipher)
	x.expect("Passphrase: ", "correct horse\n")
	x.expect("again: ", "correct horse\n")
	if code, shown := x.end(); code != 0 || strings.Contains(shown, "correct horse") {
		t.Errorf("init: exit %d, %q", code, shown)
	}

	x = m.onTerminal("mount", m.cipher, m.dir)
	x.expect("Passphrase: ", "wrong\n")
	if code, shown := x.end(); code != 4 || strings.Count(strings.TrimSpace(shown), "\n") > 1 ||
		strings.Contains(shown, "wrong\r") {
		t.Errorf("a wrong one: exit %d, %q", code, shown)
	}
	x = m.onTerminal("mount", m.cipher, m.dir)
	x.expect("Passphrase: ", "\x03") // Ctrl-C
	if code, _ := x.end(); code == 0 || isMount(m.dir) {
		t.Errorf("given up: exit %d, mounted %v", code, isMount(m.dir))
	}
	x = m.onTerminal("mount", m.cipher, m.dir)
	x.expect("Passphrase: ", "correct horse\n")
	if code, shown := x.end(); code != 0 || !isMount(m.dir) {
		t.Fatalf("mount: exit %d, %q", code, shown)
	}
	write(t, m.path("f"), []byte("x")) // the terminal is gone, the daemon is not
	m.umount()
}

// On a terminal fsck shows how far it is, and takes that away; elsewhere it does not.
func TestProgressOnTerminal(t *testing.T) {
	m := newVolume(t)
	for i := range 20 {
		write(t, m.path(fmt.Sprint(i)), noise(8<<20))
	}
	m.umount()
	code, shown := m.onTerminal("fsck", m.cipher).end()
	if code != 0 || !strings.Contains(shown, " files, ") || !strings.Contains(shown, "\x1b[K") {
		t.Errorf("exit %d, %q", code, shown)
	}
	if out := m.kmsfs("fsck", m.cipher); strings.ContainsAny(out, "\r\x1b") {
		t.Errorf("into a pipe: %q", out)
	}
}
