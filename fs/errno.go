package fs

import (
	"errors"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"kmsfs/keystore"
)

// verdicts is the one table from a key service's verdict to what a program sees.
var verdicts = map[keystore.Kind]syscall.Errno{
	keystore.Revoked:     syscall.EKEYREVOKED,
	keystore.Denied:      syscall.EKEYREJECTED,
	keystore.Credentials: syscall.EKEYEXPIRED,
	keystore.Outage:      syscall.ETIMEDOUT,
	keystore.Untrusted:   syscall.ENOKEY,
	keystore.Damaged:     syscall.EIO,
	keystore.Canceled:    syscall.EINTR,
	keystore.Invalid:     syscall.EIO,
}

// status translates an error: a verdict, an errno, or EIO for damage.
func status(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	if k := keystore.KindOf(err); k != 0 {
		return fuse.Status(verdicts[k])
	}
	if e, ok := errors.AsType[syscall.Errno](err); ok && e != 0 {
		return fuse.Status(e)
	}
	return fuse.EIO
}
