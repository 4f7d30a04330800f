//go:build linux && !portable

package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/fs/volume"
	"kmsfs/keystore/agestore"
	"kmsfs/keystore/awskms"
	"kmsfs/keystore/local"
)

func recipientsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "recipients",
		Short: "List, add and remove the keys under which a volume is wrapped",
		Long: `List, add and remove the keys under which a volume is wrapped. New files get all of
them; kmsfs rewrap gives them to the files that are there. The volume may be mounted.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(recipientsList(), recipientsAdd(),
		recipientsChange("remove", "remove CIPHERDIR KEY", "Take a key out of the list",
			`Take a key out of the list: new files are not wrapped for it any more. Files that have no
other key are an obstacle: give them one with kmsfs rewrap first. Afterwards rewrap takes the
key out of the files too.`, "%s is no recipient any more. kmsfs rewrap %s takes it out of the files.\n"),
		recipientsChange("first", "set-default CIPHERDIR KEY",
			"Make a key of the list the one that makes the keys of new files", "",
			"%s makes the keys of new files in %s.\n"))
	return c
}

// recipientState is a recipient in the output of recipients list.
type recipientState struct {
	URI string `json:"uri"`
	ARN string `json:"arn,omitempty"`
}

func recipientsList() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "list CIPHERDIR",
		Short: "List the keys; nothing of it is authenticated, and no key is needed",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			l, err := volume.Find(args[0])
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			defer l.Close()
			out := []recipientState{}
			for _, r := range l.Config.Recipients {
				arn, ok := strings.CutPrefix(r.URI, awskms.Scheme)
				if !ok {
					arn = ""
				}
				out = append(out, recipientState{r.URI, arn})
			}
			if asJSON {
				return printJSON(out)
			}
			for _, r := range out {
				fmt.Println(r.URI)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// newRecipientFlags are those of commands that add a recipient.
type newRecipientFlags struct {
	keyFlags
	newPassphraseFile string
	asJSON            bool
}

// recipientResult is the output of a change of the recipients.
type recipientResult struct {
	URI        string   `json:"uri"`
	Recipients []string `json:"recipients"`         // that the volume has now
	KeyFile    string   `json:"key_file,omitempty"` // that was made
}

func recipientsAdd() *cobra.Command {
	var k newRecipientFlags
	c := &cobra.Command{
		Use:   "add CIPHERDIR KEY",
		Short: "Add a key: of KMS, in any Region or account, a local one, a passphrase, or an age recipient",
		Args:  cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			return k.addRecipient(contextOf(c), args[0], args[1])
		},
	}
	k.add(c, openVolumeUsage)
	k.addIdentities(c)
	k.addUnverified(c)
	c.Flags().StringVar(&k.newPassphraseFile, "new-passphrase-file", "",
		"read the passphrase that is added from this `FILE`")
	c.Flags().BoolVar(&k.asJSON, "json", false, "print JSON")
	return c
}

func (k *newRecipientFlags) addRecipient(ctx context.Context, dir, key string) error {
	return k.administer(ctx, dir, func(a administrator) error {
		change, m, err := k.prepare(ctx, key)
		if err != nil {
			return err
		}
		done, err := a.change(ctx, change)
		clear(change.Passphrase)
		if err != nil {
			if m.created { // it cannot be known whether the volume has it by now
				say("the key file %s was made, and stays: kmsfs recipients list tells whether the volume has it", m.path)
			}
			return err
		}
		uri := done.uri
		if err := updateRecord(done.record, dir, uri, m.path); err != nil {
			return err
		}
		if k.asJSON {
			out := recipientResult{uri, done.record.Recipients, ""}
			if m.created {
				out.KeyFile = m.path
			}
			return printJSON(out)
		}
		fmt.Printf("%s is a recipient of new files. kmsfs rewrap --missing %s gives it the files that are there.\n", uri, shellWord(dir))
		if m.created {
			fmt.Printf("The key file was made: %s. Back it up, apart from the volume.\n", m.path)
		}
		return nil
	})
}

// prepare does what a new recipient needs of this user's side: a key file that is missing is made, a
// passphrase is asked for, an alias becomes the ARN that it means now.
func (k *newRecipientFlags) prepare(ctx context.Context,
	key string) (c recipientChange, m made, err error) {
	c = recipientChange{Op: "add", Key: key}
	switch {
	case strings.HasPrefix(key, local.Scheme):
		m, err = k.createOne(ctx, key)
		c.Key = local.Scheme + m.path
	case key == passphraseKey:
		c.Passphrase, err = askPassphrase(k.newPassphraseFile, true)
	default:
		if _, ok := kmsName(key); ok {
			if m, err = k.createOne(ctx, key); err == nil {
				c.Key = m.store.URI()
			}
		}
	}
	return c, m, err
}

func recipientsChange(op, use, short, long, done string) *cobra.Command {
	var k keyFlags
	var asJSON bool
	c := &cobra.Command{
		Use:   use,
		Short: short,
		Long:  long,
		Args:  cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			ctx := contextOf(c)
			return k.administer(ctx, args[0], func(a administrator) error {
				uri, err := k.recipientNamed(ctx, a, args[1])
				if err != nil {
					return err
				}
				if err := changeAndRecord(ctx, a, args[0], recipientChange{Op: op, Key: uri}); err != nil {
					return err
				}
				if asJSON {
					list, err := a.recipients(ctx)
					if err != nil {
						return err
					}
					return printJSON(recipientResult{uri, list, ""})
				}
				fmt.Printf(done, uri, shellWord(args[0]))
				return nil
			})
		},
	}
	k.add(c, openVolumeUsage)
	k.addIdentities(c)
	k.addUnverified(c)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// changeAndRecord makes a change, and writes the trust record.
func changeAndRecord(ctx context.Context, a administrator, dir string, c recipientChange) error {
	done, err := a.change(ctx, c)
	if err != nil {
		return err
	}
	return updateRecord(done.record, dir, "", "")
}

// recipientNamed returns the URI of the recipient of a volume that KEY means: the URI itself, or what
// init and add take. A key file that is lost can be named by its URI only.
func (k *keyFlags) recipientNamed(ctx context.Context, a administrator, key string) (string, error) {
	list, err := a.recipients(ctx)
	if err != nil {
		return "", err
	}
	uri, err := k.uriOf(ctx, key, list)
	if err != nil && strings.HasPrefix(key, local.Scheme) {
		err = hint(err, "name a recipient whose key file is lost by its URI: kmsfs recipients list")
	}
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(list, func(u string) bool { return sameKey(u, uri) })
	if i < 0 {
		return "", fmt.Errorf("%s: %w", uri, volume.ErrNotRecipient)
	}
	return list[i], nil // a replica's, perhaps
}

// uriOf returns the URI that KEY means; list are those among which "passphrase" is looked for.
func (k *keyFlags) uriOf(ctx context.Context, key string, list []string) (string, error) {
	if slices.Contains(list, key) {
		return key, nil
	}
	if path, ok := strings.CutPrefix(key, local.Scheme); ok {
		s, err := local.OpenFile(path)
		if err != nil {
			return "", err
		}
		return s.URI(), nil
	}
	if name, ok := kmsName(key); ok {
		s, err := k.kms().Open(ctx, name)
		if err != nil {
			return "", err
		}
		return s.URI(), nil
	}
	if name := strings.TrimPrefix(key, agestore.Scheme); agestore.Named(name) {
		s, err := agestore.New(name)
		if err != nil {
			return "", err
		}
		return s.URI(), nil
	}
	if key == passphraseKey {
		all := slices.DeleteFunc(slices.Clone(list),
			func(u string) bool { return !strings.HasPrefix(u, local.PassphraseScheme) })
		if len(all) == 1 {
			return all[0], nil
		}
		return "", hint(fmt.Errorf("%d passphrases are recipients", len(all)),
			"name one by its URI: kmsfs recipients list")
	}
	return "", badKey(key)
}
