//go:build linux && !portable

package volume

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
)

// truncate changes the size of a file that may be closed.
func (c *content) truncate(ctx context.Context, size int64) error {
	if size < 0 || size > blockcrypt.MaxPlain {
		return unix.EFBIG
	}
	f, err := c.acquire(ctx, size > 0)
	if err != nil && size == 0 && blockcrypt.ClassOf(err) != "" {
		return c.emptyDamaged(err)
	}
	if err != nil {
		return err
	}
	write := size > 0
	err = f.resize(ctx, size)
	f.mu.Lock()
	if c.v.Shared() {
		err = errors.Join(err, f.lease.giveBack())
	} else {
		err = errors.Join(err, f.Rest())
	}
	f.unlock()
	f.release(write)
	return f.failed("truncate", err)
}

// emptyDamaged empties a file that does not open: no key is needed to throw its
// content away.
func (c *content) emptyDamaged(damage error) error {
	if c.v.o.ReadOnly {
		return unix.EROFS
	}
	c.openMu.Lock()
	defer c.openMu.Unlock()
	if c.file.Load() != nil {
		return damage
	}
	c.dropHalf()
	fd, err := c.n.open(unix.O_RDWR)
	if err != nil {
		return err
	}
	defer c.v.disk.Close(fd)
	return c.v.disk.Truncate(fd, 0)
}

// resize is truncate for an open file.
func (f *file) resize(ctx context.Context, size int64) error {
	if err := f.needWrite(); err != nil {
		return err
	}
	if size == 0 {
		return f.empty(ctx)
	}
	unlock, err := f.lockForContent(ctx, false)
	if err != nil {
		return err
	}
	defer unlock()
	grows := size > f.Size
	if err := f.Truncate(size); err != nil {
		return err
	}
	if f.n.lost.cut(size); grows {
		f.n.lost.found(size-1, size)
	}
	return nil
}

// empty truncates to nothing. Where somebody has the file open for writing, the
// new content's data key is taken before the old content goes.
func (f *file) empty(ctx context.Context) error {
	for {
		if err := f.lease.lock(ctx); err != nil {
			return err
		}
		if f.writers == 0 || f.next != nil {
			break
		}
		if err := f.lease.giveBack(); err != nil {
			f.unlock()
			return err
		}
		f.unlock()
		if _, err := f.renewKey(ctx, nil); err != nil {
			return err
		}
	}
	defer f.unlock()
	_, err := f.Clear()
	if takes(f, f.next); err == nil {
		f.n.lost.cut(0)
	}
	return err
}
