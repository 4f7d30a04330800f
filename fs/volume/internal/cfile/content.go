// Package cfile reads and writes one ciphertext file. It knows no volume, no names and no key
// service.
//
// [Content] reads: the blocks and holes of a file, and the part of an unfinished one that opens.
// It changes nothing; fsck and the commands for single files have no more. [File] is a Content
// that can be written as FORMAT.md, section 4, demands. Its [Phase] says how far the file on the
// disk is from the form in which it rests; the table in phase.go has all ways from one phase to
// another. It asks its [Host] for the few things of the volume that it needs.
package cfile

import (
	"fmt"
	"sync/atomic"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// Content is the content of a ciphertext file whose header was read and whose data key was
// unwrapped: its blocks, and the holes between them. It changes nothing. Mounted files, fsck and
// the commands for single files read through it.
type Content struct {
	Disk   *disk.Disk
	Geo    blockcrypt.Geometry
	FD     int
	Header *blockcrypt.Header // nil while the file is empty
	Keys   *blockcrypt.FileKeys

	Size    int64 // of the plaintext
	Whole   bool  // the ciphertext file ends at a whole page
	Partial bool  // the file is unfinished, and Size the number of bytes that open

	// Ahead is the beginning of the ciphertext file, which was read with the header. It goes
	// when it was used, and when the content changes. After AheadUntil, if that is set, it
	// is too old: another mount may write.
	Ahead      atomic.Pointer[[]byte]
	AheadUntil time.Time
}

// Unfinished reports whether the state says that the file is being written.
func (c *Content) Unfinished() bool { return c.Flags()&(blockcrypt.Dirty|blockcrypt.Cut) != 0 }

// Accept takes the size of a clean state if it goes with the length of the ciphertext file.
// empty is true if there is only the header of an empty file.
func (c *Content) Accept(length int64) (empty bool, err error) {
	s := c.Header.State
	switch length {
	case c.Geo.Exact(s.Size):
	case c.Geo.Whole(s.Size):
		c.Whole = true
	default:
		if s.Size == 0 && length == int64(c.Geo.Header()) {
			return true, nil
		}
		detail := fmt.Sprintf("the file is %d bytes long, not the %d of %d bytes of plaintext",
			length, c.Geo.Exact(s.Size), s.Size)
		if s.Generation == 1 && s.Floor == 0 && length < c.Geo.Exact(s.Size) {
			detail += "; if it is a copy, it may have been copied while it was first written: copy it again"
		}
		return false, &blockcrypt.DamageError{Class: blockcrypt.BadSize, Pos: -1, Detail: detail}
	}
	c.Size = s.Size
	return false, nil
}

// Flags returns the flags of the state.
func (c *Content) Flags() uint32 {
	if c.Header == nil {
		return 0
	}
	return c.Header.State.Flags
}
