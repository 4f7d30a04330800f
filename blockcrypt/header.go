package blockcrypt

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
)

// The format's version and its only suite: AES-256-GCM with random 96-bit
// nonces, HKDF-SHA256, HMAC-SHA256.
const (
	Version = 1
	Suite   = 1
)

// Offsets in a header.
const (
	offState      = 128
	offStateTag   = 176
	offRecipients = 192
	offList       = 200

	// StateOffset and StateSize are the bytes of a header that a change of
	// state rewrites: the state and its tag.
	StateOffset = offState
	StateSize   = offRecipients - offState
	// RecipientsOffset is where the bytes begin that a rewrap rewrites, up to H.
	RecipientsOffset = offRecipients
)

// ID names a volume, a file or a directory.
type ID [16]byte

// Flags of a state.
const (
	Dirty  uint32 = 1 << iota // length and content may be ahead of the state
	Sparse                    // a page of zeros is a hole
	Cut                       // a truncation to Floor is under way
	Clone                     // made by copying blocks
)

// State is what a header says of its file at one moment.
type State struct {
	Size       int64 // bytes of plaintext; of a dirty file, those when it was written
	Floor      int64 // the number of confirmed bytes
	Session    uint64
	Generation uint64
	Flags      uint32
}

// A Recipient is a key service's key, or another key, with a data key that it can unwrap.
type Recipient struct {
	URI     string `json:"uri"`    // scheme:rest, printable ASCII, at most 255 bytes
	Branch  []byte `json:"branch"` // what the scheme needs besides, see FORMAT.md; may be empty
	Wrapped []byte `json:"wrapped"`
}

// Header is the parsed header of one file.
type Header struct {
	Geometry   Geometry
	Volume     ID // zero: made outside a volume
	File       ID
	Dir        ID // the directory of its creation, a hint
	Commitment [32]byte
	Origin     [16]byte
	NoOpen     uint32 // feature bits that forbid opening
	NoWrite    uint32 // feature bits that forbid writing
	State      State
	StateTag   [16]byte
	Recipients []Recipient
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var magic = []byte{'k', 'm', 's', 'f', 's', 0, 0, Version}

// HeaderSize reads H from a file's first bytes, at least 12, so that a reader
// without kmsfs.json knows how much to read.
func HeaderSize(b []byte) (int, error) {
	if len(b) < 12 {
		return 0, damaged(BadHeader, "cut short")
	}
	if !bytes.Equal(b[:7], magic[:7]) {
		return 0, damaged(BadHeader, "this is not a kmsfs file")
	}
	if b[7] != Version {
		return 0, damaged(Unsupported, "format version %d", b[7])
	}
	if b[10] != Suite || b[11] != 12 {
		return 0, damaged(Unsupported, "suite %d, page size 2^%d", b[10], b[11])
	}
	h := int(binary.BigEndian.Uint16(b[8:]))
	_, err := NewGeometry(h)
	return h, err
}

// ParseHeader decodes the header at the start of b, which may be longer. It
// checks everything that needs no key: [BadHeader], [BadChecksum], [Unsupported].
func ParseHeader(b []byte) (*Header, error) {
	n, err := HeaderSize(b)
	if err != nil {
		return nil, err
	}
	if len(b) < n {
		return nil, damaged(BadHeader, "cut short")
	}
	b = b[:n]
	g, _ := NewGeometry(n)
	h := &Header{Geometry: g, NoOpen: binary.BigEndian.Uint32(b[112:]),
		NoWrite: binary.BigEndian.Uint32(b[116:])}
	copy(h.Volume[:], b[16:])
	copy(h.File[:], b[32:])
	copy(h.Dir[:], b[48:])
	copy(h.Commitment[:], b[64:])
	copy(h.Origin[:], b[96:])
	copy(h.StateTag[:], b[offStateTag:])
	list := int(binary.BigEndian.Uint16(b[192:]))
	if list > n-offList {
		return nil, damaged(BadHeader, "recipients beyond the header")
	}
	if binary.BigEndian.Uint32(b[196:]) != checksum(b, list) {
		return nil, damaged(BadChecksum, "the header was damaged")
	}
	if h.NoOpen != 0 {
		return nil, damaged(Unsupported, "feature bits %#x", h.NoOpen)
	}
	if !zero(b[12:16]) || !zero(b[120:128]) || !zero(b[194:196]) || !zero(b[offList+list:]) {
		return nil, damaged(BadHeader, "bytes that must be zero are not")
	}
	if h.Recipients, err = parseRecipients(b[offList : offList+list]); err != nil {
		return nil, err
	}
	h.State, err = parseState(b[offState:offStateTag])
	return h, err
}

// WrittenBy returns the floor and the session of the state of a header's first page, of which nothing
// is checked.
func WrittenBy(page []byte) (floor, session uint64) {
	return binary.BigEndian.Uint64(page[offState+8:]), binary.BigEndian.Uint64(page[offState+16:])
}

// RecipientsEnd returns where the recipients end, as a header's first page says, in bytes.
func RecipientsEnd(page []byte) int { return offList + int(binary.BigEndian.Uint16(page[192:])) }

func parseState(b []byte) (State, error) {
	s := State{
		Size:       int64(binary.BigEndian.Uint64(b)),
		Floor:      int64(binary.BigEndian.Uint64(b[8:])),
		Session:    binary.BigEndian.Uint64(b[16:]),
		Generation: binary.BigEndian.Uint64(b[24:]),
		Flags:      binary.BigEndian.Uint32(b[32:]),
	}
	if s.Size < 0 || s.Size > MaxPlain || s.Floor < 0 || s.Floor > s.Size ||
		s.Flags&^(Dirty|Sparse|Cut|Clone) != 0 || !zero(b[36:48]) {
		return s, damaged(BadHeader, "an impossible state")
	}
	return s, nil
}

func parseRecipients(b []byte) ([]Recipient, error) {
	var out []Recipient
	seen := map[string]bool{}
	for len(b) > 0 {
		var part [3][]byte
		for i := range part {
			if len(b) < 2 || len(b)-2 < int(binary.BigEndian.Uint16(b)) {
				return nil, damaged(BadHeader, "a recipient is cut short")
			}
			n := 2 + int(binary.BigEndian.Uint16(b))
			part[i], b = bytes.Clone(b[2:n]), b[n:]
		}
		uri := string(part[0])
		if !ValidURI(uri) {
			return nil, damaged(BadHeader, "a recipient's URI is malformed")
		}
		if seen[uri] {
			return nil, damaged(BadHeader, "a recipient is named twice")
		}
		seen[uri] = true
		out = append(out, Recipient{uri, part[1], part[2]})
	}
	if len(out) == 0 {
		return nil, damaged(BadHeader, "no recipient")
	}
	return out, nil
}

// ValidURI reports whether s may name a recipient: scheme:rest, printable ASCII, at most 255 bytes.
func ValidURI(s string) bool {
	colon := false
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
		colon = colon || i > 0 && s[i] == ':'
	}
	return colon && len(s) <= 255
}

