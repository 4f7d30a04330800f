//go:build linux && !portable

package volume_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/fs/volume/check"
	"kmsfs/keystore"
	"kmsfs/keystore/agestore"
	"kmsfs/keystore/local"
)

// The volumes in tests/testdata/golden were made by earlier versions, and every
// later one reads them. They are made with
//
//	go test ./fs/volume -run Golden -golden-make NAME
//
// and never made again.
var goldenMake = flag.String("golden-make", "", "make this golden volume")

const (
	goldenDir        = "../../tests/testdata/golden"
	goldenPassphrase = "a passphrase of the tests"
	goldenIdentity   = "AGE-SECRET-KEY-1QER8NHM645DLUZ0V4HJT0U9XYPZJ4M0SZ2QDW60JAE92MSY2DQ5SERP0GQ"
)

// golden is the manifest beside a volume: its contents.
type golden struct {
	Made  string // the version
	Key   string // a local key, in hex, "" if there is only the passphrase
	Files map[string]goldenFile
}

type goldenFile struct {
	Size   int64
	SHA256 string
	Target string            `json:",omitempty"`
	Attrs  map[string]string `json:",omitempty"`
}

// goldenKinds are the volumes, and the contents of each.
var goldenKinds = map[string]struct {
	plain, key, passphrase, age bool

	fill func(w *world)
}{
	"encrypted-local": {key: true, fill: func(w *world) { fillGolden(w); w.close() }},
	"plain-passphrase": {plain: true, passphrase: true, fill: func(w *world) {
		fillGolden(w)
		w.close()
	}},
	"two-recipients": {key: true, passphrase: true, fill: func(w *world) { fillGolden(w); w.close() }},
	"age-recipient":  {key: true, age: true, fill: func(w *world) { fillGolden(w); w.close() }},
	"crashed": {key: true, fill: func(w *world) {
		fillGolden(w)
		// Dirty: a growth that was fsynced, and nothing after it.
		h := w.opened("f-100000")
		_, err := h.Write(ctx, bytes.Repeat([]byte("grown"), 2000), 100000)
		w.do("write", err)
		w.do("fsync", h.Fsync())
		// Cut: a truncation that was not fsynced.
		_, err = w.must("sparse").SetAttr(ctx, size(3000))
		w.do("truncate", err)
		w.crash()
	}},
}

func fillGolden(w *world) {
	w.mkdir("d")
	for _, n := range []int{0, 1, 3039, 3040, 3041, 7104, 7105, 100000} {
		w.write("f-"+itoa(n), pattern(n))
	}
	long := strings.Repeat("long name ", 24)
	w.write("d/"+long, []byte("the entry of a long name"))
	w.mkdir("d/" + long + "d")
	w.write("d/"+long+"d/休みがほしい", []byte("温泉に行きたい"))
	h, err := w.create("sparse")
	w.do("create", err)
	_, err = h.Write(ctx, pattern(5000), 0)
	w.do("write", err)
	_, err = h.Write(ctx, pattern(5000), 3<<20)
	w.do("write", err)
	w.do("fsync", h.Fsync())
	w.do("close", h.Release())
	_, _, err = w.v.Symlink(ctx, w.v.Root(), "link", "d/where it leads", volume.Caller{})
	w.do("symlink", err)
	_, _, err = w.v.Link(ctx, w.must("f-3041"), w.must("d"), "hard")
	w.do("link", err)
	if err := w.must("f-1").Setxattr("user.note", []byte("a value"), 0, false); err != nil &&
		!errors.Is(err, unix.EOPNOTSUPP) {
		w.t.Fatal(err)
	}
	w.v.Settle()
}

func itoa(n int) string { return strconv.Itoa(n) }

func jsonOf(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(7*i + i/256)
	}
	return b
}

// goldenStores returns the stores of a golden volume.
func goldenStores(t *testing.T, g golden, dir string) (out []keystore.Store) {
	t.Helper()
	if g.Key != "" {
		key, err := hex.DecodeString(g.Key)
		if err != nil {
			t.Fatal(err)
		}
		s, err := local.New(key)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, s)
	}
	l, err := volume.Find(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, r := range l.Config.Recipients {
		if strings.HasPrefix(r.URI, local.PassphraseScheme) {
			s, err := local.OpenPassphrase(r.URI, r.Branch, []byte(goldenPassphrase))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, s)
		}
		if strings.HasPrefix(r.URI, agestore.Scheme) {
			out = append(out, goldenAge(t, r.URI, r.Branch))
		}
	}
	return out
}

