package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// Lone is one ciphertext file read by itself, wherever it lies. Its origin
// cannot be checked without its volume.
type Lone struct {
	Header *blockcrypt.Header // nil: an empty file
	Length int64              // of the ciphertext

	disk disk
	f    *file
	fd   int
	off  int64
}

// OpenLone opens a ciphertext file and reads its header; nothing is
// authenticated before [Lone.Unlock].
func OpenLone(path string) (*Lone, error) {
	l := &Lone{}
	var err error
	if l.fd, err = l.disk.openPath(path, unix.O_RDONLY|unix.O_NONBLOCK); err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	if err := l.readHeader(); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func (l *Lone) readHeader() error {
	var st unix.Stat_t
	if err := l.disk.fstat(l.fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return errors.New("not a regular file")
	}
	if l.Length = st.Size; l.Length == 0 {
		return nil
	}
	b := make([]byte, blockcrypt.MaxHeader)
	n, err := l.disk.pread(l.fd, b, 0)
	if err != nil {
		return err
	}
	l.Header, err = blockcrypt.ParseHeader(b[:n])
	return err
}

// Binding returns what the data key is bound to.
func (l *Lone) Binding() keystore.Binding {
	return keystore.Binding{Use: keystore.ForFile, Volume: l.Header.Volume, ID: l.Header.File}
}

// Unlock checks the data key and the state. Incomplete is true where the file
// was being written when it was copied: what opens can be read.
func (l *Lone) Unlock(dataKey []byte) (incomplete bool, err error) {
	keys, err := l.Header.Unlock(dataKey)
	if err != nil {
		return false, err
	}
	v := &Volume{o: Options{ReadOnly: true}, geo: l.Header.Geometry, log: slog.New(slog.DiscardHandler)}
	v.root = &Node{v: v, typ: unix.S_IFREG, last: -1}
	l.f = &file{n: v.root, v: v, fd: l.fd, hdr: l.Header, keys: keys, tailK: -1}
	err = l.f.takeState(l.Length)
	return l.f.view, err
}

// Size returns the plaintext's size after Unlock.
func (l *Lone) Size() int64 { return l.f.size }

// Read implements [io.Reader], after Unlock.
func (l *Lone) Read(b []byte) (int, error) {
	if l.Header == nil {
		return 0, io.EOF
	}
	n, err := l.f.read(b, l.off)
	l.off += int64(n)
	if n == 0 && err == nil && len(b) > 0 {
		err = io.EOF
	}
	return n, err
}

// Close closes the file.
func (l *Lone) Close() { l.disk.close(l.fd) }

// Encrypt writes what it reads from r as a ciphertext file outside any volume,
// to w, an empty file: in bounded memory, the header last.
func Encrypt(ctx context.Context, w *os.File, r io.Reader, stores []keystore.Store) error {
	id := blockcrypt.NewID()
	key, err := keystore.New(ctx, stores, keystore.Binding{Use: keystore.ForFile, ID: id})
	if err != nil {
		return err
	}
	defer key.Wipe()
	rs := make([]blockcrypt.Recipient, len(key.Wrapped))
	for i, x := range key.Wrapped {
		rs[i] = blockcrypt.Recipient{URI: x.URI, Branch: x.Branch, Wrapped: x.Blob}
	}
	h := max(blockcrypt.DefaultHeader, blockcrypt.RecipientsFit(rs))
	g, err := blockcrypt.NewGeometry(h)
	if err != nil {
		return err
	}
	hdr, keys, err := blockcrypt.NewFile(g, nil, id, blockcrypt.ID{}, key.Key, rs)
	if err != nil {
		return err
	}
	size, err := sealAll(w, r, g, keys)
	if err != nil || size == 0 {
		return err
	}
	keys.SetState(hdr, blockcrypt.State{Size: size, Floor: size, Generation: 1})
	head, err := hdr.Encode()
	if err != nil {
		return err
	}
	_, err = w.WriteAt(head, 0)
	return err
}

// sealAll writes the blocks of what r holds, all but the header.
func sealAll(w *os.File, r io.Reader, g blockcrypt.Geometry, keys *blockcrypt.FileKeys) (size int64, err error) {
	epoch := blockcrypt.NewEpoch()
	text := make([]byte, blockcrypt.BlockSize)
	page := make([]byte, blockcrypt.PageSize)
	for k := int64(0); ; k++ {
		if k > 0 && k%blockcrypt.EpochBlocks == 0 {
			epoch = blockcrypt.NewEpoch()
		}
		n, err := io.ReadFull(r, text[:g.Capacity(k)])
		if n > 0 {
			keys.Seal(page, k, epoch, text[:n])
			if _, err := w.WriteAt(page[:blockcrypt.SealedSize(n)], g.PageOff(k)+int64(g.Lead(k))); err != nil {
				return 0, err
			}
			size += int64(n)
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return size, nil
		case err != nil:
			return 0, fmt.Errorf("read the plaintext: %w", err)
		}
	}
}

// PlainSize returns the plaintext size that the ciphertext's length says; no key is needed.
func (l *Lone) PlainSize() (int64, error) {
	v := &Volume{geo: l.Header.Geometry}
	return v.geo.Plain(l.Length, func(k int64) (int, error) { return v.lastLen(l.fd, k) })
}
