//go:build !linux || portable

package main

import (
	"context"
	"errors"

	"kmsfs/fs/volume"
)

var errOnlyLinux = errors.New("volumes are repaired on Linux only: fsck without --repair tells what is wrong")

// besideWriter refuses a repair.
func (f *fsckFlags) besideWriter(*volume.Found, string) error {
	if f.repair {
		return usageError{errOnlyLinux, "kmsfs fsck"}
	}
	return nil
}

func (f *fsckFlags) mend(context.Context, string) error { return errOnlyLinux }