// goldenAge opens the age recipient of golden volumes, with its identity.
func goldenAge(t *testing.T, uri string, branch []byte) keystore.Store {
	t.Helper()
	id, err := age.ParseX25519Identity(goldenIdentity)
	if err != nil {
		t.Fatal(err)
	}
	if uri == "" {
		s, err := agestore.New(id.Recipient().String())
		if err != nil {
			t.Fatal(err)
		}
		uri, branch = s.URI(), s.Branch()
	}
	s, err := agestore.Open(uri, branch, agestore.Identities{id})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestGolden(t *testing.T) {
	if *goldenMake != "" {
		makeGolden(t, *goldenMake)
		return
	}
	made, _ := filepath.Glob(filepath.Join(goldenDir, "*.tar.gz"))
	if len(made) < len(goldenKinds) {
		t.Fatalf("%d golden volumes, want %d", len(made), len(goldenKinds))
	}
	for _, path := range made {
		name := strings.TrimSuffix(filepath.Base(path), ".tar.gz")
		t.Run(name, func(t *testing.T) { readGolden(t, strings.TrimSuffix(path, ".tar.gz")) })
	}
}

// readGolden opens a golden volume: each file by itself, checked, read-only, and
// for writing, which repairs the crashed one.
func readGolden(t *testing.T, path string) {
	var g golden
	b, err := os.ReadFile(path + ".json")
	if err == nil {
		err = json.Unmarshal(b, &g)
	}
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	attrs := untar(t, path+".tar.gz", dir)
	stores := goldenStores(t, g, dir)
	for i, s := range stores {
		w := &world{t: t, dir: dir, store: s, log: &logBuffer{}, quiet: true}
		fs, d := w.fsckWith(stores)
		if worst(fs) > check.Unconfirmed || d.Files < 10 ||
			!strings.HasSuffix(path, "crashed") && len(fs) > 0 {
			t.Errorf("fsck: %+v, %+v", d, fs)
		}
		w.openWith(stores[i:i+1], volume.Options{ReadOnly: true})
		w.compare(g, attrs)
		w.close()
	}
	w := &world{t: t, dir: dir, store: stores[0], log: &logBuffer{}, quiet: true}
	w.openWith(stores, volume.Options{})
	w.compare(g, attrs)
	w.write("new", pattern(5000))
	w.want("new", pattern(5000))
	w.do("unlink", w.v.Unlink(w.v.Root(), "new"))
	w.do("wait", w.v.Wait(ctx))
	w.close()
	if fs, _ := w.fsckWith(stores); len(fs) != 0 {
		t.Errorf("fsck afterwards: %+v", fs)
	}
}

func (w *world) openWith(stores []keystore.Store, o volume.Options) {
	w.t.Helper()
	l, err := volume.Find(w.dir)
	w.do("find", err)
	u, err := l.Unlock(ctx, stores, volume.UnlockOptions{ReadOnly: o.ReadOnly})
	w.do("unlock", err)
	o.Logger = w.log.logger()
	w.v, err = u.Open(o)
	w.do("open", err)
}

func (w *world) fsckWith(stores []keystore.Store) (fs []check.Finding, d check.Counts) {
	w.t.Helper()
	l, err := volume.Find(w.dir)
	w.do("find", err)
	u, err := l.Unlock(ctx, stores, volume.UnlockOptions{ReadOnly: true})
	w.do("unlock", err)
	defer u.Close()
	d, err = check.Volume(ctx, u, check.Options{Found: func(f check.Finding) { fs = append(fs, f) }})
	w.do("fsck", err)
	return fs, d
}

func (w *world) compare(g golden, attrs bool) {
	w.t.Helper()
	got := w.manifest("", attrs)
	for name, x := range g.Files {
		if y, ok := got[name]; !ok || x.Size != y.Size || x.SHA256 != y.SHA256 ||
			x.Target != y.Target || attrs && jsonOf(x.Attrs) != jsonOf(y.Attrs) {
			w.t.Errorf("%.30s: %+v, want %+v; the log: %s", name, y, x, w.log)
		}
	}
	if len(got) != len(g.Files) {
		w.t.Errorf("%d entries, want %d", len(got), len(g.Files))
	}
}

// manifest lists what a volume holds.
func (w *world) manifest(dir string, attrs bool) map[string]goldenFile {
	w.t.Helper()
	out := map[string]goldenFile{}
	for _, name := range w.list(dir) {
		p := filepath.Join(dir, name)
		n := w.must(p)
		st, err := n.Attr()
		w.do("stat", err)
		x := goldenFile{}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			for k, v := range w.manifest(p, attrs) {
				out[k] = v
			}
		case unix.S_IFLNK:
			x.Target, err = w.v.Readlink(n)
			w.do("readlink", err)
		default:
			b, err := readNode(n)
			w.do("read "+p, err)
			sum := sha256.Sum256(b)
			x.Size, x.SHA256 = int64(len(b)), hex.EncodeToString(sum[:])
			if v, err := n.Getxattr("user.note"); err == nil && attrs {
				x.Attrs = map[string]string{"user.note": string(v)}
			}
		}
		out[p] = x
	}
	return out
}

