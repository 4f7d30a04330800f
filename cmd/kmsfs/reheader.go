//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
)

// reheaderFlags are those of kmsfs reheader.
type reheaderFlags struct {
	keyFlags
	size   int
	asJSON bool
}

// reheaderRequest is what a daemon is asked.
type reheaderRequest struct {
	Size   int `json:"size"` // of headers, in bytes; 0: twice what they have, or what was begun
	AtOnce int `json:"at_once"`
}

func reheaderCommand() *cobra.Command {
	var f reheaderFlags
	c := &cobra.Command{
		Use:   "reheader [--size BYTES] CIPHERDIR",
		Short: "Give the files of a volume larger headers, with room for more recipients",
		Long: `Give the files of a volume larger headers, with room for more recipients: 1,024 bytes hold
two KMS keys, 2,048 hold these and an age recipient. New files get such headers at once. Those that
are there are encrypted again, with new data keys, as by kmsfs rekey; the volume may be mounted and in
use, and the command can be interrupted and called again.

Until all files are done, versions of kmsfs before this one refuse the volume.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return f.run(contextOf(c), args[0]) },
	}
	f.add(c, openVolumeUsage)
	f.addIdentities(c)
	f.addUnverified(c)
	c.Flags().IntVar(&f.size, "size", 0,
		"of a header in `BYTES`, a multiple of 512 up to 65024; default: twice what they have")
	c.Flags().BoolVar(&f.asJSON, "json", false, "print the result as JSON")
	c.Flags().Float64Var(&f.aws.RPS, "kms-rps", 2000,
		"calls a second to KMS at most, if the volume is not mounted")
	return c
}

func (f *reheaderFlags) run(ctx context.Context, dir string) error {
	if f.size != 0 && (f.size < 512 || f.size > blockcrypt.MaxHeader || f.size%512 != 0) {
		return usageError{fmt.Errorf("--size %d: want a multiple of 512 from 512 to %d", f.size,
			blockcrypt.MaxHeader), "kmsfs reheader"}
	}
	out := rekeyResult{Errors: []failedFile{}}
	var line progressLine
	err := f.administer(ctx, dir, func(a administrator) error {
		var rec *volume.Record
		err := a.reheader(ctx, reheaderRequest{f.size, rekeyAtOnce}, func(n news) {
			if n.Record != nil {
				rec = n.Record
			}
			if n.Rekeyed != nil {
				out.Rekeyed = *n.Rekeyed
				line.show("%d files, %d changed", out.Files, out.Changed)
			}
			if n.Failed != nil && len(out.Errors) < mostErrors {
				out.Errors = append(out.Errors, *n.Failed)
			}
		})
		if rec != nil {
			err = errors.Join(err, updateRecord(rec, dir, "", ""))
		}
		return err
	})
	line.clear()
	if err != nil {
		return err
	}
	if f.asJSON {
		err = printJSON(out)
	} else {
		for _, x := range out.Errors {
			say("%s: %s", x.Path, x.Error)
		}
		fmt.Printf("%d files: %d have new headers, %d had them already or are empty, %d failed.\n",
			out.Files, out.Changed, out.Files-out.Changed-out.Failed, out.Failed)
	}
	if err == nil && out.Failed > 0 {
		err = hint(fmt.Errorf("%d files have their old headers", out.Failed),
			"see why above, and call the command again")
	}
	return err
}

// reheaderVolume gives files other headers, in the process that has the volume open.
func reheaderVolume(ctx context.Context, v *volume.Volume, q reheaderRequest, tell func(news)) error {
	rs := v.Recipients()
	now, former := rs.HeaderSize()
	switch {
	case q.Size != 0:
	case former != 0:
		q.Size = now // as it was begun
	case now >= blockcrypt.MaxHeader:
		return fmt.Errorf("the headers have %d bytes: there are no larger ones", now)
	default:
		q.Size = min(2*now, blockcrypt.MaxHeader)
	}
	rec, err := rs.SetHeaderSize(q.Size)
	if err != nil {
		return err
	}
	tell(news{Record: rec})
	done, rec, err := rs.Reheader(ctx, rekeyOptions(q.AtOnce, tell))
	tell(news{Rekeyed: &done, Record: rec})
	return err
}
