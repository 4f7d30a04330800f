//go:build linux && !portable

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore/awskms"
)

// policyFlags are those of kmsfs policy.
type policyFlags struct {
	principals []string
	key        string
	terraform  bool
}

// policyRoles are what a principal can be to a volume.
var policyRoles = []string{"reader", "writer", "ingester", "administrator", "rewrapper"}

func policyCommand() *cobra.Command {
	var f policyFlags
	c := &cobra.Command{
		Use:   "policy reader|writer|ingester|administrator|rewrapper --principal ARN CIPHERDIR",
		Short: "Print the statements of a KMS key policy that one role of a volume needs",
		Long: `Print the statements of a KMS key policy that one role of a volume needs, and no more:

  reader         mount --read-only, cat, decrypt
  writer         mount
  ingester       mount and add files, without the right to read those that are there
  administrator  switch the key, and not use it
  rewrapper      recipients and rewrap, without the right to read a file

They are bound to the volume by the encryption context. No key is needed, and AWS is not asked.`,
		Args:      cobra.ExactArgs(2),
		ValidArgs: policyRoles,
		RunE:      func(_ *cobra.Command, args []string) error { return f.run(args[0], args[1]) },
	}
	c.Flags().StringArrayVar(&f.principals, "principal", nil,
		"`ARN` of a user or role of AWS that gets these rights (repeatable)")
	c.Flags().StringVar(&f.key, "key", "", "`ARN` of the key, if the volume has several of KMS")
	c.Flags().BoolVar(&f.terraform, "terraform", false, "print an aws_iam_policy_document instead of JSON")
	return c
}

// policyStatement is one of a key policy.
type policyStatement struct {
	Sid       string
	Effect    string
	Principal struct{ AWS []string }
	Action    []string
	Resource  string
	Condition *policyCondition `json:",omitempty"`
}

type policyCondition struct{ StringEquals map[string]string }

func (f *policyFlags) run(role, dir string) error {
	if len(f.principals) == 0 {
		return usageError{errors.New("say with --principal ARN whose role it is"), "kmsfs policy"}
	}
	l, err := volume.Find(dir)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	defer l.Close()
	first, err := f.isFirst(l.Config)
	if err != nil {
		return err
	}
	statements, err := f.statements(role, l.Config, first)
	if err != nil {
		return err
	}
	if f.terraform {
		fmt.Print(terraform(role, statements))
		return nil
	}
	return printJSON(struct {
		Version   string
		Statement []policyStatement
	}{"2012-10-17", statements})
}

// isFirst reports whether the key is the one that makes the keys of new files.
func (f *policyFlags) isFirst(c *blockcrypt.Config) (bool, error) {
	in := func(rs []blockcrypt.Recipient) (keys []string) {
		for _, r := range rs {
			if arn, ok := strings.CutPrefix(r.URI, awskms.Scheme); ok {
				keys = append(keys, arn)
			}
		}
		return keys
	}
	keys := in(c.Recipients)
	switch {
	case len(keys) == 0 && f.key == "":
		return false, errors.New("the volume has no KMS key")
	case f.key == "" && len(keys) > 1:
		return false, usageError{fmt.Errorf("the volume has several KMS keys: name one with --key: %s", strings.Join(keys, ", ")), "kmsfs policy"}
	case f.key == "":
		return true, nil
	}
	named := func(k string) bool { return sameKey(awskms.Scheme+k, awskms.Scheme+f.key) }
	i := slices.IndexFunc(keys, named)
	for _, id := range c.DirectoryIDs() {
		if j := slices.IndexFunc(in(c.Directories[id].Recipients), named); j >= 0 && (i < 0 || j < i) {
			i = j
		}
	}
	if i < 0 {
		return false, fmt.Errorf("%s: %w", f.key, volume.ErrNotRecipient)
	}
	return i == 0, nil
}

// statements returns what a role needs.
func (f *policyFlags) statements(role string, c *blockcrypt.Config, first bool) ([]policyStatement, error) {
	var out []policyStatement
	allow := func(sid string, context map[string]string, actions ...string) {
		s := policyStatement{Sid: sid, Effect: "Allow", Action: actions, Resource: "*"}
		s.Principal.AWS = f.principals
		if context != nil {
			s.Condition = &policyCondition{map[string]string{"kms:EncryptionContext:kmsfs:volume": c.Volume.String()}}
			for k, v := range context {
				s.Condition.StringEquals["kms:EncryptionContext:"+k] = v
			}
		}
		out = append(out, s)
	}
	any := map[string]string{}
	makes := "kms:GenerateDataKey"
	if !first && c.Branch == nil {
		makes = "kms:Encrypt" // the first key makes data keys, and this one wraps them
	}
	switch role {
	case "reader":
		allow("KmsfsReads", any, "kms:Decrypt")
	case "writer":
		allow("KmsfsReadsAndWrites", any, "kms:Decrypt", makes)
	case "ingester":
		// The volume key gives names, and no content.
		allow("KmsfsOpensTheVolume", map[string]string{"kmsfs:use": "volume"}, "kms:Decrypt")
		allow("KmsfsAddsFiles", any, makes)
	case "rewrapper":
		if c.Branch != nil {
			return nil, hint(errors.New("the volume has branch keys: to rewrap its files they are decrypted, so no role can do that unseen"), "kmsfs policy writer has the rights that rewrap needs")
		}
		// The volume key gives names, and no content.
		allow("KmsfsOpensTheVolume", map[string]string{"kmsfs:use": "volume"}, "kms:Decrypt", "kms:Encrypt")
		allow("KmsfsMovesKeysUnseen", any, "kms:ReEncryptFrom", "kms:ReEncryptTo")
	case "administrator":
		allow("KmsfsAdministrators", nil, awskms.AdminActions()...)
		return out, nil
	default:
		return nil, usageError{fmt.Errorf("%q is no role: %s are", role,
			strings.Join(policyRoles, ", ")), "kmsfs policy"}
	}
	allow("KmsfsNamesTheKeyByItsAlias", nil, "kms:DescribeKey")
	return out, nil
}

// terraform returns the statements as a data source of the AWS provider.
func terraform(role string, statements []policyStatement) string {
	var b strings.Builder
	list := func(items []string) string {
		q, _ := json.Marshal(items) // strings of JSON are strings of HCL, but for ${ and %{
		return strings.NewReplacer("${", "$${", "%{", "%%{", `","`, `", "`).Replace(string(q))
	}
	fmt.Fprintf(&b, "data \"aws_iam_policy_document\" \"kmsfs_%s\" {\n", role)
	for _, s := range statements {
		fmt.Fprintf(&b,
			"  statement {\n    sid       = %q\n    actions   = %s\n    resources = [\"*\"]\n",
			s.Sid, list(s.Action))
		fmt.Fprintf(&b,
			"    principals {\n      type        = \"AWS\"\n      identifiers = %s\n    }\n",
			list(s.Principal.AWS))
		if s.Condition != nil {
			for _, k := range slices.Sorted(maps.Keys(s.Condition.StringEquals)) {
				fmt.Fprintf(&b,
					"    condition {\n      test     = \"StringEquals\"\n      variable = %q\n      values   = [%q]\n    }\n", k, s.Condition.StringEquals[k])
			}
		}
		b.WriteString("  }\n")
	}
	b.WriteString("}\n")
	return b.String()
}
