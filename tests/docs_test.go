package tests

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

var link = regexp.MustCompile(`\]\(([^)#]+)(#[^)]*)?\)`)

// Every page is reached from README.md, its links lead to files, and its lines are short.
func TestPages(t *testing.T) {
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatalf("no pages: %v", err)
	}
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range pages {
		if name := strings.TrimPrefix(page, "../"); !strings.Contains(string(readme), "("+name+")") {
			t.Errorf("README.md does not name %s", name)
		}
	}
	for _, page := range append(pages, "../README.md", "../blockcrypt/FORMAT.md", "POSIX.md") {
		f, err := os.Open(page)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		for n := 1; lines.Scan(); n++ {
			line := lines.Text()
			for _, m := range link.FindAllStringSubmatch(line, -1) {
				if _, err := os.Stat(filepath.Join(filepath.Dir(page), m[1])); err != nil &&
					!strings.Contains(m[1], "://") {
					t.Errorf("%s:%d: %v", page, n, err)
				}
			}
			prose := !strings.HasPrefix(line, "    ") && !strings.HasPrefix(line, "|") &&
				strings.Contains(line, " ")
			if prose && utf8.RuneCountInString(line) > 100 {
				t.Errorf("%s:%d: %d columns", page, n, utf8.RuneCountInString(line))
			}
		}
		if err := lines.Err(); err != nil {
			t.Error(err)
		}
	}
}
