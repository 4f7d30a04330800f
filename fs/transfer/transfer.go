//go:build linux && !portable

// Package transfer copies trees out of a volume and into it, without a mount: content, names,
// modes, owners, times, extended attributes, holes, hard links and special files.
//
// A file takes its place when it is whole, with its time of modification. So a transfer that was
// interrupted goes on where it ended: files that are there with the same size and time are left alone.
// All names outside the volume are opened below a directory by [os.Root]: no symlink leads out of it.
package transfer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Options of [Export] and [Import].
type Options struct {
	AtOnce   int                          // files at the same time; 1 if zero
	Progress func(Counts)                 // told after each file, by one goroutine at a time; it may be nil
	Failed   func(path string, err error) // told of each entry that was not copied, or not whole, likewise
}

// Counts counts what was copied.
type Counts struct {
	Dirs       int64 `json:"directories"`
	Files      int64 `json:"files"`
	Same       int64 `json:"same"` // files that were there already
	Others     int64 `json:"others"`
	Bytes      int64 `json:"bytes"` // of plaintext that were copied
	Failed     int64 `json:"failed"`
	Incomplete int64 `json:"incomplete"` // files that were being written, and are there all the same
}

// ErrIncomplete says that a file was being written when the volume was copied, or is now.
var ErrIncomplete = errors.New("the file was being written; the blocks that open were exported, the last writes may be missing")

// ErrAttributes says that an entry is there, and lacks attributes.
var ErrAttributes = errors.New("it was copied, but not all of its attributes")

// attributeErrors say which attributes an entry lacks. They are ErrAttributes, on one line.
type attributeErrors []error

func (e attributeErrors) Error() string {
	var out []string
	for _, err := range e {
		out = append(out, err.Error())
	}
	return ErrAttributes.Error() + ": " + strings.Join(out, "; ")
}

// Unwrap returns all of them.
func (e attributeErrors) Unwrap() []error { return append([]error{ErrAttributes}, e...) }

// note adds the failure of an attribute.
func (e *attributeErrors) note(err error, attribute string) {
	if err != nil {
		*e = append(*e, fmt.Errorf("%s: %w", attribute, err))
	}
}

// err returns nil if there was none.
func (e attributeErrors) err() error {
	if len(e) == 0 {
		return nil
	}
	return e
}

// copying is an export or an import under way, with what both have.
type copying struct {
	o     Options
	root  *os.Root                // outside the volume
	user  bool                    // this is not root: the copies belong to the caller
	stop  context.CancelCauseFunc // ends it
	first map[[2]uint64]string    // the first of the names of a file that has several, by device and inode

	mu     sync.Mutex
	counts Counts
}

// begin opens the directory outside the volume. The context ends when the copying cannot go on.
func begin(ctx context.Context, dir string, o Options) (context.Context, *copying, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, nil, err
	}
	c := &copying{o: o, root: root, user: os.Geteuid() != 0, first: map[[2]uint64]string{}}
	ctx, c.stop = context.WithCancelCause(ctx)
	return ctx, c, nil
}

// end closes the directory.
func (x *copying) end() {
	x.stop(nil)
	x.root.Close()
}

// crew calls do for what is sent to jobs, for several at the same time, until wait, which ends that.
func crew[T any](atOnce int, do func(T)) (jobs chan T, wait func()) {
	jobs = make(chan T)
	var wg sync.WaitGroup
	for range max(1, atOnce) {
		wg.Go(func() {
			for x := range jobs {
				do(x)
			}
		})
	}
	return jobs, func() {
		close(jobs)
		wg.Wait()
	}
}

// rootOnly reports whether an extended attribute is one that root alone can set.
func rootOnly(name string) bool {
	return !strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "system.")
}

// data is a file with holes, to be read.
type data struct {
	seek func(off int64, whence int) (int64, error)
	read func(b []byte, off int64) (int, error) // 0 at the end
}

// copyTo copies the data of a file of about this size, and leaves holes out. end is where it ends.
func (d data) copyTo(ctx context.Context, size int64, write func(b []byte, off int64) error) (copied, end int64, err error) {
	b := make([]byte, min(chunk, max(1, size)))
	for {
		if err := ctx.Err(); err != nil {
			return copied, end, err
		}
		next, err := d.seek(end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return copied, end, nil
		}
		if err != nil {
			return copied, end, err
		}
		hole, err := d.seek(next, unix.SEEK_HOLE)
		if err != nil {
			return copied, end, err
		}
		n, err := d.read(b[:min(int64(len(b)), hole-next)], next)
		if err == nil && n > 0 {
			err = write(b[:n], next)
		}
		if err != nil || n == 0 {
			return copied, end, err
		}
		copied, end = copied+int64(n), next+int64(n)
	}
}

// note counts an entry, or its failure. A disk that is full ends all.
func (x *copying) note(at string, err error, count func(*Counts)) {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch {
	case err == nil:
		count(&x.counts)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		x.stop(fmt.Errorf("%s: %w", at, err))
	case errors.Is(err, context.Canceled):
	case (errors.Is(err, ErrIncomplete) || errors.Is(err, ErrChanged)) && !errors.Is(err, ErrAttributes):
		count(&x.counts)
		x.counts.Incomplete++
		x.o.Failed(at, err)
	default:
		x.counts.Failed++
		x.o.Failed(at, err)
	}
	if x.o.Progress != nil {
		x.o.Progress(x.counts)
	}
}

// chunk is how much is read at once, in bytes.
const chunk = 1 << 20
