package tests

import (
	"fmt"
	"kmsfs/tests/slowdisk"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// binary is the program under test, built once.
var binary string

func TestMain(m *testing.M) {
	slowdisk.RunIfChild()
	dir, err := os.MkdirTemp("", "kmsfs-tests-")
	if err != nil {
		panic(err)
	}
	binary = filepath.Join(dir, "kmsfs")
	args := []string{"build", "-o", binary}
	if raceEnabled {
		args = append(args, "-race")
	}
	if out, err := exec.Command("go", append(args, "../cmd/kmsfs")...).CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building kmsfs: %v\n%s", err, out)
		os.RemoveAll(dir)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}
