// Package local wraps data keys under a local key: 32 bytes in a file of mode
// 0600, or derived from a passphrase with Argon2id. It is the embedded default:
// no account, no network.
package local

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/crypto/argon2" // Argon2id (RFC 9106), which the standard library lacks

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// Schemes of the URIs.
const (
	Scheme           = "local:"
	PassphraseScheme = "passphrase:"
)

// Store wraps under one local key.
type Store struct {
	uri    string
	branch []byte // of a passphrase: parameters and the sealed local key
	key    [keystore.KeySize]byte
}

var (
	_ keystore.Store     = (*Store)(nil)
	_ keystore.Immediate = (*Store)(nil)
)

// New returns the store of a 32-byte local key; its URI is derived from the key.
func New(key []byte) (*Store, error) {
	if len(key) != keystore.KeySize {
		return nil, invalid(Scheme,
			fmt.Errorf("a local key has %d bytes, not %d", keystore.KeySize, len(key)))
	}
	id, err := hkdf.Key(sha256.New, key, nil, "kmsfs v1 key id", keystore.KeySize)
	if err != nil {
		return nil, err
	}
	return &Store{uri: Scheme + hex.EncodeToString(id[:16]), key: [keystore.KeySize]byte(key)}, nil
}

// Immediate implements [keystore.Immediate].
func (s *Store) Immediate() {}

// URI implements [keystore.Store].
func (s *Store) URI() string { return s.uri }

// Wrap implements [keystore.Store]; see [keystore.WrapLocal].
func (s *Store) Wrap(_ context.Context, b keystore.Binding, key []byte) (blockcrypt.Recipient, error) {
	blob, err := keystore.WrapLocal(s.key[:], b, [16]byte{}, key)
	if err != nil {
		return blockcrypt.Recipient{}, &keystore.Error{Kind: keystore.Invalid, URI: s.uri,
			Op: "wrap", Err: err}
	}
	return blockcrypt.Recipient{URI: s.uri, Branch: s.branch, Wrapped: blob}, nil
}

// Unwrap implements [keystore.Store].
func (s *Store) Unwrap(_ context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	key, err := keystore.UnwrapLocal(s.key[:], b, [16]byte{}, w.Wrapped)
	if err != nil {
		return nil, &keystore.Error{Kind: keystore.Damaged, URI: s.uri, Op: "unwrap", Err: err}
	}
	return key, nil
}

// Key files.

// OpenFile reads a key file: exactly 32 bytes, a regular file that nobody but
// its owner can read.
func OpenFile(path string) (*Store, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hinted(fmt.Errorf("the key file %s does not exist", path),
			"restore it from its backup, or name the place it moved to with --key local:PATH")
	}
	if err != nil {
		return nil, invalid(Scheme, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, invalid(Scheme, err)
	}
	if !st.Mode().IsRegular() {
		return nil, invalid(Scheme, fmt.Errorf("the key file %s is not a regular file", path))
	}
	if st.Mode().Perm()&0o077 != 0 && runtime.GOOS != "windows" { // which has no such bits
		return nil, hinted(fmt.Errorf("the key file %s is open to others (mode %04o)", path,
			st.Mode().Perm()), "chmod 600 "+path)
	}
	b, err := io.ReadAll(io.LimitReader(f, keystore.KeySize+1))
	if err != nil {
		return nil, invalid(Scheme, err)
	}
	defer clear(b)
	if len(b) != keystore.KeySize || st.Size() != keystore.KeySize {
		return nil, invalid(Scheme,
			fmt.Errorf("the key file %s has %d bytes, not %d", path, st.Size(), keystore.KeySize))
	}
	return New(b)
}

// CreateFile makes a key file with a new key, mode 0600, durable when it
// returns. A file that is there already is opened instead; made says which.
func CreateFile(path string) (s *Store, made bool, err error) {
	if _, err := os.Lstat(path); err == nil {
		s, err = OpenFile(path)
		return s, false, err
	}
	key := make([]byte, keystore.KeySize)
	rand.Read(key)
	defer clear(key)
	if err := writeNew(path, key); err != nil {
		return nil, false, invalid(Scheme, err)
	}
	s, err = New(key)
	return s, true, err
}

