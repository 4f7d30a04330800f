//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
)

// ErrOtherSize says that files are being given headers of another size than the one that is asked for.
var ErrOtherSize = errors.New("the files are being given headers of another size")

// HeaderSize returns the size of new files' headers in bytes, and that of files that were not given
// such a header yet; 0 if there are none.
func (r *Recipients) HeaderSize() (now, former int) {
	c := r.now.Load().cfg
	return c.Header, c.Former
}

// SetHeaderSize gives new files headers of this size in bytes. Those that are there get theirs by
// [Recipients.Reheader]. It returns what the trust record should say.
func (r *Recipients) SetHeaderSize(size int) (*Record, error) {
	unlock, err := r.lock(context.Background())
	if err != nil {
		return nil, err
	}
	defer unlock()
	next := *r.now.Load().cfg
	switch {
	case size > blockcrypt.MaxHeader:
		return nil, fmt.Errorf("a header of %d bytes: %d are the most", size, blockcrypt.MaxHeader)
	case next.Header == size:
		return record(&next, r.v.vk), nil
	case size == next.Former: // back, where some files cannot be changed
	case next.Former != 0:
		return nil, fmt.Errorf("%w: %d bytes", ErrOtherSize, next.Header)
	}
	next.Header, next.Former = size, next.Header
	var rec *Record
	err = r.v.peers.alone(func() error { // others would make files with the former size for a while
		rec, err = r.replace(next, r.now.Load().stores, nil)
		return err
	})
	if err != nil {
		return nil, err
	}
	// A call that writes a first header now has the file's lock: from here on all are new ones, or
	// can be seen.
	for _, f := range r.v.nodes.files() {
		f.mu.Lock()
		f.unlock()
	}
	return rec, nil
}

// Reheader gives files that have headers of the former size new ones, and with them new data keys, as
// [Volume.Rekey] does. When no file has the former size any more, kmsfs.json says so, and the trust
// record should say rec; it is nil while files are left.
func (r *Recipients) Reheader(ctx context.Context, o RekeyOptions) (done Rekeyed, rec *Record, err error) {
	v := r.v
	if v.o.ReadOnly {
		return done, nil, unix.EROFS
	}
	if _, former := r.HeaderSize(); former == 0 {
		return done, nil, nil
	}
	o.headers = true
	if done, err = v.Rekey(ctx, v.root, o); err != nil || done.Failed > 0 {
		return done, nil, err
	}
	unlock, err := r.lock(ctx)
	if err != nil {
		return done, nil, err
	}
	defer unlock()
	next := *r.now.Load().cfg
	left, err := r.all(ctx, func(h *blockcrypt.Header) bool { return h.Geometry.Header() != next.Former })
	if err == nil && left.Files > 0 {
		err = fmt.Errorf("%d files have headers of %d bytes yet, the first is %s", left.Files, next.Former, left.First)
	}
	if err == nil {
		err = v.syncAll() // the headers that were read need not be on the disk yet
	}
	if err != nil {
		return done, nil, err
	}
	next.Former = 0
	rec, err = r.replace(next, r.now.Load().stores, nil)
	return done, rec, err
}
