package tests

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kmsfs/keystore/keystoretest"
)

// pagePolicy returns the key policy that docs/keys.md shows, for the volume with this ID, with
// one right of one statement left out.
func pagePolicy(t *testing.T, volume string, statement int, right string) string {
	t.Helper()
	b, err := os.ReadFile("../docs/keys.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), "    {\n      \"Version\": \"2012-10-17\"")
	text, _, ok := strings.Cut(text, "\n    }\n")
	text = `{"Version": "2012-10-17"` + text + "}"
	var p struct {
		Version   string
		Statement []map[string]any
	}
	if err := json.Unmarshal([]byte(strings.ReplaceAll(text, "6f92105be8fb692102e78183ee60d7f1", volume)), &p); err != nil || !ok {
		t.Fatalf("the page's policy: %v", err)
	}
	if right != "" {
		actions, several := p.Statement[statement]["Action"].([]any)
		if !several {
			actions = []any{p.Statement[statement]["Action"]}
		}
		left := slices.DeleteFunc(slices.Clone(actions), func(a any) bool { return a == right })
		if len(left) == len(actions) {
			t.Fatalf("statement %d does not give %s", statement, right)
		}
		p.Statement[statement]["Action"] = left
	}
	out, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// The key policy of docs/keys.md allows what it says that it allows, and each right in it is
// needed.
func TestPagePolicy(t *testing.T) {
	srv := keystoretest.Start(t)
	srv.AddKey("alias/files")
	m := &mounted{t: t, base: t.TempDir(), faults: true}
	m.cipher, m.dir = filepath.Join(m.base, "cipher"), filepath.Join(m.base, "mnt")
	m.env = append(os.Environ(), "XDG_STATE_HOME="+filepath.Join(m.base, "state"), "XDG_CONFIG_HOME="+filepath.Join(m.base, "config"), "XDG_RUNTIME_DIR="+filepath.Join(m.base, "run"))
	for k, v := range keystoretest.Env(srv.URL) {
		m.env = append(m.env, k+"="+v)
	}
	needFUSE(t)
	for _, d := range []string{m.cipher, m.dir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(m.cleanup)
	m.kmsfs("init", "--key", "alias/files", m.cipher)
	var info struct{ Volume string }
	if err := json.Unmarshal([]byte(m.kmsfs("info", "--json", m.cipher)), &info); err != nil {
		t.Fatal(err)
	}
	letter := filepath.Join(m.base, "letter")
	write(t, letter, []byte("a letter"))
	m.kmsfs("encrypt", "--key", "alias/files", letter, letter+".sealed")
	m.mount()
	write(t, m.path("old"), []byte("old"))
	m.umount()
	roles := map[string]string{"AKWRITER": "arn:aws:iam::111122223333:role/files-writer", "AKREADER": "arn:aws:iam::111122223333:role/files-reader", "AKADMIN": "arn:aws:iam::111122223333:role/key-admin"}
	as := func(id string, args ...string) error {
		env := m.env
		defer func() { m.env = env }()
		m.env = append(slices.Clone(env), "AWS_ACCESS_KEY_ID="+id)
		out, err := m.try(args...)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	mountAnd := func(id string, options []string, do func() error) error {
		if err := as(id, append(append([]string{"mount", "--key", "alias/files"}, options...), m.cipher, m.dir)...); err != nil {
			return err
		}
		defer m.umount()
		return do()
	}
	read := func() error { _, err := os.ReadFile(m.path("old")); return err }
	tasks := map[string]func() error{
		"the writer mounts and reads": func() error { return mountAnd("AKWRITER", nil, read) },
		"the writer makes a file": func() error {
			return mountAnd("AKWRITER", nil, func() error { return os.WriteFile(m.path("new"), []byte("new"), 0o644) })
		},
		"the writer encrypts a file":  func() error { return as("AKWRITER", "encrypt", "--key", "alias/files", letter, letter+".w") },
		"the reader mounts and reads": func() error { return mountAnd("AKREADER", []string{"--read-only"}, read) },
		"the reader decrypts a file": func() error {
			return as("AKREADER", "decrypt", "--key", "alias/files", letter+".sealed", letter+".again")
		},
		"the administrator disables the key": func() error {
			return errors.Join(as("AKADMIN", "key", "disable", "--yes", "alias/files"), as("AKADMIN", "key", "enable", "alias/files"))
		},
	}
	for _, c := range []struct {
		statement int
		without   string
		fails     []string
	}{
		{0, "", nil},
		{0, "kms:DisableKey", []string{"the administrator disables the key"}},
		{0, "kms:DescribeKey", []string{"the administrator disables the key"}},
		{1, "kms:GenerateDataKey", []string{"the writer makes a file", "the writer encrypts a file"}},
		{1, "kms:Decrypt", []string{"the writer mounts and reads", "the writer makes a file"}},
		{2, "kms:Decrypt", []string{"the reader mounts and reads", "the reader decrypts a file"}},
		{3, "kms:DescribeKey", []string{"the writer mounts and reads", "the writer makes a file", "the writer encrypts a file", "the reader mounts and reads", "the reader decrypts a file"}},
	} {
		if err := srv.SetPolicy(pagePolicy(t, info.Volume, c.statement, c.without), roles); err != nil {
			t.Fatal(err)
		}
		for name, task := range tasks {
			if err := task(); (err != nil) != slices.Contains(c.fails, name) {
				t.Errorf("without %q in statement %d: %s: %v", c.without, c.statement, name, err)
			}
		}
	}
	// A reader has no right to use another volume, nor to make keys.
	if err := srv.SetPolicy(pagePolicy(t, strings.Repeat("1", 32), 0, ""), roles); err != nil {
		t.Fatal(err)
	}
	if err := tasks["the reader mounts and reads"](); err == nil {
		t.Error("the policy of another volume lets the reader in")
	}
	// One who mounts read-write and only reads causes no denied call.
	if err := srv.SetPolicy(pagePolicy(t, info.Volume, 0, ""), map[string]string{"AKREADER": roles["AKREADER"]}); err != nil {
		t.Fatal(err)
	}
	before := srv.Calls("GenerateDataKey")
	if err := mountAnd("AKREADER", nil, read); err != nil {
		t.Error(err)
	}
	if n := srv.Calls("GenerateDataKey"); n != before {
		t.Errorf("a reader who mounts read-write asks for %d new keys", n-before)
	}
}
