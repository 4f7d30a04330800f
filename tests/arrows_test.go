package tests

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// What each package may import of this module. There is no util, no common: the format does
// no I/O, the keystore knows no files, the seam to the disk knows no format, and only cmd knows
// the backends.
var arrows = map[string]string{
	"kmsfs/blockcrypt":            "",
	"kmsfs/keystore":              "kmsfs/blockcrypt",
	"kmsfs/keystore/local":        "kmsfs/blockcrypt kmsfs/keystore",
	"kmsfs/keystore/agestore":     "kmsfs/blockcrypt kmsfs/keystore",
	"kmsfs/keystore/awskms":       "kmsfs/blockcrypt kmsfs/keystore",
	"kmsfs/keystore/keystoretest": "kmsfs/blockcrypt kmsfs/keystore",

	"kmsfs/fs/volume/internal/disk":   "",
	"kmsfs/fs/volume/internal/layout": "kmsfs/blockcrypt kmsfs/fs/volume/internal/disk",
	"kmsfs/fs/volume/internal/ranges": "",
	"kmsfs/fs/volume/internal/cfile":  "kmsfs/blockcrypt kmsfs/fs/volume/internal/disk kmsfs/fs/volume/internal/ranges",

	"kmsfs/fs/volume":         "kmsfs/blockcrypt kmsfs/fs/volume/internal/cfile kmsfs/fs/volume/internal/disk kmsfs/fs/volume/internal/layout kmsfs/fs/volume/internal/ranges kmsfs/keystore",
	"kmsfs/fs/volume/check":   "kmsfs/blockcrypt kmsfs/fs/volume kmsfs/fs/volume/internal/cfile kmsfs/fs/volume/internal/disk kmsfs/fs/volume/internal/layout kmsfs/keystore",
	"kmsfs/fs/transfer":       "kmsfs/blockcrypt kmsfs/fs/volume",
	"kmsfs/fs":                "kmsfs/blockcrypt kmsfs/fs/volume kmsfs/keystore",
	"kmsfs/cmd/kmsfs":         "kmsfs/blockcrypt kmsfs/fs kmsfs/fs/volume kmsfs/fs/transfer kmsfs/fs/volume/check kmsfs/keystore kmsfs/keystore/agestore kmsfs/keystore/awskms kmsfs/keystore/local",
	"kmsfs/tests":             "",
	"kmsfs/tests/cutdisk":     "",
	"kmsfs/tests/hostcheck":   "",
	"kmsfs/tests/independent": "",
	"kmsfs/tests/slowdisk":    "",
}

// Libraries that a package must not see.
var forbidden = map[string][]string{
	"kmsfs/blockcrypt": {"os", "io", "log", "log/slog", "context", "net",
		"github.com/hanwen/go-fuse/v2/fuse", "golang.org/x/sys/unix"},
	"kmsfs/keystore":  {"os", "log", "log/slog", "github.com/hanwen/go-fuse/v2/fuse"},
	"kmsfs/fs/volume": {"github.com/hanwen/go-fuse/v2/fuse", "log"},
	"kmsfs/fs":        {"github.com/aws/aws-sdk-go-v2/aws"},
}

func TestImportArrows(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}}:{{range .Imports}} {{.}}{{end}}`,
		"kmsfs/...").CombinedOutput()
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

// Calls of the packages unix and os that fs/volume makes outside internal/disk: none of them is
// about the ciphertext tree.
var besidesTheTree = []string{
	"unix.Geteuid", "unix.ClockGettime", "unix.Setfsuid", "unix.Getrlimit", "unix.NsecToTimespec",
	"os.Hostname", "os.Getpid", "os.ReadFile", // of /proc
	"os.NewSyscallError",
}

// Every syscall on the ciphertext tree goes through internal/disk, where tests see it and can
// make it fail.
func TestSyscallsBehindTheSeam(t *testing.T) {
	var files []string
	for _, dir := range []string{"", "internal/cfile/", "internal/layout/"} {
		in, err := filepath.Glob("../fs/volume/" + dir + "*.go")
		if err != nil || len(in) == 0 {
			t.Fatalf("no files in %s: %v", dir, err)
		}
		files = append(files, in...)
	}
	calls := 0
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			pkg, ok := sel.X.(*ast.Ident)
			if !ok || pkg.Obj != nil || pkg.Name != "unix" && pkg.Name != "os" && pkg.Name != "syscall" {
				return true
			}
			calls++
			if what := pkg.Name + "." + sel.Sel.Name; !slices.Contains(besidesTheTree, what) {
				t.Errorf("%s: %s is called outside internal/disk", set.Position(call.Pos()), what)
			}
			return true
		})
	}
	if calls == 0 {
		t.Error("no call was looked at")
	}
}
