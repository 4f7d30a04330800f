package blockcrypt_test

import (
	"bytes"
	"testing"

	"kmsfs/blockcrypt"
)

// Every header size: sizes strictly increase with the plaintext, and invert.
func TestSizesInvert(t *testing.T) {
	for h := 512; h <= 8192; h += 512 {
		g, err := blockcrypt.NewGeometry(h)
		if err != nil {
			t.Fatal(err)
		}
		last := int64(0)
		for n := int64(1); n < 5*4096; n++ {
			c := g.Exact(n)
			if c <= last {
				t.Fatalf("H %d: %d bytes take %d, %d take %d", h, n-1, last, n, c)
			}
			last = c
			want := int(n - g.Start(g.Block(n-1)))
			back, err := g.Plain(c, func(k int64) (int, error) {
				if k != g.Block(n-1) {
					t.Fatalf("H %d, %d bytes: asked for block %d", h, n, k)
				}
				return want, nil
			})
			if err != nil || back != n {
				t.Fatalf("H %d: %d bytes come back as %d (%v)", h, n, back, err)
			}
			w := g.Whole(n)
			if back, err := g.Plain(w,
				func(int64) (int, error) { return want, nil }); err != nil || back != n ||
				w%4096 != 0 || w < c || w-c >= 4096 {
				t.Fatalf("H %d: %d bytes at whole pages, %d: %d (%v)", h, n, w, back, err)
			}
		}
	}
}

// Blocks tile the plaintext, and each lies within one page.
func TestGeometry(t *testing.T) {
	for h := 512; h <= blockcrypt.MaxHeader; h += 512 {
		g, err := blockcrypt.NewGeometry(h)
		if err != nil {
			t.Fatal(err)
		}
		for k := int64(0); k < 5; k++ {
			if g.Start(k)+int64(g.Capacity(k)) != g.Start(k+1) || g.Block(g.Start(k)) != k ||
				g.Block(g.Start(k+1)-1) != k {
				t.Fatalf("H %d: block %d does not join the next", h, k)
			}
			from := g.PageOff(k) + int64(g.Lead(k))
			if to := from + int64(blockcrypt.SealedSize(g.Capacity(k))); from/4096 != (to-1)/4096 ||
				to%4096 != 0 {
				t.Fatalf("H %d: block %d spans [%d,%d)", h, k, from, to)
			}
		}
		if g.Exact(1) != int64(h)+33 {
			t.Fatalf("H %d: one byte takes %d", h, g.Exact(1))
		}
	}
	for _, h := range []int{0, 511, 513, 65025, 65536, -512} {
		if _, err := blockcrypt.NewGeometry(h); blockcrypt.ClassOf(err) != blockcrypt.BadHeader {
			t.Errorf("H %d: %v", h, err)
		}
	}
	g, _ := blockcrypt.NewGeometry(1024)
	for _, c := range []int64{1, 1023, 1025, 1056, 4096 + 32} {
		if _, err := g.Plain(c, nil); blockcrypt.ClassOf(err) != blockcrypt.BadSize {
			t.Errorf("a length of %d: %v", c, err)
		}
	}
}

func TestHeaderRoundTrip(t *testing.T) {
	vk := volumeKeys(t)
	for h := 512; h <= blockcrypt.MaxHeader; h += 4096 - 512 {
		b := seal(t, max(h, 1024), vk, fixedKey(1), pattern(100))
		hdr, err := blockcrypt.ParseHeader(b)
		if err != nil {
			t.Fatal(err)
		}
		again, err := hdr.Encode()
		if err != nil || !bytes.Equal(again, b[:len(again)]) {
			t.Fatalf("H %d: the header comes back differently: %v", h, err)
		}
	}
	g, _ := blockcrypt.NewGeometry(512)
	long := blockcrypt.Recipient{URI: "x:y", Wrapped: make([]byte, 400)}
	hdr, _, err := blockcrypt.NewFile(g, vk, blockcrypt.FileIDs{File: fixedID(1), Dir: fixedID(1)}, fixedKey(1),
		[]blockcrypt.Recipient{long})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := hdr.Encode(); blockcrypt.ClassOf(err) != blockcrypt.BadHeader {
		t.Errorf("recipients that do not fit: %v", err)
	}
	if n := blockcrypt.RecipientsFit(hdr.Recipients); n != 1024 {
		t.Errorf("they fit in %d", n)
	}
	hdr.Recipients = append(hdr.Recipients, long)
	if n := blockcrypt.RecipientsFit(hdr.Recipients); n != 0 {
		t.Errorf("a recipient named twice fits in %d", n)
	}
}

