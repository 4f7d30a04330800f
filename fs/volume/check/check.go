// Package check looks for damage in a tree of ciphertext, and mends what has one right answer. It
// changes nothing unless it is told to: see [Repair].
package check

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
	"kmsfs/keystore"
)

// Grade says how much a finding matters.
type Grade int

// The grades, the least first.
const (
	Note        Grade = iota // nothing is wrong with the existing data
	Mendable                 // it has one right answer: a repair gives it, and loses nothing
	Unconfirmed              // data that was being written, and never confirmed, may be missing
	Unchecked                // it could not be looked at
	Damaged                  // data that existed once cannot be read any more
)

func (g Grade) String() string {
	return [...]string{"note", "mendable", "unconfirmed", "unchecked", "damaged"}[g]
}

// MarshalText implements [encoding.TextMarshaler].
func (g Grade) MarshalText() ([]byte, error) { return []byte(g.String()), nil }

// Finding is one thing that a check has found.
type Finding struct {
	Path      string `json:"path"`           // of the ciphertext, below the volume
	Name      string `json:"name,omitempty"` // the plaintext path, where it is known
	Grade     Grade  `json:"grade"`
	What      string `json:"what"` // the class of damage, or another word
	Detail    string `json:"detail"`
	From      int64  `json:"from,omitempty"` // [From, To) of the plaintext is lost; both 0: all, or not known
	To        int64  `json:"to,omitempty"`
	Confirmed bool   `json:"confirmed"` // they may have been confirmed
	Advice    string `json:"advice,omitempty"`
}

// What a finding can be, besides the classes of damage.
const (
	FoundDirID     = "directory-id"
	FoundOrphan    = "orphan"
	FoundLeftover  = "leftover"
	FoundRecipient = "recipient"
	FoundSession   = "session"
	FoundCopied    = "copied-while-written"
	FoundKey       = "key"
	FoundIO        = "io"
	FoundForeign   = "foreign"
	FoundLinks     = "no-symlinks"
)

// Counts counts what a check has looked at.
type Counts struct {
	Dirs, Files, Blocks, Bytes int64
	Found                      [Damaged + 1]int64 // by grade
	All                        bool               // the tree was walked to its end: Expected is final
	Expected                   int64              // bytes of ciphertext to read, without holes
}

// Repaired is what a repair did about a finding.
type Repaired struct {
	Finding
	Done string // the repair that was made, "" if none
	Err  error  // why not
}

// Options of a check.
type Options struct {
	Found    func(Finding)      // told of each finding, one at a time
	Progress func(done *Counts) // called now and then, by one goroutine at a time; it may be nil
}

// checker checks a tree of ciphertext: its structure, and with keys each name and block. It changes
// nothing.
type checker struct {
	volume.Tree
	o     Options
	ring  *keystore.Ring // nil without keys
	sizes layout.Sizes
	lone  bool            // a file without its volume
	bad   map[uint64]bool // sessions that the marker names
	alive map[uint64]bool // in a shared volume, whether the host of a session of bad has it mounted; nil in others

	jobs chan checkJob

	mu   sync.Mutex
	done Counts

	dirs, files, blocks, bytes, expected atomic.Int64
}

type checkJob struct {
	cpath, ppath string
	want         []blockcrypt.Recipient // that a file should have
}

// Structure checks the structure of a volume, which needs no key.
func Structure(ctx context.Context, l *volume.Found, o Options) (Counts, error) {
	c := &checker{Tree: l.Tree(), o: o}
	return c.run(ctx)
}

// Volume checks a volume: names, every block, and of each file one wrapped key. Its other recipients
// are compared by name.
func Volume(ctx context.Context, u *volume.Unlocked, o Options) (Counts, error) {
	c := &checker{Tree: u.Tree(), o: o}
	c.ring = keystore.NewRing(u.Config.Volume, c.Stores,
		keystore.RingOptions{Sample: keystore.SampleOfVolume(u.Config.Volume, u.Config.Recipients)})
	defer c.ring.Close()
	return c.run(ctx)
}

