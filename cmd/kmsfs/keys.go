package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/agestore"
	"kmsfs/keystore/awskms"
	"kmsfs/keystore/local"
)

// keyFlags are the flags by which keys are named and reached.
type keyFlags struct {
	keys           []string
	passphraseFile string
	identityFiles  []string // of age
	aws            awskms.Options

	acceptUnverified bool // with identityFiles: a volume that no trust record vouches for may be changed

	clients    *awskms.Clients
	usesKMS    bool
	identities agestore.Identities // of identityFiles, once they were read
	candidates [][]byte            // passphrases to try instead of asking for one
}

func (k *keyFlags) add(c *cobra.Command, usage string) {
	f := c.Flags()
	f.StringArrayVarP(&k.keys, "key", "k", nil, usage)
	f.StringVar(&k.passphraseFile, "passphrase-file", "", "read the passphrase from this `FILE`")
	k.addAWS(c)
}

// addIdentities adds the flag for opening by an age recipient.
func (k *keyFlags) addIdentities(c *cobra.Command) {
	c.Flags().StringArrayVar(&k.identityFiles, "identity", nil,
		"open with the age identity, or the SSH key, in this `FILE` (repeatable)")
}

// addUnverified adds the flag for changing a volume that nothing but an identity vouches for.
func (k *keyFlags) addUnverified(c *cobra.Command) {
	c.Flags().BoolVar(&k.acceptUnverified, "accept-unverified", false,
		"with --identity: change a volume that no trust record on this machine vouches for")
}

// addAWS adds the flags by which KMS is reached.
func (k *keyFlags) addAWS(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&k.aws.Endpoint, "aws-endpoint", "", "`URL` of KMS, instead of the Region's own")
	f.StringVar(&k.aws.Profile, "aws-profile", "", "`PROFILE` of the AWS configuration")
	f.StringVar(&k.aws.Region, "aws-region", "", "`REGION` of keys that are named by alias or ID")
	f.StringVar(&k.aws.RoleARN, "aws-role-arn", "", "assume the role `ARN` for all calls")
	f.StringArrayVar(&k.aws.GrantTokens, "grant-token", nil,
		"`TOKEN` of a new grant that KMS may not know everywhere yet (repeatable)")
}

// kms returns the maker of KMS stores, one for the whole command: it keeps connections and credentials.
func (k *keyFlags) kms() *awskms.Clients {
	if k.clients == nil {
		k.clients = awskms.New(k.aws)
	}
	return k.clients
}

const passphraseKey = "passphrase"

// kmsName returns the name of a KMS key without its scheme.
func kmsName(key string) (string, bool) {
	if name, ok := strings.CutPrefix(key, awskms.Scheme); ok {
		return name, true
	}
	return key, awskms.Named(key)
}

func badKey(key string) error {
	return usageError{fmt.Errorf("%q names no key: local:PATH, passphrase, aws-kms:ALIAS|ID|ARN, alias/…, arn:aws:kms:…, age1… and ssh-… do", key), "kmsfs"}
}

// made is a store for a new volume or file, and what to tell about it.
type made struct {
	store   keystore.Store
	path    string // of a key file, absolute
	created bool
}

// create opens the keys of a new volume or file: a key file that is missing is
// made, a passphrase is asked for twice, KMS is asked whether the key can serve.
func (k *keyFlags) create(ctx context.Context) ([]made, error) {
	out := make([]made, len(k.keys))
	// Key files last: what fails before leaves none behind.
	for _, files := range []bool{false, true} {
		for i, key := range k.keys {
			if strings.HasPrefix(key, local.Scheme) != files {
				continue
			}
			m, err := k.createOne(ctx, key)
			out[i] = m
			if err == nil && (twice(out, i) || slices.Index(k.keys, key) != i) {
				err = usageError{fmt.Errorf("the key %s is named twice", key), "kmsfs"}
			}
			if err != nil {
				unmake(out)
				return nil, err
			}
		}
	}
	return out, nil
}

// twice reports whether key i is the same recipient as another.
func twice(ms []made, i int) bool {
	for j, m := range ms {
		if j != i && m.store != nil && keystore.Serves(ms[i].store, m.store.URI()) {
			return true
		}
	}
	return false
}

// unmake removes the key files that were made for what then failed.
func unmake(ms []made) {
	for _, m := range ms {
		if m.created {
			os.Remove(m.path)
		}
	}
}

// createOne opens one key for a new volume or file. A key file that is missing is made.
func (k *keyFlags) createOne(ctx context.Context, key string) (made, error) {
	if path, ok := strings.CutPrefix(key, local.Scheme); ok && path != "" {
		abs, err := filepath.Abs(path)
		if err != nil {
			return made{}, err
		}
		s, created, err := local.CreateFile(abs)
		if err != nil {
			return made{}, err
		}
		return made{s, abs, created}, nil
	}
	if name, ok := kmsName(key); ok {
		s, err := k.kms().Open(ctx, name)
		if err == nil {
			err = s.Check(ctx)
		}
		if err != nil {
			return made{}, err
		}
		return made{store: s}, nil
	}
	if name := strings.TrimPrefix(key, agestore.Scheme); agestore.Named(name) {
		s, err := agestore.New(name)
		if err != nil {
			return made{}, err
		}
		return made{store: s}, nil
	}
	if key != passphraseKey {
		return made{}, badKey(key)
	}
	p, err := askPassphrase(k.passphraseFile, true)
	if err != nil {
		return made{}, err
	}
	defer clear(p)
	s, err := local.NewPassphrase(p)
	if err != nil {
		return made{}, err
	}
	return made{store: s}, nil
}

func stores(ms []made) []keystore.Store {
	var out []keystore.Store
	for _, m := range ms {
		out = append(out, m.store)
	}
	return out
}

