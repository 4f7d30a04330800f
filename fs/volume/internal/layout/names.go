package layout

import (
	"errors"
	"fmt"
	"strings"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
)

// Faults of the symlink that holds a long name.
var (
	ErrNameLost    = errors.New("the name of a long entry is lost")
	ErrNameAltered = errors.New("the name of a long entry was altered")
)

// IsSilly reports whether an entry is a removed file that NFS keeps under a name of its own while a host
// has it open. Encoded names hold no dot.
func IsSilly(cname string) bool { return strings.HasPrefix(cname, ".nfs") }

// EncodedName returns the encoded name of an entry of a directory: its ciphertext name, or for a
// long one the target of its symlink. It is "" for an entry of kmsfs' own.
func EncodedName(d *disk.Disk, fd int, cname string) (string, error) {
	if IsSilly(cname) {
		return "", nil
	}
	if !IsOwn(cname) {
		return cname, nil
	}
	hash, long := strings.CutPrefix(cname, blockcrypt.LongPrefix)
	if !long {
		return "", nil
	}
	encoded, err := d.Readlink(fd, blockcrypt.LongName+hash)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNameLost, err)
	}
	if h, isLong := blockcrypt.LongHash(encoded); !isLong || h != hash {
		return "", ErrNameAltered
	}
	return encoded, nil
}

// EntryOf returns the entry whose name the symlink of a long name holds; ok is false if cname is
// no such symlink.
func EntryOf(cname string) (entry string, ok bool) {
	hash, ok := strings.CutPrefix(cname, blockcrypt.LongName)
	return blockcrypt.LongPrefix + hash, ok
}
