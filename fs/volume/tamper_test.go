//go:build linux && !portable

package volume_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

// tampered is the table of docs/security.md, "What is noticed": changes by somebody who may
// write to the ciphertext directory, and how it shows. Each row's cases are made
// here, and the test fails if the page lacks the row.
var tampered = []struct {
	what, shows string
	cases       func(m *tamperer)
}{
	{"A bit or a byte of a file's header, also with its checksum made right",
		"EIO or ENOKEY at open", (*tamperer).headerFields},
	{"A part of a header exchanged for another file's, or another volume's",
		"EIO or ENOKEY at open", (*tamperer).headerSwaps},
	{"A bit of a block: its length, key number, nonce, content, tag", "EIO when it is read",
		(*tamperer).blockBits},
	{"A block emptied, or exchanged for one of another place or file", "EIO when it is read",
		(*tamperer).blockSwaps},
	{"A file cut, or made longer", "EIO at open", (*tamperer).lengths},
	{"A file of another volume, or made by somebody with the right to wrap keys only (GenerateDataKey)", "EIO at open", (*tamperer).planted},
	{"A file under a key that nobody named", "ENOKEY at open", (*tamperer).foreignKey},
	{"A recipient planted in a file's header",
		"it is not used; `kmsfs fsck` lists it, `kmsfs rewrap` takes it out", (*tamperer).plantedRecipient},
	{"A recipient planted for a directory in `kmsfs.json`", "mount refuses", (*tamperer).plantedDirectoryKeys},
	{"Directories exchanged that have keys of their own", "new files get the other one's keys; not noticed",
		(*tamperer).exchangedDirectories},
	{"A name altered, or a file moved to another directory", "it is not shown; the log says so",
		(*tamperer).names},
	{"The name of a long entry altered or lost", "it is not listed; the log says so",
		(*tamperer).longNames},
	{"A directory's ID altered in one place, or lost in both", "EIO for its entries", (*tamperer).dirIDs},
	{"A symlink's target altered", "EIO at readlink", (*tamperer).targets},
	{"An extended attribute's value altered, or put under another name", "EIO when it is read",
		(*tamperer).attrValues},
	{"kmsfs.json altered, of another volume, or an older one", "mount refuses", (*tamperer).configs},
	{"kmsfs.mounted altered, or another volume's", "mount refuses", (*tamperer).markers},
	{"A file put back to an older version of itself, or blocks or the state of one", "not noticed",
		(*tamperer).older},
	{"A file put back to its form before `kmsfs reheader`", "EIO at open", (*tamperer).formerHeader},
	{"A file emptied, deleted, or exchanged for another of its directory", "not noticed",
		(*tamperer).exchanged},
	{"Targets exchanged between symlinks; values of one attribute between files", "not noticed",
		(*tamperer).valuesExchanged},
	{"Modes, owners, times", "not noticed", (*tamperer).modes},
}

// tamperer changes the ciphertext of a fresh volume and looks what comes of it.
type tamperer struct {
	t     *testing.T
	row   string
	shows string
	cases map[string]int // by outcome
	n     int
}

// victim is a closed volume with known content.
type victim struct {
	*world
	m       *tamperer
	content map[string][]byte
	record  *volume.Record
}

func (m *tamperer) victim() *victim {
	v := &victim{world: newWorld(m.t, volume.Options{}), m: m, content: map[string][]byte{}}
	v.quiet = true
	for _, d := range []string{"d", "e"} {
		v.mkdir(d)
	}
	for i, name := range []string{"d/f", "d/g", "e/f"} {
		v.content[name] = noise(20000 + i)
		v.world.write(name, v.content[name])
	}
	return v
}

func (v *victim) seal() {
	v.close()
	u, err := v.unlock()
	v.do("unlock", err)
	v.record = u.Record
	u.Close()
}

