package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/local"
)

const openVolumeUsage = "open the volume with this `KEY` (repeatable); default: what the trust record names"

// transferAtOnce is how many files are read or copied at the same time: a disk with latency, and keys of
// a service, are waited for.
const transferAtOnce = 32

// unlockFlags say how a volume is unlocked.
type unlockFlags struct {
	keyFlags
	readOnly    bool
	acceptOlder bool

	unvouched  bool // only an age identity, and no trust record, says that the volume is the user's
	incomplete bool // keys of recipients need not be at hand
}

// unlock finds the volume's keys and checks it against its trust record.
func (f *unlockFlags) unlock(ctx context.Context, cipherDir string) (*volume.Unlocked, error) {
	l, err := volume.Find(cipherDir)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cipherDir, err)
	}
	defer l.Close()
	rec, err := readRecord(l.Config.Volume)
	if err == nil {
		_, err = stateDir()
	}
	if err != nil {
		return nil, err
	}
	trusted, err := f.trusted(ctx, recipientsOfAll(l.Config), rec)
	if err != nil {
		return nil, err
	}
	if len(trusted) == 0 {
		return nil, untrusted(l.Config.Recipients, cipherDir, rec)
	}
	if f.unvouched = len(f.identityFiles) > 0 && rec == nil; f.unvouched {
		// Everybody who knows the public key can make a volume that the identity opens.
		if !f.readOnly && !f.acceptUnverified {
			return nil, coded{hint(fmt.Errorf("no trust record on this machine vouches for the volume %s, and anybody who knows the age recipient can have made it", l.Config.Volume),
				"if you are sure that it is yours: --accept-unverified"), exitKey}
		}
		say("warning: no trust record on this machine vouches for the volume %s: anybody who knows the age recipient can have made it", l.Config.Volume)
	}
	o := volume.UnlockOptions{Record: rec, AcceptOlder: f.acceptOlder, ReadOnly: f.readOnly,
		Incomplete: f.incomplete,
		More:       func(ctx context.Context, r blockcrypt.Recipient) (keystore.Store, error) { return f.open(ctx, r, rec) }}
	if len(f.identityFiles) > 0 && f.readOnly {
		o.More = nil // nothing else is asked
	}
	u, err := l.Unlock(ctx, trusted, o)
	if err != nil {
		return nil, err
	}
	for _, err := range u.Absent() {
		say("warning: %v", err)
	}
	for _, key := range f.keys {
		if path, ok := strings.CutPrefix(key, local.Scheme); ok { // where it is now
			s, err := local.OpenFile(path)
			if err == nil {
				path, err = filepath.Abs(path)
			}
			if err != nil {
				u.Close()
				return nil, err
			}
			u.Record.SetLocal(s.URI(), path)
		}
	}
	return u, nil
}

// untrusted refuses a volume whose keys nobody named, with the line that would
// accept it.
func untrusted(rs []blockcrypt.Recipient, cipherDir string, rec *volume.Record) error {
	key := rs[0].URI
	switch {
	case strings.HasPrefix(key, local.Scheme):
		key = "local:PATH"
	case strings.HasPrefix(key, local.PassphraseScheme):
		key = passphraseKey
	}
	why := "nobody named this key for the volume, and there is no trust record here"
	if rec != nil {
		why = "the volume's trust record does not name this key"
	}
	err := &keystore.Error{Kind: keystore.Untrusted, URI: rs[0].URI, Op: "mount", Err: errors.New(why)}
	// The line is made to be pasted, and whoever wrote kmsfs.json chose the key.
	return hint(err, "if it is yours: kmsfs mount --key %s %s MOUNTPOINT; other commands take --key, too", shellWord(key),
		shellWord(cipherDir))
}

// shellWord quotes s for a shell where that is needed.
func shellWord(s string) string {
	for _, r := range s {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:@%+,", r) {
			return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
		}
	}
	return s
}

// recipientsOfAll returns the recipients of a volume and of its directories, each once.
func recipientsOfAll(c *blockcrypt.Config) []blockcrypt.Recipient {
	var out []blockcrypt.Recipient
	seen := map[string]bool{}
	add := func(rs []blockcrypt.Recipient) {
		for _, r := range rs {
			if !seen[r.URI] {
				seen[r.URI] = true
				out = append(out, r)
			}
		}
	}
	add(c.Recipients)
	for _, id := range c.DirectoryIDs() {
		add(c.Directories[id].Recipients)
		add(c.Directories[id].Former)
	}
	return out
}

// contextOf returns the context of a command.
func contextOf(c *cobra.Command) context.Context {
	if ctx := c.Context(); ctx != nil {
		return ctx
	}
	return context.Background()
}

// outside returns the absolute path of a directory, which may not exist yet, and refuses one that lies in the
// ciphertext directory.
func outside(dst, cipherDir string) (string, error) {
	from, err := filepath.Abs(cipherDir)
	if err == nil {
		from, err = filepath.EvalSymlinks(from)
	}
	to, terr := filepath.Abs(dst)
	if terr != nil || err != nil { // what is wrong with the ciphertext directory is told later
		return to, terr
	}
	real, rest := to, ""
	for { // symlinks on the part that exists
		r, err := filepath.EvalSymlinks(real)
		if err == nil {
			real = filepath.Join(r, rest)
			break
		}
		if up := filepath.Dir(real); up != real {
			real, rest = up, filepath.Join(filepath.Base(real), rest)
			continue
		}
		return "", err
	}
	if rel, err := filepath.Rel(from, real); err == nil && rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator)) {
		return "", usageError{fmt.Errorf("%s lies in the ciphertext directory", dst), "kmsfs export"}
	}
	return to, nil
}
