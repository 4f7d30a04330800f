package tests

import (
	"os/exec"
	"strings"
	"testing"
)

// What each package may import of this module. There is no util, no common, and
// nothing above knows what is below but by these arrows: the format does no I/O,
// the keystore knows no files, and only cmd knows the backends.
var arrows = map[string]string{
	"kmsfs/blockcrypt":            "",
	"kmsfs/keystore":              "",
	"kmsfs/keystore/local":        "kmsfs/keystore",
	"kmsfs/keystore/awskms":       "kmsfs/keystore",
	"kmsfs/keystore/keystoretest": "kmsfs/keystore",
	"kmsfs/fs/volume":             "kmsfs/blockcrypt kmsfs/keystore",
	"kmsfs/fs":                    "kmsfs/fs/volume kmsfs/keystore",
	"kmsfs/cmd/kmsfs":             "kmsfs/blockcrypt kmsfs/fs kmsfs/fs/volume kmsfs/keystore kmsfs/keystore/awskms kmsfs/keystore/local",
	"kmsfs/tests":                 "",
	"kmsfs/tests/cutdisk":         "",
	"kmsfs/tests/independent":     "",
}

// Libraries that a package must not see.
var forbidden = map[string][]string{
	"kmsfs/blockcrypt": {"os", "io", "log", "log/slog", "context", "net", "github.com/hanwen/go-fuse/v2/fuse", "golang.org/x/sys/unix"},
	"kmsfs/keystore":   {"os", "log", "log/slog", "github.com/hanwen/go-fuse/v2/fuse"},
	"kmsfs/fs/volume":  {"github.com/hanwen/go-fuse/v2/fuse", "log"},
	"kmsfs/fs":         {"github.com/aws/aws-sdk-go-v2/aws"},
}

func TestImportArrows(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}}:{{range .Imports}} {{.}}{{end}}`, "kmsfs/...").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	seen := 0
	for line := range strings.Lines(string(out)) {
		pkg, imports, _ := strings.Cut(strings.TrimSpace(line), ":")
		allowed, known := arrows[pkg]
		if !known {
			t.Errorf("package %s has no arrows: say here what it may import", pkg)
		}
		seen++
		for imp := range strings.FieldsSeq(imports) {
			if strings.HasPrefix(imp, "kmsfs/") && !strings.Contains(" "+allowed+" ", " "+imp+" ") {
				t.Errorf("%s imports %s, which no arrow allows", pkg, imp)
			}
			for _, f := range forbidden[pkg] {
				if imp == f {
					t.Errorf("%s imports %s", pkg, imp)
				}
			}
		}
	}
	if seen != len(arrows) {
		t.Errorf("%d packages, %d have arrows", seen, len(arrows))
	}
}
