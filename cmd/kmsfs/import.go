//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"kmsfs/fs/transfer"
	"kmsfs/fs/volume"
)

// importFlags are those of kmsfs import.
type importFlags struct {
	keyFlags
	asJSON bool
}

func importTreeCommand() *cobra.Command {
	var f importFlags
	c := &cobra.Command{
		Use:   "import SRCDIR CIPHERDIR",
		Short: "Copy a directory into a volume, without a mount",
		Long: `Copy what is in a directory into the root of a volume, without a mount: content, modes, owners (as
root), times, extended attributes, holes, hard links and special files. A file takes its place when it
is whole; called again, the command goes on where it was interrupted, and leaves files alone that have
the same size and time. Nothing in the volume is removed.

The volume must not be mounted for writing: copy to the mount point then. Files that cannot be read are
named, and the others imported; so are those that change while they are read (exit code 8).`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error { return f.run(contextOf(c), args[0], args[1]) },
	}
	f.add(c, openVolumeUsage)
	fl := c.Flags()
	fl.BoolVar(&f.asJSON, "json", false, "print the result as JSON")
	fl.Float64Var(&f.aws.RPS, "kms-rps", 2000, "calls a second to KMS at most")
	return c
}

func (f *importFlags) run(ctx context.Context, src, cipherDir string) error {
	cipherDir, err := realDir(cipherDir)
	if err != nil {
		return err
	}
	from, err := filepath.EvalSymlinks(src)
	if err == nil {
		from, err = filepath.Abs(from)
	}
	if err != nil {
		return err
	}
	if strings.HasPrefix(cipherDir+"/", strings.TrimSuffix(from, "/")+"/") || strings.HasPrefix(from+"/", cipherDir+"/") {
		return usageError{fmt.Errorf("%s and the ciphertext directory lie one in the other", src), "kmsfs import"}
	}
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	m := unlockFlags{keyFlags: f.keyFlags}
	u, err := m.unlock(ctx, cipherDir)
	if err != nil {
		return err
	}
	defer u.Close()
	v, err := u.Open(volume.Options{Pool: poolBase, NoPrefetch: true,
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if errors.Is(err, volume.ErrLocked) {
		err = hint(err, "copy to its mount point, or unmount it first")
	}
	if err != nil {
		return err
	}
	err = v.Wait(ctx) // what a mount has left to be repaired
	out := transferResult{Errors: []failedFile{}}
	var line progressLine
	if err == nil {
		out.Counts, err = transfer.Import(ctx, v, from, out.options(&line))
	}
	line.clear()
	cerr := v.Close() // it makes all durable
	return errors.Join(out.show("imported", f.asJSON), out.verdict(ctx, "the import", errors.Join(err, cerr)))
}
