// Package agestore wraps data keys for recipients of age (age-encryption.org/v1): X25519 keys,
// post-quantum hybrid ones, and SSH keys. Only the public key is needed to wrap. The identity that
// unwraps is kept elsewhere, for the day on which the other keys are lost.
package agestore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"filippo.io/age"        // the format and its recipients; well reviewed, and `age -d` opens what it made
	"filippo.io/age/agessh" // SSH keys as recipients
	"filippo.io/age/armor"
	"golang.org/x/crypto/ssh"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// Scheme of the URIs.
const Scheme = "age:"

// Identities are what unwraps.
type Identities = []age.Identity

// Store wraps for one recipient, and unwraps if it has an identity that can.
type Store struct {
	uri       string
	name      string        // the recipient as age writes it; "" if it is not known
	recipient age.Recipient // nil if it is not known
	ids       Identities
}

var (
	_ keystore.Store     = (*Store)(nil)
	_ keystore.Immediate = (*Store)(nil)
	_ keystore.Sealer    = (*Store)(nil)
)

// Named reports whether a name is that of an age recipient.
func Named(name string) bool {
	return strings.HasPrefix(name, "age1") || strings.HasPrefix(name, "ssh-ed25519 ") ||
		strings.HasPrefix(name, "ssh-rsa ")
}

// New returns the store of a recipient, as age-keygen or ssh-keygen prints it. It can only wrap.
func New(name string) (*Store, error) {
	name = strings.TrimSpace(strings.TrimPrefix(name, Scheme))
	if kind, key, ok := strings.Cut(name, " "); ok { // the comment of an SSH key is not part of it
		key, _, _ = strings.Cut(key, " ")
		name = kind + " " + key
	}
	r, err := parse(name)
	if err != nil {
		return nil, &keystore.Error{Kind: keystore.Invalid, URI: Scheme, Op: "open",
			Err:  fmt.Errorf("%q is no age recipient: %w", name, err),
			Hint: "age-keygen -y prints the one of an identity file"}
	}
	return &Store{uri: uri(name), name: name, recipient: r}, nil
}

func parse(name string) (age.Recipient, error) {
	switch {
	case strings.HasPrefix(name, "age1pq1"):
		return age.ParseHybridRecipient(name)
	case strings.HasPrefix(name, "age1"):
		return age.ParseX25519Recipient(name) // refuses those of plugins, which would run a program for each file
	default:
		return agessh.ParseRecipient(name)
	}
}

// uri names a recipient in headers: some are longer than a URI may be.
func uri(name string) string {
	h := sha256.Sum256([]byte(name))
	return Scheme + hex.EncodeToString(h[:16])
}

// Open returns the store of a recipient that a volume or a file names. The branch is the
// recipient's public key, in kmsfs.json; files have none, and then the store can only unwrap.
func Open(u string, branch []byte, ids Identities) (*Store, error) {
	if len(branch) == 0 {
		return &Store{uri: u, ids: ids}, nil
	}
	s, err := New(string(branch))
	if err == nil && (s.uri != u || s.name != string(branch)) {
		err = errors.New("its public key is another one's")
	}
	if err != nil {
		return nil, &keystore.Error{Kind: keystore.Damaged, URI: u, Op: "open", Err: err}
	}
	s.ids = ids
	return s, nil
}

// URI implements [keystore.Store].
func (s *Store) URI() string { return s.uri }

// Branch returns the public key, which kmsfs.json keeps.
func (s *Store) Branch() []byte { return []byte(s.name) }

// Immediate implements [keystore.Immediate].
func (s *Store) Immediate() {}

// OnlySeals implements [keystore.Sealer].
func (s *Store) OnlySeals() bool { return len(s.ids) == 0 }

// bound is what is encrypted: the binding before the key, since age has no associated data.
func bound(b keystore.Binding, key []byte) []byte {
	out := append([]byte("kmsfs v1 age "+string(b.Use)+"\x00"), b.Volume[:]...)
	return append(append(out, b.ID[:]...), key...)
}

// Wrap implements [keystore.Store]. The blob is a file of age. With the volume key comes the public
// key, for those who open the volume later and make files.
func (s *Store) Wrap(_ context.Context, b keystore.Binding, key []byte) (blockcrypt.Recipient, error) {
	if s.recipient == nil {
		return blockcrypt.Recipient{}, &keystore.Error{Kind: keystore.Invalid, URI: s.uri,
			Op: "wrap", Err: errors.New("its public key is not known")}
	}
	var out bytes.Buffer
	w, err := age.Encrypt(&out, s.recipient)
	if err == nil {
		text := bound(b, key)
		defer clear(text)
		if _, err = w.Write(text); err == nil {
			err = w.Close()
		}
	}
	if err != nil {
		return blockcrypt.Recipient{}, &keystore.Error{Kind: keystore.Invalid, URI: s.uri,
			Op: "wrap", Err: err}
	}
	wrapped := blockcrypt.Recipient{URI: s.uri, Wrapped: out.Bytes()}
	if b.Use == keystore.ForVolume || b.Use == keystore.ForDirectory {
		wrapped.Branch = s.Branch()
	}
	return wrapped, nil
}

