//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/signal"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"kmsfs/fs/transfer"
	"kmsfs/fs/volume"
)

// exportFlags are those of kmsfs export.
type exportFlags struct {
	keyFlags
	acceptOlder, asJSON bool
}

func exportTreeCommand() *cobra.Command {
	var f exportFlags
	c := &cobra.Command{
		Use:   "export CIPHERDIR DSTDIR [PATH...]",
		Short: "Copy the plaintext of a volume to a directory, without a mount",
		Long: `Copy the plaintext of a volume, or the files and directories with these plaintext PATHs in it, to a
directory, without a mount: content, modes, owners (as root), times, extended attributes, holes, hard links and special
files. A file takes its place when it is whole; called again, the command goes on where it was
interrupted, and leaves files alone that have the same size and time. Nothing in DSTDIR is removed.

The volume may be a backup, or be mounted: then files that are being written are named, and the exit
code is 8. Files that cannot be read are named, and the others are exported.`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			paths := args[2:]
			if len(paths) == 0 {
				paths = []string{"."}
			}
			return f.run(contextOf(c), args[0], args[1], paths)
		},
	}
	f.add(c, openVolumeUsage)
	f.addIdentities(c)
	fl := c.Flags()
	fl.BoolVar(&f.acceptOlder, "accept-older", false,
		"accept a kmsfs.json that is older than the last one seen: a restored backup")
	fl.BoolVar(&f.asJSON, "json", false, "print the result as JSON")
	fl.Float64Var(&f.aws.RPS, "kms-rps", 2000, "calls a second to KMS at most")
	return c
}

// transferResult is the output of kmsfs export and import.
type transferResult struct {
	transfer.Counts
	Hidden int64        `json:"hidden"` // entries of the volume whose names do not decode
	Errors []failedFile `json:"errors"` // the first of them
}

func (f *exportFlags) run(ctx context.Context, cipherDir, dst string, paths []string) error {
	cipherDir, err := realDir(cipherDir)
	if err != nil {
		return err
	}
	if _, err := outside(dst, cipherDir); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	m := unlockFlags{keyFlags: f.keyFlags, readOnly: true, acceptOlder: f.acceptOlder}
	u, err := m.unlock(ctx, cipherDir)
	if err != nil {
		return err
	}
	defer u.Close()
	hidden := &hiddenEntries{}
	v, err := u.Open(volume.Options{ReadOnly: true, Logger: slog.New(hidden)})
	if err != nil {
		return err
	}
	out := transferResult{Errors: []failedFile{}}
	var line progressLine
	out.Counts, err = transfer.Export(ctx, v, paths, dst, out.options(&line))
	line.clear()
	out.Hidden = hidden.n.Load()
	err = errors.Join(out.show("exported", f.asJSON), out.verdict(ctx, fmt.Sprintf("the export to %s", dst), err))
	return errors.Join(err, v.Close())
}

// options report to the result, and show progress.
func (r *transferResult) options(line *progressLine) transfer.Options {
	last := time.Time{}
	return transfer.Options{
		AtOnce: transferAtOnce,
		Progress: func(c transfer.Counts) {
			if time.Since(last) > 200*time.Millisecond {
				last = time.Now()
				line.show("%d files, %d MiB", c.Files+c.Same, c.Bytes>>20)
			}
		},
		Failed: func(path string, err error) {
			if len(r.Errors) < mostErrors {
				r.Errors = append(r.Errors, failedFile{path, err.Error()})
			}
		},
	}
}

func (r *transferResult) show(done string, asJSON bool) error {
	if asJSON {
		return printJSON(r)
	}
	for _, x := range r.Errors {
		say("%s: %s", x.Path, x.Error)
	}
	fmt.Printf("%d files %s, %d bytes; %d were there already; %d directories, %d others, %d failed, %d incomplete.\n",
		r.Files, done, r.Bytes, r.Same, r.Dirs, r.Others, r.Failed, r.Incomplete)
	return nil
}

// verdict is the error of a transfer; what names it, and err is why it ended early.
func (r *transferResult) verdict(ctx context.Context, what string, err error) error {
	switch {
	case ctx.Err() != nil:
		return hint(errors.New("interrupted; the files that were copied stay"), "go on with the same command")
	case err != nil:
		return hint(fmt.Errorf("%s ended: %w", what, err), "go on with the same command")
	case r.Hidden > 0:
		return hint(fmt.Errorf("%d entries have names that cannot be read, and %d were not copied, or not whole", r.Hidden, r.Failed),
			"kmsfs fsck tells what is damaged")
	case r.Failed > 0:
		return hint(fmt.Errorf("%d entries were not copied, or not whole", r.Failed), "see why above; kmsfs fsck tells of damage in the volume")
	case r.Incomplete > 0:
		return coded{fmt.Errorf("%d files were being written meanwhile", r.Incomplete), exitIncomplete}
	}
	return nil
}

// hiddenEntries is the log of a volume of which only entries count that are not shown: all else is told
// by who asked.
type hiddenEntries struct{ n atomic.Int64 }

func (h *hiddenEntries) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }

func (h *hiddenEntries) Handle(_ context.Context, r slog.Record) error {
	if r.Message == volume.EntryNotShown {
		h.n.Add(1)
		var at string
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == "at" {
				at = a.Value.String()
			}
			return true
		})
		say("%s: %s", at, r.Message)
	}
	return nil
}

func (h *hiddenEntries) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h *hiddenEntries) WithGroup(string) slog.Handler      { return h }
