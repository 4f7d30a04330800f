//go:build linux && !portable

package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
)

// boundaries of blocks, pages and gaps, for a header of 1024 bytes.
var boundaries = []int64{0, 1, 2, 3039, 3040, 3041, 4063, 4064, 4065, 4095, 4096, 4097, 5000, 7103,
	7104, 7105, 8192, 11168, 65536, 1 << 20, 1<<20 + 3041, 1 << 21}

func modelOps() int {
	if n, err := strconv.Atoi(os.Getenv("KMSFS_MODEL_OPS")); err == nil {
		return n
	}
	return 100_000
}

// Random operations on files, with sizes around every boundary, against a model
// in memory; through settling, new sessions, remounts and crashes.
func TestModel(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			m := &model{world: newWorld(t, volume.Options{}), r: rand.New(rand.NewPCG(seed, 7)),
				files: map[string][]byte{}, open: map[string]*volume.Handle{}}
			m.quiet = true // crashes are repaired, and the log says so
			for i := range modelOps() / 4 {
				m.step(i)
				if t.Failed() {
					t.Fatalf("at operation %d", i)
				}
			}
			m.closeAll()
			m.reopen(volume.Options{})
			for name := range m.files {
				m.want(name, m.files[name])
			}
		})
	}
}

type model struct {
	*world
	r     *rand.Rand
	files map[string][]byte
	open  map[string]*volume.Handle
}

func (m *model) offset(n int) int64 {
	if m.r.IntN(3) == 0 && n > 0 {
		return m.r.Int64N(int64(n) + 1)
	}
	o := boundaries[m.r.IntN(len(boundaries)-m.r.IntN(len(boundaries)))] + m.r.Int64N(5) - 2
	return max(0, o)
}

func (m *model) handle(name string) *volume.Handle {
	if h := m.open[name]; h != nil {
		return h
	}
	h, err := m.create(name)
	if err != nil {
		m.t.Fatal(err)
	}
	if _, ok := m.files[name]; !ok {
		m.files[name] = nil
	}
	m.open[name] = h
	return h
}

func (m *model) closeAll() {
	for name, h := range m.open {
		if err := h.Release(); err != nil {
			m.t.Errorf("close %s: %v", name, err)
		}
		delete(m.open, name)
	}
}

func (m *model) step(i int) {
	name := fmt.Sprintf("f%d", m.r.IntN(6))
	b := m.files[name]
	switch x := m.r.IntN(1000); {
	case x < 400:
		off, data := m.offset(len(b)), m.data()
		if _, err := m.handle(name).Write(ctx, data, off); err != nil {
			m.t.Errorf("write %d at %d of %d: %v", len(data), off, len(b), err)
		}
		b = m.files[name]
		if grown := int(off) + len(data); grown > len(b) {
			b = append(b, make([]byte, grown-len(b))...)
		}
		copy(b[off:], data)
		m.files[name] = b
	case x < 450:
		m.space(name)
	case x < 600:
		off, got := m.offset(len(b)), make([]byte, m.r.IntN(20000))
		n, err := m.handle(name).Read(ctx, got, off)
		b = m.files[name]
		want := b[min(int(off), len(b)):min(int(off)+len(got), len(b))]
		if err != nil || !bytes.Equal(got[:n], want) {
			m.t.Errorf("read %s at %d of %d: %d bytes, want %d, difference at %d: %v", name, off,
				len(b), n, len(want), difference(got[:n], want), err)
		}
	case x < 760:
		n := m.offset(len(b))
		if _, err := m.handle(name).Node().SetAttr(ctx, size(n)); err != nil {
			m.t.Errorf("truncate %d to %d: %v", len(b), n, err)
		}
		b = m.files[name]
		if int(n) <= len(b) {
			m.files[name] = b[:n:n]
		} else {
			m.files[name] = append(b[:len(b):len(b)], make([]byte, int(n)-len(b))...)
		}
	case x < 820:
		if h := m.open[name]; h != nil {
			if err := h.Fsync(); err != nil {
				m.t.Errorf("fsync: %v", err)
			}
		}
	case x < 900:
		if h := m.open[name]; h != nil {
			if err := h.Release(); err != nil {
				m.t.Errorf("close: %v", err)
			}
			delete(m.open, name)
		}
	case x < 930:
		if st, err := m.handle(name).Node().Attr(); err != nil || st.Size != int64(len(m.files[name])) {
			m.t.Errorf("stat: %d bytes, want %d: %v", st.Size, len(m.files[name]), err)
		}
	case x < 950:
		m.v.Age()
	case x < 975:
		m.v.Settle()
	case x < 980:
		if err := m.v.NextSession(); err != nil {
			m.t.Error(err)
		}
	case x < 990 && i%7 == 0:
		m.closeAll()
		m.reopen(volume.Options{})
	case x < 1000 && i%11 == 0:
		// As SIGKILL after everything was answered: nothing is lost.
		m.crash()
		clear(m.open)
		m.world.open(volume.Options{})
		for name, b := range m.files {
			m.want(name, b)
		}
	}
}

// space reserves, punches and finds holes.
func (m *model) space(name string) {
	h := m.handle(name)
	b := m.files[name]
	off, n := m.offset(len(b)), 1+m.offset(len(b))
	if m.r.IntN(8) == 0 {
		off, n = m.r.Int64N(int64(len(b))+1), int64(len(b))+1 // to the end
	}
	const keep = unix.FALLOC_FL_KEEP_SIZE
	mode := []uint32{0, keep, unix.FALLOC_FL_PUNCH_HOLE | keep, unix.FALLOC_FL_PUNCH_HOLE | keep,
		unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | keep}[m.r.IntN(6)]
	if err := h.Fallocate(ctx, mode, off, n); err != nil {
		m.t.Errorf("fallocate %x of %d at %d of %d: %v", mode, n, off, len(b), err)
	}
	if mode > keep && off < int64(len(b)) {
		b = bytes.Clone(b)
		clear(b[off:min(off+n, int64(len(b)))])
	}
	if end := int(off + n); mode&keep == 0 && end > len(b) {
		b = append(b[:len(b):len(b)], make([]byte, end-len(b))...)
	}
	m.files[name] = b
	m.seek(h, b)
}

// seek checks that what lies in holes is zeros, and that they end with the file.
func (m *model) seek(h *volume.Handle, b []byte) {
	for off := int64(0); ; {
		data, err := h.Seek(off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) && off >= int64(len(b)) {
			return
		}
		if err != nil || data < off || !blockcrypt.IsHole(b[off:data]) {
			m.t.Errorf("SEEK_DATA at %d of %d: %d, %v", off, len(b), data, err)
			return
		}
		if off, err = h.Seek(data, unix.SEEK_HOLE); err != nil || off <= data || off > int64(len(b)) {
			m.t.Errorf("SEEK_HOLE at %d of %d: %d, %v", data, len(b), off, err)
			return
		}
	}
}

func (m *model) data() []byte {
	n := 1 + m.r.IntN(200)
	switch m.r.IntN(6) {
	case 0:
		n = 1 + m.r.IntN(9000)
	case 1:
		n = int(max(1, boundaries[m.r.IntN(12)]))
	}
	return noise(n)
}
