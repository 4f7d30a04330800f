package tests

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Calls between the files of fs/volume go down: no file calls, by way of others, one that calls it.
// So there is an order in which a stranger can read them.
func TestCallsGoDown(t *testing.T) {
	calls := callsBetweenFiles(t, "../fs/volume")
	if len(calls) < 20 {
		t.Fatalf("%d files call others", len(calls))
	}
	state := map[string]int{} // 1: on the path, 2: all below it was looked at
	var path []string
	var visit func(string)
	visit = func(file string) {
		switch state[file] {
		case 1:
			t.Errorf("a circle of calls: %s", strings.Join(append(path[slices.Index(path, file):], file), " -> "))
			return
		case 2:
			return
		}
		state[file] = 1
		path = append(path, file)
		for _, below := range calls[file] {
			visit(below)
		}
		path = path[:len(path)-1]
		state[file] = 2
	}
	for file := range calls {
		visit(file)
	}
}

// callsBetweenFiles returns which files of a package each of its files calls.
func callsBetweenFiles(t *testing.T, dir string) map[string][]string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	conf := types.Config{Importer: noImports{}, Error: func(error) {}} // its own functions are enough
	pkg, _ := conf.Check(dir, fset, files, info)
	out := map[string][]string{}
	for id, o := range info.Uses {
		if f, ok := o.(*types.Func); ok && f.Pkg() == pkg {
			from := filepath.Base(fset.Position(id.Pos()).Filename)
			to := filepath.Base(fset.Position(f.Pos()).Filename)
			if from != to && !slices.Contains(out[from], to) {
				out[from] = append(out[from], to)
			}
		}
	}
	return out
}

// noImports finds no package.
type noImports struct{}

func (noImports) Import(string) (*types.Package, error) { return nil, errors.New("not looked for") }