func makeGolden(t *testing.T, name string) {
	kind, ok := goldenKinds[name]
	if !ok {
		t.Fatalf("there is no golden volume %q", name)
	}
	dir := t.TempDir()
	g := golden{Made: "0.1"}
	var stores []keystore.Store
	if kind.key {
		key := noise(32)
		g.Key = hex.EncodeToString(key)
		s, err := local.New(key)
		if err != nil {
			t.Fatal(err)
		}
		stores = append(stores, s)
	}
	if kind.passphrase {
		s, err := local.NewPassphrase([]byte(goldenPassphrase))
		if err != nil {
			t.Fatal(err)
		}
		stores = append(stores, s)
	}
	if kind.age {
		stores = append(stores, goldenAge(t, "", nil))
	}
	if _, err := volume.Init(ctx, dir, stores, blockcrypt.NewID(),
		volume.InitOptions{PlainNames: kind.plain}); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: dir, store: stores[0], log: &logBuffer{}, quiet: true}
	w.openWith(stores, volume.Options{})
	kind.fill(w)
	if err := os.MkdirAll(goldenDir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(goldenDir, name)
	makeTar(t, path+".tar.gz", dir)
	// Its content is the one that a repair finds.
	copied := t.TempDir()
	attrs := untar(t, path+".tar.gz", copied)
	w = &world{t: t, dir: copied, store: stores[0], log: &logBuffer{}, quiet: true}
	w.openWith(stores, volume.Options{})
	g.Files = w.manifest("", attrs)
	w.close()
	b, err := json.MarshalIndent(g, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".json", append(b, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

const paxAttr = "SCHILY.xattr."

func makeTar(t *testing.T, path, dir string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	z := gzip.NewWriter(f)
	tw := tar.NewWriter(z)
	links := map[uint64]string{}
	err = filepath.Walk(dir, func(p string, st os.FileInfo, err error) error {
		if err != nil || p == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		target, _ := os.Readlink(p)
		h, err := tar.FileInfoHeader(st, target)
		if err != nil {
			return err
		}
		h.Name, h.Uname, h.Gname, h.Uid, h.Gid = rel, "", "", 0, 0
		h.Format = tar.FormatPAX
		sys := unix.Stat_t{}
		if err := unix.Lstat(p, &sys); err != nil {
			return err
		}
		if first := links[sys.Ino]; first != "" && st.Mode().IsRegular() {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return tw.WriteHeader(h)
		}
		links[sys.Ino] = rel
		buf := make([]byte, 10000)
		if n, err := unix.Llistxattr(p, buf); err == nil && st.Mode().IsRegular() {
			for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
				val := make([]byte, 10000)
				if k, err := unix.Lgetxattr(p, name, val); err == nil && strings.HasPrefix(name, "user.") {
					h.PAXRecords = map[string]string{paxAttr +
						name: hex.EncodeToString(val[:k])} // a value may hold NUL
				}
			}
		}
		if err := tw.WriteHeader(h); err != nil || !st.Mode().IsRegular() {
			return err
		}
		b, err := os.ReadFile(p)
		if err == nil {
			_, err = tw.Write(b)
		}
		return err
	})
	if err := errors.Join(err, tw.Close(), z.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// untar unpacks a golden volume; attrs is false where the filesystem has no extended
// attributes.
func untar(t *testing.T, path, dir string) (attrs bool) {
	t.Helper()
	attrs = true
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(path)
	do(err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	do(err)
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return attrs
		}
		do(err)
		p := filepath.Join(dir, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			do(os.Mkdir(p, 0o755))
		case tar.TypeSymlink:
			do(os.Symlink(h.Linkname, p))
		case tar.TypeLink:
			do(os.Link(filepath.Join(dir, h.Linkname), p))
		case tar.TypeReg:
			b, err := io.ReadAll(r)
			do(err)
			do(os.WriteFile(p, b, 0o644))
			for k, v := range h.PAXRecords {
				if name, ok := strings.CutPrefix(k, paxAttr); ok {
					raw, err := hex.DecodeString(v)
					do(err)
					if err := unix.Setxattr(p, name, raw, 0); errors.Is(err, unix.EOPNOTSUPP) {
						attrs = false
					} else {
						do(err)
					}
				}
			}
		}
	}
}