// ImportFile makes a key file of a key that was kept elsewhere, durable when it returns. It is
// never written over another file.
func ImportFile(path string, key []byte) (*Store, error) {
	s, err := New(key)
	if err != nil {
		return nil, err
	}
	if err := writeNew(path, key); err != nil {
		return nil, invalid(Scheme, err)
	}
	return s, nil
}

// writeNew makes a file of mode 0600 that is there whole, durably, or not at all.
func writeNew(path string, b []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".kmsfs-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Link(f.Name(), path) // never over another
	}
	if err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Passphrases.

// Argon2id parameters of new passphrases: those of RFC 9106 §4 for less memory.
const (
	argonLanes  = 4
	argonPasses = 3
	argonKiB    = 64 << 10

	branchSize  = 88
	branchFixed = 28 // version, lanes, zero, passes, KiB, salt
)

// NewPassphrase makes a local key sealed under a passphrase.
func NewPassphrase(passphrase []byte) (*Store, error) {
	id := make([]byte, 16)
	rand.Read(id)
	s := &Store{uri: PassphraseScheme + hex.EncodeToString(id)}
	rand.Read(s.key[:])
	b := []byte{argon2.Version, argonLanes, 0, 0}
	b = binary.BigEndian.AppendUint32(b, argonPasses)
	b = binary.BigEndian.AppendUint32(b, argonKiB)
	b = append(b, make([]byte, 16)...)
	rand.Read(b[12:])
	a, err := passphraseCipher(b, passphrase)
	if err != nil {
		return nil, invalid(s.uri, err)
	}
	s.branch = a.Seal(bytes.Clone(b), nil, s.key[:], passphraseAD(b))
	return s, nil
}

// OpenPassphrase opens the local key that a recipient's branch holds. A wrong
// passphrase is of kind [keystore.Denied].
func OpenPassphrase(uri string, branch, passphrase []byte) (*Store, error) {
	if len(branch) != branchSize {
		return nil, &keystore.Error{Kind: keystore.Damaged, URI: uri, Op: "unwrap",
			Err: errors.New("the passphrase's parameters were damaged")}
	}
	a, err := passphraseCipher(branch[:branchFixed], passphrase)
	if err != nil {
		return nil, &keystore.Error{Kind: keystore.Damaged, URI: uri, Op: "unwrap", Err: err}
	}
	key, err := a.Open(nil, nil, branch[branchFixed:], passphraseAD(branch[:branchFixed]))
	if err != nil {
		return nil, &keystore.Error{Kind: keystore.Denied, URI: uri, Op: "unwrap",
			Err: errors.New("wrong passphrase")}
	}
	defer clear(key)
	return &Store{uri: uri, branch: bytes.Clone(branch), key: [keystore.KeySize]byte(key)}, nil
}

// passphraseCipher checks the parameters, bounded both ways: too little would
// be weak, too much a way to stop the reader.
func passphraseCipher(b, passphrase []byte) (cipher.AEAD, error) {
	lanes, passes, kib := b[1], binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])
	if b[0] != argon2.Version || lanes < 1 || lanes > 16 || b[2] != 0 || b[3] != 0 || passes < 1 ||
		passes > 64 || kib < 8<<10 || kib > 4<<20 {
		return nil, errors.New("the passphrase's parameters are out of bounds")
	}
	key := argon2.IDKey(passphrase, b[12:branchFixed], passes, kib, lanes, keystore.KeySize)
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

func passphraseAD(fixed []byte) []byte {
	return append([]byte("kmsfs v1 passphrase"), fixed...)
}

func invalid(uri string, err error) error {
	return &keystore.Error{Kind: keystore.Invalid, URI: uri, Op: "open", Err: err}
}

func hinted(err error, hint string) error {
	return &keystore.Error{Kind: keystore.Invalid, URI: Scheme, Op: "open", Hint: hint, Err: err}
}
