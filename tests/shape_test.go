package tests

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The most that a stranger can be expected to keep in mind.
const (
	mostMethods = 30 // of a type
	mostFields  = 20 // of a struct
	mostParams  = 5  // of a function
	mostShare   = 35 // per cent of the code that one package has
)

// asMany are types with as many methods as somebody else's list has entries.
var asMany = map[string]string{
	"../fs.fileSystem":                "requests of FUSE",
	"../fs/volume/internal/disk.Disk": "system calls",
	"../keystore/keystoretest.Server": "what tests turn on the KMS server and ask of it",
}

// No type and no package is so large that nobody knows all of it.
func TestNothingIsTooLarge(t *testing.T) {
	methods, lines, all := map[string]int{}, map[string]int{}, 0
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") ||
			strings.HasSuffix(path, "_test.go") || strings.HasPrefix(path, "../tests/") {
			return err
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		pkg := filepath.Dir(path)
		file, err := parser.ParseFile(token.NewFileSet(), path, src, 0)
		if err != nil {
			return err
		}
		n := len(slices.Collect(strings.Lines(string(src))))
		lines[pkg] += n
		all += n
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if n.Recv != nil {
					methods[pkg+"."+strings.TrimLeft(typeName(n.Recv.List[0].Type), "*")]++
				}
				if n.Type.Params.NumFields() > mostParams {
					t.Errorf("%s: %s has %d parameters, more than %d", path, n.Name.Name,
						n.Type.Params.NumFields(), mostParams)
				}
			case *ast.TypeSpec:
				if s, ok := n.Type.(*ast.StructType); ok && fieldsOf(s) > mostFields {
					t.Errorf("%s.%s has %d fields, more than %d", pkg, n.Name.Name, fieldsOf(s), mostFields)
				}
			}
			return true
		})
		return nil
	})
	if err != nil || all == 0 {
		t.Fatalf("%d lines read: %v", all, err)
	}
	for _, name := range slices.Sorted(maps.Keys(methods)) {
		if n := methods[name]; n > mostMethods && asMany[name] == "" {
			t.Errorf("%s has %d methods, more than %d", name, n, mostMethods)
		}
	}
	for pkg, n := range lines {
		if n*100 > all*mostShare {
			t.Errorf("%s has %d of %d lines, more than %d %%", pkg, n, all, mostShare)
		}
	}
}

// fieldsOf counts the fields of a struct; an embedded one is one.
func fieldsOf(s *ast.StructType) (n int) {
	for _, f := range s.Fields.List {
		n += max(1, len(f.Names))
	}
	return n
}

// typeName returns the name of a receiver's type, with its parameters left out.
func typeName(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return typeName(e.X)
	case *ast.IndexExpr:
		return typeName(e.X)
	case *ast.IndexListExpr:
		return typeName(e.X)
	case *ast.Ident:
		return e.Name
	}
	return ""
}
