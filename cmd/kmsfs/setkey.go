//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

// setKeyFlags are those of kmsfs setkey.
type setKeyFlags struct {
	newRecipientFlags
	inherit bool
}

// setKeyRequest gives a directory keys: none, those of the directory above.
type setKeyRequest struct {
	rekeyRequest
	Keys []recipientChange `json:"keys"`
}

func setKeyCommand() *cobra.Command {
	var f setKeyFlags
	c := &cobra.Command{
		Use:   "setkey DIR KEY... | setkey --inherit DIR",
		Short: "Give the new files of a directory keys of its own",
		Long: `Give the new files below a directory keys of its own, in the place of the volume's recipients: of
KMS, in any Region or account, local ones, or age recipients. DIR is a directory on a mount, or of a
ciphertext directory that is not mounted. kmsfs rewrap gives the keys to the files that are there, and
takes those of before out; until then both are trusted. kmsfs info lists what was set.

Somebody who has no right to the keys of a directory can use the rest of the volume: he sees the names
in the directory, and cannot read or make files in it. To open the volume its recipients are needed.
A file does not move to a directory with other keys: mv copies it, and hard links are refused.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if f.inherit != (len(args) == 1) {
				return usageError{errors.New("name one or more keys, or give --inherit"), "kmsfs setkey"}
			}
			return f.run(contextOf(c), args[0], args[1:])
		},
	}
	f.add(c, openVolumeUsage)
	f.addIdentities(c)
	f.addUnverified(c)
	c.Flags().BoolVar(&f.inherit, "inherit", false, "new files get the keys of the directory above again")
	c.Flags().BoolVar(&f.asJSON, "json", false, "print JSON")
	return c
}

// setKeyResult is the output of kmsfs setkey.
type setKeyResult struct {
	Path     string   `json:"path"`                // below the volume
	Keys     []string `json:"keys"`                // that new files get; none: those of the directory above
	KeyFiles []string `json:"key_files,omitempty"` // that were made
}

func (f *setKeyFlags) run(ctx context.Context, path string, keys []string) error {
	dir, place, err := volumeOfPath(path)
	if err != nil {
		return err
	}
	return f.administer(ctx, dir, func(a administrator) error {
		q := setKeyRequest{rekeyRequest: place}
		ms, err := f.prepareAll(ctx, keys, &q)
		if err != nil {
			return err
		}
		out := setKeyResult{Path: place.Path, Keys: []string{}}
		rec, err := a.setKeys(ctx, q, func(n news) { out.Keys = append(out.Keys, n.URI) })
		if err != nil {
			for _, m := range ms {
				if m.created { // it cannot be known whether the directory has it by now
					say("the key file %s was made, and stays: kmsfs info tells whether the directory has it", m.path)
				}
			}
			return err
		}
		for i, uri := range out.Keys {
			if err := updateRecord(rec, dir, uri, ms[i].path); err != nil {
				return err
			}
			if ms[i].created {
				out.KeyFiles = append(out.KeyFiles, ms[i].path)
			}
		}
		if len(out.Keys) == 0 {
			if err := updateRecord(rec, dir, "", ""); err != nil {
				return err
			}
		}
		return f.show(&out, path, dir)
	})
}

// prepareAll does what the keys need of this user's side.
func (f *setKeyFlags) prepareAll(ctx context.Context, keys []string, q *setKeyRequest) ([]made, error) {
	var ms []made
	for _, key := range keys {
		if key == passphraseKey {
			unmake(ms)
			return nil, usageError{errors.New("a directory's key is no passphrase: a mount would have to ask for each"), "kmsfs setkey"}
		}
		c, m, err := f.prepare(ctx, key)
		if err != nil {
			unmake(ms)
			return nil, err
		}
		q.Keys, ms = append(q.Keys, c), append(ms, m)
	}
	return ms, nil
}

func (f *setKeyFlags) show(out *setKeyResult, path, dir string) error {
	if f.asJSON {
		return printJSON(out)
	}
	if len(out.Keys) == 0 {
		fmt.Printf("New files in %s get the keys of the directory above.\n", path)
	} else {
		fmt.Printf("New files in %s are under %s.\n", path, strings.Join(out.Keys, " and "))
	}
	fmt.Printf("kmsfs rewrap %s gives the files that are there the same.\n", shellWord(dir))
	for _, p := range out.KeyFiles {
		fmt.Printf("The key file was made: %s. Back it up, apart from the volume.\n", p)
	}
	return nil
}

// setDirectoryKeys gives a directory keys, in the process that has the volume open. It tells the URI of each.
func setDirectoryKeys(ctx context.Context, k *keyFlags, v *volume.Volume, q setKeyRequest,
	tell func(news)) (*volume.Record, error) {
	n, forget, err := nodeOf(ctx, v, q.rekeyRequest)
	if err != nil {
		return nil, err
	}
	defer forget()
	var stores []keystore.Store
	for _, c := range q.Keys {
		s, err := k.newRecipient(ctx, c)
		if err != nil {
			return nil, err
		}
		for _, t := range stores {
			if keystore.Serves(s, t.URI()) || keystore.Serves(t, s.URI()) {
				return nil, usageError{fmt.Errorf("the key %s is named twice", s.URI()), "kmsfs setkey"}
			}
		}
		stores = append(stores, s)
	}
	rec, err := v.Recipients().SetKeys(ctx, n, stores)
	if err != nil {
		return nil, err
	}
	for _, s := range stores {
		tell(news{URI: s.URI()})
	}
	return rec, nil
}

func (o *openVolume) setKeys(ctx context.Context, q setKeyRequest, tell func(news)) (*volume.Record, error) {
	return setDirectoryKeys(ctx, o.k, o.v, q, tell)
}

func (d *mountDaemon) setKeys(ctx context.Context, q setKeyRequest, tell func(news)) (rec *volume.Record, err error) {
	err = d.ask(ctx, http.MethodPost, "setkey", q, func(n news) {
		if n.Record != nil {
			rec = n.Record
		} else {
			tell(n)
		}
	})
	if err == nil && rec == nil {
		err = errors.New("the daemon's answer lacks the trust record")
	}
	return rec, err
}
