//go:build linux && !portable

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/fs/volume"
	"kmsfs/keystore/awskms"
)

// keyCommand is for users without another tool for KMS keys.
func keyCommand() *cobra.Command {
	var f keyFlags
	c := &cobra.Command{
		Use:   "key",
		Short: "Make and manage AWS KMS keys; write a local key down, and read it back",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	p := c.PersistentFlags()
	p.StringVar(&f.aws.Endpoint, "aws-endpoint", "", "`URL` of KMS, instead of the Region's own")
	p.StringVar(&f.aws.Profile, "aws-profile", "", "`PROFILE` of the AWS configuration")
	p.StringVar(&f.aws.Region, "aws-region", "", "`REGION` of the keys")
	p.StringVar(&f.aws.RoleARN, "aws-role-arn", "", "assume the role `ARN`")
	c.AddCommand(exportCommand(), importCommand(), f.createCommand(), f.listCommand(), f.showCommand(),
		f.changeCommand(keyChange{use: "enable KEY", short: "Let a disabled key be used again",
			do: func(c *cobra.Command, k *awskms.Admin, key string) (string, error) {
				return "enabled", k.Enable(c.Context(), key)
			}}),
		f.changeCommand(keyChange{use: "disable KEY", takesAway: true,
			short: "Disable a key: no file that has only this key can be opened until it is enabled",
			do: func(c *cobra.Command, k *awskms.Admin, key string) (string, error) {
				return "disabled; within minutes no file that has only this key can be read",
					k.Disable(c.Context(), key)
			}}),
		deleteCommand(&f),
		f.changeCommand(keyChange{use: "cancel-deletion KEY",
			short: "Keep a key that was to be deleted; it is disabled then",
			do: func(c *cobra.Command, k *awskms.Admin, key string) (string, error) {
				return "kept, and disabled: kmsfs key enable", k.CancelDeletion(c.Context(), key)
			}}))
	return c
}

func (f *keyFlags) admin(c *cobra.Command, key string) (*awskms.Admin, error) {
	return f.kms().Admin(c.Context(), key)
}

func (f *keyFlags) createCommand() *cobra.Command {
	var alias string
	var admins, users []string
	var yes bool
	c := &cobra.Command{
		Use:   "create --alias alias/NAME",
		Short: "Make a symmetric key",
		Long: `Make a symmetric key. Its policy keeps those apart who manage the key, and
cannot decrypt with it, from those who use it. It is shown before it is sent.
Without --admin, or --user, the account decides by its IAM policies.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if !strings.HasPrefix(alias, "alias/") || strings.HasPrefix(alias, "alias/aws/") ||
				len(alias) == len("alias/") {
				return usageError{fmt.Errorf("%q is no name for a key: alias/NAME is", alias),
					c.CommandPath()}
			}
			k, err := f.admin(c, "")
			if err != nil {
				return err
			}
			policy, err := k.Policy(c.Context(), admins, users)
			if err != nil {
				return err
			}
			fmt.Printf("A symmetric key, %s, with this policy:\n%s\n", alias, policy)
			if err := confirm("Make it", yes); err != nil {
				return err
			}
			arn, err := k.Create(c.Context(), alias, policy)
			if err != nil {
				return err
			}
			fmt.Printf("Made: %s\nUse it: kmsfs init --key %s CIPHERDIR\n", arn, alias)
			return nil
		},
	}
	c.Flags().StringVar(&alias, "alias", "", "`alias/NAME` of the key")
	c.Flags().StringArrayVar(&admins, "admin", nil,
		"`ARN` of a principal that may manage the key (repeatable)")
	c.Flags().StringArrayVar(&users, "user", nil,
		"`ARN` of a principal that may encrypt and decrypt (repeatable)")
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	c.MarkFlagRequired("alias")
	return c
}

func (f *keyFlags) listCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the account's keys in this Region that have an alias of their own",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			k, err := f.admin(c, "")
			if err != nil {
				return err
			}
			keys, err := k.List(c.Context())
			for _, x := range keys {
				fmt.Printf("%-40s %-16s %s\n", x.Alias, x.State, x.ARN)
			}
			return err
		},
	}
}

func (f *keyFlags) showCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show KEY",
		Short: "Show a key, and the volumes known here that depend on it",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			k, err := f.admin(c, args[0])
			if err != nil {
				return err
			}
			x, err := k.Show(c.Context(), args[0])
			if err != nil {
				return err
			}
			out, err := json.MarshalIndent(x, "", "  ")
			if err != nil {
				return err
			}
			fmt.Println(string(out))
			for _, v := range dependents(x.ARN) {
				fmt.Println(v)
			}
			return nil
		},
	}
}

// keyChange is a command that switches a key.
type keyChange struct {
	use, short string
	takesAway  bool                                     // it asks first
	check      func(c *cobra.Command, arn string) error // before it asks; nil: nothing is checked
	do         func(*cobra.Command, *awskms.Admin, string) (string, error)
}

// changeCommand makes the command of a change. The key is looked up first, so that people see which one
// it is.
func (f *keyFlags) changeCommand(x keyChange) *cobra.Command {
	var yes bool
	c := &cobra.Command{Use: x.use, Short: x.short, Args: cobra.ExactArgs(1)}
	c.RunE = func(c *cobra.Command, args []string) error {
		k, err := f.admin(c, args[0])
		if err != nil {
			return err
		}
		key, err := k.Show(c.Context(), args[0])
		if err != nil {
			return err
		}
		if x.check != nil {
			if err := x.check(c, key.ARN); err != nil {
				return err
			}
		}
		if x.takesAway {
			for _, v := range dependents(key.ARN) {
				fmt.Println(v)
			}
			if err := confirm("Do that to "+key.ARN, yes); err != nil {
				return err
			}
		}
		done, err := x.do(c, k, key.ARN)
		if err != nil {
			return err
		}
		fmt.Printf("%s is %s.\n", key.ARN, done)
		return nil
	}
	if x.takesAway {
		c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	}
	return c
}

func deleteCommand(f *keyFlags) *cobra.Command {
	var days int
	var trees []string
	c := f.changeCommand(keyChange{use: "schedule-deletion KEY --days N", takesAway: true,
		short: "Delete a key in 7 to 30 days: data under this key alone is lost then",
		check: func(c *cobra.Command, key string) error {
			if days < 7 || days > 30 {
				return usageError{errors.New("--days must be 7 to 30"), c.CommandPath()}
			}
			if len(trees) == 0 {
				return nil
			}
			none := func(string, volume.Inventoried) error { return nil }
			inv, err := takeInventory(contextOf(c), trees, none)
			if err != nil {
				return err
			}
			return inv.needs([]string{awskms.Scheme + key})
		},
		do: func(c *cobra.Command, k *awskms.Admin, key string) (string, error) {
			when, err := k.ScheduleDeletion(c.Context(), key, days)
			return "to be deleted at " + when + "; until then: kmsfs key cancel-deletion", err
		}})
	c.Flags().IntVar(&days, "days", 30, "how many `DAYS` from now, 7 to 30")
	c.Flags().StringArrayVar(&trees, "inventory", nil,
		"refuse if a file in this `DIR`, a volume or a backup, needs the key (repeatable)")
	return c
}

// confirm asks on the terminal, unless yes is set.
func confirm(what string, yes bool) error {
	if yes {
		return nil
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return hint(errors.New("there is no terminal to ask on"), "give --yes")
	}
	defer tty.Close()
	fmt.Fprintf(tty, "%s? [yes/no] ", what)
	answer, _ := bufio.NewReader(tty).ReadString('\n')
	if strings.TrimSpace(answer) != "yes" {
		return errors.New("not done")
	}
	return nil
}

// dependents tells which volumes known on this machine depend on a key: this user's
// and root's, and for root everybody's.
func dependents(arn string) (out []string) {
	dirs := []string{"/var/lib/kmsfs"}
	if dir, err := statePath(); err == nil {
		dirs = append(dirs, dir)
	}
	if os.Geteuid() == 0 {
		homes, _ := filepath.Glob("/home/*")
		passwd, _ := os.ReadFile("/etc/passwd") // which knows those elsewhere
		for line := range strings.Lines(string(passwd)) {
			if f := strings.Split(line, ":"); len(f) == 7 {
				homes = append(homes, f[5])
			}
		}
		for _, home := range homes {
			dirs = append(dirs, filepath.Join(home, ".local/state/kmsfs"))
		}
	}
	slices.Sort(dirs)
	var records []string
	for _, dir := range slices.Compact(dirs) {
		if _, err := os.ReadDir(dir); errors.Is(err, os.ErrPermission) {
			out = append(out, fmt.Sprintf("Which volumes %s knows cannot be seen by this user.", dir))
		}
		found, _ := filepath.Glob(filepath.Join(dir, "*.json"))
		records = append(records, found...)
	}
	for _, p := range records {
		b, err := os.ReadFile(p)
		var rec volume.Record
		if err != nil || json.Unmarshal(b, &rec) != nil {
			continue
		}
		i := slices.IndexFunc(rec.Recipients,
			func(r string) bool { return awskms.SameKey(r, awskms.Scheme+arn) })
		if i < 0 {
			continue
		}
		if rec.Recipients[i] != awskms.Scheme+arn {
			out = append(out,
				fmt.Sprintf("The volume %s names its replica %s, which has a state of its own.",
					rec.Volume, strings.TrimPrefix(rec.Recipients[i], awskms.Scheme)))
		} else if len(rec.Recipients) == 1 {
			out = append(out,
				fmt.Sprintf("The volume %s depends on it: without it nothing in there can be read.",
					rec.Volume))
		} else {
			out = append(out,
				fmt.Sprintf("The volume %s names it, and %d other recipients.", rec.Volume,
					len(rec.Recipients)-1))
		}
	}
	return out
}
