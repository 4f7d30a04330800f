package keystoretest

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
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
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	url := fmt.Sprintf("http://127.0.0.1:%d", port)
	for k, v := range Env(url) {
		t.Setenv(k, v)
	}
	c := exec.Command(bin, "-p", fmt.Sprint(port))
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
		if t.Failed() {
			t.Logf("moto_server: %s", &out)
		}
	})
	for range 300 {
		if r, err := http.Get(url + "/moto-api/"); err == nil {
			r.Body.Close()
			return url
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal("moto_server does not answer")
	return ""
}
