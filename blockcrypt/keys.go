package blockcrypt

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"sync"
)

// KeySize is the size of a data key and of every derived key, in bytes, but
// those of AES-SIV, which have 64.
const KeySize = 32

// FileKeys are the keys of one file, derived from its data key. They are safe
// for use by several goroutines.
type FileKeys struct {
	prk   []byte // HKDF-Extract(salt = volume ID ‖ file ID, data key)
	state []byte

	mu      sync.RWMutex
	content map[uint16]cipher.AEAD // bounded by maxContentKeys
}

// maxContentKeys bounds the cache of content keys of a file: a hostile or very
// old file can name 65,536 of them.
const maxContentKeys = 32

func expand(prk []byte, info string, extra ...byte) []byte {
	k, err := hkdf.Expand(sha256.New, prk, info+string(extra), KeySize)
	if err != nil {
		panic(err) // only for a length beyond 255 hashes
	}
	return k
}

func extract(key []byte, salt ...[]byte) []byte {
	var s []byte
	for _, p := range salt {
		s = append(s, p...)
	}
	// HKDF-Extract is HMAC (RFC 5869, section 2.2). Made here, since the hash keeps its
	// last block, which is the key, until something else is written.
	m := hmac.New(sha256.New, s)
	m.Write(key)
	prk := m.Sum(nil)
	m.Reset()
	m.Write(make([]byte, sha256.BlockSize-1))
	return prk
}

func deriveFileKeys(dataKey []byte, volume, file ID) (*FileKeys, [32]byte, error) {
	if len(dataKey) != KeySize {
		return nil, [32]byte{}, damaged(BadCommitment, "a data key has %d bytes, not %d", KeySize,
			len(dataKey))
	}
	prk := extract(dataKey, volume[:], file[:])
	k := &FileKeys{prk: prk, state: expand(prk, "kmsfs v1 state", Suite)}
	return k, [32]byte(expand(prk, "kmsfs v1 commit", Suite)), nil
}

// Unlock derives the file's keys from its data key. It fails with
// [BadCommitment] for another file's key and with [BadState] where the state
// was altered.
func (h *Header) Unlock(dataKey []byte) (*FileKeys, error) {
	k, commitment, err := deriveFileKeys(dataKey, h.Volume, h.File)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(commitment[:], h.Commitment[:]) == 0 {
		return nil, damaged(BadCommitment, "the data key is not this file's")
	}
	tag := k.stateTag(h)
	if !hmac.Equal(tag[:], h.StateTag[:]) {
		return nil, &DamageError{BadState, offState, "the state was altered"}
	}
	return k, nil
}

// FileIDs are the ID of a file and that of the directory in which it is made, zero outside a volume.
type FileIDs struct{ File, Dir ID }

// NewFile makes the keys and the header of a file with new content: commitment
// and, inside a volume, origin. The caller sets the state with [FileKeys.SetState].
// vk is nil outside a volume; volume is then zero.
func NewFile(g Geometry, vk *VolumeKeys, ids FileIDs, dataKey []byte,
	rs []Recipient) (*Header, *FileKeys, error) {
	h := &Header{Geometry: g, File: ids.File, Dir: ids.Dir, Recipients: rs}
	if vk != nil {
		h.Volume = vk.volume
	}
	k, commitment, err := deriveFileKeys(dataKey, h.Volume, ids.File)
	if err != nil {
		return nil, nil, err
	}
	h.Commitment = commitment
	if vk != nil {
		h.Origin = vk.origin(h)
	}
	return h, k, nil
}

// SetState puts s with its tag into h.
func (k *FileKeys) SetState(h *Header, s State) {
	h.State = s
	h.StateTag = k.stateTag(h)
}

func (k *FileKeys) stateTag(h *Header) [16]byte {
	var b [offRecipients]byte
	h.encodeFixed(b[:])
	h.EncodeState(b[offState:])
	m := hmac.New(sha256.New, k.state)
	m.Write(b[:offStateTag])
	return [16]byte(m.Sum(nil))
}

// aead returns the cipher of content key e.
func (k *FileKeys) aead(e uint16) cipher.AEAD {
	k.mu.RLock()
	a := k.content[e]
	k.mu.RUnlock()
	if a != nil {
		return a
	}
	key := expand(k.prk, "kmsfs v1 content", Suite, byte(e>>8), byte(e))
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // only for a wrong key length
	}
	if a, err = cipher.NewGCMWithRandomNonce(block); err != nil {
		panic(err) // only for a cipher that is not AES
	}
	clear(key)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.content == nil || len(k.content) >= maxContentKeys {
		k.content = make(map[uint16]cipher.AEAD, 1)
	}
	k.content[e] = a
	return a
}

// NewEpoch draws the number of a content key at random. A writer draws one for
// each file at its first write in a session, and again after [EpochBlocks].
func NewEpoch() uint16 {
	var b [2]byte
	rand.Read(b[:])
	return binary.BigEndian.Uint16(b[:])
}

// EpochBlocks is how many blocks a writer seals under one content key: random
// 96-bit nonces are good for 2^32 (NIST SP 800-38D §8.3), of which it takes half.
const EpochBlocks = 1 << 31
