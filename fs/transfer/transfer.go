// Package transfer copies trees out of a volume and into it, without a mount: content, names,
// modes, owners, times, extended attributes, holes, hard links and special files.
//
// A file takes its place when it is whole, with its time of modification. So a transfer that was
// interrupted goes on where it ended: files that are there with the same size and time are left alone.
// All names outside the volume are opened below a directory by [os.Root]: no symlink leads out of it.
package transfer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path"
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
var ErrIncomplete = errors.New("it was being written; what opens was exported, the last writes may be missing")

// ErrAttributes says that an entry is there, and lacks attributes.
var ErrAttributes = errors.New("it was copied, but not all of its attributes")

// tally counts what was transferred, and ends the transfer where it cannot go on.
type tally struct {
	o    Options
	stop context.CancelCauseFunc

	mu     sync.Mutex
	counts Counts
}

// note counts an entry, or its failure. A disk that is full ends the transfer.
func (x *tally) note(at string, err error, count func(*Counts)) {
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

// temporary is the name under which a file is made beside its place: the same in the next export,
// which takes it away.
func temporary(at string) string {
	h := sha256.Sum256([]byte(path.Base(at)))
	return path.Join(path.Dir(at), ".kmsfs-export-"+hex.EncodeToString(h[:8]))
}

// chunk is how much is read at once, in bytes.
const chunk = 1 << 20
