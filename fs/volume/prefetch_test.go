package volume_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

// distant is a store that takes its time.
type distant struct{ keystore.Store }

const farAway = 20 * time.Millisecond

func (s distant) Unwrap(ctx context.Context, b keystore.Binding, w keystore.Wrapped) ([]byte, error) {
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
		w.store = distant{hidden{w.store}}
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
