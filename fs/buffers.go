package fs

import (
	"sync"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// buffer holds a request and its answer.
type buffer struct{ in, out []byte }

// answer returns where the answer to a request goes.
func (b *buffer) answer(in []byte) []byte {
	if n := smallSize/2 + answerSize(in); n > len(b.out) {
		b.out = make([]byte, max(n, len(b.in)))
	}
	return b.out
}

const (
	bufferSize = maxWrite + 8192 // a request, or its answer, with its header
	smallSize  = 8192            // a request without data, or an answer without much of it
	mostKept   = longReaders + 8 // buffers that nobody uses at the moment
)

func newBuffer() *buffer { return &buffer{make([]byte, bufferSize), make([]byte, smallSize)} }

// smalls are buffers for requests of up to smallSize bytes; room for the answer grows if it must.
var smalls = sync.Pool{New: func() any { return &buffer{make([]byte, smallSize), make([]byte, smallSize)} }}

// small returns a buffer that holds a request, nil if that or its answer is no small one.
func small(in []byte) *buffer {
	if len(in) > smallSize || answerSize(in) > bigRequest {
		return nil
	}
	b := smalls.Get().(*buffer)
	copy(b.in, in)
	return b
}

// answerSize returns how many bytes a request wants in its answer, besides a header and
// attributes.
func answerSize(in []byte) int {
	switch (*fuse.InHeader)(unsafe.Pointer(&in[0])).Opcode {
	case opRead, opReadDir, opReadDirPlus:
		if len(in) >= int(unsafe.Sizeof(fuse.ReadIn{})) {
			return int((*fuse.ReadIn)(unsafe.Pointer(&in[0])).Size)
		}
	case opGetXattr, opListXattr:
		if len(in) >= int(unsafe.Sizeof(fuse.GetXAttrIn{})) {
			return int((*fuse.GetXAttrIn)(unsafe.Pointer(&in[0])).Size)
		}
	case opIoctl:
		if len(in) >= int(unsafe.Sizeof(fuse.IoctlIn{})) {
			return int((*fuse.IoctlIn)(unsafe.Pointer(&in[0])).OutSize)
		}
	}
	return 0
}

// buffers are those of whole size that nobody uses.
type buffers struct {
	mu   sync.Mutex
	kept []*buffer
}

func (bs *buffers) get() *buffer {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	if n := len(bs.kept); n > 0 {
		b := bs.kept[n-1]
		bs.kept = bs.kept[:n-1]
		return b
	}
	return newBuffer()
}

// put takes a buffer back.
func (bs *buffers) put(b *buffer) {
	if len(b.in) < bufferSize {
		smalls.Put(b)
		return
	}
	bs.mu.Lock()
	defer bs.mu.Unlock()
	if len(bs.kept) < mostKept {
		bs.kept = append(bs.kept, b)
	}
}
