package blockcrypt

import "fmt"

// Sizes in bytes.
const (
	PageSize  = 4096 // of ciphertext
	BlockSize = 4064 // the plaintext of a whole page
	Overhead  = 32   // of a block: length 2, key number 2, nonce 12, tag 16

	MinHeader     = 512
	MaxHeader     = 65024
	DefaultHeader = 1024

	// MaxPlain is the largest plaintext: its ciphertext's length still fits in an int64.
	MaxPlain = 1<<63 - 1<<57
)

// Geometry is the arithmetic of a file whose header has H bytes: integers only.
// The header's last H mod 4096 bytes share a page with block 0. A value is made
// by [NewGeometry].
type Geometry struct {
	h, r, d int64 // header; its bytes in block 0's page; its whole pages
}

// NewGeometry checks H: a multiple of 512 from [MinHeader] to [MaxHeader].
func NewGeometry(h int) (Geometry, error) {
	if h < MinHeader || h > MaxHeader || h%512 != 0 {
		return Geometry{}, damaged(BadHeader, "%d is no header size", h)
	}
	return Geometry{int64(h), int64(h % PageSize), int64(h / PageSize)}, nil
}

// Header returns H in bytes.
func (g Geometry) Header() int { return int(g.h) }

// Block returns the number of the block that holds plaintext offset x.
func (g Geometry) Block(x int64) int64 { return (x + g.r) / BlockSize }

// Start returns the plaintext offset at which block k begins.
func (g Geometry) Start(k int64) int64 { return max(0, k*BlockSize-g.r) }

// Capacity returns how many bytes of plaintext block k can hold.
func (g Geometry) Capacity(k int64) int { return int(g.Start(k+1) - g.Start(k)) }

// PageOff returns the ciphertext offset of the page of block k. Block 0 begins
// [Geometry.Lead] bytes into its page, every other at its start.
func (g Geometry) PageOff(k int64) int64 { return (g.d + k) * PageSize }

// BlockAt returns the number of the block in whose page the ciphertext offset c lies.
func (g Geometry) BlockAt(c int64) int64 { return c/PageSize - g.d }

// Lead returns how many bytes of the header stand before block k in its page.
func (g Geometry) Lead(k int64) int {
	if k == 0 {
		return int(g.r)
	}
	return 0
}

// Exact returns the length of the ciphertext file of n bytes of plaintext.
func (g Geometry) Exact(n int64) int64 {
	if n == 0 {
		return 0
	}
	v := n + g.r
	return PageSize*g.d + v + Overhead*((v+BlockSize-1)/BlockSize)
}

// Whole returns [Geometry.Exact] rounded up to a page.
func (g Geometry) Whole(n int64) int64 { return (g.Exact(n) + PageSize - 1) / PageSize * PageSize }

// Last returns the number of the last page's block in a file of length c, -1
// if the file has no block.
func (g Geometry) Last(c int64) int64 {
	if c <= g.h {
		return -1
	}
	return (c-1)/PageSize - g.d
}

// Plain returns the plaintext size that belongs to the ciphertext length c. A
// file of H bytes is an empty one. Where c is a multiple of the page size the
// length of the last block, n, is asked of lastLen, which is given its number.
// A length that no plaintext has is [BadSize].
func (g Geometry) Plain(c int64, lastLen func(k int64) (int, error)) (int64, error) {
	switch {
	case c == 0, c == g.h:
		return 0, nil
	case c < g.h+Overhead+1:
		return 0, damaged(BadSize, "no file is %d bytes long", c)
	}
	k := g.Last(c)
	n := int(c-g.PageOff(k)) - g.Lead(k) - Overhead
	if c%PageSize == 0 {
		var err error
		if n, err = lastLen(k); err != nil {
			return 0, err
		}
	}
	if n < 1 || n > g.Capacity(k) {
		return 0, damaged(BadSize, "no file is %d bytes long", c)
	}
	return g.Start(k) + int64(n), nil
}

func (g Geometry) String() string { return fmt.Sprintf("header %d", g.h) }
