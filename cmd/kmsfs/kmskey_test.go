//go:build linux && !portable

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Who switches a key off is told which volumes go with it, under a replica of a
// multi-Region key too.
func TestDependents(t *testing.T) {
	const (
		mrk   = "arn:aws:kms:eu-central-1:111122223333:key/mrk-0123456789abcdef0123456789abcdef"
		plain = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	)
	replica := strings.Replace(mrk, "eu-central-1", "us-east-1", 1)
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	dir, err := statePath()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for volume, recipients := range map[string]string{"a": `"aws-kms:` + replica + `"`,
		"b": `"aws-kms:` + plain + `"`,
		"c": `"aws-kms:` + plain + `", "local:00112233445566778899aabbccddeeff"`} {
		rec := `{"volume": "` + strings.Repeat("0", 31) + volume + `", "recipients": [` + recipients + `]}`
		if err := os.WriteFile(filepath.Join(dir, volume+".json"), []byte(rec), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for arn, want := range map[string][]string{
		mrk:     {"a names its replica " + replica},
		replica: {"a depends on it"},
		plain:   {"b depends on it", "c names it, and 1 other"},
		strings.Replace(plain, "1234abcd", "1234abce", 1): nil,
	} {
		got := dependents(arn)
		if len(got) != len(want) {
			t.Errorf("%s: %q", arn, got)
			continue
		}
		for i := range want {
			if !strings.Contains(got[i], want[i]) {
				t.Errorf("%s: %q, want %q", arn, got[i], want[i])
			}
		}
	}
}
