package check

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// checkFile checks one ciphertext file.
func (c *checker) checkFile(ctx context.Context, j checkJob) {
	defer c.progress()
	c.files.Add(1)
	f := Finding{Path: j.cpath, Name: j.ppath}
	fd, err := c.Disk.OpenFileBelow(c.Root, j.cpath)
	if errors.Is(err, fs.ErrNotExist) {
		return // it went while this ran
	}
	if err != nil {
		f.Grade, f.What, f.Detail = Unchecked, FoundIO, err.Error()
		c.found(f)
		return
	}
	defer c.Disk.Close(fd)
	k := &fileCheck{checker: c, fd: fd, f: f, want: j.want}
	k.checkAll(ctx)
	if len(k.findings) > 0 && c.alive != nil && c.leaseToRead(ctx, fd) {
		// A host may have been writing to it: now none does.
		k = &fileCheck{checker: c, fd: fd, f: f, want: j.want}
		k.checkAll(ctx)
	}
	k.tell()
}

// tell reports the findings.
func (k *fileCheck) tell() {
	for _, f := range k.findings {
		k.checker.found(f)
	}
}

func (k *fileCheck) checkAll(ctx context.Context) {
	if err := k.check(ctx); err != nil {
		k.fail(err)
	}
}

// found notes a finding of the file.
func (k *fileCheck) found(f Finding) { k.findings = append(k.findings, f) }

// fileCheck is the check of one file.
type fileCheck struct {
	*checker
	want []blockcrypt.Recipient // that it should have, in a volume
	fd   int

	findings []Finding

	f      Finding // with the path
	length int64
	stored int64 // bytes that the disk has for it
	hdr    *blockcrypt.Header
	geo    blockcrypt.Geometry // of the header
}

// fail reports what is wrong with the whole file.
func (k *fileCheck) fail(err error) {
	f := k.f
	f.Detail = err.Error()
	switch kind := keystore.KindOf(err); {
	case blockcrypt.ClassOf(err) != "":
		f.Grade, f.What = Damaged, string(blockcrypt.ClassOf(err))
		f.Confirmed = k.hdr == nil || k.hdr.State.Floor > 0
		f.Advice = "restore it from a backup"
	case kind == keystore.Damaged:
		f.Grade, f.What, f.Confirmed = Damaged, FoundKey, true
		f.Advice = "no recipient can unwrap it: restore it from a backup"
	case kind != 0:
		f.Grade, f.What = Unchecked, FoundKey
		f.Advice = "it is checked when its key can be used: name the key with --key, or see the error"
	default:
		f.Grade, f.What = Unchecked, FoundIO
		f.Advice = "it could not be read: see the kernel's log about the disk"
	}
	k.found(f)
}

func (k *fileCheck) check(ctx context.Context) error {
	st, err := k.Disk.Info(k.fd)
	if err != nil {
		return err
	}
	k.stored = st.Stored
	if k.length = st.Size; k.length == 0 {
		return nil
	}
	hdr, _, err := layout.ReadHeader(k.Disk, k.fd, k.sizes.Most(), false)
	if u, ok := errors.AsType[layout.Unwritten](err); ok && (u.Session == 0 && len(k.bad) > 0 || k.bad[u.Session]) {
		k.unconfirmed(FoundSession, "it was made, and never written to the disk, in a session that did not end well",
			"the next mount makes it empty")
		return nil
	}
	if err != nil {
		return err
	}
	k.hdr, k.geo = hdr, hdr.Geometry
	if err := layout.CheckHeader(hdr, k.sizes, k.Config.Volume, k.Keys); err != nil {
		return err
	}
	if err := k.checkLength(); err != nil || k.isEmpty() {
		return err
	}
	if k.ring == nil {
		return k.checkPages(nil)
	}
	if !k.lone {
		k.checkRecipients()
	}
	keys, err := k.ring.Unlock(ctx, hdr)
	if err != nil {
		return err
	}
	return k.checkPages(keys)
}

func (k *fileCheck) dirty() bool {
	return k.hdr.State.Flags&(blockcrypt.Dirty|blockcrypt.Cut) != 0
}

// isEmpty reports whether only the header is there, of an empty file.
func (k *fileCheck) isEmpty() bool {
	return k.hdr.State.Size == 0 && k.length == int64(k.geo.Header())
}

// checkLength compares the length with a clean state.
func (k *fileCheck) checkLength() error {
	s := k.hdr.State
	if k.dirty() || k.isEmpty() || k.length == k.geo.Exact(s.Size) || k.length == k.geo.Whole(s.Size) {
		return nil
	}
	if k.bad[s.Session] && s.Floor < s.Size {
		return nil // its last data was not on the disk when the session ended
	}
	err := &blockcrypt.DamageError{Class: blockcrypt.BadSize, Pos: -1,
		Detail: fmt.Sprintf("the file is %d bytes long, not the %d of %d bytes of plaintext",
			k.length, k.geo.Exact(s.Size), s.Size)}
	if k.length < k.geo.Exact(s.Size) {
		f := k.f
		f.Grade, f.What, f.Detail, f.Confirmed = Damaged, string(blockcrypt.BadSize), err.Detail+
			": it was cut short", true
		f.From, f.To = k.geo.Start(k.wholeBlocks()), s.Size
		f.Advice = "restore it from a backup; fsck --repair keeps the readable part as a copy beside it"
		k.found(f)
		return nil
	}
	return err
}

// wholeBlocks returns how many blocks of a file that was cut short are there whole.
func (k *fileCheck) wholeBlocks() int64 {
	n := k.geo.Last(k.length)
	if k.length%blockcrypt.PageSize == 0 {
		n++
	}
	return max(0, n)
}

