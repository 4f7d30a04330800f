//go:build linux && !portable

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore/local"
)

func passwdCommand() *cobra.Command {
	var k newRecipientFlags
	c := &cobra.Command{
		Use:   "passwd CIPHERDIR",
		Short: "Change the passphrase of a volume",
		Long: `Change the passphrase of a volume: the new one is added, all files get it, and the old one
goes; other passphrases stay. The key behind it is another one: the old passphrase opens
copies that were made before, and nothing else. The command can be interrupted: call it again
with the same two passphrases. The volume may be mounted.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return k.changePassphrase(contextOf(c),
				args[0])
		},
	}
	k.add(c, openVolumeUsage)
	c.Flags().StringVar(&k.newPassphraseFile, "new-passphrase-file", "",
		"read the new passphrase from this `FILE`")
	return c
}

func (k *newRecipientFlags) changePassphrase(ctx context.Context, dir string) error {
	l, err := volume.Find(dir)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	entries := l.Config.Recipients // only to see which one a passphrase opens
	l.Close()
	if !slices.ContainsFunc(entries,
		func(r blockcrypt.Recipient) bool { return strings.HasPrefix(r.URI, local.PassphraseScheme) }) {
		return hint(errors.New("the volume has no passphrase"),
			"kmsfs recipients add %s passphrase", shellWord(dir))
	}
	p, err := askPassphrase(k.passphraseFile, false)
	if err != nil {
		return err
	}
	defer clear(p)
	next, err := askPassphrase(k.newPassphraseFile, true)
	if err != nil {
		return err
	}
	defer clear(next)
	old, there := openedBy(entries, p), openedBy(entries, next)
	switch {
	case bytes.Equal(p, next):
		return errors.New("the new passphrase is the old one")
	case old == nil && there == nil:
		return coded{errors.New("wrong passphrase"), exitKey}
	}
	k.candidates = [][]byte{p, next}
	return k.administer(ctx, dir, func(a administrator) error {
		done, err := a.change(ctx,
			recipientChange{Op: "add", Key: passphraseKey, Passphrase: bytes.Clone(next)})
		if err == nil {
			err = updateRecord(done.record, dir, "", "")
		}
		if err != nil {
			return err
		}
		if old != nil { // else it went already, before the command was interrupted
			if err := k.replace(ctx, a, dir, old.URI(), done.uri); err != nil {
				return err
			}
		}
		if err := rewrapShown(ctx, a, rewrapRequest{AtOnce: rewrapAtOnce}); err != nil {
			return err
		}
		fmt.Println("The passphrase was changed. Copies that were made before still have the old one.")
		return nil
	})
}

// replace gives all files the new recipient, and takes the old one out of the list.
func (k *newRecipientFlags) replace(ctx context.Context, a administrator, dir, old, next string) error {
	list, err := a.recipients(ctx)
	if err != nil {
		return err
	}
	if list[0] == old {
		if err := changeAndRecord(ctx, a, dir, recipientChange{Op: "first", Key: next}); err != nil {
			return err
		}
	}
	if err := rewrapShown(ctx, a, rewrapRequest{Missing: true, AtOnce: rewrapAtOnce}); err != nil {
		return err
	}
	return changeAndRecord(ctx, a, dir, recipientChange{Op: "remove", Key: old})
}

// rewrapShown rewraps with its progress on the terminal; a file that fails is an error.
func rewrapShown(ctx context.Context, a administrator, q rewrapRequest) error {
	var line progressLine
	var failed []failedFile
	err := a.rewrap(ctx, q, func(n news) {
		if n.Progress != nil {
			line.show("%d files, %d changed", n.Progress.Files, n.Progress.Changed)
		}
		if n.Failed != nil {
			failed = append(failed, *n.Failed)
		}
	})
	line.clear()
	for i, x := range failed {
		if i < mostErrors {
			say("%s: %s", x.Path, x.Error)
		}
	}
	if err == nil && len(failed) > 0 {
		err = hint(fmt.Errorf("%d files could not be changed, and have the old passphrase",
			len(failed)), "call the command again")
	}
	return err
}