// path returns the ciphertext path of a plaintext one; the volume is open.
func (v *victim) path(name string) string {
	v.t.Helper()
	dir, cname := "", ""
	for part := range strings.SplitSeq(name, "/") {
		dir = filepath.Join(dir, cname)
		cname = v.v.CipherName(v.must(strings.TrimSuffix(name[:strings.Index(name, part)], "/")), part)
	}
	return filepath.Join(v.dir, dir, cname)
}

// outcome opens the volume and reads name: how what was done to it shows.
func (v *victim) outcome(name string) string {
	return v.with(func() string { return v.shows(name) })
}

func (v *victim) shows(name string) string {
	n, err := v.node(name)
	switch {
	case errors.Is(err,
		unix.ENOENT) && !slices.Contains(v.list(filepath.Dir(name)), filepath.Base(name)) &&
		strings.Contains(v.log.String(), "not shown"):
		return "it is not shown; the log says so"
	case errors.Is(err, unix.EIO):
		return "EIO for its entries"
	case err != nil:
		return fmt.Sprint("lookup: ", err)
	}
	h, err := n.Open(ctx, false)
	if err != nil {
		return shown(err) + " at open"
	}
	defer h.Release()
	got := make([]byte, 0, len(v.content[name])+5000)
	for off := 0; ; off += 1000 {
		b := make([]byte, 1000)
		k, err := h.Read(ctx, b, int64(off))
		if err != nil {
			return shown(err) + " when it is read"
		}
		got = append(got, b[:k]...)
		if k < len(b) {
			break
		}
	}
	if !bytes.Equal(got, v.content[name]) {
		return "OTHER BYTES"
	}
	return "not noticed"
}

// shown is the errno of an error, as the mount says it.
func shown(err error) string {
	switch {
	case keystore.KindOf(err) == keystore.Untrusted:
		return "ENOKEY"
	case blockcrypt.ClassOf(err) != "", keystore.KindOf(err) == keystore.Damaged, errors.Is(err, unix.EIO):
		return "EIO"
	}
	return err.Error()
}

// one counts a case.
func (m *tamperer) one(what, got string) {
	m.t.Helper()
	m.n++
	m.cases[got]++
	if got != m.shows && !(m.shows == "EIO or ENOKEY at open" &&
		(got == "EIO at open" || got == "ENOKEY at open")) {
		m.t.Errorf("%s: %s: %s, want %s", m.row, what, got, m.shows)
	}
}

// on changes d/f's ciphertext and looks at it.
func (m *tamperer) on(v *victim, path, what string, f func(b []byte) []byte) {
	m.t.Helper()
	b, err := os.ReadFile(path)
	v.do("read", err)
	now := f(bytes.Clone(b))
	if bytes.Equal(now, b) {
		return // it was so already
	}
	v.do("write", os.WriteFile(path, now, 0o644))
	m.one(what, v.outcome("d/f"))
	v.do("write", os.WriteFile(path, b, 0o644))
}

// fields of a header: name, from, to.
var fields = []struct {
	name     string
	from, to int
}{
	{"magic", 0, 7}, {"version", 7, 8}, {"H", 8, 10}, {"suite", 10, 11}, {"page size", 11, 12},
	{"zeros", 12, 16}, {"volume ID", 16, 32}, {"file ID", 32, 48}, {"directory", 48, 64},
	{"commitment", 64, 96}, {"origin", 96, 112}, {"features", 112, 120}, {"more zeros", 120, 128},
	{"size", 128, 136}, {"floor", 136, 144}, {"session", 144, 152},
	{"generation", 152, 160}, {"flags", 160, 164}, {"zeros of the state", 164, 176},
	{"tag", 176, 192}, {"length of the recipients", 192, 194}, {"yet more zeros", 194, 196},
	{"checksum", 196, 200},
	{"a URI", 202, 240}, {"wrapped key", 250, 300}, {"padding", 900, 1024},
}

// right makes a header's checksum right.
func right(b []byte) []byte {
	n := min(int(binary.BigEndian.Uint16(b[192:])), 1024-200)
	t := crc32.MakeTable(crc32.Castagnoli)
	c := crc32.Update(crc32.Update(crc32.Update(0, t, b[:128]), t, b[192:196]), t, b[200:200+n])
	binary.BigEndian.PutUint32(b[196:], c)
	return b
}

func (m *tamperer) headerFields() {
	v := m.victim()
	path := v.path("d/f")
	v.seal()
	for _, f := range fields {
		for what, change := range map[string]func(b []byte){
			"first bit": func(b []byte) { b[0] ^= 0x80 }, "last bit": func(b []byte) { b[len(b)-1] ^= 1 }, "zeroed": func(b []byte) { clear(b) }, "all ones": func(b []byte) {
				for i := range b {
					b[i] = 0xff
				}
			},
		} {
			for _, sum := range []bool{false, true} {
				if sum && f.name == "checksum" {
					continue
				}
				m.on(v, path, fmt.Sprintf("%s %s, checksum made right %v", f.name, what,
					sum), func(b []byte) []byte {
					change(b[f.from:f.to])
					if sum {
						right(b)
					}
					return b
				})
			}
		}
	}
}

func (m *tamperer) headerSwaps() {
	v, w := m.victim(), m.victim()
	path, same := v.path("d/f"), v.path("d/g")
	other := w.path("d/f")
	v.seal()
	w.seal()
	for from, p := range map[string]string{"another file": same, "another volume": other} {
		x, err := os.ReadFile(p)
		v.do("read", err)
		for _, f := range fields {
			m.on(v, path, f.name+" of "+from,
				func(b []byte) []byte { copy(b[f.from:f.to], x[f.from:f.to]); return right(b) })
		}
		m.on(v, path, "state and tag of "+from,
			func(b []byte) []byte { copy(b[128:192], x[128:192]); return b })
		m.on(v, path, "recipients of "+from,
			func(b []byte) []byte { copy(b[192:1024], x[192:1024]); return right(b) })
		m.on(v, path, "all but the IDs of "+from,
			func(b []byte) []byte { copy(b[64:1024], x[64:1024]); return right(b) })
		m.on(v, path, "header of "+from, func(b []byte) []byte { copy(b[:1024], x[:1024]); return b })
	}
}

func (m *tamperer) blockBits() {
	v := m.victim()
	path := v.path("d/f")
	v.seal()
	for _, k := range []int{0, 1, 3} {
		begin := k * 4096
		if k == 0 {
			begin = 1024
		}
		for what, at := range map[string]int{"length": 1, "length's high bits": 0, "key number": 3,
			"nonce": 4, "end of the nonce": 15, "content": 16, "more content": 2000} {
			m.on(v, path, fmt.Sprintf("%s of block %d", what, k),
				func(b []byte) []byte { b[begin+at] ^= 1; return b })
		}
		m.on(v, path, fmt.Sprintf("tag of block %d", k),
			func(b []byte) []byte { b[(k+1)*4096-1] ^= 1; return b })
	}
	m.on(v, path, "tag of the last block", func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
}

func (m *tamperer) blockSwaps() {
	v := m.victim()
	path, same := v.path("d/f"), v.path("d/g")
	v.seal()
	x, err := os.ReadFile(same)
	v.do("read", err)
	for _, k := range []int{1, 2, 3} {
		page := func(b []byte, k int) []byte { return b[k*4096 : (k+1)*4096] }
		m.on(v, path, "zeros", func(b []byte) []byte { clear(page(b, k)); return b })
		m.on(v, path, "ones",
			func(b []byte) []byte { copy(page(b, k), bytes.Repeat([]byte{0xff}, 4096)); return b })
		m.on(v, path, "the neighbour", func(b []byte) []byte { copy(page(b, k), page(b, k%3+1)); return b })
		m.on(v, path, "another file's", func(b []byte) []byte { copy(page(b, k), page(x, k)); return b })
		m.on(v, path, "another file's other one",
			func(b []byte) []byte { copy(page(b, k), page(x, k%3+1)); return b })
	}
	m.on(v, path, "the first block", func(b []byte) []byte { clear(b[1024:4096]); return b })
}

func (m *tamperer) lengths() {
	v := m.victim()
	path := v.path("d/f")
	v.seal()
	for _, n := range []int{1, 11, 199, 1023, 1024, 1025, 4096, 8192, 9000, 20479} {
		m.on(v, path, fmt.Sprint("cut to ", n), func(b []byte) []byte { return b[:n] })
	}
	m.on(v, path, "one byte less", func(b []byte) []byte { return b[:len(b)-1] })
	m.on(v, path, "one byte more", func(b []byte) []byte { return append(b, 0) })
	m.on(v, path, "a page more", func(b []byte) []byte { return append(b, make([]byte, 4096)...) })
	m.on(v, path, "its last page again", func(b []byte) []byte { return append(b, b[len(b)-4096:]...) })
}

func (m *tamperer) planted() {
	v, w := m.victim(), m.victim()
	path, other := v.path("d/f"), w.path("d/f")
	v.seal()
	w.seal()
	theirs, err := os.ReadFile(other)
	v.do("read", err)
	m.on(v, path, "another volume's", func([]byte) []byte { return theirs })
	m.on(v, path, "another volume's, with this one's ID",
		func(b []byte) []byte { copy(theirs[16:32], b[16:32]); return right(theirs) })
	// With the data key, and a wrapping of it, but no volume key: no origin.
	for _, origin := range []string{"zero", "another file's"} {
		m.on(v, path, "forged, origin "+origin, func(b []byte) []byte {
			old, err := blockcrypt.ParseHeader(b)
			v.do("parse", err)
			id := blockcrypt.NewID()
			dk, err := keystore.New(ctx, []keystore.Store{v.store},
				keystore.Binding{Use: keystore.ForFile, Volume: old.Volume, ID: id})
			v.do("generate", err)
			rs := []blockcrypt.Recipient{{URI: dk.Wrapped[0].URI, Branch: dk.Wrapped[0].Branch,
				Wrapped: dk.Wrapped[0].Wrapped}}
			return forge(v.t, old, id, dk.Key, rs, origin != "zero")
		})
	}
}

// forge makes a file as somebody can who has a data key, but not the volume's.
func forge(t testing.TB, like *blockcrypt.Header, id blockcrypt.ID, key []byte,
	rs []blockcrypt.Recipient, withOrigin bool) []byte {
	t.Helper()
	fake, err := blockcrypt.NewVolumeKeys(bytes.Repeat([]byte{7}, 32), like.Volume)
	if err != nil {
		t.Fatal(err)
	}
	hdr, keys, err := blockcrypt.NewFile(like.Geometry, fake, blockcrypt.FileIDs{File: id, Dir: like.Dir}, key, rs)
	if err != nil {
		t.Fatal(err)
	}
	if hdr.Origin = [16]byte{}; withOrigin {
		hdr.Origin = like.Origin
	}
	keys.SetState(hdr, blockcrypt.State{Size: 5, Floor: 5, Generation: 1})
	b, err := hdr.Encode()
	if err != nil {
		t.Fatal(err)
	}
	b = append(b, make([]byte, blockcrypt.SealedSize(5))...)
	keys.Seal(b[1024:], 0, 1, []byte("forge"))
	return b
}

func (m *tamperer) foreignKey() {
	v := m.victim()
	path := v.path("d/f")
	v.seal()
	foreign := newStore(m.t)[0]
	// Also if somebody with the volume's key makes an origin.
	for _, both := range []bool{false, true} {
		m.on(v, path, fmt.Sprint("with the volume's key ", both), func(b []byte) []byte {
			old, err := blockcrypt.ParseHeader(b)
			v.do("parse", err)
			w := blockcrypt.Recipient{URI: foreign.URI(), Wrapped: noise(60)}
			old.Recipients = []blockcrypt.Recipient{{URI: w.URI, Wrapped: w.Wrapped}}
			if both {
				old.Recipients = append(old.Recipients,
					blockcrypt.Recipient{URI: "aws-kms:arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", Wrapped: noise(100)})
			}
			head, err := old.Encode()
			v.do("encode", err)
			copy(b, head)
			return b
		})
	}
}

func (m *tamperer) plantedRecipient() {
	v := m.victim()
	path := v.path("d/f")
	v.seal()
	theirs := newStore(m.t)[0]
	for what, at := range map[string]int{"before the others": 0, "behind the others": 1} {
		replaceHeader(m.t, path, func(h *blockcrypt.Header) {
			h.Recipients = slices.Insert(h.Recipients, at,
				blockcrypt.Recipient{URI: theirs.URI(), Wrapped: noise(60)})
		})
		got := v.outcome("d/f") // it is opened by the volume's own recipient
		fs, _ := v.fsck()
		v.open(volume.Options{})
		_, err := v.v.Recipients().Rewrap(ctx, volume.RewrapOptions{})
		v.do("rewrap", err)
		v.close()
		left := v.named()[theirs.URI()]
		if got == "not noticed" && strings.Contains(summary(fs), "note/recipient") && left == 0 {
			got = m.shows
		} else {
			got = fmt.Sprintf("%s, fsck %q, %d left", got, summary(fs), left)
		}
		m.one(what, got)
	}
}

func (m *tamperer) configs() {
	v, w := m.victim(), m.victim()
	v.seal()
	w.seal()
	path := filepath.Join(v.dir, "kmsfs.json")
	b, err := os.ReadFile(path)
	v.do("read", err)
	for i := 0; i < len(b); i += 7 {
		x := bytes.Clone(b)
		x[i] ^= 1
		v.do("write", os.WriteFile(path, x, 0o644))
		m.one(fmt.Sprint("bit at ", i), v.outcome("d/f"))
	}
	theirs, err := os.ReadFile(filepath.Join(w.dir, "kmsfs.json"))
	v.do("read", err)
	for what, x := range map[string][]byte{"another volume's": theirs, "cut": b[:len(b)/2],
		"without its second line": b[:bytes.IndexByte(b, '\n')+1], "empty": nil,
		"twice": append(bytes.Clone(b), b...)} {
		v.do("write", os.WriteFile(path, x, 0o644))
		m.one(what, v.outcome("d/f"))
	}
	v.do("remove", os.Remove(path))
	m.one("lost", v.outcome("d/f"))
	v.do("write", os.WriteFile(path, b, 0o644))
	v.record.Generation++ // as if a newer one had been seen
	m.one("older than the last one seen", v.outcome("d/f"))
}

func (m *tamperer) markers() {
	v, w := m.victim(), m.victim()
	v.crash()
	w.crash()
	u, err := v.unlock()
	v.do("unlock", err)
	v.record = u.Record
	u.Close()
	path := filepath.Join(v.dir, "kmsfs.mounted")
	target, err := os.Readlink(path)
	v.do("readlink", err)
	theirs, err := os.Readlink(filepath.Join(w.dir, "kmsfs.mounted"))
	v.do("readlink", err)
	for what, now := range map[string]string{"a character": other(target[:1]) + target[1:],
		"the last": target[:len(target)-1] + other(target[len(target)-1:]), "cut": target[:20],
		"another volume's": theirs, "readable": "hello"} {
		if now == target {
			continue
		}
		v.do("remove", os.Remove(path))
		v.do("symlink", os.Symlink(now, path))
		m.one(what, v.outcome("d/f"))
	}
}

func (m *tamperer) older() {
	v := m.victim()
	path := v.path("d/f")
	v.close()
	old, err := os.ReadFile(path)
	v.do("read", err)
	before := v.content["d/f"]
	v.open(volume.Options{})
	h := v.opened("d/f")
	now := bytes.Clone(before)
	copy(now[3100:], bytes.Repeat([]byte("new"), 300)) // in the second block
	_, err = h.Write(ctx, now[3100:4000], 3100)
	v.do("write", err)
	v.do("close", errors.Join(h.Fsync(), h.Release()))
	v.content["d/f"] = now
	v.seal()
	whole, err := os.ReadFile(path)
	v.do("read", err)
	v.content["d/f"] = before
	m.on(v, path, "the whole file", func([]byte) []byte { return old })
	m.on(v, path, "a block", func(b []byte) []byte { copy(b[4096:8192], old[4096:8192]); return b })
	v.content["d/f"] = now
	m.on(v, path, "the state", func(b []byte) []byte { copy(b[128:192], old[128:192]); return b })
	v.do("write", os.WriteFile(path, whole, 0o644))
}

func (m *tamperer) formerHeader() {
	v := m.victim()
	path := v.path("d/f")
	v.close()
	old, err := os.ReadFile(path)
	v.do("read", err)
	v.open(volume.Options{})
	_, err = v.v.Recipients().SetHeaderSize(2048)
	v.do("set the size", err)
	if _, rec, err := v.v.Recipients().Reheader(ctx, volume.RekeyOptions{}); err != nil || rec == nil {
		v.t.Fatal(err)
	}
	v.seal()
	m.on(v, path, "before reheader", func([]byte) []byte { return old })
}

func (m *tamperer) exchanged() {
	v := m.victim()
	f, g := v.path("d/f"), v.path("d/g")
	v.seal()
	a, err := os.ReadFile(f)
	v.do("read", err)
	b, err := os.ReadFile(g)
	v.do("read", err)
	content := v.content["d/f"]
	v.content["d/f"] = v.content["d/g"]
	m.on(v, f, "another of its directory", func([]byte) []byte { return b })
	v.content["d/f"] = nil
	m.on(v, f, "emptied", func([]byte) []byte { return nil })
	v.content["d/f"] = content
	v.do("remove", os.Remove(g))
	m.one("its neighbour deleted", v.outcome("d/f"))
	_ = a
}

func (m *tamperer) valuesExchanged() {
	v := m.victim()
	for _, n := range []string{"a", "b"} {
		_, _, err := v.v.Symlink(ctx, v.must("d"), n, "target of "+n, volume.Caller{})
		v.do("symlink", err)
	}
	a, b := v.path("d/a"), v.path("d/b")
	v.seal()
	v.do("rename", os.Rename(a, a+"x"))
	ta, _ := os.Readlink(a + "x")
	tb, _ := os.Readlink(b)
	v.do("remove", errors.Join(os.Remove(a+"x"), os.Remove(b)))
	v.do("symlink", errors.Join(os.Symlink(tb, a), os.Symlink(ta, b)))
	m.one("targets", v.with(func() string {
		if got, err := v.v.Readlink(v.must("d/a")); err != nil || got != "target of b" {
			return fmt.Sprint(got, err)
		}
		return "not noticed"
	}))
}

func (m *tamperer) modes() {
	v := m.victim()
	path := v.path("d/f")
	v.seal()
	v.do("chmod", os.Chmod(path, 0o600))
	m.one("mode", v.outcome("d/f"))
}

func TestTamperingTable(t *testing.T) {
	page, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	total := map[string]int{}
	for _, row := range tampered {
		t.Run(row.what, func(t *testing.T) {
			m := &tamperer{t: t, row: row.what, shows: row.shows, cases: map[string]int{}}
			row.cases(m)
			if m.n == 0 {
				t.Error("no case was made")
			}
			total[row.shows] += m.n
			if line := fmt.Sprintf("| %s | %s |", row.what,
				row.shows); !strings.Contains(string(page), line) {
				t.Errorf("docs/security.md lacks the row: %s", line)
			}
		})
	}
	for _, shows := range slices.Sorted(maps.Keys(total)) {
		t.Logf("%4d cases: %s", total[shows], shows)
	}
}
