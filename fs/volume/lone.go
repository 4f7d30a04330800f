package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// Lone is one ciphertext file read by itself, wherever it lies. Its origin
// cannot be checked without its volume.
type Lone struct {
	Header *blockcrypt.Header // nil: an empty file
	Length int64              // of the ciphertext

	disk *disk.Disk
	f    *cfile.Content
	fd   int
}

// OpenLone opens a ciphertext file and reads its header; nothing is
// authenticated before [Lone.Unlock].
func OpenLone(path string) (*Lone, error) {
	l := &Lone{disk: &disk.Disk{}}
	var err error
	if l.fd, err = l.disk.OpenFilePath(path); err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	if err := l.readHeader(blockcrypt.MaxHeader); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// readHeader reads the header, which is not longer than most bytes.
func (l *Lone) readHeader(most int) error {
	st, err := l.disk.Info(l.fd)
	if err != nil {
		return err
	}
	if !st.Mode.IsRegular() {
		return errors.New("not a regular file")
	}
	if l.Length = st.Size; l.Length == 0 {
		return nil
	}
	l.Header, _, err = layout.ReadHeader(l.disk, l.fd, most, false)
	return err
}

// Binding returns what the data key is bound to.
func (l *Lone) Binding() keystore.Binding {
	return keystore.Binding{Use: keystore.ForFile, Volume: l.Header.Volume, ID: l.Header.File}
}

// Unlock checks the data key and the state. Incomplete is true where the file
// was being written when it was copied: the blocks that open can be read.
func (l *Lone) Unlock(dataKey []byte) (incomplete bool, err error) {
	keys, err := l.Header.Unlock(dataKey)
	if err != nil {
		return false, err
	}
	l.f = &cfile.Content{Disk: l.disk, Geo: l.Header.Geometry, FD: l.fd, Header: l.Header, Keys: keys}
	if l.f.Unfinished() {
		return true, l.f.LookThrough(l.Length)
	}
	_, err = l.f.Accept(l.Length)
	return false, err
}

// Size returns the plaintext's size after Unlock.
func (l *Lone) Size() int64 { return l.f.Size }

// copyChunk is how much is copied at once, in bytes.
const copyChunk = 1 << 20

// CopyTo writes the plaintext to w, after Unlock. Holes are passed to skip, which makes the
// next n bytes of the output zeros; if it is nil they are written.
func (l *Lone) CopyTo(w io.Writer, skip func(n int64) error) error {
	if l.Header == nil {
		return nil
	}
	buf := make([]byte, copyChunk)
	for off := int64(0); off < l.f.Size; {
		hole, n, err := l.f.Extent(off)
		if err != nil {
			return err
		}
		if hole && skip != nil {
			err = skip(n)
		} else {
			b := buf[:min(n, copyChunk)]
			n = int64(len(b))
			if clear(b); !hole {
				_, err = l.f.Read(nil, b, off)
			}
			if err == nil {
				_, err = w.Write(b)
			}
		}
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

// Ciphertext gives the descriptor of the file, for package check, which stands above.
func (l *Lone) Ciphertext() (d *disk.Disk, fd int) { return l.disk, l.fd }

// Close closes the file.
func (l *Lone) Close() { l.disk.Close(l.fd) }

// Encrypt writes what it reads from r as a ciphertext file outside any volume,
// to w, an empty file: in bounded memory, the header last.
func Encrypt(ctx context.Context, w *os.File, r io.Reader, stores []keystore.Store) error {
	id := blockcrypt.NewID()
	key, err := keystore.New(ctx, stores, keystore.Binding{Use: keystore.ForFile, ID: id})
	if err != nil {
		return err
	}
	defer key.Wipe()
	rs := key.Wrapped
	h := max(blockcrypt.DefaultHeader, blockcrypt.RecipientsFit(rs))
	g, err := blockcrypt.NewGeometry(h)
	if err != nil {
		return err
	}
	hdr, keys, err := blockcrypt.NewFile(g, nil, blockcrypt.FileIDs{File: id}, key.Key, rs)
	if err != nil {
		return err
	}
	size, sparse, err := sealAll(w, r, g, keys)
	if err != nil || size == 0 {
		return err
	}
	state := blockcrypt.State{Size: size, Floor: size, Generation: 1}
	if sparse {
		state.Flags = blockcrypt.Sparse
	}
	keys.SetState(hdr, state)
	head, err := hdr.Encode()
	if err != nil {
		return err
	}
	_, err = w.WriteAt(head, 0)
	return err
}

// sealAll writes the blocks of all that r holds, without the header. Long holes of a file stay
// holes.
func sealAll(w *os.File, r io.Reader, g blockcrypt.Geometry,
	keys *blockcrypt.FileKeys) (size int64, sparse bool, err error) {
	epoch, skipped := blockcrypt.NewEpoch(), int64(0)
	text := make([]byte, blockcrypt.BlockSize)
	page := make([]byte, blockcrypt.PageSize)
	for k := int64(0); ; k++ {
		if k > 0 && k%blockcrypt.EpochBlocks == 0 {
			epoch = blockcrypt.NewEpoch()
		}
		n, err := io.ReadFull(r, text[:g.Capacity(k)])
		if n == 0 && skipped > 0 {
			return 0, false, errors.New("read the plaintext: the file has become shorter")
		}
		if n > 0 {
			keys.Seal(page, k, epoch, text[:n])
			if _, err := w.WriteAt(page[:blockcrypt.SealedSize(n)],
				g.PageOff(k)+int64(g.Lead(k))); err != nil {
				return 0, false, err
			}
			size += int64(n)
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return size, sparse, nil
		case err != nil:
			return 0, false, fmt.Errorf("read the plaintext: %w", err)
		}
		if skipped = 0; blockcrypt.IsHole(text) {
			if skipped, err = skipHole(r); err != nil {
				return 0, false, fmt.Errorf("read the plaintext: %w", err)
			}
			k, size, sparse = k+skipped, size+skipped*blockcrypt.BlockSize, sparse || skipped > 0
		}
	}
}

// PlainSize returns the plaintext size that the ciphertext's length says; no key is needed.
func (l *Lone) PlainSize() (int64, error) {
	g := l.Header.Geometry
	return g.Plain(l.Length, func(k int64) (int, error) { return cfile.SealedLen(l.disk, g, l.fd, k) })
}