func (c *checker) run(ctx context.Context) (Counts, error) {
	var err error
	if c.sizes, err = c.Sizes(); err != nil {
		return Counts{}, err
	}
	if err := c.readMarker(); err != nil {
		return Counts{}, err
	}
	workers := runtime.GOMAXPROCS(0)
	if c.ring != nil && c.ring.Waits() {
		workers = 64
	}
	c.jobs = make(chan checkJob, 4*workers)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for j := range c.jobs {
				if ctx.Err() == nil {
					c.checkFile(ctx, j)
				}
			}
		})
	}
	if st, err := c.Disk.InfoAt(c.Root, layout.LockName); err == nil && (!st.Mode.IsRegular() || st.Links > 1) {
		c.found(Finding{Path: layout.LockName, Grade: Damaged, What: FoundForeign,
			Detail: "it is not a regular file with one name, so the volume cannot be mounted for writing",
			Advice: "if the volume is mounted nowhere, remove it: the next mount makes it again"})
	}
	if layout.LacksLinks(c.Disk, c.Root) {
		c.found(Finding{Path: layout.LinksName, Grade: Damaged, What: FoundLinks,
			Detail: "this copy was made without symlinks: the symlinks of the volume and its names of more than 160 bytes are missing",
			Advice: "copy the directory again with its symlinks (rsync -a, tar; rclone needs --links); fsck --repair accepts the copy as it is"})
	}
	id := c.Config.Volume
	c.walk(ctx, checkJob{want: c.Config.Recipients}, &id)
	c.mu.Lock()
	c.done.All = ctx.Err() == nil
	c.mu.Unlock()
	close(c.jobs)
	wg.Wait()
	c.progress()
	return c.snapshot(), ctx.Err()
}

func (c *checker) snapshot() Counts {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.done
	d.Dirs, d.Files, d.Blocks, d.Bytes, d.Expected = c.dirs.Load(), c.files.Load(), c.blocks.Load(), c.bytes.Load(), c.expected.Load()
	return d
}

func (c *checker) progress() {
	if c.o.Progress == nil {
		return
	}
	d := c.snapshot()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.o.Progress(&d)
}

func (c *checker) found(f Finding) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done.Found[f.Grade]++
	c.o.Found(f)
}

// readMarker learns which sessions did not end well.
func (c *checker) readMarker() error {
	c.bad = map[uint64]bool{}
	sessions, err := layout.ReadMarker(c.Disk, c.Root, c.Keys)
	if err != nil && blockcrypt.ClassOf(err) == "" {
		return err
	}
	if err != nil {
		c.found(Finding{Path: layout.MarkerName, Grade: Damaged, What: string(blockcrypt.BadMarker),
			Detail: err.Error(),
			Advice: "nothing can be mounted for writing until it is restored, or removed by hand"})
		return nil
	}
	for _, s := range sessions {
		c.bad[s] = true
	}
	if c.Config.Shared {
		return c.readHosts()
	}
	if len(sessions) > 0 && !c.hasWriter() {
		c.found(Finding{Path: layout.MarkerName, Grade: Mendable, What: FoundSession,
			Detail: fmt.Sprintf("the last mount did not end well (%d sessions)", len(sessions)),
			Advice: "the next mount repairs what it was writing"})
	}
	return nil
}

// readHosts learns which sessions of hosts go on, and which did not end well.
func (c *checker) readHosts() error {
	hosts, err := layout.FindHosts(c.Disk, c.Root, c.Keys)
	if err != nil {
		return err
	}
	c.alive = map[uint64]bool{}
	for _, h := range hosts {
		f := Finding{Path: path.Join(layout.HostsName, h.Name)}
		for _, s := range h.Sessions {
			c.bad[s] = true
			c.alive[s] = h.Alive
		}
		switch {
		case h.Err != nil:
			f.Grade, f.What, f.Detail = Damaged, string(blockcrypt.BadMarker), h.Err.Error()
			f.Advice = "files that this host was writing cannot be repaired until it is restored; without any, remove it by hand"
			c.found(f)
		case !h.Alive && len(h.Sessions) > 0:
			f.Grade, f.What = Mendable, FoundSession
			f.Detail = fmt.Sprintf("the host %q did not unmount the volume well", h.Host.Host)
			f.Advice = "a mount, of any host, repairs what it was writing"
			c.found(f)
		}
	}
	return nil
}

