package keystore

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
)

// LocalWrapSize is the size of a key wrapped by [WrapLocal]: nonce 12, key 32, tag 16.
const LocalWrapSize = 12 + KeySize + 16

var errUnwrap = errors.New("the wrapped key was damaged, or is not of this key")

// WrapLocal wraps key under the 32-byte key kek, a local or a branch key: AES-256-GCM
// under HKDF(kek, salt = volume ID ‖ ID, info "kmsfs v1 wrap" ‖ use), so that
// each binding has a wrapping key of its own. branch is zero for a local key.
func WrapLocal(kek []byte, b Binding, branch [16]byte, key []byte) ([]byte, error) {
	a, err := wrapCipher(kek, b)
	if err != nil {
		return nil, err
	}
	return a.Seal(nil, nil, key, wrapAD(b, branch)), nil
}

// UnwrapLocal is the inverse of [WrapLocal].
func UnwrapLocal(kek []byte, b Binding, branch [16]byte, blob []byte) ([]byte, error) {
	a, err := wrapCipher(kek, b)
	if err != nil {
		return nil, err
	}
	if len(blob) != LocalWrapSize {
		return nil, errUnwrap
	}
	key, err := a.Open(nil, nil, blob, wrapAD(b, branch))
	if err != nil {
		return nil, errUnwrap
	}
	return key, nil
}

func wrapCipher(kek []byte, b Binding) (cipher.AEAD, error) {
	salt := append(b.Volume[:], b.ID[:]...)
	key, err := hkdf.Key(sha256.New, kek, salt, "kmsfs v1 wrap"+string(b.Use), KeySize)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// wrapAD is use ‖ volume ID ‖ branch ID ‖ file ID, zeros for a missing ID.
func wrapAD(b Binding, branch [16]byte) []byte {
	var file [16]byte
	switch b.Use {
	case ForFile, ForDirectory:
		file = b.ID
	case ForBranch:
		branch = b.ID
	}
	ad := append([]byte(b.Use), b.Volume[:]...)
	return append(append(ad, branch[:]...), file[:]...)
}
