package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/keystore/local"
)

func passwdCommand() *cobra.Command {
	var k newRecipientFlags
	c := &cobra.Command{
		Use:   "passwd CIPHERDIR",
		Short: "Change the passphrase of a volume",
		Long: `Change the passphrase of a volume: the new one is added, all files get it, and the old one
goes. The key behind it is another one afterwards: the old passphrase opens copies that were
made before, and nothing else. The command can be interrupted: call it again with the same two
passphrases. The volume may be mounted.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return k.changePassphrase(contextOf(c), args[0]) },
	}
	k.add(c, openVolumeUsage)
	c.Flags().StringVar(&k.newPassphraseFile, "new-passphrase-file", "", "read the new passphrase from this `FILE`")
	return c
}

func (k *newRecipientFlags) changePassphrase(ctx context.Context, dir string) error {
	return k.administer(ctx, dir, func(a administrator) error {
		list, err := a.recipients(ctx)
		if err != nil {
			return err
		}
		old := slices.DeleteFunc(slices.Clone(list), func(u string) bool { return !strings.HasPrefix(u, local.PassphraseScheme) })
		if len(old) == 0 {
			return hint(errors.New("the volume has no passphrase"), "kmsfs recipients add %s passphrase", shellWord(dir))
		}
		p, err := askPassphrase(k.newPassphraseFile, true)
		if err != nil {
			return err
		}
		done, err := a.change(ctx, recipientChange{Op: "add", Key: passphraseKey, Passphrase: p})
		clear(p)
		if err == nil {
			err = updateRecord(done.record, dir, "", "")
		}
		if err != nil {
			return err
		}
		old = slices.DeleteFunc(old, func(u string) bool { return u == done.uri })
		if len(old) == 0 {
			return errors.New("the new passphrase is the old one")
		}
		if list[0] == old[0] {
			if err := changeAndRecord(ctx, a, dir, recipientChange{Op: "first", Key: done.uri}); err != nil {
				return err
			}
		}
		if err := rewrapShown(ctx, a, rewrapRequest{Missing: true, AtOnce: rewrapAtOnce}); err != nil {
			return err
		}
		for _, u := range old {
			if err := changeAndRecord(ctx, a, dir, recipientChange{Op: "remove", Key: u}); err != nil {
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
		err = hint(fmt.Errorf("%d files could not be changed, so the old passphrase stays too", len(failed)), "call the command again")
	}
	return err
}
