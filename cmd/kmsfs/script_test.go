//go:build linux && !portable

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript" // txtar scripts that run the real main
	"golang.org/x/sys/unix"

	"kmsfs/keystore/keystoretest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"kmsfs": func() { os.Exit(run(os.Args)) }})
}

// Scripts run with a KMS server of their own; $KEY is the ARN of alias/main,
// $OTHER that of alias/other.
func TestScripts(t *testing.T) {
	_, err := os.Stat("/dev/fuse")
	keystoretest.Need(t, "/dev/fuse and root or fusermount3", err == nil)
	server := func(ts *testscript.TestScript) *keystoretest.Server { return ts.Value("kms").(*keystoretest.Server) }
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("the condition %q is not known", cond)
		},
		Setup: func(e *testscript.Env) error {
			srv := keystoretest.Start(t)
			e.Values["kms"] = srv
			e.Setenv("KEY", srv.AddKey("alias/main"))
			e.Setenv("OTHER", srv.AddKey("alias/other"))
			srv.AddKeyLike("alias/rsa", "RSA_2048", "ENCRYPT_DECRYPT", "CUSTOMER")
			srv.AddKeyLike("alias/hmac", "HMAC_256", "GENERATE_VERIFY_MAC", "CUSTOMER")
			for k, v := range keystoretest.Env(srv.URL) {
				e.Setenv(k, v)
			}
			e.Setenv("XDG_STATE_HOME", filepath.Join(e.WorkDir, "state"))
			e.Setenv("XDG_CONFIG_HOME", filepath.Join(e.WorkDir, "config"))
			e.Setenv("XDG_RUNTIME_DIR", filepath.Join(e.WorkDir, "run"))
			e.Setenv("HOME", e.WorkDir)
			e.Setenv("GORACE", "atexit_sleep_ms=0") // or each command takes a second more
			e.Defer(func() { unmountBelow(t, e.WorkDir) })
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			// kms STATE $KEY: sets a key's state
			"kms": func(ts *testscript.TestScript, _ bool, args []string) { server(ts).SetState(args[1], args[0]) },
			// kmsalias ALIAS: gives the alias to a new key
			"kmsalias": func(ts *testscript.TestScript, _ bool, args []string) { server(ts).AddKey(args[0]) },
			// kmsdeny [OP...]: makes operations be denied
			"kmsdeny": func(ts *testscript.TestScript, _ bool, args []string) { server(ts).Deny(args...) },
			// kmsgrant TOKEN: keys can be used only with this grant token, '' for all
			"kmsgrant": func(ts *testscript.TestScript, _ bool, args []string) { server(ts).NeedGrant(args[0]) },
			// eventually COMMAND...: it succeeds within some seconds
			"eventually": func(ts *testscript.TestScript, _ bool, args []string) {
				for until := time.Now().Add(15 * time.Second); ; time.Sleep(100 * time.Millisecond) {
					err := ts.Exec(args[0], args[1:]...)
					if err == nil {
						return
					}
					if time.Now().After(until) {
						ts.Fatalf("%v never succeeded: %v", args, err)
					}
				}
			},
			// flip FILE OFFSET: changes a bit
			"flip": func(ts *testscript.TestScript, _ bool, args []string) {
				b := []byte(ts.ReadFile(args[0]))
				at, err := strconv.Atoi(args[1])
				ts.Check(err)
				b[(at+len(b))%len(b)] ^= 1
				ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o644))
			},
			// replace FILE OLD NEW
			"replace": func(ts *testscript.TestScript, _ bool, args []string) {
				s := ts.ReadFile(args[0])
				if !strings.Contains(s, args[1]) {
					ts.Fatalf("%s has no %q", args[0], args[1])
				}
				ts.Check(os.WriteFile(ts.MkAbs(args[0]),
					[]byte(strings.Replace(s, args[1], args[2], 1)), 0o644))
			},
			// cipherfile NAME DIR: sets $NAME to the only ciphertext file in DIR
			"cipherfile": func(ts *testscript.TestScript, _ bool, args []string) {
				es, err := os.ReadDir(ts.MkAbs(args[1]))
				ts.Check(err)
				for _, e := range es {
					if e.Type().IsRegular() && !strings.HasPrefix(e.Name(), "kmsfs.") {
						ts.Setenv(args[0], filepath.Join(args[1], e.Name()))
					}
				}
			},
			// oneline: stderr is one line of error, and perhaps a hint
			"oneline": func(ts *testscript.TestScript, _ bool, _ []string) {
				lines := strings.Split(strings.TrimRight(ts.ReadFile("stderr"), "\n"), "\n")
				if len(lines) > 2 || !strings.HasPrefix(lines[0], "kmsfs: error: ") ||
					len(lines) == 2 && !strings.HasPrefix(lines[1], "kmsfs: hint: ") {
					ts.Fatalf("not one line and a hint: %q", lines)
				}
			},
			// status CODE COMMAND...: the exit code of a command
			"status": func(ts *testscript.TestScript, _ bool, args []string) {
				err := ts.Exec(args[1], args[2:]...)
				code := 0
				if e, ok := err.(*exec.ExitError); ok {
					code = e.ExitCode()
				} else if err != nil {
					ts.Fatalf("%v", err)
				}
				if strconv.Itoa(code) != args[0] {
					ts.Fatalf("exit code %d, want %s", code, args[0])
				}
			},
			// killdaemon: SIGKILL for every daemon of the script
			"killdaemon": func(ts *testscript.TestScript, _ bool, args []string) {
				marks, _ := filepath.Glob(ts.MkAbs("state/kmsfs/mounts/*"))
				for _, m := range marks {
					id, _, _ := strings.Cut(ts.ReadFile(m), " ")
					pid, err := strconv.Atoi(id)
					ts.Check(err)
					fd, err := unix.PidfdOpen(pid, 0)
					ts.Check(err)
					ts.Check(unix.Kill(pid, unix.SIGKILL))
					for {
						if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}},
							10000); err != unix.EINTR {
							break
						}
					}
					unix.Close(fd)
				}
			},
		},
	})
}

// unmountBelow leaves no mount behind, whatever a script did.
func unmountBelow(t *testing.T, dir string) {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 2 && strings.HasPrefix(f[1], dir) {
			if err := detach(f[1]); err != nil {
				t.Errorf("%s is left mounted: %v", f[1], err)
			}
		}
	}
}

func TestLogIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	line := bytes.Repeat([]byte("x"), 1000)
	for range 5000 {
		if _, err := l.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, path + ".1"} {
		if st, err := os.Stat(p); err != nil || st.Size() > maxLog {
			t.Errorf("%s: %v, %v", p, st, err)
		}
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{`/a\040b`: "/a b", `/x`: "/x", `/t\134`: `/t\`,
		`/bad\9`: `/bad\9`} {
		if got := unescape(in); got != want {
			t.Errorf("%q became %q", in, got)
		}
	}
}