// Unwrap implements [keystore.Store].
func (s *Store) Unwrap(_ context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	fail := func(kind keystore.Kind, err error, hint string) ([]byte, error) {
		return nil, &keystore.Error{Kind: kind, URI: s.uri, Op: "unwrap", Err: err, Hint: hint}
	}
	if s.OnlySeals() {
		return fail(keystore.Untrusted, errors.New("its identity is not at hand"),
			"name it with --identity FILE")
	}
	r, err := age.Decrypt(bytes.NewReader(w.Wrapped), s.ids...)
	if _, ok := errors.AsType[*age.NoIdentityMatchError](err); ok {
		return fail(keystore.Denied, errors.New("no identity that was given is this recipient's"), "")
	}
	prefix := bound(b, nil)
	text := make([]byte, len(prefix)+keystore.KeySize+1)
	defer clear(text)
	n := 0
	if err == nil {
		if n, err = io.ReadFull(r, text); errors.Is(err, io.ErrUnexpectedEOF) {
			err = nil
		}
	}
	if err != nil || n != len(prefix)+keystore.KeySize || !bytes.HasPrefix(text, prefix) {
		return fail(keystore.Damaged,
			errors.New("the wrapped key was damaged, or is that of another file"), "")
	}
	return bytes.Clone(text[len(prefix):n]), nil
}

// maxIdentities is how long an identity file may be, in bytes.
const maxIdentities = 1 << 20

// ReadIdentities reads a file of identities: one of age-keygen, one of it that was encrypted with a
// passphrase, or an SSH private key. passphrase is called if the file needs one.
func ReadIdentities(path string, passphrase func() ([]byte, error)) (Identities, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxIdentities+1))
	if err != nil {
		return nil, err
	}
	defer clear(b)
	if len(b) > maxIdentities {
		return nil, invalid(path, errors.New("it is too large"))
	}
	ids, err := identities(b, passphrase)
	if err != nil {
		return nil, invalid(path, err)
	}
	return ids, nil
}

func invalid(path string, err error) error {
	if e, ok := errors.AsType[*keystore.Error](err); ok {
		return e
	}
	return &keystore.Error{Kind: keystore.Invalid, URI: Scheme, Op: "open",
		Err: fmt.Errorf("the identity file %s cannot be read: %w", path, err)}
}

func identities(b []byte, passphrase func() ([]byte, error)) (Identities, error) {
	switch {
	case bytes.HasPrefix(b, []byte("age-encryption.org/")):
		return encrypted(b, passphrase)
	case bytes.HasPrefix(b, []byte("-----BEGIN AGE ENCRYPTED FILE-----")):
		plain, err := dearmor(b)
		if err != nil {
			return nil, err
		}
		return encrypted(plain, passphrase)
	case bytes.HasPrefix(b, []byte("-----BEGIN")):
		id, err := agessh.ParseIdentity(b)
		if missing, ok := errors.AsType[*ssh.PassphraseMissingError](err); ok && missing.PublicKey != nil {
			id, err = agessh.NewEncryptedSSHIdentity(missing.PublicKey, bytes.Clone(b), passphrase)
		}
		if err != nil {
			return nil, err
		}
		return Identities{id}, nil
	}
	return age.ParseIdentities(bytes.NewReader(b))
}

// encrypted opens an identity file that is itself a file of age, under a passphrase.
func encrypted(b []byte, passphrase func() ([]byte, error)) (Identities, error) {
	p, err := passphrase()
	if err != nil {
		return nil, err
	}
	defer clear(p)
	id, err := age.NewScryptIdentity(string(p))
	if err != nil {
		return nil, err
	}
	r, err := age.Decrypt(bytes.NewReader(b), id)
	if err != nil {
		return nil, &keystore.Error{Kind: keystore.Denied, URI: Scheme, Op: "open",
			Err: errors.New("the passphrase does not open the identity file")}
	}
	return age.ParseIdentities(io.LimitReader(r, maxIdentities))
}

// dearmor returns the bytes of a file of age in its text form.
func dearmor(b []byte) ([]byte, error) { return io.ReadAll(armor.NewReader(bytes.NewReader(b))) }
