package blockcrypt

import "encoding/binary"

// SealedSize returns the bytes that a block of n bytes takes.
func SealedSize(n int) int { return n + Overhead }

// Seal writes block number k with content key e to dst: [SealedSize] bytes,
// with a fresh random nonce. plain has 1 to [BlockSize] bytes and must not
// overlap dst. Whatever follows in the page the caller zeroes.
func (fk *FileKeys) Seal(dst []byte, k int64, e uint16, plain []byte) {
	if len(plain) < 1 || len(plain) > BlockSize {
		panic("blockcrypt: a block of impossible length")
	}
	binary.BigEndian.PutUint16(dst, uint16(len(plain)))
	binary.BigEndian.PutUint16(dst[2:], e)
	var ad [12]byte
	fk.aead(e).Seal(dst[4:4], nil, plain, blockAD(&ad, k, dst))
}

// Open authenticates block number k, which begins at page[0], and appends its
// plaintext to dst. capacity is the most it can hold ([Geometry.Capacity]); the
// bytes of page behind the block must be zero. Anything else is [BadBlock].
func (fk *FileKeys) Open(dst []byte, k int64, page []byte, capacity int) ([]byte, error) {
	n := BlockLen(page)
	if n < 1 || n > capacity || len(page) < n+Overhead {
		return nil, badBlock(k)
	}
	if !zero(page[n+Overhead:]) {
		return nil, badBlock(k)
	}
	var ad [12]byte
	out, err := fk.aead(binary.BigEndian.Uint16(page[2:])).Open(dst, nil, page[4:n+Overhead],
		blockAD(&ad, k, page))
	if err != nil {
		return nil, badBlock(k)
	}
	return out, nil
}

// BlockLen reads n, the length of the block that begins at page[0], without
// authenticating it; -1 where there is none.
func BlockLen(page []byte) int {
	if len(page) < 2 {
		return -1
	}
	return int(binary.BigEndian.Uint16(page))
}

// IsHole reports whether a page holds zeros only.
func IsHole(page []byte) bool { return zero(page) }

func blockAD(ad *[12]byte, k int64, page []byte) []byte {
	binary.BigEndian.PutUint64(ad[:], uint64(k))
	copy(ad[8:], page[:4])
	return ad[:]
}

func badBlock(k int64) error {
	return &DamageError{BadBlock, -1, "block " + itoa(k) + " does not open"}
}
