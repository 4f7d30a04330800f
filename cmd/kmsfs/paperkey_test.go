//go:build linux && !portable

package main

import (
	"bytes"
	"crypto/rand"
	"strings"
	"testing"
)

// A key comes back from paper, also if it was typed without care; a changed, exchanged or missing
// line is told by its number.
func TestPaperKey(t *testing.T) {
	for range 200 {
		key := make([]byte, 32)
		rand.Read(key)
		lines := paperKey(key)
		text := strings.Join(lines, "\n")
		for _, typed := range []string{text, strings.ToLower(text),
			strings.ReplaceAll(text, "-", " "), "# from the safe\n\n" + text + "\n",
			strings.ReplaceAll(strings.ReplaceAll(text, "O", "0"), "B", "8")} {
			if got, err := readPaperKey(strings.NewReader(typed)); err != nil || !bytes.Equal(got, key) {
				t.Fatalf("%q: %v", typed, err)
			}
		}
		for i := range lines {
			wrong := []byte(lines[i])
			at := 3 + 5*(i%4)
			if wrong[at]++; wrong[at] > 'Z' || wrong[at] < 'A' {
				wrong[at] = 'A'
			}
			bad := append(append([]string{}, lines[:i]...), string(wrong))
			if string(wrong) == lines[i] {
				continue
			}
			if _, err := readPaperKey(strings.NewReader(strings.Join(append(bad, lines[i+1:]...),
				"\n"))); err == nil || !strings.Contains(err.Error(), "mistake") {
				t.Errorf("a slip in line %d: %v", i+1, err)
			}
		}
		swapped := strings.Join([]string{lines[1][3:], lines[0][3:], lines[2], lines[3]}, "\n")
		if _, err := readPaperKey(strings.NewReader(swapped)); err == nil ||
			!strings.Contains(err.Error(), "line 1") {
			t.Errorf("exchanged lines: %v", err)
		}
		if _, err := readPaperKey(strings.NewReader(strings.Join(lines[:3], "\n"))); err == nil ||
			!strings.Contains(err.Error(), "only 3") {
			t.Errorf("a line less: %v", err)
		}
	}
}
