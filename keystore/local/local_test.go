package local_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kmsfs/keystore"
	"kmsfs/keystore/keystoretest"
	"kmsfs/keystore/local"
)

func TestSuiteKeyFile(t *testing.T) {
	a, made, err := local.CreateFile(filepath.Join(t.TempDir(), "a"))
	if err != nil || !made {
		t.Fatal(made, err)
	}
	b, _, err := local.CreateFile(filepath.Join(t.TempDir(), "b"))
	if err != nil {
		t.Fatal(err)
	}
	keystoretest.Suite(t, a, b)
}

func TestSuitePassphrase(t *testing.T) {
	a, err := local.NewPassphrase([]byte("correct horse"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := local.NewPassphrase([]byte("correct horse"))
	if err != nil {
		t.Fatal(err)
	}
	keystoretest.Suite(t, a, b)
}

func TestPassphrase(t *testing.T) {
	s, err := local.NewPassphrase([]byte("correct horse"))
	if err != nil {
		t.Fatal(err)
	}
	b := keystore.Binding{Use: keystore.ForFile}
	w, err := s.Wrap(t.Context(), b, make([]byte, 32))
	if err != nil || len(w.Branch) != 88 {
		t.Fatal(len(w.Branch), err)
	}
	again, err := local.OpenPassphrase(w.URI, w.Branch, []byte("correct horse"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.Unwrap(t.Context(), b, w); err != nil {
		t.Fatal(err)
	}
	if _, err := local.OpenPassphrase(w.URI, w.Branch,
		[]byte("Correct horse")); keystore.KindOf(err) != keystore.Denied {
		t.Errorf("a wrong passphrase: %v", err)
	}
	for _, at := range []int{0, 1, 2, 4, 8, 12, 28, 40,
		87} { // version, lanes, zero, passes, KiB, salt, nonce, key, tag
		x := bytes.Clone(w.Branch)
		x[at] ^= 0x40
		if _, err := local.OpenPassphrase(w.URI, x, []byte("correct horse")); err == nil {
			t.Errorf("byte %d of the branch changed, and it opens", at)
		}
	}
	if _, err := local.OpenPassphrase(w.URI, w.Branch[:87],
		[]byte("correct horse")); keystore.KindOf(err) != keystore.Damaged {
		t.Errorf("a branch cut short: %v", err)
	}
}

func TestKeyFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	s, _, err := local.CreateFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 || st.Size() != 32 {
		t.Fatal(st, err)
	}
	again, made, err := local.CreateFile(path)
	if err != nil || made || again.URI() != s.URI() {
		t.Fatalf("made anew: %v, %v", made, err)
	}
	for name, c := range map[string]struct {
		size int
		mode os.FileMode
		want string
	}{"short": {31, 0o600, "31 bytes"}, "long": {33, 0o600, "33 bytes"},
		"open": {32, 0o640, "open to others"}, "empty": {0, 0o600, "0 bytes"}} {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, make([]byte, c.size), c.mode); err != nil {
			t.Fatal(err)
		}
		if _, err := local.OpenFile(p); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, p := range []string{filepath.Join(dir, "missing"), dir, "/dev/null"} {
		if _, err := local.OpenFile(p); keystore.KindOf(err) != keystore.Invalid {
			t.Errorf("%s: %v", p, err)
		}
	}
}
