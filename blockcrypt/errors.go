package blockcrypt

import (
	"errors"
	"fmt"
)

// Class says what kind of thing is damaged. The test vectors name it.
type Class string

// The classes of failure.
const (
	BadHeader     Class = "header"      // not a header, cut short, or fields that contradict each other
	BadChecksum   Class = "checksum"    // the header's CRC-32C
	BadCommitment Class = "commitment"  // the data key is not the one the header commits to
	BadOrigin     Class = "origin"      // not made with this volume's key
	BadVolume     Class = "volume"      // made in another volume
	BadState      Class = "state"       // the state's tag
	BadBlock      Class = "block"       // a block does not open
	BadSize       Class = "size"        // a length that no plaintext has, or that contradicts the state
	BadName       Class = "name"        // a name that does not decode
	BadValue      Class = "value"       // a symlink target or attribute value that does not open
	BadConfig     Class = "config"      // kmsfs.json does not parse
	BadConfigMAC  Class = "config-mac"  // kmsfs.json was altered
	BadMarker     Class = "marker"      // the session marker does not parse or was altered
	Unsupported   Class = "unsupported" // of a newer format, or a suite or feature that is not known
)

// A DamageError says that bytes are not what was written. Pos is the position
// in the file in bytes, -1 where there is none.
type DamageError struct {
	Class  Class
	Pos    int64
	Detail string
}

func (e *DamageError) Error() string {
	if e.Pos >= 0 {
		return fmt.Sprintf("bad %s at byte %d: %s", e.Class, e.Pos, e.Detail)
	}
	return fmt.Sprintf("bad %s: %s", e.Class, e.Detail)
}

// ClassOf returns the class of the [DamageError] in err's chain, "" if there is none.
func ClassOf(err error) Class {
	if d, ok := errors.AsType[*DamageError](err); ok {
		return d.Class
	}
	return ""
}

func damaged(c Class, format string, args ...any) error {
	return &DamageError{Class: c, Pos: -1, Detail: fmt.Sprintf(format, args...)}
}