// walk checks a directory and all below it. id is nil where its ID must be read.
func (c *checker) walk(ctx context.Context, in checkJob, id *blockcrypt.ID) {
	cpath, ppath, want := in.cpath, in.ppath, in.want
	if ctx.Err() != nil {
		return
	}
	c.dirs.Add(1)
	c.progress()
	fd, err := c.Disk.OpenDir(c.Root, cpath)
	if err != nil {
		c.found(Finding{Path: cpath, Name: ppath, Grade: Unchecked, What: FoundIO, Detail: err.Error()})
		return
	}
	var entries []disk.Dirent
	if err := c.Disk.Scan(fd,
		func(e disk.Dirent) error { entries = append(entries, e); return nil }); err != nil {
		c.found(Finding{Path: cpath, Name: ppath, Grade: Unchecked, What: FoundIO, Detail: err.Error()})
	}
	plain := c.Config.Names == blockcrypt.NamesPlain
	if id == nil && !plain {
		id = c.dirID(fd, cpath, ppath, entries)
	}
	if id != nil {
		if keys := c.Config.Directories[*id]; len(keys.Recipients) > 0 {
			want = keys.Recipients
		}
	}
	d := directory{fd: fd, cpath: cpath, ppath: ppath, id: id, names: make(map[string]bool, len(entries))}
	for _, e := range entries {
		d.names[e.Name] = true
	}
	var subdirs []checkJob
	for _, e := range entries {
		name, show := c.entryName(d, e)
		if !show {
			continue
		}
		j := checkJob{path.Join(cpath, e.Name), name, want}
		c.checkAttrs(fd, e, j)
		switch c.Disk.TypeOf(fd, e) {
		case disk.TypeDir:
			subdirs = append(subdirs, j)
		case disk.TypeFile:
			if st, err := c.Disk.InfoAt(fd, e.Name); err == nil {
				c.expected.Add(min(st.Size, st.Stored))
			}
			c.jobs <- j
		case disk.TypeLink:
			c.checkTarget(fd, e, j)
		}
	}
	c.Disk.Close(fd)
	for _, j := range subdirs {
		c.walk(ctx, j, nil)
	}
}

// dirID returns a directory's ID, nil if none is known. One that is in doubt is tried: names tell
// whether it is right.
func (c *checker) dirID(fd int, cpath, ppath string, entries []disk.Dirent) *blockcrypt.ID {
	x := layout.DirIDOf(c.Disk, fd, entries)
	id, ok, lost, err := x.Resolve()
	f := Finding{Path: cpath, Name: ppath, What: FoundDirID}
	switch {
	case err != nil:
		f.Grade, f.Detail, f.Advice = Damaged, err.Error(), "fsck --repair tries those that the files in it remember; or restore kmsfs.dir from a backup"
	case lost:
		f.Grade, f.Detail, f.Advice = Mendable, "one of the two places of the directory's ID is lost", "a mount, or fsck --repair, makes it again"
	}
	if f.Detail != "" {
		c.found(f)
	}
	switch {
	case ok:
		return &id
	case len(x.IDs) == 1: // the other place is malformed; the names tell whether this one is right
		return &x.IDs[0]
	}
	return nil
}

// directory is one that is being checked.
type directory struct {
	fd           int
	cpath, ppath string         // paths below the volume, of ciphertext and of plaintext
	id           *blockcrypt.ID // nil: not known
	names        map[string]bool
}

