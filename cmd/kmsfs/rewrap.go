//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

// rewrapFlags are those of kmsfs rewrap.
type rewrapFlags struct {
	keyFlags
	from, to                string
	missing, verify, asJSON bool
}

// rewrapAtOnce is how many files are changed at the same time: with calls of 20 ms that gives 3,000
// a second, more than --kms-rps lets through.
const rewrapAtOnce = 64

func rewrapCommand() *cobra.Command {
	var f rewrapFlags
	c := &cobra.Command{
		Use:   "rewrap [--from KEY --to KEY] [--missing] [--verify] CIPHERDIR|FILE...",
		Short: "Give the files of a volume its present recipients",
		Long: `Give the files of a volume its present recipients: those that kmsfs recipients lists,
and no others. Only the wrapped keys in the headers change, not the content. The command can be
interrupted and called again. The volume may be mounted and in use. Length and time of the
files stay, so a backup tool must compare contents once to see the change (rsync --checksum).

Between two KMS keys of one Region KMS rewraps the keys by itself (ReEncrypt), if it is allowed;
else, and for files under branch keys, they are decrypted and encrypted again here.

FILE is one that kmsfs encrypt made: it gets the key of --to in the place of --from, or of all that
it has. Files of a volume get theirs with the volume.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if st, err := os.Stat(args[0]); err == nil && st.Mode().IsRegular() {
				return f.files(contextOf(c), args)
			}
			if len(args) > 1 {
				return usageError{errors.New("one volume at a time, or several files"), "kmsfs rewrap"}
			}
			return f.run(contextOf(c), args[0])
		},
	}
	f.add(c, openVolumeUsage)
	f.addIdentities(c)
	f.addUnverified(c)
	fl := c.Flags()
	fl.StringVar(&f.from, "from", "",
		"only replace this `KEY` in the files that have it, by the one of --to")
	fl.StringVar(&f.to, "to", "", "the `KEY`, a recipient of the volume, that takes its place")
	fl.BoolVar(&f.missing, "missing", false, "only add the recipients that files lack; take none out")
	fl.BoolVar(&f.verify, "verify", false,
		"read all headers again afterwards, and fail if one is not as it should be")
	fl.BoolVar(&f.asJSON, "json", false, "print the result as JSON")
	fl.Float64Var(&f.aws.RPS, "kms-rps", 2000,
		"calls a second to KMS at most, if the volume is not mounted")
	return c
}

// rewrapResult is the output of kmsfs rewrap.
type rewrapResult struct {
	volume.Rewrapped
	Errors []failedFile `json:"errors"` // the first of them
	Wrong  []string     `json:"wrong"`  // files that --verify has found, the first of them
}

const mostErrors = 100 // that the output of a command lists

func (f *rewrapFlags) run(ctx context.Context, dir string) error {
	if (f.from == "") != (f.to == "") || f.from != "" && f.missing {
		return usageError{errors.New("--from and --to go together, and without --missing"), "kmsfs rewrap"}
	}
	return f.administer(ctx, dir, func(a administrator) error {
		list, err := a.recipients(ctx)
		if err != nil {
			return err
		}
		q := rewrapRequest{Missing: f.missing, AtOnce: rewrapAtOnce}
		if f.from != "" {
			if q.From, err = f.uriOf(ctx, f.from, list); err == nil {
				q.To, err = f.recipientNamed(ctx, a, f.to)
			}
			if err != nil {
				return err
			}
		}
		out := rewrapResult{Errors: []failedFile{}, Wrong: []string{}}
		var line progressLine
		var rec *volume.Record // where former keys of directories were forgotten
		err = a.rewrap(ctx, q, func(n news) {
			if n.Progress != nil {
				out.Rewrapped = *n.Progress
				line.show("%d files, %d changed", out.Files, out.Changed)
			}
			if n.Failed != nil && len(out.Errors) < mostErrors {
				out.Errors = append(out.Errors, *n.Failed)
			}
			if n.Record != nil {
				rec = n.Record
			}
		})
		if err == nil && rec != nil {
			err = updateRecord(rec, dir, "", "")
		}
		if err == nil && f.verify {
			line.show("reading all headers again")
			err = f.verifyAll(ctx, dir, q, &out)
		}
		line.clear()
		return errors.Join(f.show(&out), f.verdict(ctx, err, &out, dir))
	})
}

func (f *rewrapFlags) show(out *rewrapResult) error {
	if f.asJSON {
		return printJSON(out)
	}
	for _, x := range out.Errors {
		say("%s: %s", x.Path, x.Error)
	}
	for _, path := range out.Wrong {
		say("%s does not have the recipients that it should have", path)
	}
	fmt.Printf("%d files: %d changed, %d had them already, %d failed.\n", out.Files, out.Changed,
		out.Files-out.Changed-out.Failed, out.Failed)
	return nil
}

func (f *rewrapFlags) verdict(ctx context.Context, err error, out *rewrapResult, dir string) error {
	switch {
	case ctx.Err() != nil || errors.Is(err, context.Canceled):
		return hint(errors.New("interrupted; the files that were changed stay so"),
			"go on with the same command")
	case err != nil:
		return err
	case out.Failed > 0:
		return hint(fmt.Errorf("%d files could not be changed", out.Failed),
			"see kmsfs fsck %s, and call the command again", shellWord(dir))
	case len(out.Absent) > 0:
		return hint(fmt.Errorf("some files lack %s, whose key is not at hand",
			strings.Join(out.Absent, ", ")),
			"name all keys with --key, or give --passphrase-file; of a mounted volume, those are taken with which it was mounted")
	case out.FormerKept != "":
		return hint(fmt.Errorf("keys that directories had before stay trusted: %s", out.FormerKept), "call the command again later")
	case out.FormerNeeded > 0 && f.from == "" && !f.missing:
		return hint(fmt.Errorf("%d files still need a key that their directory had before", out.FormerNeeded),
			"call the command again")
	case len(out.Wrong) > 0:
		return hint(errors.New("not all files are as they should be"),
			"call the command again; files that were made meanwhile may be among them")
	}
	return nil
}

// verifyAll reads every header again. With --from none may name that key. Else each must have just
// the recipients of the volume, or those of one of its directories; with --missing it may have others
// too. Which directory a file is in is not looked at: kmsfs fsck does that.
func (f *rewrapFlags) verifyAll(ctx context.Context, dir string, q rewrapRequest, out *rewrapResult) error {
	l, err := volume.Find(dir)
	if err != nil {
		return err
	}
	defer l.Close()
	lists := [][]blockcrypt.Recipient{l.Config.Recipients}
	for _, keys := range l.Config.Directories {
		if len(keys.Recipients) > 0 {
			lists = append(lists, keys.Recipients)
		}
	}
	return volume.Inventory(ctx, dir, func(e volume.Inventoried) {
		bad := e.Err != nil
		if e.Header != nil {
			has := e.Header.Recipients
			in := func(uri string, list []blockcrypt.Recipient) bool {
				return slices.ContainsFunc(list, func(r blockcrypt.Recipient) bool { return sameKey(r.URI, uri) })
			}
			hasAllOf := func(list []blockcrypt.Recipient) bool {
				lacks := func(r blockcrypt.Recipient) bool { return !in(r.URI, has) }
				strange := func(r blockcrypt.Recipient) bool { return !in(r.URI, list) }
				return !slices.ContainsFunc(list, lacks) && (q.Missing || !slices.ContainsFunc(has, strange))
			}
			bad = !slices.ContainsFunc(lists, hasAllOf)
			if q.From != "" {
				bad = in(q.From, has)
			}
		}
		if bad && len(out.Wrong) < mostErrors {
			out.Wrong = append(out.Wrong, e.Path)
		}
	})
}

// files rewraps single files.
func (f *rewrapFlags) files(ctx context.Context, paths []string) error {
	if f.to == "" || f.missing || f.verify {
		return usageError{errors.New("files take --to, and may take --from"), "kmsfs rewrap"}
	}
	add := newRecipientFlags{keyFlags: f.keyFlags}
	change, m, err := add.prepare(ctx, f.to)
	if err != nil {
		return err
	}
	defer clear(change.Passphrase)
	to, err := add.newRecipient(ctx, change)
	if err != nil {
		unmake([]made{m})
		return err
	}
	if keystore.OnlySeals(to) && f.from == "" {
		return usageError{errors.New("an age recipient is for recovery: name with --from the key that it is to replace"), "kmsfs rewrap"}
	}
	out := rewrapResult{Errors: []failedFile{}, Wrong: []string{}}
	for _, path := range paths {
		out.Files++
		changed, err := f.file(ctx, path, to)
		if err != nil {
			out.Failed++
			out.Errors = append(out.Errors, failedFile{path, err.Error()})
			if len(paths) == 1 {
				unmake([]made{m})
				return named(path, err)
			}
		} else if changed {
			out.Changed++
		}
	}
	if m.created && out.Changed > 0 {
		say("the key file %s was made; back it up: without it the files cannot be opened", m.path)
	} else {
		unmake([]made{m}) // no file needs it
	}
	return errors.Join(f.show(&out), f.verdict(ctx, nil, &out, ""))
}

// file gives one file the recipient to in the place of others.
func (f *rewrapFlags) file(ctx context.Context, path string, to keystore.Store) (changed bool, err error) {
	l, err := volume.OpenLone(path)
	if err != nil {
		return false, err
	}
	defer l.Close()
	if l.Header == nil {
		return false, nil // an empty file has no key
	}
	if l.Header.Volume != (blockcrypt.ID{}) {
		return false, hint(errors.New("it is a file of a volume"), "rewrap the volume")
	}
	var old []string
	for _, w := range l.Header.Recipients {
		old = append(old, w.URI)
	}
	goes := func(uri string) bool { return true }
	if f.from != "" {
		from, err := f.uriOf(ctx, f.from, old)
		if err != nil {
			return false, err
		}
		goes = func(uri string) bool { return sameKey(uri, from) }
	}
	var kept, stays []blockcrypt.Recipient // kept: it has this one already
	for _, r := range l.Header.Recipients {
		switch {
		case keystore.Serves(to, r.URI):
			kept = append(kept, r)
		case !goes(r.URI):
			stays = append(stays, r)
		}
	}
	if len(kept)+len(stays) == len(old) {
		return false, nil // nothing that is to go is there
	}
	key, err := f.dataKey(ctx, l)
	if err != nil {
		return false, err
	}
	defer clear(key)
	if incomplete, err := l.Unlock(key); err != nil {
		return false, err
	} else if incomplete {
		return false, coded{errors.New("it was being written when it was copied"), exitIncomplete}
	}
	w, err := to.Wrap(ctx, l.Binding(), key) // again, even if it has one: that could be damaged
	if err != nil {
		return false, err
	}
	return true, l.SetRecipients(append([]blockcrypt.Recipient{w}, stays...))
}