// trusted opens the stores that --key names; without --key those of the recipients that the trust
// record vouches for.
func (k *keyFlags) trusted(ctx context.Context, recipients []blockcrypt.Recipient,
	rec *volume.Record) ([]keystore.Store, error) {
	if len(k.identityFiles) > 0 {
		return k.byIdentity(recipients)
	}
	var out []keystore.Store
	for _, key := range k.keys {
		s, err := k.named(ctx, key, recipients)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	if len(out) > 0 {
		return out, nil
	}
	var errs []error
	for _, r := range recipients {
		if !rec.Trusts(r.URI) {
			continue
		}
		s, err := k.open(ctx, r, rec)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if !keystore.OnlySeals(s) {
			out = append(out, s)
		}
	}
	if len(out) == 0 && len(errs) > 0 {
		return nil, errs[0]
	}
	return out, nil
}

// byIdentity opens the age recipients by the identities that were named.
func (k *keyFlags) byIdentity(recipients []blockcrypt.Recipient) (out []keystore.Store, err error) {
	if k.identities == nil {
		for _, path := range k.identityFiles {
			ids, err := agestore.ReadIdentities(path,
				func() ([]byte, error) { return askPassphrase(k.passphraseFile, false) })
			if err != nil {
				return nil, err
			}
			k.identities = append(k.identities, ids...)
		}
	}
	for _, r := range recipients {
		if strings.HasPrefix(r.URI, agestore.Scheme) {
			s, err := agestore.Open(r.URI, r.Branch, k.identities)
			if err != nil {
				return nil, err
			}
			out = append(out, s)
		}
	}
	if len(out) == 0 {
		return nil, coded{fmt.Errorf("no age identity opens this: it is under %s",
			uris(recipients)), exitKey}
	}
	return out, nil
}

// opened opens a key that the user named; a passphrase must be that of one of the recipients.
func (k *keyFlags) opened(ctx context.Context, key string,
	recipients []blockcrypt.Recipient) (keystore.Store, error) {
	if path, ok := strings.CutPrefix(key, local.Scheme); ok && path != "" {
		return local.OpenFile(path)
	}
	if name, ok := kmsName(key); ok {
		k.usesKMS = true
		return k.kms().Open(ctx, name)
	}
	if key == passphraseKey {
		return k.anyPassphrase(recipients)
	}
	return nil, badKey(key)
}

// named opens a key that the user named, which must be one of the recipients.
func (k *keyFlags) named(ctx context.Context, key string,
	recipients []blockcrypt.Recipient) (keystore.Store, error) {
	s, err := k.opened(ctx, key, recipients)
	if err != nil {
		return nil, err
	}
	for _, r := range recipients {
		if keystore.Serves(s, r.URI) {
			return s, nil
		}
	}
	return nil, coded{notOfThis(key, s.URI(), recipients), exitKey}
}

// notOfThis says that a key is none of the recipients. An alias may have been given to another
// key since.
func notOfThis(key, uri string, recipients []blockcrypt.Recipient) error {
	if strings.Contains(key, "alias/") {
		err := fmt.Errorf("%s now means %s; this is under %s", key,
			strings.TrimPrefix(uri, awskms.Scheme), uris(recipients))
		return hint(err,
			"if the alias was given to another key, and the old one is yours, name it by its ARN: --key %s", shellWord(strings.TrimPrefix(recipients[0].URI, awskms.Scheme)))
	}
	return fmt.Errorf("the key %s is not one that opens this: %s", key, uris(recipients))
}

func uris(rs []blockcrypt.Recipient) string {
	var out []string
	for _, r := range rs {
		out = append(out, r.URI)
	}
	return strings.Join(out, ", ")
}

// open opens the store of a recipient that is trusted.
func (k *keyFlags) open(ctx context.Context, r blockcrypt.Recipient,
	rec *volume.Record) (keystore.Store, error) {
	switch {
	case strings.HasPrefix(r.URI, local.Scheme):
		path := rec.LocalPath(r.URI)
		if path == "" {
			return nil, hint(fmt.Errorf("where the key file of %s lies is not known", r.URI),
				"name it with --key local:PATH")
		}
		s, err := local.OpenFile(path)
		if err == nil && s.URI() != r.URI {
			return nil, coded{hint(fmt.Errorf("the key file %s is not the one that opens this",
				path),
				"restore %s from its backup, or name the place it moved to with --key local:PATH",
				r.URI), exitKey}
		}
		return s, err
	case strings.HasPrefix(r.URI, local.PassphraseScheme):
		return k.anyPassphrase([]blockcrypt.Recipient{r})
	case strings.HasPrefix(r.URI, awskms.Scheme):
		k.usesKMS = true
		return k.kms().OpenURI(ctx, r.URI)
	case strings.HasPrefix(r.URI, agestore.Scheme):
		return agestore.Open(r.URI, r.Branch, k.identities)
	}
	return nil, fmt.Errorf("this version of kmsfs does not know recipients like %s", r.URI)
}

// anyPassphrase asks for a passphrase and opens the first recipient that has it.
func (k *keyFlags) anyPassphrase(rs []blockcrypt.Recipient) (keystore.Store, error) {
	var err error = coded{errors.New("no passphrase opens this"), exitKey}
	ps := k.candidates
	for _, r := range rs {
		if !strings.HasPrefix(r.URI, local.PassphraseScheme) {
			continue
		}
		if ps == nil {
			p, err := askPassphrase(k.passphraseFile, false)
			if err != nil {
				return nil, err
			}
			defer clear(p)
			ps = [][]byte{p}
		}
		for _, p := range ps {
			var s *local.Store
			if s, err = local.OpenPassphrase(r.URI, r.Branch, p); err == nil {
				return s, nil
			}
		}
	}
	return nil, err
}
