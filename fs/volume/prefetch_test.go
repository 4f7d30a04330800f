//go:build linux && !portable

package volume_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

// distant is a store that takes its time, and counts.
type distant struct {
	keystore.Store
	calls *atomic.Int32
}

const farAway = 20 * time.Millisecond

func (s distant) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	s.calls.Add(1)
	time.Sleep(farAway)
	return s.Store.Unwrap(ctx, b, w)
}

// What a scan waits for: as many calls, one after the other, as it takes to see that
// it is one, and hardly any after that, in one large directory or in many small ones.
func TestScanWaits(t *testing.T) {
	for _, c := range []struct{ dirs, files, most int }{
		{1, 2000, 20}, // 32 if it were 64 keys at once
		{100, 6, 10},
	} {
		w := newWorld(t, volume.Options{})
		for i := range c.dirs {
			w.mkdir(fmt.Sprint("d", i))
			for j := range c.files {
				w.write(fmt.Sprintf("d%d/f%d", i, j), []byte("x"))
			}
		}
		w.close()
		w.store = distant{hidden{w.store}, new(atomic.Int32)}
		synctest.Test(t, func(t *testing.T) {
			w.open(volume.Options{})
			defer w.close()
			begun, read := time.Now(), 0
			for _, d := range w.list("") {
				for _, f := range w.list(d) {
					w.want(d+"/"+f, []byte("x"))
					read++
				}
			}
			n := int(time.Since(begun) / farAway)
			t.Logf("%d directories of %d files: as long as %d calls", c.dirs, c.files, n)
			if read != c.dirs*c.files || n > c.most {
				t.Errorf("%d files were read in the time of %d calls, want %d", read, n, c.most)
			}
		})
	}
}

// Files opened at random, after a scan or beside one, cost no guesses, and do not
// hold the scan up.
func TestRandomBesideScan(t *testing.T) {
	const dirs, files = 20, 100
	w := newWorld(t, volume.Options{})
	w.mkdir("scan")
	for i := range 10 * files {
		w.write(fmt.Sprint("scan/f", i), []byte("x"))
	}
	for i := range dirs {
		w.mkdir(fmt.Sprint("d", i))
		for j := range files {
			w.write(fmt.Sprintf("d%d/f%d", i, j), []byte("x"))
		}
	}
	w.close()
	var calls atomic.Int32
	w.store = distant{hidden{w.store}, &calls}
	synctest.Test(t, func(t *testing.T) {
		w.open(volume.Options{})
		defer w.close()
		r, random := rand.New(rand.NewPCG(7, 8)), 0
		// Not the first of a directory: the scan would go on there, and guess all it may.
		first := make([]string, dirs)
		for i := range dirs {
			first[i] = w.list(fmt.Sprint("d", i))[0]
		}
		one := func() {
			d, f := random%dirs, "f0"
			for f == "f0" || f == first[d] {
				f = fmt.Sprint("f", r.IntN(files))
			}
			w.want(fmt.Sprintf("d%d/%s", d, f), []byte("x"))
			random++
		}
		begun := time.Now()
		for i, f := range w.list("scan") {
			w.want("scan/"+f, []byte("x"))
			if i%25 == 24 {
				one()
			}
		}
		if n := int(time.Since(begun)/farAway) - random; n > 20 {
			t.Errorf("a scan beside random opens waited for %d calls", n)
		}
		for range dirs {
			one()
		}
		if n := int(calls.Load()) - 10*files; n > 2*random {
			t.Errorf("%d opens at random cost %d calls", random, n)
		}
		t.Logf("%d opens at random, %d calls beside the scan's", random, int(calls.Load())-10*files)
	})
}
