package fs

import (
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// notifier tells the kernel to drop its cache of a file, by
// FUSE_NOTIFY_INVAL_INODE (linux/fuse.h). The kernel writes dirty pages first and
// waits for those: the caller holds no lock, and another worker reads requests (see loop.yield).
type notifier struct {
	fd   int
	goes func(func()) // runs something that fd outlives

	gate   *sync.RWMutex // held for reading while fd is used
	closed *atomic.Bool
}

const notifyInvalInode = 2

// WriteBack implements [volume.Kernel]: the kernel writes all that it holds back of
// a file, and forgets what it knows of its content.
func (n notifier) WriteBack(node uint64) error { return n.invalInode(node, 0, 0) }

// dropPages makes the kernel forget these bytes of a file, which it goes on
// showing after they could not be written; as soon as the request that says so
// is answered.
func (n notifier) dropPages(node uint64, off, size int64) {
	n.goes(func() { n.invalInode(node, off, size) }) // a failure leaves what the program wrote in the cache
}

// ForgetAttr implements [volume.Kernel].
func (n notifier) ForgetAttr(node uint64) error { return n.forgetAttr(node) }

// forgetAttr makes the kernel ask for a node's attributes and ACLs again. It waits for
// nothing, so that it can be called before a request is answered.
func (n notifier) forgetAttr(node uint64) error { return n.invalInode(node, -1, 0) }

// invalInode lets go of size bytes from off, of all up to the end if size is 0, and of the
// attributes; of those alone if off is negative.
func (n notifier) invalInode(node uint64, off, size int64) error {
	const length = 16 + 24
	b := make([]byte, 0, length)
	b = binary.NativeEndian.AppendUint32(b, length)
	b = binary.NativeEndian.AppendUint32(b, notifyInvalInode)
	b = binary.NativeEndian.AppendUint64(b, 0) // a notification
	b = binary.NativeEndian.AppendUint64(b, node)
	b = binary.NativeEndian.AppendUint64(b, uint64(off))
	b = binary.NativeEndian.AppendUint64(b, uint64(size))
	n.gate.RLock() // the number must stay the device's
	defer n.gate.RUnlock()
	if n.closed.Load() {
		return nil
	}
	for {
		_, err := unix.Write(n.fd, b)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV): // it knows no such file any more
			return nil
		}
		return err
	}
}