// No two seals of the same block are the same bytes, and each content key has its own.
func TestSealIsRandomized(t *testing.T) {
	vk := volumeKeys(t)
	a, b := seal(t, 1024, vk, fixedKey(1), pattern(9000)), seal(t, 1024, vk, fixedKey(1), pattern(9000))
	for _, at := range []int{1040, 4112, 8208} {
		if bytes.Equal(a[at:at+64], b[at:at+64]) {
			t.Errorf("byte %d: the same ciphertext twice", at)
		}
	}
}

func TestOpenRefusesOtherCapacity(t *testing.T) {
	g, _ := blockcrypt.NewGeometry(1024)
	_, fk, err := blockcrypt.NewFile(g, volumeKeys(t), blockcrypt.FileIDs{File: fixedID(1), Dir: fixedID(1)}, fixedKey(1),
		[]blockcrypt.Recipient{{URI: "x:y"}})
	if err != nil {
		t.Fatal(err)
	}
	page := make([]byte, blockcrypt.PageSize)
	fk.Seal(page, 7, 1, pattern(4064))
	for _, c := range []struct {
		k   int64
		cap int
		ok  bool
	}{{7, 4064, true}, {7, 4063, false}, {8, 4064, false}, {6, 4064, false}} {
		if _, err := fk.Open(nil, c.k, page, c.cap); (err == nil) != c.ok {
			t.Errorf("as block %d of capacity %d: %v", c.k, c.cap, err)
		}
	}
}

func volumeKeys(t testing.TB) *blockcrypt.VolumeKeys {
	t.Helper()
	vk, err := blockcrypt.NewVolumeKeys(fixedKey(0x11), fixedID(1))
	if err != nil {
		t.Fatal(err)
	}
	return vk
}

func FuzzParseHeader(f *testing.F) {
	v, _ := load(f)
	for _, x := range v.Files {
		f.Add(x.Ciphertext[:min(len(x.Ciphertext), 1024)])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := blockcrypt.ParseHeader(b)
		if err != nil {
			return
		}
		again, err := h.Encode()
		if err != nil || !bytes.Equal(again, b[:len(again)]) {
			t.Fatalf("a header parses that does not come back: %v", err)
		}
	})
}

func FuzzParseConfig(f *testing.F) {
	v, _ := load(f)
	for _, x := range v.Configs {
		f.Add([]byte(x.Encoded))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := blockcrypt.ParseConfig(b); err == nil && len(c.Recipients) == 0 {
			t.Fatal("a configuration without recipients parses")
		}
	})
}

func FuzzDecodeName(f *testing.F) {
	v, vk := load(f)
	for _, x := range v.Names {
		f.Add(x.Encoded)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := vk.DecodeName(v.VolumeID, s)
		if err != nil {
			return
		}
		if again, err := vk.EncodeName(v.VolumeID, n); err != nil || again != s {
			t.Fatalf("%q decodes to %q, which encodes to %q", s, n, again)
		}
	})
}

func FuzzOpenBlock(f *testing.F) {
	v, vk := load(f)
	for _, x := range v.Files {
		if len(x.Ciphertext) > 1024 {
			f.Add(x.Ciphertext[1024:])
		}
	}
	h, err := blockcrypt.ParseHeader(v.Files[1].Ciphertext)
	if err != nil {
		f.Fatal(err)
	}
	fk, err := h.Unlock(v.Files[1].DataKey)
	if err != nil {
		f.Fatal(err)
	}
	_ = vk
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := fk.Open(nil, 0, b, 3040); err == nil && !bytes.Equal(p, pattern(len(p))) {
			t.Fatal("bytes open that nobody sealed")
		}
	})
}

