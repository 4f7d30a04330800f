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

	"golang.org/x/sys/unix"
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
	if err := json.Unmarshal([]byte(strings.ReplaceAll(text, "6f92105be8fb692102e78183ee60d7f1",
		volume)), &p); err != nil || !ok {
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

// policyVolume is a volume under alias/files, used with the rights of several principals.
type policyVolume struct{ *mounted }

func newPolicyVolume(t *testing.T, srv *keystoretest.Server) policyVolume {
	t.Helper()
	m := &mounted{t: t, base: t.TempDir(), faults: true}
	m.cipher, m.dir = filepath.Join(m.base, "cipher"), filepath.Join(m.base, "mnt")
	m.env = append(os.Environ(), "XDG_STATE_HOME="+filepath.Join(m.base, "state"),
		"XDG_CONFIG_HOME="+filepath.Join(m.base, "config"), "XDG_RUNTIME_DIR="+filepath.Join(m.base, "run"))
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
	return policyVolume{m}
}

// as runs the program with the credentials of an access key ID.
func (p policyVolume) as(id string, args ...string) error {
	env := p.env
	defer func() { p.env = env }()
	p.env = append(slices.Clone(env), "AWS_ACCESS_KEY_ID="+id)
	out, err := p.try(args...)
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// mountAnd calls do while the volume is mounted with such credentials.
func (p policyVolume) mountAnd(id string, options []string, do func() error) error {
	if err := p.as(id,
		append(append([]string{"mount", "--key", "alias/files"}, options...), p.cipher,
			p.dir)...); err != nil {
		return err
	}
	defer p.umount()
	return do()
}

// The key policy of docs/keys.md allows what it says that it allows, and each right in it is
// needed.
func TestPagePolicy(t *testing.T) {
	srv := keystoretest.Start(t)
	srv.AddKey("alias/files")
	p := newPolicyVolume(t, srv)
	m, as, mountAnd := p.mounted, p.as, p.mountAnd
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
	roles := map[string]string{"AKWRITER": "arn:aws:iam::111122223333:role/files-writer",
		"AKREADER": "arn:aws:iam::111122223333:role/files-reader",
		"AKADMIN":  "arn:aws:iam::111122223333:role/key-admin"}
	read := func() error { _, err := os.ReadFile(m.path("old")); return err }
	tasks := map[string]func() error{
		"the writer mounts and reads": func() error { return mountAnd("AKWRITER", nil, read) },
		"the writer makes a file": func() error {
			return mountAnd("AKWRITER", nil,
				func() error { return os.WriteFile(m.path("new"), []byte("new"), 0o644) })
		},
		"the writer encrypts a file": func() error {
			return as("AKWRITER", "encrypt", "--key",
				"alias/files", letter, letter+".w")
		},
		"the reader mounts and reads": func() error {
			return mountAnd("AKREADER",
				[]string{"--read-only"}, read)
		},
		"the reader decrypts a file": func() error {
			return as("AKREADER", "decrypt", "--key", "alias/files", letter+".sealed", letter+".again")
		},
		"the administrator disables the key": func() error {
			return errors.Join(as("AKADMIN", "key", "disable", "--yes", "alias/files"),
				as("AKADMIN", "key", "enable", "alias/files"))
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
		{3, "kms:DescribeKey",
			[]string{"the writer mounts and reads", "the writer makes a file",
				"the writer encrypts a file", "the reader mounts and reads", "the reader decrypts a file"}},
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
	if err := srv.SetPolicy(pagePolicy(t, info.Volume, 0, ""),
		map[string]string{"AKREADER": roles["AKREADER"]}); err != nil {
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

// What kmsfs policy prints for a role is enough for it, each right of it is needed, and nothing else
// is allowed by it: a rewrapper moves files to another key and cannot read one.
func TestPolicyCommand(t *testing.T) {
	srv := keystoretest.Start(t)
	old, next := srv.AddKey("alias/files"), srv.AddKey("alias/next")
	p := newPolicyVolume(t, srv)
	m, as, mountAnd := p.mounted, p.as, p.mountAnd
	m.mount()
	write(t, m.path("old"), []byte("old"))
	m.umount()
	principal := func(role string) string { return "arn:aws:iam::111122223333:role/" + role }
	roles := map[string]string{"AKREADER": principal("reader"), "AKWRITER": principal("writer"),
		"AKREWRAPPER": principal("rewrapper"), "AKINGESTER": principal("ingester")}
	type statement = map[string]any
	policies := map[string][]statement{}
	for _, role := range []string{"reader", "writer", "rewrapper", "ingester"} {
		var p struct{ Statement []statement }
		if err := json.Unmarshal([]byte(m.kmsfs("policy", role, "--principal", principal(role),
			m.cipher)), &p); err != nil {
			t.Fatal(err)
		}
		policies[role] = p.Statement
	}
	read := func() error { _, err := os.ReadFile(m.path("old")); return err }
	// A rewrapper goes to the other key and back again.
	move := func() error {
		for _, k := range [][2]string{{old, next}, {next, old}} {
			if err := errors.Join(
				as("AKREWRAPPER", "recipients", "add", "--key", k[0], m.cipher,
					"alias/"+map[string]string{old: "files", next: "next"}[k[1]]),
				as("AKREWRAPPER", "rewrap", "--verify", "--from", k[0], "--to", k[1], m.cipher),
				as("AKREWRAPPER", "recipients", "remove", m.cipher, k[0]),
				as("AKREWRAPPER", "rewrap", "--verify", m.cipher)); err != nil {
				return err
			}
		}
		return nil
	}
	tasks := map[string]map[string]func() error{
		"reader": {"reads": func() error { return mountAnd("AKREADER", []string{"--read-only"}, read) }},
		"writer": {
			"reads": func() error { return mountAnd("AKWRITER", nil, read) },
			"writes": func() error {
				return mountAnd("AKWRITER", nil,
					func() error { return os.WriteFile(m.path("new"), []byte("new"), 0o644) })
			},
		},
		"rewrapper": {"moves": move},
		"ingester": {"adds": func() error {
			return mountAnd("AKINGESTER", nil, func() error {
				if err := os.WriteFile(m.path("added"), []byte("added"), 0o644); err != nil {
					return err
				}
				_, err := os.ReadDir(m.dir) // names are seen
				return err
			})
		}},
	}
	// set makes the policy one of all roles, with a right of one statement left out.
	set := func(role string, at int, right string) {
		t.Helper()
		var all []statement
		for r, statements := range policies {
			for i, s := range statements {
				if r == role && i == at && right != "" {
					c := statement{}
					for k, v := range s {
						c[k] = v
					}
					c["Action"] = slices.DeleteFunc(slices.Clone(s["Action"].([]any)),
						func(a any) bool { return a == right })
					s = c
				}
				all = append(all, s)
			}
		}
		b, err := json.Marshal(map[string]any{"Version": "2012-10-17", "Statement": all})
		if err == nil {
			err = srv.SetPolicy(string(b), roles)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	set("", 0, "")
	for role, ts := range tasks {
		for name, task := range ts {
			if err := task(); err != nil {
				t.Errorf("the %s, who %s: %v", role, name, err)
			}
		}
	}
	for _, id := range []string{"AKREWRAPPER", "AKINGESTER"} {
		if err := mountAnd(id, []string{"--read-only"}, read); !errors.Is(err, unix.EKEYREJECTED) {
			t.Errorf("%s reads a file: %v", roles[id], err)
		}
	}
	// What an ingester made before, it cannot read either; a reader can.
	if err := mountAnd("AKINGESTER", nil,
		func() error { _, err := os.ReadFile(m.path("added")); return err }); !errors.Is(err,
		unix.EKEYREJECTED) {
		t.Errorf("an ingester reads a file of an earlier mount: %v", err)
	}
	if err := mountAnd("AKREADER", []string{"--read-only"},
		func() error { _, err := os.ReadFile(m.path("added")); return err }); err != nil {
		t.Errorf("a reader cannot read what an ingester has added: %v", err)
	}
	if err := mountAnd("AKREADER", nil,
		func() error { return os.WriteFile(m.path("more"), []byte("more"), 0o644) }); err == nil {
		t.Error("the reader makes a file")
	}
	for role, statements := range policies {
		for i, s := range statements {
			for _, right := range s["Action"].([]any) {
				set(role, i, right.(string))
				failed := false
				for _, task := range tasks[role] {
					failed = task() != nil || failed
				}
				if err := srv.SetPolicy("", nil); err != nil {
					t.Fatal(err)
				}
				if role == "rewrapper" { // it may have stopped half way
					for _, k := range []string{"alias/files", "alias/next"} {
						m.try("recipients", "add", m.cipher, k)
					}
					m.kmsfs("rewrap", m.cipher)
					m.try("recipients", "remove", m.cipher, next)
					m.kmsfs("rewrap", m.cipher)
				}
				if !failed {
					t.Errorf("the %s does without %s", role, right)
				}
			}
		}
	}
	if out := m.kmsfs("policy", "writer", "--terraform", "--principal", principal("writer"),
		m.cipher); !strings.Contains(out, `actions   = ["kms:Decrypt", "kms:GenerateDataKey"]`) ||
		!strings.Contains(out, `variable = "kms:EncryptionContext:kmsfs:volume"`) {
		t.Errorf("%s", out)
	}
}
