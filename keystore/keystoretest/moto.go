package keystoretest

import (
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"
)

// Need skips the test where a prerequisite is missing; in CI that is a failure.
func Need(t testing.TB, why string, ok bool) {
	t.Helper()
	switch {
	case ok:
	case os.Getenv("CI") != "":
		t.Fatalf("this test needs %s", why)
	default:
		t.Skipf("this test needs %s", why)
	}
}

// Moto starts moto_server, an emulator of AWS by others, that ends with the
// test, and points the SDK's environment at it. It returns its URL.
func Moto(t testing.TB) string {
	t.Helper()
	bin, err := exec.LookPath("moto_server")
	Need(t, "moto_server: make test installs it", err == nil)
	said, err := os.Create(filepath.Join(t.TempDir(), "moto.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer said.Close()
	c := exec.Command(bin, "-p", "0") // a free port, which it says
	c.Stdout, c.Stderr = said, said
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
		if t.Failed() {
			out, _ := os.ReadFile(said.Name())
			t.Logf("moto_server: %s", out)
		}
	})
	for range 300 {
		out, _ := os.ReadFile(said.Name())
		if m := regexp.MustCompile(`Running on (http://127\.0\.0\.1:\d+)\s`).FindSubmatch(out); m != nil {
			url := string(m[1])
			for k, v := range Env(url) {
				t.Setenv(k, v)
			}
			if r, err := http.Get(url + "/moto-api/"); err == nil {
				r.Body.Close()
				return url
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal("moto_server does not answer")
	return ""
}
