package agestore

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"filippo.io/age"
	"filippo.io/age/armor"
	"golang.org/x/crypto/ssh"

	"kmsfs/keystore"
	"kmsfs/keystore/keystoretest"
)

// pair is a recipient with the text of its identity file.
type pair struct{ recipient, identity string }

func pairs(t *testing.T) map[string]pair {
	t.Helper()
	x, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	h, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(priv, "")
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := ssh.MarshalPrivateKeyWithPassphrase(priv, "", []byte("correct horse"))
	if err != nil {
		t.Fatal(err)
	}
	spub, err := ssh.NewPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	line := string(bytes.TrimSpace(ssh.MarshalAuthorizedKey(spub)))
	return map[string]pair{
		"X25519":                {x.Recipient().String(), "# a comment\n" + x.String() + "\n"},
		"hybrid":                {h.Recipient().String(), h.String() + "\n"},
		"SSH":                   {line + " somebody@a machine", string(pem.EncodeToMemory(block))},
		"SSH with a passphrase": {line, string(pem.EncodeToMemory(sealed))},
		"encrypted":             {x.Recipient().String(), underPassphrase(t, x.String(), false)},
		"encrypted, as text":    {x.Recipient().String(), underPassphrase(t, x.String(), true)},
	}
}

func underPassphrase(t *testing.T, text string, armored bool) string {
	t.Helper()
	r, err := age.NewScryptRecipient("correct horse")
	if err != nil {
		t.Fatal(err)
	}
	r.SetWorkFactor(10)
	var out bytes.Buffer
	var w io.WriteCloser = nopCloser{&out}
	if armored {
		w = armor.NewWriter(&out)
	}
	e, err := age.Encrypt(w, r)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.WriteString(e, text)
	if err = errors.Join(err, e.Close(), w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func secret() ([]byte, error) { return []byte("correct horse"), nil }

func TestIdentities(t *testing.T) {
	b := keystore.Binding{Use: keystore.ForFile, Volume: [16]byte{1}, ID: [16]byte{2}}
	for name, p := range pairs(t) {
		t.Run(name, func(t *testing.T) {
			s, err := New(p.recipient)
			if err != nil || !s.OnlySeals() {
				t.Fatal(err)
			}
			key := bytes.Repeat([]byte{7}, keystore.KeySize)
			w, err := s.Wrap(t.Context(), b, key)
			if err != nil || len(w.Branch) != 0 {
				t.Fatal(err)
			}
			if _, err := s.Unwrap(t.Context(), b, w); keystore.KindOf(err) != keystore.Untrusted {
				t.Errorf("without an identity: %v", err)
			}
			path := filepath.Join(t.TempDir(), "key.txt")
			if err := os.WriteFile(path, []byte(p.identity), 0o600); err != nil {
				t.Fatal(err)
			}
			ids, err := ReadIdentities(path, secret)
			if err != nil {
				t.Fatal(err)
			}
			for _, branch := range [][]byte{s.Branch(), nil} { // of kmsfs.json, and of a file
				o, err := Open(s.URI(), branch, ids)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := o.Unwrap(t.Context(), b, w); err != nil || !bytes.Equal(got, key) {
					t.Errorf("%x, %v", got, err)
				}
				other := b
				other.ID[0]++
				if _, err := o.Unwrap(t.Context(), other, w); keystore.KindOf(err) != keystore.Damaged {
					t.Errorf("of another file: %v", err)
				}
			}
		})
	}
}

// A store with its identity is a keystore like any other.
func TestSuite(t *testing.T) {
	open := func() keystore.Store {
		p := pairs(t)["X25519"]
		s, err := New(p.recipient)
		if err != nil {
			t.Fatal(err)
		}
		ids, err := identities([]byte(p.identity), secret)
		if err != nil {
			t.Fatal(err)
		}
		o, err := Open(s.URI(), s.Branch(), ids)
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	// A changed stanza cannot be told from that of somebody else.
	keystoretest.Suite(t, open(), open(), keystore.Damaged, keystore.Denied)
}

func TestRefused(t *testing.T) {
	x, h := pairs(t)["X25519"], pairs(t)["hybrid"]
	for _, name := range []string{"", "age1",
		"age1yubikey1q2w7u3vpya839jxxuq8g0sedh3d740d4xvn639sqhr95ejj8vu3hyfumptt", x.recipient[:40],
		x.recipient + "x", "ssh-rsa AAAA", "ssh-ed25519 !"} {
		if _, err := New(name); keystore.KindOf(err) != keystore.Invalid {
			t.Errorf("%q: %v", name, err)
		}
	}
	s, err := New(x.recipient)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(s.URI(), []byte(h.recipient), nil); keystore.KindOf(err) != keystore.Damaged {
		t.Errorf("another one's public key: %v", err)
	}
	ids, err := identities([]byte(h.identity), secret)
	if err != nil {
		t.Fatal(err)
	}
	b := keystore.Binding{Use: keystore.ForVolume}
	w, err := s.Wrap(t.Context(), b, make([]byte, keystore.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	o, err := Open(s.URI(), s.Branch(), ids)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.Unwrap(t.Context(), b, w); keystore.KindOf(err) != keystore.Denied {
		t.Errorf("by another identity: %v", err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{"nothing": "", "noise": "noise\n",
		"armor": "-----BEGIN AGE ENCRYPTED FILE-----\n", "ssh": "-----BEGIN OPENSSH PRIVATE KEY-----\n"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadIdentities(path, secret); keystore.KindOf(err) != keystore.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	path := filepath.Join(dir, "sealed")
	if err := os.WriteFile(path, []byte(underPassphrase(t, x.identity, false)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadIdentities(path,
		func() ([]byte, error) { return []byte("wrong"), nil }); keystore.KindOf(err) != keystore.Denied {
		t.Errorf("a wrong passphrase: %v", err)
	}
	if _, err := ReadIdentities(filepath.Join(dir, "missing"), secret); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}