// entryName returns the plaintext path of an entry; show is false for entries that are
// kmsfs' own, which is checked here.
func (c *checker) entryName(d directory, e disk.Dirent) (name string, show bool) {
	plain := c.Config.Names == blockcrypt.NamesPlain
	f := Finding{Path: path.Join(d.cpath, e.Name)}
	encoded := e.Name
	entry, isName := layout.EntryOf(e.Name)
	switch {
	case plain && (d.cpath != "" || !layout.IsOwn(e.Name)):
		return under(d.cpath, d.ppath, e.Name), true
	case layout.IsSilly(e.Name):
		return "", false
	case !layout.IsOwn(e.Name):
	case strings.HasPrefix(e.Name, blockcrypt.LongPrefix) && !plain:
		var err error
		if encoded, err = layout.EncodedName(c.Disk, d.fd, e.Name); err != nil {
			f.Grade, f.What, f.Advice = Damaged, string(blockcrypt.BadName), "its content can be read: kmsfs cat"
			if f.Detail = layout.ErrNameAltered.Error(); errors.Is(err, layout.ErrNameLost) {
				f.Detail = layout.ErrNameLost.Error()
				f.Advice += "; or restore " + blockcrypt.LongName +
					strings.TrimPrefix(e.Name, blockcrypt.LongPrefix) + " from a backup"
			}
			c.found(f)
			return "", true
		}
	case layout.IsDirID(e.Name) && !plain, d.cpath == "" && slices.Contains(layout.RootNames, e.Name):
		return "", false
	case d.cpath == "" && strings.HasPrefix(e.Name, layout.RekeyPrefix) && c.hasWriter():
		return "", false // of a kmsfs rekey that is under way, perhaps
	case d.cpath == "" && (e.Name == blockcrypt.ConfigName+".new" || e.Name == layout.MarkerName+".new" ||
		strings.HasPrefix(e.Name, layout.RekeyPrefix)):
		f.Grade, f.What, f.Detail, f.Advice = Mendable, FoundLeftover, "left behind by an interrupted replacement", "fsck --repair removes it"
		c.found(f)
		return "", false
	case isName && !plain:
		if !d.names[entry] {
			f.Grade, f.What, f.Detail, f.Advice = Mendable, FoundOrphan, "the name of a long entry that is not there", "fsck --repair removes it"
			c.found(f)
		}
		return "", false
	default:
		f.Grade, f.What, f.Detail = Note, FoundForeign, "not made by kmsfs"
		c.found(f)
		return "", false
	}
	if c.Keys == nil || d.id == nil {
		if raw, err := base64.RawURLEncoding.DecodeString(encoded); err != nil || len(raw) < 32 ||
			len(raw)%16 != 0 {
			f.Grade, f.What, f.Detail, f.Advice = Damaged, string(blockcrypt.BadName), "no encoded name looks like this", "a mount does not show it"
			c.found(f)
		}
		return "", true
	}
	p, err := c.Keys.DecodeName(*d.id, encoded)
	if err != nil {
		f.Grade, f.What, f.Detail, f.Advice = Damaged, string(blockcrypt.BadName), "the name does not decode: it was altered, or moved here from another directory", "a mount does not show it; its content can be read: kmsfs cat"
		c.found(f)
		return "", true
	}
	return under(d.cpath, d.ppath, p), true
}

// under returns the plaintext path of an entry of a directory, "" where the directory's is not
// known.
func under(cpath, ppath, name string) string {
	if cpath != "" && ppath == "" {
		return ""
	}
	return path.Join(ppath, name)
}

// checkTarget opens a symlink's target.
func (c *checker) checkTarget(fd int, e disk.Dirent, j checkJob) {
	if c.Keys == nil {
		return
	}
	t, err := c.Disk.Readlink(fd, e.Name)
	if err == nil {
		_, err = c.Keys.OpenTarget(t)
	}
	if err != nil {
		c.found(Finding{Path: j.cpath, Name: j.ppath, Grade: Damaged,
			What: string(blockcrypt.BadValue), Detail: "the symlink's target cannot be read",
			Advice: "make it again, or restore it from a backup"})
	}
}

// File checks one ciphertext file by itself, wherever it lies; without stores only its structure
// is. l must have a header. The origin cannot be checked without the volume.
func File(ctx context.Context, l *volume.Lone, name string, stores []keystore.Store,
	o Options) (Counts, error) {
	c := &checker{o: o, sizes: layout.Sizes{New: l.Header.Geometry}, lone: true, bad: map[uint64]bool{}}
	var fd int
	c.Disk, fd = l.Ciphertext()
	c.Config = &blockcrypt.Config{Volume: l.Header.Volume, Header: l.Header.Geometry.Header()}
	if len(stores) > 0 {
		c.ring = keystore.NewRing(l.Header.Volume, stores, keystore.RingOptions{})
		defer c.ring.Close()
	}
	c.files.Add(1)
	k := &fileCheck{checker: c, fd: fd, f: Finding{Path: name}}
	k.checkAll(ctx)
	k.tell()
	c.done.All = true
	return c.snapshot(), ctx.Err()
}