// checkRecipients compares the file's recipients with those of its directory.
func (k *fileCheck) checkRecipients() {
	in := func(uri string, list []string) bool {
		return slices.ContainsFunc(list,
			func(u string) bool { return u == uri || k.ring != nil && k.ring.Same(u, uri) })
	}
	var have, want []string
	for _, r := range k.hdr.Recipients {
		have = append(have, r.URI)
	}
	for _, r := range k.want {
		want = append(want, r.URI)
	}
	f := k.f
	f.Grade, f.What = Note, FoundRecipient
	for _, u := range want {
		if !in(u, have) {
			f.Detail, f.Advice = "the recipient "+u+
				" is missing: it is newer than the file, or could not be reached when the file was made", "kmsfs rewrap --missing gives it to the file"
			k.found(f)
		}
	}
	for _, u := range have {
		if !in(u, want) {
			f.Detail, f.Advice = "it also names the recipient "+u+
				", which kmsfs.json does not name for its directory", "kmsfs rewrap takes it out"
			k.found(f)
		}
	}
}

func (k *fileCheck) unconfirmed(what, detail, advice string) {
	f := k.f
	f.Grade, f.What, f.Detail, f.Advice = Unconfirmed, what, detail, advice
	k.found(f)
}

// checkPages looks at every block: opens it, or without keys checks what can be
// told without.
func (k *fileCheck) checkPages(keys *blockcrypt.FileKeys) error {
	s := k.hdr.State
	f := &cfile.Content{Disk: k.Disk, Geo: k.geo, FD: k.fd, Header: k.hdr, Keys: keys, Size: s.Size}
	if k.dirty() || k.bad[s.Session] && s.Floor < s.Size {
		return k.checkWritten(f)
	}
	return k.eachBlock(f, func(b int64, page []byte, size int) bool {
		if keys != nil {
			var text [blockcrypt.PageSize]byte
			return f.OpenBlock(text[:0], b, page, size) == nil
		}
		return f.IsHole(b,
			page) || blockcrypt.BlockLen(page) == size &&
			len(page) >= blockcrypt.SealedSize(size) &&
			blockcrypt.IsHole(page[blockcrypt.SealedSize(size):])
	})
}

// eachBlock calls good for every block of a clean file and reports the ranges of
// those that are not.
func (k *fileCheck) eachBlock(f *cfile.Content, good func(b int64, page []byte, size int) bool) error {
	last := k.geo.Block(f.Size - 1)
	if k.length < k.geo.Exact(f.Size) {
		last = k.wholeBlocks() - 1 // that it was cut short was said
	}
	buf := cfile.Runs.Get().(*[]byte)
	defer cfile.Runs.Put(buf)
	bad := int64(-1) // where a range of bad blocks begins
	end := func(b int64) {
		if bad < 0 {
			return
		}
		x := k.f
		x.Grade, x.What, x.From, x.To, x.Confirmed = Damaged, string(blockcrypt.BadBlock), k.geo.Start(bad), min(k.geo.Start(b), f.Size), true
		x.Detail = fmt.Sprintf("blocks %d to %d do not open", bad, b-1)
		if b == bad+1 {
			x.Detail = fmt.Sprintf("block %d does not open", bad)
		}
		x.Advice = "restore it from a backup; fsck --repair keeps the readable part as a copy beside it"
		k.found(x)
		bad = -1
	}
	for first, n := int64(0), int64(0); first <= last; first += n {
		n = min(cfile.RunPages, last-first+1)
		if at := k.geo.Start(first); at < f.Size && f.Flags()&blockcrypt.Sparse != 0 {
			hole, size, err := f.Extent(at)
			if err != nil {
				return err
			}
			blocks := k.geo.Block(at+size-1) - first + 1
			if hole { // it costs nothing
				end(first)
				n = blocks
				continue
			}
			n = min(n, blocks)
		}
		m, err := k.Disk.Pread(k.fd, (*buf)[:n*blockcrypt.PageSize], k.geo.PageOff(first))
		if err != nil {
			return err
		}
		k.bytes.Add(int64(m))
		for i := range n {
			b := first + i
			k.blocks.Add(1)
			if good(b, cfile.PageOf((*buf)[:m], int(i), k.geo.Lead(b)), f.BlockLen(b)) {
				end(b)
			} else if bad < 0 {
				bad = b
			}
		}
	}
	end(last + 1)
	return nil
}

// checkWritten looks at a file that was being written: when its session ended
// badly, or when it was copied.
func (k *fileCheck) checkWritten(f *cfile.Content) error {
	s := k.hdr.State
	k.bytes.Add(min(k.length, k.stored))
	if f.Keys == nil {
		k.sayWritten(fmt.Sprintf("it was being written; its state says that %d bytes were confirmed", s.Floor))
		return nil
	}
	r, err := f.Assess(k.length, nil)
	if err != nil {
		return err
	}
	k.blocks.Add(r.Pages)
	k.sayWritten(fmt.Sprintf("it was being written: %d bytes can be decrypted, of which %d are known to have been confirmed", r.Size, s.Floor))
	return nil
}

// sayWritten reports a file that was being written, unless it is being written now.
func (k *fileCheck) sayWritten(detail string) {
	s := k.hdr.State
	switch {
	case !k.lone && (k.alive[s.Session] || k.alive == nil && k.bad[s.Session] && k.hasWriter()): // it is being written now
	case k.bad[s.Session]:
		k.unconfirmed(FoundSession, detail, "the next mount repairs it")
	default:
		k.unconfirmed(FoundCopied, detail,
			"kmsfs cat gives what opens; a mount refuses it; fsck --repair keeps it as a copy beside it")
	}
}
