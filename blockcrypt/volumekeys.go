package blockcrypt

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strconv"
	"strings"

	// AES-SIV (RFC 5297), which the standard library lacks.
	"github.com/tink-crypto/tink-go/v2/daead/subtle"
)

// VolumeKeys are the keys derived from the volume key. They are safe for use
// by several goroutines.
type VolumeKeys struct {
	volume                        ID
	originKey, json, mounted      []byte
	commitment                    [32]byte
	namesSIV, valuesSIV, xattrSIV *subtle.AESSIV
}

// NewVolumeKeys derives the keys of a volume from its 32-byte volume key.
func NewVolumeKeys(volumeKey []byte, volume ID) (*VolumeKeys, error) {
	if len(volumeKey) != KeySize {
		return nil, damaged(BadConfig, "a volume key has %d bytes, not %d", KeySize, len(volumeKey))
	}
	prk := extract(volumeKey, volume[:])
	v := &VolumeKeys{
		volume:     volume,
		originKey:  expand(prk, "kmsfs v1 origin"),
		json:       expand(prk, "kmsfs v1 json"),
		mounted:    expand(prk, "kmsfs v1 mounted"),
		commitment: [32]byte(expand(prk, "kmsfs v1 trust")),
	}
	for _, s := range []struct {
		siv  **subtle.AESSIV
		info string
	}{{&v.namesSIV, "names"}, {&v.valuesSIV, "values"}, {&v.xattrSIV, "xattrs"}} {
		key, err := hkdf.Expand(sha256.New, prk, "kmsfs v1 "+s.info, 64)
		if err != nil {
			return nil, err
		}
		if *s.siv, err = subtle.NewAESSIV(key); err != nil {
			return nil, err
		}
	}
	clear(prk)
	return v, nil
}

// Volume returns the volume's ID.
func (v *VolumeKeys) Volume() ID { return v.volume }

// Commitment identifies the volume key without revealing it: the trust record keeps it.
func (v *VolumeKeys) Commitment() [32]byte { return v.commitment }

func (v *VolumeKeys) origin(h *Header) [16]byte {
	var b [128]byte
	h.encodeFixed(b[:])
	m := hmac.New(sha256.New, v.originKey)
	m.Write(b[:96])
	return [16]byte(m.Sum(nil))
}

// CheckOrigin fails with [BadVolume] for a file of another volume and with
// [BadOrigin] for one that was not made with this volume's key.
func (v *VolumeKeys) CheckOrigin(h *Header) error {
	if h.Volume != v.volume {
		return damaged(BadVolume, "the file is of volume %x", h.Volume)
	}
	if o := v.origin(h); !hmac.Equal(o[:], h.Origin[:]) {
		return damaged(BadOrigin, "the file was not made in this volume")
	}
	return nil
}

// Names.

const (
	maxName    = 255 // bytes of a name, plain or encoded
	LongPrefix = "kmsfs.long."
	LongName   = "kmsfs.name."
	Reserved   = "kmsfs."
)

// EncodeName encrypts a name within the directory dir. The result can be longer
// than 255 bytes, see [LongHash].
func (v *VolumeKeys) EncodeName(dir ID, name string) (string, error) {
	if !validName(name) {
		return "", damaged(BadName, "not a name of 1 to 255 bytes")
	}
	padded := make([]byte, (len(name)+15)/16*16)
	copy(padded, name)
	ct, err := v.namesSIV.EncryptDeterministically(padded, dir[:])
	if err != nil {
		return "", err
	}
	return base64.RawURLEncoding.EncodeToString(ct), nil
}

// DecodeName is strict: what [VolumeKeys.EncodeName] would not give back is [BadName].
func (v *VolumeKeys) DecodeName(dir ID, encoded string) (string, error) {
	ct, err := decode64(encoded)
	if err != nil || len(ct) < 32 {
		return "", damaged(BadName, "not an encoded name")
	}
	padded, err := v.namesSIV.DecryptDeterministically(ct, dir[:])
	if err != nil {
		return "", damaged(BadName, "a name of another directory, or altered")
	}
	name := strings.TrimRight(string(padded), "\x00")
	if !validName(name) || len(padded) != (len(name)+15)/16*16 {
		return "", damaged(BadName, "a name that cannot be")
	}
	return name, nil
}

// decode64 decodes what the encoder gives, and nothing else.
func decode64(s string) ([]byte, error) {
	if strings.ContainsAny(s, "\r\n") { // the decoder passes over these
		return nil, base64.CorruptInputError(0)
	}
	return base64.RawURLEncoding.Strict().DecodeString(s)
}

func validName(s string) bool {
	return s != "" && len(s) <= maxName && s != "." && s != ".." && !strings.ContainsAny(s, "/\x00")
}

// MostShort is the length in bytes of the longest name that is used as it is when it is encoded; all
// longer ones have a [LongHash].
const MostShort = 160

// LongHash returns what stands for an encoded name of more than 255 bytes: the
// entry is [LongPrefix] ‖ hash, beside a symlink [LongName] ‖ hash whose target
// is the encoded name. long is false where the encoded name is used as it is.
func LongHash(encoded string) (hash string, long bool) {
	if len(encoded) <= maxName {
		return "", false
	}
	h := sha256.Sum256([]byte(encoded))
	return base64.RawURLEncoding.EncodeToString(h[:]), true
}

// Values: symlink targets and extended attributes.

const (
	valueOverhead = 32 // random 16, SIV 16
	symlinkUse    = "symlink"
	valueUse      = "value"
)

// SealValue encrypts the value of the extended attribute with the full
// plaintext name attr.
func (v *VolumeKeys) SealValue(attr string, value []byte) ([]byte, error) {
	return v.sealValue(valueUse, attr, value)
}

