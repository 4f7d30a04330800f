package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"kmsfs/fs/export"
	"kmsfs/fs/volume"
)

// exportFlags are those of kmsfs export.
type exportFlags struct {
	keyFlags
	acceptOlder, asJSON bool
}

// exportAtOnce is how many files are copied at the same time: keys of a service are waited for.
const exportAtOnce = 32

func exportTreeCommand() *cobra.Command {
	var f exportFlags
	c := &cobra.Command{
		Use:   "export CIPHERDIR DSTDIR [PATH...]",
		Short: "Copy the plaintext of a volume to a directory, without a mount",
		Long: `Copy the plaintext of a volume, or what has these plaintext PATHs in it, to a directory, without a
mount: content, modes, owners (as root), times, extended attributes, holes, hard links and special
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

// exportResult is the output of kmsfs export.
type exportResult struct {
	export.Counts
	Hidden int64        `json:"hidden"` // entries whose names do not decode
	Errors []failedFile `json:"errors"` // the first of them
}

func (f *exportFlags) run(ctx context.Context, cipherDir, dst string, paths []string) error {
	cipherDir, err := realDir(cipherDir)
	if err != nil {
		return err
	}
	to, err := filepath.Abs(dst)
	if err != nil {
		return err
	}
	if strings.HasPrefix(to+"/", cipherDir+"/") {
		return usageError{fmt.Errorf("%s lies in the ciphertext directory", dst), "kmsfs export"}
	}
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	m := mountFlags{keyFlags: f.keyFlags, readOnly: true, acceptOlder: f.acceptOlder}
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
	out := exportResult{Errors: []failedFile{}}
	var line progressLine
	last := time.Time{}
	out.Counts, err = export.Tree(ctx, v, paths, dst, export.Options{
		AtOnce: exportAtOnce,
		Progress: func(c export.Counts) {
			if time.Since(last) > 200*time.Millisecond {
				last = time.Now()
				line.show("%d files, %d MiB", c.Files+c.Same, c.Bytes>>20)
			}
		},
		Failed: func(path string, err error) {
			if len(out.Errors) < mostErrors {
				out.Errors = append(out.Errors, failedFile{path, err.Error()})
			}
		},
	})
	line.clear()
	out.Hidden = hidden.n.Load()
	return errors.Join(f.show(&out), f.verdict(ctx, err, &out, dst), v.Close())
}

func (f *exportFlags) show(out *exportResult) error {
	if f.asJSON {
		return printJSON(out)
	}
	for _, x := range out.Errors {
		say("%s: %s", x.Path, x.Error)
	}
	fmt.Printf("%d files exported, %d bytes; %d were there already; %d directories, %d others, %d failed, %d incomplete.\n",
		out.Files, out.Bytes, out.Same, out.Dirs, out.Others, out.Failed, out.Incomplete)
	return nil
}

func (f *exportFlags) verdict(ctx context.Context, err error, out *exportResult, dst string) error {
	switch {
	case ctx.Err() != nil:
		return hint(errors.New("interrupted; what was exported stays"), "go on with the same command")
	case err != nil:
		return hint(fmt.Errorf("the export to %s ended: %w", dst, err), "go on with the same command")
	case out.Failed > 0 || out.Hidden > 0:
		return hint(fmt.Errorf("%d entries were not exported, or not whole, and %d have names that cannot be read", out.Failed, out.Hidden),
			"kmsfs fsck tells what is damaged")
	case out.Incomplete > 0:
		return coded{fmt.Errorf("%d files were being written; what opens was exported", out.Incomplete), exitIncomplete}
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
