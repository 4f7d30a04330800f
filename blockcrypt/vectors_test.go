package blockcrypt_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"

	"kmsfs/blockcrypt"
	"kmsfs/tests/independent"
)

var update = flag.Bool("update", false, "make the test vectors again")

// vectors is testdata/vectors.json: see FORMAT.md, "Test vectors".
type vectors struct {
	VolumeID  blockcrypt.ID `json:"volume_id"`
	VolumeKey hexBytes      `json:"volume_key"`
	Files     []fileVector  `json:"files"`
	Names     []nameVector  `json:"names"`
	Attrs     []nameVector  `json:"attributes"`
	Values    []valueVector `json:"values"`
	Markers   []nameVector  `json:"markers"`
	Configs   []nameVector  `json:"configs"`
}

// fileVector is a ciphertext file. Byte i of its plaintext is (7i + i/256) mod
// 256; Class is the failure, if one is expected.
type fileVector struct {
	Name       string           `json:"name"`
	DataKey    hexBytes         `json:"data_key"`
	Size       int              `json:"size"`
	SHA256     string           `json:"plaintext_sha256,omitempty"`
	Class      blockcrypt.Class `json:"class,omitempty"`
	Ciphertext []byte           `json:"ciphertext"`
}

type nameVector struct {
	Dir     *blockcrypt.ID   `json:"directory,omitempty"`
	Plain   string           `json:"plain,omitempty"` // of names in hex: they need not be text
	Encoded string           `json:"encoded"`
	Class   blockcrypt.Class `json:"class,omitempty"`
}

type valueVector struct {
	Attr   string           `json:"attribute"` // "": a symlink's target, sealed in base64url
	Plain  string           `json:"plain,omitempty"`
	Sealed []byte           `json:"sealed"`
	Class  blockcrypt.Class `json:"class,omitempty"`
}

type hexBytes []byte

func (h hexBytes) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }
func (h *hexBytes) UnmarshalText(b []byte) (err error) {
	*h, err = hex.DecodeString(string(b))
	return err
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(7*i + i/256)
	}
	return b
}

// seal makes a clean file of n bytes.
func seal(t testing.TB, h int, vk *blockcrypt.VolumeKeys, dataKey, plain []byte) []byte {
	t.Helper()
	g, err := blockcrypt.NewGeometry(h)
	if err != nil {
		t.Fatal(err)
	}
	if len(plain) == 0 {
		return nil
	}
	hdr, fk, err := blockcrypt.NewFile(g, vk, blockcrypt.FileIDs{File: fixedID(2), Dir: fixedID(3)}, dataKey, []blockcrypt.Recipient{
		{URI: "aws-kms:arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", Wrapped: bytes.Repeat([]byte{5}, 184)},
		{URI: "local:00112233445566778899aabbccddeeff", Wrapped: bytes.Repeat([]byte{6}, 60)},
	})
	if err != nil {
		t.Fatal(err)
	}
	n := int64(len(plain))
	fk.SetState(hdr, blockcrypt.State{Size: n, Floor: n, Session: 0x0102030405060708, Generation: 9})
	head, err := hdr.Encode()
	if err != nil {
		t.Fatal(err)
	}
	out := make([]byte, g.Whole(n))
	copy(out, head)
	for k := int64(0); k <= g.Block(n-1); k++ {
		fk.Seal(out[g.PageOff(k)+int64(g.Lead(k)):], k, uint16(0x1234+k),
			plain[g.Start(k):min(n, g.Start(k+1))])
	}
	return out[:g.Exact(n)]
}

// open is the reader that FORMAT.md describes, by this package.
func open(vk *blockcrypt.VolumeKeys, dataKey, file []byte) ([]byte, error) {
	if len(file) == 0 {
		return nil, nil
	}
	h, err := blockcrypt.ParseHeader(file)
	if err != nil {
		return nil, err
	}
	if err := vk.CheckOrigin(h); err != nil {
		return nil, err
	}
	fk, err := h.Unlock(dataKey)
	if err != nil {
		return nil, err
	}
	g := h.Geometry
	page := func(k int64) []byte {
		from := min(g.PageOff(k)+int64(g.Lead(k)), int64(len(file)))
		return file[from:min(int64(len(file)), g.PageOff(k+1))]
	}
	n, err := g.Plain(int64(len(file)),
		func(k int64) (int, error) { return blockcrypt.BlockLen(page(k)), nil })
	if err != nil {
		return nil, err
	}
	if n != h.State.Size {
		return nil, &blockcrypt.DamageError{Class: blockcrypt.BadSize, Pos: -1,
			Detail: "length and state differ"}
	}
	var out []byte
	for k := int64(0); int64(len(out)) < n; k++ {
		b, err := fk.Open(nil, k, page(k), g.Capacity(k))
		if err != nil {
			return nil, err
		}
		if out = append(out, b...); int64(len(out)) != min(n, g.Start(k+1)) {
			return nil, &blockcrypt.DamageError{Class: blockcrypt.BadBlock, Pos: -1, Detail: "short"}
		}
	}
	return out, nil
}

func fixedID(b byte) (id blockcrypt.ID) {
	for i := range id {
		id[i] = b<<4 | byte(i)
	}
	return id
}

func fixedKey(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

// sumAgain puts the right CRC into a header that was changed.
func sumAgain(b []byte) {
	list := int(binary.BigEndian.Uint16(b[192:]))
	t := crc32.MakeTable(crc32.Castagnoli)
	c := crc32.Update(crc32.Update(crc32.Update(0, t, b[:128]), t, b[192:196]), t, b[200:200+list])
	binary.BigEndian.PutUint32(b[196:], c)
}

func makeVectors(t *testing.T) *vectors {
	v := &vectors{VolumeID: fixedID(1), VolumeKey: fixedKey(0x11)}
	vk, err := blockcrypt.NewVolumeKeys(v.VolumeKey, v.VolumeID)
	if err != nil {
		t.Fatal(err)
	}
	key := fixedKey(0x22)
	for _, n := range []int{0, 1, 3039, 3040, 3041, 4064, 5000, 7104, 7105} {
		sum := sha256.Sum256(pattern(n))
		v.Files = append(v.Files,
			fileVector{fmt.Sprintf("%d bytes", n), key, n, hex.EncodeToString(sum[:]), "",
				seal(t, 1024, vk, key, pattern(n))})
	}
	v.badFiles(t, vk, key)
	other := fixedID(4)
	for i, n := range []string{"a", "hello.txt", "fifteen bytes..", "sixteen bytes...",
		"a name of seventeen", "休み", "\xff\xfe not UTF-8", string(bytes.Repeat([]byte("x"), 160)),
		string(bytes.Repeat([]byte("y"), 255))} {
		dir := v.VolumeID
		if i%2 == 1 {
			dir = other
		}
		e, err := vk.EncodeName(dir, n)
		if err != nil {
			t.Fatal(err)
		}
		v.Names = append(v.Names, nameVector{&dir, hex.EncodeToString([]byte(n)), e, ""})
	}
	good := v.Names[1]
	bad := func(dir blockcrypt.ID, e string) {
		v.Names = append(v.Names, nameVector{&dir, "", e, blockcrypt.BadName})
	}
	bad(v.VolumeID, good.Encoded) // of another directory
	bad(*good.Dir, good.Encoded+"A")
	bad(*good.Dir, good.Encoded+"=")
	bad(*good.Dir, good.Encoded[:20]+"\n"+good.Encoded[20:])
	bad(*good.Dir, "B"+good.Encoded[1:])
	bad(*good.Dir, "")
	for _, a := range []string{"user.note", "trusted.overlay.opaque", "user.kmsfs.x"} {
		e, err := vk.EncodeAttr(a)
		if err != nil {
			t.Fatal(err)
		}
		v.Attrs = append(v.Attrs, nameVector{nil, a, e, ""})
	}
	v.Attrs = append(v.Attrs, nameVector{nil, "", "user.note", blockcrypt.BadName},
		nameVector{nil, "", "security.kmsfs.AAAA", blockcrypt.BadName},
		nameVector{nil, "", "trusted" + v.Attrs[0].Encoded[4:] + "A", blockcrypt.BadName})
	for _, p := range []string{"", "value", string(pattern(300))} {
		s, err := vk.SealValue("user.note", []byte(p))
		if err != nil {
			t.Fatal(err)
		}
		v.Values = append(v.Values, valueVector{"user.note", hex.EncodeToString([]byte(p)), s, ""})
	}
	target, err := vk.SealTarget("../some/where")
	if err != nil {
		t.Fatal(err)
	}
	v.Values = append(v.Values,
		valueVector{"", hex.EncodeToString([]byte("../some/where")), []byte(target), ""},
		valueVector{"user.other", "", v.Values[1].Sealed, blockcrypt.BadValue},
		valueVector{"user.note", "", v.Values[1].Sealed[:31], blockcrypt.BadValue})
	m := vk.SealMarker([]uint64{1, 0xfedcba9876543210})
	v.Markers = []nameVector{{nil, "0000000000000001 fedcba9876543210", m, ""},
		{nil, "", "B" + m[1:], blockcrypt.BadMarker}, {nil, "", m[:20], blockcrypt.BadMarker}}
	v.configs(t, vk)
	return v
}

func (v *vectors) badFiles(t *testing.T, vk *blockcrypt.VolumeKeys, key []byte) {
	plain := pattern(9000)
	file := func() []byte { return seal(t, 1024, vk, key, plain) }
	add := func(name string, class blockcrypt.Class, b []byte) {
		v.Files = append(v.Files, fileVector{name, key, len(plain), "", class, b})
	}
	change := func(name string, class blockcrypt.Class, f func(b []byte)) {
		b := file()
		f(b)
		add(name, class, b)
	}
	add("header cut short", blockcrypt.BadHeader, file()[:1000])
	add("cut within the first 12 bytes", blockcrypt.BadHeader, file()[:11])
	change("other magic", blockcrypt.BadHeader, func(b []byte) { b[0] = 'K' })
	change("version 2", blockcrypt.Unsupported, func(b []byte) { b[7] = 2 })
	change("suite 2", blockcrypt.Unsupported, func(b []byte) { b[10] = 2; sumAgain(b) })
	change("header size 1000", blockcrypt.BadHeader,
		func(b []byte) { binary.BigEndian.PutUint16(b[8:], 1000); sumAgain(b) })
	change("a bit of the header", blockcrypt.BadChecksum, func(b []byte) { b[40] ^= 1 })
	change("a bit of a recipient", blockcrypt.BadChecksum, func(b []byte) { b[300] ^= 1 })
	change("feature that forbids opening", blockcrypt.Unsupported,
		func(b []byte) { b[115] = 1; sumAgain(b) })
	change("padding of the header", blockcrypt.BadHeader, func(b []byte) { b[1023] = 1 })
	change("recipients longer than the header", blockcrypt.BadHeader,
		func(b []byte) { binary.BigEndian.PutUint16(b[192:], 60000) })
	change("origin", blockcrypt.BadOrigin, func(b []byte) { b[96] ^= 1; sumAgain(b) })
	change("another volume", blockcrypt.BadVolume, func(b []byte) { b[16] ^= 1; sumAgain(b) })
	change("state", blockcrypt.BadState, func(b []byte) { b[135] ^= 1 })
	change("tag of the state", blockcrypt.BadState, func(b []byte) { b[191] ^= 1 })
	change("floor above size", blockcrypt.BadHeader, func(b []byte) { b[136] = 0x7f })
	change("a bit of block 0", blockcrypt.BadBlock, func(b []byte) { b[2000] ^= 1 })
	change("a nonce", blockcrypt.BadBlock, func(b []byte) { b[4096+5] ^= 1 })
	change("the number of a content key", blockcrypt.BadBlock, func(b []byte) { b[4096+3] ^= 1 })
	change("a reserved bit of n", blockcrypt.BadBlock, func(b []byte) { b[4096] |= 0x80 })
	change("blocks exchanged", blockcrypt.BadBlock, func(b []byte) {
		p := bytes.Clone(b[4096:8192])
		copy(b[4096:], b[8192:])
		copy(b[8192:], p[:len(b)-8192])
	})
	change("a page of zeros", blockcrypt.BadBlock, func(b []byte) { clear(b[4096:8192]) })
	add("cut at a page", blockcrypt.BadSize, file()[:8192])
	add("cut elsewhere", blockcrypt.BadSize, file()[:9000])
	add("a byte more", blockcrypt.BadSize, append(file(), 0))
	v.Files = append(v.Files,
		fileVector{"another data key", fixedKey(0x23), len(plain), "", blockcrypt.BadCommitment, file()})
}

func (v *vectors) configs(t *testing.T, vk *blockcrypt.VolumeKeys) {
	c := &blockcrypt.Config{Format: 1, Volume: v.VolumeID, Generation: 3, Header: 1024,
		Names: blockcrypt.NamesEncrypted,
		Recipients: []blockcrypt.Recipient{{URI: "local:00112233445566778899aabbccddeeff",
			Wrapped: bytes.Repeat([]byte{7}, 60)}}}
	b, err := c.Encode(vk)
	if err != nil {
		t.Fatal(err)
	}
	s := string(b)
	with := func(old, now string, class blockcrypt.Class) {
		v.Configs = append(v.Configs,
			nameVector{nil, "", string(bytes.Replace(b, []byte(old), []byte(now), 1)), class})
	}
	v.Configs = []nameVector{{nil, "", s, ""}}
	with(`"generation":3`, `"generation":4`, blockcrypt.BadConfigMAC)
	with(`"format":1`, `"format":2`, blockcrypt.Unsupported)
	with(`"format":1`, `"more":1,"format":1`, blockcrypt.BadConfig)
	with(`"header":1024`, `"header":1000`, blockcrypt.BadConfig)
	with(`"encrypted"`, `"else"`, blockcrypt.Unsupported)
	with("{", "", blockcrypt.BadConfig)
	with("\n", "", blockcrypt.BadConfig)

	proof := func(uri string) []blockcrypt.Recipient {
		return []blockcrypt.Recipient{{URI: uri, Wrapped: bytes.Repeat([]byte{8}, 60)}}
	}
	c.Directories = map[blockcrypt.ID]blockcrypt.DirectoryKeys{
		fixedID(0xb): {Recipients: proof("local:11112233445566778899aabbccddeeff"), Former: proof("local:22222233445566778899aabbccddeeff")},
		fixedID(0xa): {Former: proof("local:33332233445566778899aabbccddeeff")}}
	if b, err = c.Encode(vk); err != nil {
		t.Fatal(err)
	}
	with("", "", "")
	with("local:1111", "local:1112", blockcrypt.BadConfigMAC)
	with("local:2222", "local:1111", blockcrypt.BadConfig) // twice
	with(`"former":`, `"recipients":[],"former":`, blockcrypt.BadConfig)
	with(fixedID(0xb).String(), v.VolumeID.String(), blockcrypt.BadConfig) // the root
	with(fixedID(0xa).String(), "a", blockcrypt.BadConfig)
	with(fixedID(0xa).String(), fixedID(0xb).String(), blockcrypt.BadConfig) // twice
	with(`"encrypted"`, `"plain"`, blockcrypt.BadConfig)
}

const vectorFile = "testdata/vectors.json"

func load(t testing.TB) (*vectors, *blockcrypt.VolumeKeys) {
	t.Helper()
	b, err := os.ReadFile(vectorFile)
	if err != nil {
		t.Fatal(err)
	}
	v := &vectors{}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
	vk, err := blockcrypt.NewVolumeKeys(v.VolumeKey, v.VolumeID)
	if err != nil {
		t.Fatal(err)
	}
	return v, vk
}

func TestVectors(t *testing.T) {
	if *update {
		b, err := json.MarshalIndent(makeVectors(t), "", " ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(vectorFile), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(vectorFile, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	v, vk := load(t)
	for _, f := range v.Files {
		t.Run("file/"+f.Name, func(t *testing.T) {
			got, err := open(vk, f.DataKey, f.Ciphertext)
			if c := blockcrypt.ClassOf(err); c != f.Class || f.Class == "" && err != nil {
				t.Fatalf("class %q (%v), want %q", c, err, f.Class)
			}
			other, oerr := independent.Decode(f.Ciphertext, f.DataKey, v.VolumeKey)
			if f.Class != "" {
				if oerr == nil && f.Class != blockcrypt.BadHeader &&
					f.Class != blockcrypt.BadVolume && f.Class != blockcrypt.BadSize {
					t.Fatalf("the independent decoder opens it")
				}
				return
			}
			sum := sha256.Sum256(got)
			if len(got) != f.Size || hex.EncodeToString(sum[:]) != f.SHA256 ||
				!bytes.Equal(got, pattern(f.Size)) {
				t.Fatalf("another plaintext of %d bytes", len(got))
			}
			if oerr != nil || !bytes.Equal(other, got) {
				t.Fatalf("the independent decoder: %v", oerr)
			}
		})
	}
	for i, n := range v.Names {
		got, err := vk.DecodeName(*n.Dir, n.Encoded)
		check(t, "name", i, hex.EncodeToString([]byte(got)), n.Plain, err, n.Class)
		if n.Class == "" {
			again, _ := vk.EncodeName(*n.Dir, got)
			check(t, "name", i, again, n.Encoded, nil, "")
		}
	}
	for i, n := range v.Attrs {
		got, err := vk.DecodeAttr(n.Encoded)
		check(t, "attribute", i, got, n.Plain, err, n.Class)
	}
	for i, x := range v.Values {
		var got []byte
		var err error
		if x.Attr == "" {
			var s string
			s, err = vk.OpenTarget(string(x.Sealed))
			got = []byte(s)
			if l := blockcrypt.TargetLen(int64(len(x.Sealed))); l != int64(len(s)) {
				t.Errorf("value %d: target of %d bytes, computed %d", i, len(s), l)
			}
		} else {
			got, err = vk.OpenValue(x.Attr, x.Sealed)
		}
		check(t, "value", i, hex.EncodeToString(got), x.Plain, err, x.Class)
	}
	for i, m := range v.Markers {
		s, err := vk.OpenMarker(m.Encoded)
		got := ""
		if err == nil {
			got = fmt.Sprintf("%016x %016x", s[0], s[1])
		}
		check(t, "marker", i, got, m.Plain, err, m.Class)
	}
	for i, c := range v.Configs {
		cfg, err := blockcrypt.ParseConfig([]byte(c.Encoded))
		if err == nil {
			err = cfg.Verify(vk)
		}
		check(t, "config", i, "", "", err, c.Class)
	}
}

func check(t *testing.T, what string, i int, got, want string, err error, class blockcrypt.Class) {
	t.Helper()
	if c := blockcrypt.ClassOf(err); c != class || class == "" && err != nil {
		t.Errorf("%s %d: class %q (%v), want %q", what, i, c, err, class)
	} else if class == "" && got != want {
		t.Errorf("%s %d: %q, want %q", what, i, got, want)
	}
}