// OpenValue is the inverse of [VolumeKeys.SealValue]; else [BadValue].
func (v *VolumeKeys) OpenValue(attr string, sealed []byte) ([]byte, error) {
	return v.openValue(valueUse, attr, sealed)
}

// SealTarget encrypts a symlink's target.
func (v *VolumeKeys) SealTarget(target string) (string, error) {
	b, err := v.sealValue(symlinkUse, "", []byte(target))
	return base64.RawURLEncoding.EncodeToString(b), err
}

// OpenTarget is the inverse of [VolumeKeys.SealTarget]; else [BadValue].
func (v *VolumeKeys) OpenTarget(sealed string) (string, error) {
	b, err := decode64(sealed)
	if err != nil {
		return "", damaged(BadValue, "not a symlink target")
	}
	t, err := v.openValue(symlinkUse, "", b)
	return string(t), err
}

// TargetLen returns the length of a target from that of its sealed form, -1 if there is none.
func TargetLen(sealed int64) int64 {
	return max(-1, sealed*6/8-valueOverhead)
}

func (v *VolumeKeys) sealValue(use, attr string, value []byte) ([]byte, error) {
	out := make([]byte, 16, valueOverhead+len(value))
	rand.Read(out)
	ct, err := v.valuesSIV.EncryptDeterministically(value, valueAD(use, attr, out))
	return append(out, ct...), err
}

func (v *VolumeKeys) openValue(use, attr string, b []byte) ([]byte, error) {
	if len(b) < valueOverhead {
		return nil, damaged(BadValue, "cut short")
	}
	out, err := v.valuesSIV.DecryptDeterministically(b[16:], valueAD(use, attr, b[:16]))
	if err != nil {
		return nil, damaged(BadValue, "a value of another name, or altered")
	}
	return out, nil
}

func valueAD(use, attr string, random []byte) []byte { return append([]byte(use+attr), random...) }

// spaces are the namespaces of extended attributes that are encrypted. Which names of
// security.* stay as they are, since the kernel reads them, is not the format's matter.
var spaces = []string{"user", "trusted", "security"}

// EncodeAttr encrypts the name of a user.*, trusted.* or security.* attribute: its
// namespace stays, the rest goes into namespace + "kmsfs." + base64url.
func (v *VolumeKeys) EncodeAttr(name string) (string, error) {
	space, rest, ok := strings.Cut(name, ".")
	if !ok || rest == "" || !slices.Contains(spaces, space) {
		return "", damaged(BadName, "not a user, trusted or security attribute")
	}
	ct, err := v.xattrSIV.EncryptDeterministically([]byte(rest), []byte("xattr"))
	return space + "." + Reserved + base64.RawURLEncoding.EncodeToString(ct), err
}

// DecodeAttr is the inverse of [VolumeKeys.EncodeAttr]; else [BadName].
func (v *VolumeKeys) DecodeAttr(encoded string) (string, error) {
	space, rest, _ := strings.Cut(encoded, ".")
	b64, ok := strings.CutPrefix(rest, Reserved)
	if !ok || !slices.Contains(spaces, space) {
		return "", damaged(BadName, "not an encoded attribute")
	}
	ct, err := decode64(b64)
	if err != nil {
		return "", damaged(BadName, "not an encoded attribute")
	}
	pt, err := v.xattrSIV.DecryptDeterministically(ct, []byte("xattr"))
	if err != nil || len(pt) == 0 {
		return "", damaged(BadName, "an attribute of another volume, or altered")
	}
	return space + "." + string(pt), nil
}

// The session marker.

// SealMarker returns the target of kmsfs.mounted for these sessions, at least one.
func (v *VolumeKeys) SealMarker(sessions []uint64) string {
	var b []byte
	for _, s := range sessions {
		b = binary.BigEndian.AppendUint64(b, s)
	}
	return base64.RawURLEncoding.EncodeToString(append(b, v.mac(v.mounted, b)...))
}

// OpenMarker is the inverse of [VolumeKeys.SealMarker]; else [BadMarker].
func (v *VolumeKeys) OpenMarker(target string) ([]uint64, error) {
	out, err := ParseMarker(target)
	if err != nil {
		return nil, err
	}
	if !hmac.Equal([]byte(v.SealMarker(out)), []byte(target)) {
		return nil, damaged(BadMarker, "kmsfs.mounted was altered")
	}
	return out, nil
}

// ParseMarker reads the sessions without authenticating them.
func ParseMarker(target string) (sessions []uint64, err error) {
	b, err := decode64(target)
	if err != nil || len(b) < 40 || len(b)%8 != 0 {
		return nil, damaged(BadMarker, "kmsfs.mounted is malformed")
	}
	for b = b[:len(b)-sha256.Size]; len(b) > 0; b = b[8:] {
		sessions = append(sessions, binary.BigEndian.Uint64(b))
	}
	return sessions, nil
}

func (v *VolumeKeys) mac(key, b []byte) []byte {
	m := hmac.New(sha256.New, key)
	m.Write(b)
	return m.Sum(nil)
}

// NewID draws an ID at random.
func NewID() (id ID) {
	rand.Read(id[:])
	return id
}

// ParseID reads 32 lower-case hex digits.
func ParseID(s string) (id ID, ok bool) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(id) || strings.ToLower(s) != s {
		return id, false
	}
	return ID(b), true
}

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText writes an ID as hex, for JSON.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads what [ID.MarshalText] writes.
func (id *ID) UnmarshalText(b []byte) error {
	p, ok := ParseID(string(b))
	if !ok {
		return damaged(BadConfig, "%q is not 32 hex digits", b)
	}
	*id = p
	return nil
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }
