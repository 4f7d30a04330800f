package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/awskms"
	"kmsfs/keystore/local"
)

const lonelyKeyUsage = "open the file with this `KEY` (repeatable); default: what the trust record of its volume names, or else the KMS key that the file names"

func catCommand() *cobra.Command {
	var k keyFlags
	c := &cobra.Command{
		Use:   "cat [--key KEY]... CIPHERFILE",
		Short: "Print the plaintext of one ciphertext file, wherever it lies",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return k.decrypt(context.Background(), args[0], os.Stdout)
		},
	}
	k.add(c, lonelyKeyUsage)
	k.addIdentities(c)
	return c
}

func decryptCommand() *cobra.Command {
	var k keyFlags
	c := &cobra.Command{
		Use:   "decrypt [--key KEY]... IN OUT",
		Short: "Decrypt one file; - is stdin or stdout",
		Long: `Decrypt one file that kmsfs encrypt made, or one of a volume. - is stdin or
stdout. OUT appears whole or not at all.`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			ctx := context.Background()
			in, cleanup, err := spoolStdin(args[0])
			if err != nil {
				return err
			}
			defer cleanup()
			if args[1] == "-" {
				return k.decrypt(ctx, in, os.Stdout)
			}
			return writeWhole(args[1], modeOf(args[0]),
				func(f *os.File) error { return k.decrypt(ctx, in, f) })
		},
	}
	k.add(c, lonelyKeyUsage)
	k.addIdentities(c)
	return c
}

func encryptCommand() *cobra.Command {
	var k keyFlags
	c := &cobra.Command{
		Use:   "encrypt [--key KEY]... IN OUT",
		Short: "Encrypt one file, with no volume; - is stdin or stdout",
		Long: `Encrypt one file in the format of a volume's files, with no volume. - is stdin
or stdout. OUT appears whole or not at all; of a file that was being
written when it was copied, OUT gets what opens (exit code 8).`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			return k.encrypt(context.Background(),
				args[0], args[1])
		},
	}
	k.add(c,
		"wrap the file's data key under this `KEY` (repeatable); default: a local key of yours, made if missing")
	return c
}

// encrypt makes a ciphertext file outside any volume. A key file that it has made for that goes again if
// it fails.
func (k *keyFlags) encrypt(ctx context.Context, in, out string) error {
	if len(k.keys) == 0 {
		path, err := defaultKey()
		if err != nil {
			return err
		}
		k.keys = []string{local.Scheme + path}
	}
	r := os.Stdin
	if in != "-" {
		f, err := os.Open(in)
		if err != nil {
			return err
		}
		defer f.Close()
		if st, err := f.Stat(); err == nil && st.IsDir() {
			return fmt.Errorf("%s is a directory; kmsfs init makes a volume of many files", in)
		}
		r = f
	}
	ms, err := k.create(ctx)
	if err != nil {
		return err
	}
	for _, m := range ms {
		if m.created {
			say("the key file %s was made; back it up: without it the file cannot be opened", m.path)
		}
	}
	err = k.encryptTo(ctx, ms, r, in, out)
	if _, placed := errors.AsType[placedError](err); err != nil && !placed {
		unmake(ms)
	}
	return err
}

// defaultKey is the key file of encrypt and decrypt where no key is named.
func defaultKey() (string, error) {
	dir, err := keyDir()
	return filepath.Join(dir, "default.key"), err
}

// encryptTo writes the ciphertext to a file, or to stdout for "-".
func (k *keyFlags) encryptTo(ctx context.Context, ms []made, r io.Reader, in, out string) error {
	if out != "-" {
		return writeWhole(out, modeOf(in),
			func(f *os.File) error { return volume.Encrypt(ctx, f, r, stores(ms)) })
	}
	// The header is written last, so what goes to a pipe is made in a file first.
	f, _, err := spool()
	if err != nil {
		return err
	}
	defer unspool(f)
	if err := volume.Encrypt(ctx, f, r, stores(ms)); err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	_, err = io.Copy(os.Stdout, f)
	return err
}

// spoolStdin makes a ciphertext that comes from a pipe one that can be read at
// any offset; other names are given back as they are.
func spoolStdin(in string) (path string, cleanup func(), err error) {
	if in != "-" {
		return in, func() {}, nil
	}
	f, path, err := spool()
	if err != nil {
		return "", nil, err
	}
	if _, err := io.Copy(f, os.Stdin); err != nil {
		unspool(f)
		return "", nil, err
	}
	return path, func() { unspool(f) }, nil
}

// modeOf is the mode of a file made from in: in's own, or 0600.
func modeOf(in string) os.FileMode {
	if st, err := os.Stat(in); in != "-" && err == nil {
		return st.Mode().Perm()
	}
	return 0o600
}

