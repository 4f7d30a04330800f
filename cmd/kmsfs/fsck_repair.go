//go:build linux && !portable

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"kmsfs/fs/volume"
	"kmsfs/fs/volume/check"
)

// besideWriter refuses a repair while the volume is mounted for writing, and says so before a check.
func (f *fsckFlags) besideWriter(l *volume.Found, dir string) error {
	if err := l.Tree().Writer(); err != nil {
		if !errors.Is(err, volume.ErrLocked) {
			return fmt.Errorf("%s: %w", dir, err)
		}
		if l.Config.Shared { // a repair is that of one host more
			return nil
		}
		if f.repair {
			return hint(fmt.Errorf("%s: %w", dir, err),
				"kmsfs umount it first; without --repair it is checked as it is")
		}
		say("%s is mounted for writing: files that are being written now may be reported", dir)
	}
	return nil
}

// mend opens the volume for writing, which repairs what a bad end has left, and
// does about the other findings what can be done.
func (f *fsckFlags) mend(ctx context.Context, dir string) error {
	f.clearLine()
	ignorePipe() // not in the middle of a repair
	u, err := f.unlock(ctx, dir, false)
	if err != nil {
		return err
	}
	defer u.Close()
	v, err := u.Open(volume.Options{Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		NoPrefetch: true})
	if err != nil {
		return err
	}
	err = v.Wait(ctx)
	if err == nil {
		for _, r := range check.Repair(ctx, v, f.findings, f.ask) {
			f.repaired = append(f.repaired, r)
			switch {
			case f.asJSON:
			case r.Err != nil:
				fmt.Printf("not repaired  %s: %v\n", r.Path, r.Err)
			default:
				fmt.Printf("repaired      %s: %s\n", r.Path, r.Done)
			}
		}
	}
	return errors.Join(err, v.Close())
}

// ask asks about one damaged file.
func (f *fsckFlags) ask(x check.Finding) bool {
	if f.yes {
		return true
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	defer tty.Close()
	fmt.Fprintf(tty, "Keep what can be read of %s as a copy beside it? [yes/no] ", place(x))
	answer, _ := bufio.NewReader(tty).ReadString('\n')
	return strings.TrimSpace(answer) == "yes"
}