// Encode returns the header's H bytes. It fails with [BadHeader] where the
// recipients do not fit.
func (h *Header) Encode() ([]byte, error) {
	list, err := encodeRecipients(h.Recipients)
	if err != nil {
		return nil, err
	}
	if len(list) > h.Geometry.Header()-offList {
		return nil, damaged(BadHeader, "%d bytes of recipients do not fit in a header of %d",
			len(list), h.Geometry.Header())
	}
	b := make([]byte, h.Geometry.Header())
	h.encodeFixed(b)
	h.EncodeState(b[offState:offRecipients])
	binary.BigEndian.PutUint16(b[192:], uint16(len(list)))
	copy(b[offList:], list)
	binary.BigEndian.PutUint32(b[196:], checksum(b, len(list)))
	return b, nil
}

// RecipientsFit returns the smallest H that holds these recipients, 0 if none does.
func RecipientsFit(rs []Recipient) int {
	list, err := encodeRecipients(rs)
	if n := (offList + len(list) + 511) / 512 * 512; err == nil && n <= MaxHeader {
		return max(n, MinHeader)
	}
	return 0
}

// EncodeState writes the state and its tag, [StateSize] bytes, to b.
func (h *Header) EncodeState(b []byte) {
	clear(b[:StateSize])
	binary.BigEndian.PutUint64(b, uint64(h.State.Size))
	binary.BigEndian.PutUint64(b[8:], uint64(h.State.Floor))
	binary.BigEndian.PutUint64(b[16:], h.State.Session)
	binary.BigEndian.PutUint64(b[24:], h.State.Generation)
	binary.BigEndian.PutUint32(b[32:], h.State.Flags)
	copy(b[48:], h.StateTag[:])
}

// encodeFixed writes header [0,128): what never changes in a file's life.
func (h *Header) encodeFixed(b []byte) {
	copy(b, magic)
	binary.BigEndian.PutUint16(b[8:], uint16(h.Geometry.Header()))
	b[10], b[11] = Suite, 12
	copy(b[16:], h.Volume[:])
	copy(b[32:], h.File[:])
	copy(b[48:], h.Dir[:])
	copy(b[64:], h.Commitment[:])
	copy(b[96:], h.Origin[:])
	binary.BigEndian.PutUint32(b[112:], h.NoOpen)
	binary.BigEndian.PutUint32(b[116:], h.NoWrite)
}

func encodeRecipients(rs []Recipient) ([]byte, error) {
	var b []byte
	seen := map[string]bool{}
	for _, r := range rs {
		if !ValidURI(r.URI) || seen[r.URI] || len(r.Branch) > 1<<16-1 || len(r.Wrapped) > 1<<16-1 {
			return nil, damaged(BadHeader, "recipient %q is malformed, too long or named twice", r.URI)
		}
		seen[r.URI] = true
		for _, p := range [][]byte{[]byte(r.URI), r.Branch, r.Wrapped} {
			b = append(binary.BigEndian.AppendUint16(b, uint16(len(p))), p...)
		}
	}
	if len(rs) == 0 {
		return nil, damaged(BadHeader, "no recipient")
	}
	return b, nil
}

func checksum(b []byte, list int) uint32 {
	c := crc32.Update(0, castagnoli, b[:128])
	c = crc32.Update(c, castagnoli, b[192:196])
	return crc32.Update(c, castagnoli, b[offList:offList+list])
}

func zero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