func FuzzOpenMarker(f *testing.F) {
	v, vk := load(f)
	for _, x := range v.Markers {
		f.Add(x.Encoded)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if ids, err := vk.OpenMarker(s); err == nil && vk.SealMarker(ids) != s {
			t.Fatalf("%q opens and does not come back", s)
		}
	})
}

func FuzzOpenValue(f *testing.F) {
	v, vk := load(f)
	for _, x := range v.Values {
		f.Add(x.Attr, x.Sealed)
	}
	f.Fuzz(func(t *testing.T, attr string, b []byte) {
		vk.OpenValue(attr, b)
		vk.OpenTarget(string(b))
		vk.DecodeAttr(attr)
	})
}

// The former size of headers stands in kmsfs.json only while there is one.
func TestFormerHeader(t *testing.T) {
	vk := volumeKeys(t)
	c := &blockcrypt.Config{Format: 1, Volume: fixedID(1), Generation: 1, Header: 2048, Names: "encrypted",
		Recipients: []blockcrypt.Recipient{{URI: "local:x", Wrapped: bytes.Repeat([]byte{7}, 60)}}}
	for former, good := range map[int]bool{0: true, 1024: true, 65024: true, 2048: false, 1000: false, -512: false} {
		c.Former = former
		b, err := c.Encode(vk)
		if (err == nil) != good {
			t.Errorf("%d: %v", former, err)
		}
		if err != nil {
			continue
		}
		if bytes.Contains(b, []byte("former_header")) != (former != 0) {
			t.Errorf("%d: %s", former, b)
		}
		again, err := blockcrypt.ParseConfig(b)
		if err != nil || again.Verify(vk) != nil || again.Former != former || again.Header != 2048 {
			t.Errorf("%d: %+v, %v", former, again, err)
		}
	}
}

// A shared volume says so in kmsfs.json, and any other not, by the field's absence: versions that do not know
// the field refuse a shared volume.
func TestSharedConfig(t *testing.T) {
	vk := volumeKeys(t)
	c := &blockcrypt.Config{Format: 1, Volume: fixedID(1), Generation: 1, Header: 1024, Names: "encrypted",
		Recipients: []blockcrypt.Recipient{{URI: "local:x", Wrapped: bytes.Repeat([]byte{7}, 60)}}}
	for _, shared := range []bool{false, true} {
		c.Shared = shared
		b, err := c.Encode(vk)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte(`"names":"encrypted","shared":true,`)) != shared || bytes.Contains(b, []byte("false")) {
			t.Errorf("%v: %s", shared, b)
		}
		again, err := blockcrypt.ParseConfig(b)
		if err != nil || again.Verify(vk) != nil || again.Shared != shared {
			t.Errorf("%v: %+v, %v", shared, again, err)
		}
		no := bytes.Replace(b, []byte(`"names":"encrypted",`), []byte(`"names":"encrypted","shared":false,`), 1)
		if _, err := blockcrypt.ParseConfig(no); blockcrypt.ClassOf(err) != blockcrypt.BadConfig {
			t.Errorf("another form: %v", err)
		}
	}
}

func BenchmarkSeal(b *testing.B) {
	g, _ := blockcrypt.NewGeometry(1024)
	_, fk, err := blockcrypt.NewFile(g, nil, blockcrypt.FileIDs{File: fixedID(1), Dir: fixedID(1)}, fixedKey(1),
		[]blockcrypt.Recipient{{URI: "x:y"}})
	if err != nil {
		b.Fatal(err)
	}
	page, text := make([]byte, blockcrypt.PageSize), pattern(4064)
	b.SetBytes(4064)
	for b.Loop() {
		fk.Seal(page, 1, 1, text)
	}
}

func BenchmarkUnlock(b *testing.B) {
	file := seal(b, 1024, volumeKeys(b), fixedKey(1), pattern(10))
	for b.Loop() {
		h, err := blockcrypt.ParseHeader(file)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := h.Unlock(fixedKey(1)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncodeName(b *testing.B) {
	vk := volumeKeys(b)
	for b.Loop() {
		if _, err := vk.EncodeName(fixedID(1), "file-number-123"); err != nil {
			b.Fatal(err)
		}
	}
}
