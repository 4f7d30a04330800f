//go:build linux && !portable

package disk

import (
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// A call that takes space is made again while what was removed leaves, for a while; one
// that syncs is not, since the kernel would say yes the second time.
func TestTake(t *testing.T) {
	for _, c := range []struct {
		name    string
		make    func(*Disk, func() error) error
		leaving int32
		removed time.Duration // before; 0: never
		frees   int           // which call finds space; 0: none
		calls   int           // at most
		ok      bool
	}{
		{"nothing was removed", take, 0, 0, 0, 1, false},
		{"it has left before", take, 0, time.Millisecond, 0, 1, false},
		{"it leaves", take, 1, time.Millisecond, 4, 4, true},
		{"it stays", take, 1, time.Millisecond, 0, 30, false},
		{"it has stayed for long", take, 1, time.Second, 0, 1, false},
		{"a sync", do, 1, time.Millisecond, 2, 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := &Disk{}
				d.leaving.Store(c.leaving)
				if c.removed > 0 {
					removed := time.Now().Add(-c.removed)
					d.removed.Store(&removed)
				}
				calls, begun := 0, time.Now()
				err := c.make(d, func() error {
					calls++
					if c.leaving > 0 && c.removed < freedWithin {
						removed := time.Now() // others remove too, all the time
						d.removed.Store(&removed)
					}
					if calls == c.frees {
						return nil
					}
					return unix.ENOSPC
				})
				if (err == nil) != c.ok || calls > c.calls || time.Since(begun) > freedWithin+freedPause {
					t.Errorf("%d calls in %v: %v", calls, time.Since(begun), err)
				}
			})
		})
	}
}

func take(d *Disk, f func() error) error { return d.take(Call{Op: "pwrite"}, f) }
func do(d *Disk, f func() error) error   { return d.do(Call{Op: "fdatasync"}, f) }

// What left just before the second look is seen.
func TestTakeLeftMeanwhile(t *testing.T) {
	d, calls, now := &Disk{}, 0, time.Now()
	d.leaving.Store(1)
	d.removed.Store(&now)
	err := take(d, func() error {
		if calls++; calls > 1 {
			return nil
		}
		d.leaving.Store(0)
		return unix.EDQUOT
	})
	if err != nil || calls != 2 {
		t.Errorf("%d calls: %v", calls, err)
	}
}
