package tests

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/keystore/keystoretest"
)

// A name that is replaced by rename always exists, and a program that has the old file
// open goes on with it.
func TestReplace(t *testing.T) {
	m := newVolume(t)
	name := m.path("f")
	write(t, name, []byte("0"))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for g := range 3 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				var err error
				switch g {
				case 0:
					var b []byte
					if b, err = os.ReadFile(name); err == nil && len(b) == 0 {
						err = errors.New("it is empty")
					}
				case 1:
					_, err = os.Stat(name)
				case 2:
					var f *os.File
					if f, err = os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644); err == nil {
						err = f.Close()
					}
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range 1500 {
		write(t, m.path("new"), []byte(strconv.Itoa(i)))
		if err := os.Rename(m.path("new"), name); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	m.run(`cd "$M"; echo hi >q; rm q <q; echo hi >q; (echo n >q.n; mv q.n q) <q; (rm q; sync /dev/stdin) <q
		mkfifo p; exec 5<>p; rm p; chmod 600 /proc/self/fd/5; touch -d @5 /proc/self/fd/5; stat -L /proc/self/fd/5 >/dev/null
		mkdir d; (cd d; rmdir ../d; ls; stat . >/dev/null; ! touch x 2>/dev/null)`)
}

// copy_file_range is done in the daemon, at any offsets, of data that is not written
// back yet too.
func TestCopyFileRange(t *testing.T) {
	m := newVolume(t)
	b := noise(3 << 20)
	in, err := os.OpenFile(m.path("in"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(m.path("out"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := in.Write(b); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 100)
	if _, err := out.Write(want); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ from, to, n int64 }{{0, 100, 5000}, {1 << 20, 5100, 2 << 20},
		{3<<20 - 10, 5100 + 2<<20, 1000}, {4 << 20, 0, 10}, {7, 3, 50}} {
		from, to := c.from, c.to
		n, err := unix.CopyFileRange(int(in.Fd()), &from, int(out.Fd()), &to, int(c.n), 0)
		if exp := max(0, min(c.n, int64(len(b))-c.from)); err != nil || int64(n) != exp {
			t.Fatalf("copied %d of %d: %v", n, exp, err)
		}
		if end := c.to + int64(n); end > int64(len(want)) {
			want = append(want, make([]byte, end-int64(len(want)))...)
		}
		copy(want[c.to:], b[min(c.from, int64(len(b))):][:n])
	}
	got, err := os.ReadFile(m.path("out"))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, want %d: %v", len(got), len(want), err)
	}
}

// A program that waits for its key keeps nobody else waiting, and can be ended.
func TestSlowKMS(t *testing.T) {
	srv := keystoretest.Start(t)
	w := newWalk(t, srv.URL)
	srv.AddKey("alias/k")
	w.kmsfs("init", "--key", "alias/k", w.cipher)
	w.mount()
	for i := range 20 {
		write(t, w.path(fmt.Sprint(i)), []byte(text))
	}
	w.remount()
	want(t, w.path("0"), []byte(text))
	srv.Fail(func(op string) *keystoretest.Failure {
		if op == "Decrypt" {
			return &keystoretest.Failure{Hang: true}
		}
		return nil
	})
	var waiting []*exec.Cmd
	for i := range 16 { // and several for one file
		c := exec.Command("cat", w.path(fmt.Sprint(1+i/2)))
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		waiting = append(waiting, c)
	}
	time.Sleep(200 * time.Millisecond)
	begun := time.Now()
	want(t, w.path("0"), []byte(text)) // its key is known
	write(t, w.path("new"), []byte(text))
	if d := time.Since(begun); d > 10*time.Second { // the deadline is 15 s
		t.Errorf("others waited %v", d)
	}
	begun = time.Now()
	for _, c := range waiting {
		c.Process.Signal(os.Interrupt)
	}
	for _, c := range waiting {
		c.Wait()
	}
	if d := time.Since(begun); d > 10*time.Second {
		t.Errorf("ending those who wait took %v", d)
	}
	srv.Fail(nil)
	want(t, w.path("1"), []byte(text))
	w.faults = true
}