// writeWhole makes a file that appears whole or not at all.
func writeWhole(path string, mode os.FileMode, f func(*os.File) error) error {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real // a symlink stays one
	}
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", path)
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".kmsfs-*")
	if err != nil {
		return err
	}
	defer removeOnSignal(tmp.Name())()
	err = tmp.Chmod(mode &^ umask())
	var partial error
	if err == nil {
		if err = f(tmp); exitCode(err) == exitIncomplete {
			err, partial = nil, err
		}
	}
	if err := finish(tmp, path, err); err != nil {
		return err
	}
	return partial
}

// removeOnSignal removes an unfinished file when the command is interrupted; the
// function that it returns ends that.
func removeOnSignal(path string) (stop func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		if s, ok := <-c; ok {
			os.Remove(path)
			os.Exit(128 + int(s.(syscall.Signal)))
		}
	}()
	return func() {
		signal.Stop(c)
		close(c)
	}
}

// decrypt writes the plaintext of a ciphertext file to w.
func (k *keyFlags) decrypt(ctx context.Context, path string, w io.Writer) error {
	l, err := volume.OpenLone(path)
	if err != nil {
		return named(path, err)
	}
	defer l.Close()
	if l.Header == nil {
		return nil // an empty file is an empty file
	}
	key, err := k.dataKey(ctx, l)
	if err != nil {
		return named(path, err)
	}
	incomplete, err := l.Unlock(key)
	clear(key)
	if err != nil {
		return named(path, err)
	}
	if err := l.CopyTo(w, skipper(w)); err != nil {
		return named(path, err)
	}
	if incomplete {
		return coded{fmt.Errorf("%s was being written when it was copied; %d bytes that open were given, the last writes may be missing", path, l.Size()), exitIncomplete}
	}
	return nil
}

// named adds a path to an error that lacks it.
func named(path string, err error) error {
	if _, ok := errors.AsType[*os.PathError](err); ok || errors.Is(err, syscall.EPIPE) {
		return err
	}
	return fmt.Errorf("%s: %w", path, err)
}

// skipper returns what leaves a hole in w, nil if w cannot have one: it must be a regular
// file that ends where the next byte goes.
func skipper(w io.Writer) func(int64) error {
	f, ok := w.(*os.File)
	if !ok {
		return nil
	}
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return nil
	}
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil || at != st.Size() {
		return nil
	}
	if appends(f) {
		return nil
	}
	return func(n int64) error {
		at, err := f.Seek(n, io.SeekCurrent)
		if err == nil {
			err = f.Truncate(at)
		}
		return err
	}
}

// dataKey unwraps the data key of a lone file: through --key, or the trust
// record of its volume, or the KMS key that the header names.
func (k *keyFlags) dataKey(ctx context.Context, l *volume.Lone) ([]byte, error) {
	trusted, err := k.loneStores(ctx, l)
	if err != nil {
		return nil, err
	}
	return keystore.UnwrapFirst(ctx, trusted, l.Binding(), l.Header.Recipients)
}

// loneStores opens the stores of dataKey.
func (k *keyFlags) loneStores(ctx context.Context, l *volume.Lone) ([]keystore.Store, error) {
	rs := l.Header.Recipients
	rec, err := readRecord(l.Header.Volume)
	if err != nil {
		return nil, err
	}
	trusted, err := k.trusted(ctx, rs, rec)
	if err != nil {
		return nil, err
	}
	if len(trusted) == 0 && rec != nil {
		return nil, hint(&keystore.Error{Kind: keystore.Untrusted, URI: rs[0].URI, Op: "open",
			Err: errors.New("the trust record of the file's volume does not name this key")}, "if it is yours, name it with --key")
	}
	if len(trusted) == 0 {
		return k.unverified(ctx, rs)
	}
	return trusted, nil
}

// unverified opens a key that nobody vouches for: the KMS key that the header
// names, and people are told which, a passphrase, or the default key file.
func (k *keyFlags) unverified(ctx context.Context, rs []blockcrypt.Recipient) ([]keystore.Store, error) {
	for _, r := range rs {
		switch {
		case strings.HasPrefix(r.URI, awskms.Scheme):
			s, err := k.kms().OpenURI(ctx, r.URI)
			if err != nil {
				return nil, err
			}
			say("using the key that the file names, unverified: %s", r.URI)
			return []keystore.Store{s}, nil
		case strings.HasPrefix(r.URI, local.PassphraseScheme):
			s, err := k.anyPassphrase(rs)
			if err != nil {
				return nil, err
			}
			return []keystore.Store{s}, nil
		case strings.HasPrefix(r.URI, local.Scheme):
			if path, err := defaultKey(); err == nil {
				if s, err := local.OpenFile(path); err == nil && s.URI() == r.URI {
					return []keystore.Store{s}, nil
				}
			}
		}
	}
	err := &keystore.Error{Kind: keystore.Untrusted, URI: rs[0].URI, Op: "open",
		Err: errors.New("its key is not at hand")}
	return nil, hint(err, "name it with --key local:PATH")
}
