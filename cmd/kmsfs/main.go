// Command kmsfs mounts a directory of ciphertext as a directory of plaintext.
// Every file has its own data key from AWS KMS, or from a local key.
//
// This package has the flags and every byte that is shown to people; the work
// is done in kmsfs/fs/volume and kmsfs/fs.
package main

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra" // help, completion and GNU-style flags as people know them
)

func main() { os.Exit(run(os.Args)) }

// run is the whole program; it returns the exit code.
func run(args []string) int {
	harden()
	absoluteEnvironment() // before anything changes the directory
	root := command()
	rest := args[1:]
	// As mount(8) and umount(8) call their helpers.
	switch name := filepath.Base(args[0]); {
	case strings.HasPrefix(name, "mount."):
		rest = append([]string{"mount"}, rest...)
	case strings.HasPrefix(name, "umount."):
		rest = append([]string{"umount"}, rest...)
	}
	root.SetArgs(rest)
	return show(root.Execute())
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "kmsfs",
		Short: "An encrypted filesystem whose files each have a data key of their own",
		Long: `kmsfs mounts a directory of ciphertext as a directory of plaintext. Every file
is encrypted under its own data key from AWS KMS, or from a local key, and
carries that key, wrapped, in its own header.

KEY names a key:
  local:PATH                  a key file of 32 bytes, made by init if missing
  passphrase                  asked for on the terminal, or --passphrase-file
  aws-kms:ALIAS|ID|ARN        a symmetric AWS KMS key; alias/… and arn:aws:kms:…
                              do without the aws-kms: before them
  age1…, ssh-ed25519 …        an age recipient or an SSH key, for recovery: --identity
                              opens what it was given

Exit codes:
  0  done
  1  failed
  2  wrong usage
  3  damaged, altered, or not made by kmsfs; inventory --prove: a wrapped key is not good
  4  the key is refused: revoked, access denied, untrusted, wrong passphrase
  5  no valid AWS credentials
  6  the key service did not answer
  7  busy: mounted elsewhere, or in use
  8  incomplete: the file was being written when it was copied; what opens was given.
     fsck: a mount that did not end well, or the like, is to be repaired
  9  fsck: repaired, nothing is left
 10  fsck, inventory --prove and --needs: not everything could be checked`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{err,
			c.CommandPath()}
	})
	root.AddCommand(infoCommand(), catCommand(), encryptCommand(), decryptCommand(), fsckCommand(),
		lsCommand(), findCommand(), exportTreeCommand(), versionCommand(), generateCommand())
	root.AddCommand(linuxCommands()...)
	usageOf(root)
	return root
}

// usageOf makes wrong numbers of arguments wrong usage, of subcommands too.
func usageOf(root *cobra.Command) {
	for _, c := range root.Commands() {
		usageOf(c)
		args := c.Args
		c.Args = func(c *cobra.Command, a []string) error {
			if err := args(c, a); err != nil {
				return usageError{err, c.CommandPath()}
			}
			return nil
		}
	}
}
