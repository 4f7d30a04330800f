//go:build !linux || portable

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/text/cases" // which names macOS and Windows take for the same
	"golang.org/x/text/unicode/norm"

	"kmsfs/blockcrypt"
	"kmsfs/fs/transfer"
	"kmsfs/fs/volume"
)

func exportTreeCommand() *cobra.Command {
	var x exporter
	c := &cobra.Command{
		Use:   "export CIPHERDIR DSTDIR [PATH...]",
		Short: "Copy the plaintext of a volume to a directory, without a mount",
		Long: `Copy the plaintext of a volume, or the files and directories with these plaintext PATHs in it, to a
directory: content, permissions, times of modification and symlinks. On Linux, the command copies owners, extended
attributes, hard links and special files, too. A file takes its place when it is whole; called again, the command
goes on where it was interrupted, and leaves files alone that have the same size and time. Nothing in DSTDIR is
removed.

Files that cannot be read are named, and the others are exported. Of files that were being written when they were
copied what opens is exported, and the exit code is 8.`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			paths := args[2:]
			if len(paths) == 0 {
				paths = []string{"."}
			}
			return x.run(contextOf(c), args[0], args[1], paths)
		},
	}
	x.add(c, openVolumeUsage)
	x.addIdentities(c)
	fl := c.Flags()
	fl.BoolVar(&x.acceptOlder, "accept-older", false,
		"accept a kmsfs.json that is older than the last one seen: a restored backup")
	fl.BoolVar(&x.asJSON, "json", false, "print the result as JSON")
	fl.Float64Var(&x.aws.RPS, "kms-rps", 2000, "calls a second to KMS at most")
	return c
}

// exporter is an export under way.
type exporter struct {
	unlockFlags
	asJSON bool

	s   *volume.Stored
	to  *os.Root
	ctx context.Context
	end context.CancelFunc

	mu     sync.Mutex
	counts exportCounts
	full   error             // the disk has no room
	made   map[string]string // exported paths, by their folded form; only if folds

	folds bool // the filesystem does not tell all names apart
	files chan volume.StoredEntry
	late  []volume.StoredEntry // files whose names can be temporary ones of others: after them
	dirs  []volume.StoredEntry // that get their modes and times at the end
}

// exportCounts is the result of an export.
type exportCounts struct {
	Files      int64        `json:"files"`
	Same       int64        `json:"same"`
	Dirs       int64        `json:"dirs"`
	Others     int64        `json:"others"`
	Bytes      int64        `json:"bytes"`
	Failed     int64        `json:"failed"`
	Incomplete int64        `json:"incomplete"`
	Errors     []failedFile `json:"errors"` // the first of them
}

// failedFile is a file of which something failed.
type failedFile struct {
	Path  string `json:"path"`
	Error string `json:"error"`
}

const mostErrors = 1000

func (x *exporter) run(ctx context.Context, cipherDir, dst string, paths []string) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, x.end = context.WithCancel(ctx)
	defer x.end()
	to, err := outside(dst, cipherDir)
	if err != nil {
		return err
	}
	x.readOnly = true
	u, err := x.unlock(ctx, cipherDir)
	if err != nil {
		return err
	}
	defer u.Close()
	if x.s, err = u.Stored(); err != nil {
		return err
	}
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	if x.to, err = os.OpenRoot(to); err != nil {
		return err
	}
	defer x.to.Close()
	x.folds = foldsNames(x.to)
	x.ctx, x.made, x.files, x.counts.Errors = ctx, map[string]string{}, make(chan volume.StoredEntry), []failedFile{}
	var wg sync.WaitGroup
	for range transferAtOnce {
		wg.Go(func() {
			for e := range x.files {
				x.file(e)
			}
		})
	}
	for _, p := range transfer.Apart(paths) {
		x.path(p)
	}
	close(x.files)
	wg.Wait()
	for _, e := range x.late {
		x.file(e)
	}
	for i := len(x.dirs) - 1; i >= 0; i-- {
		x.note(x.dirs[i].Path, x.attributes(x.dirs[i]), func(c *exportCounts) { c.Dirs++ })
	}
	return x.verdict()
}

// note counts an entry, or tells why it failed.
func (x *exporter) note(p string, err error, count func(*exportCounts)) {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch {
	case err == nil:
		count(&x.counts)
	case exitCode(err) == exitIncomplete:
		x.counts.Incomplete++
		count(&x.counts)
	case x.ctx.Err() != nil && errors.Is(err, context.Canceled):
		return
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		x.full = fmt.Errorf("%s: %w", p, err)
		x.end()
		return
	default:
		x.counts.Failed++
	}
	if err != nil && len(x.counts.Errors) < mostErrors {
		x.counts.Errors = append(x.counts.Errors, failedFile{p, err.Error()})
	}
}

func (x *exporter) verdict() error {
	c := x.counts
	if x.asJSON {
		if err := printJSON(c); err != nil {
			return err
		}
	} else {
		for _, f := range c.Errors {
			say("%s: %s", f.Path, f.Error)
		}
		fmt.Printf("%d files exported, %d bytes; %d were there already; %d directories, %d others, %d failed, %d incomplete.\n",
			c.Files, c.Bytes, c.Same, c.Dirs, c.Others, c.Failed, c.Incomplete)
	}
	switch {
	case x.full != nil:
		return fmt.Errorf("the export ended: %w", x.full)
	case x.ctx.Err() != nil:
		return hint(errors.New("interrupted; the files that were copied stay"), "go on with the same command")
	case c.Failed > 0:
		return hint(fmt.Errorf("%d entries were not copied", c.Failed), "see why above; kmsfs fsck tells of damage in the volume")
	case c.Incomplete > 0:
		return coded{fmt.Errorf("%d files were being written meanwhile", c.Incomplete), exitIncomplete}
	}
	return nil
}

// path exports what has a plaintext path, and makes the directories above it.
func (x *exporter) path(p string) {
	e, err := x.s.Find(p)
	if err != nil {
		x.note(p, err, nil)
		return
	}
	if e.Path != "." {
		for i, c := range e.Path {
			if c != '/' {
				continue
			}
			above, err := x.s.Find(e.Path[:i])
			if err == nil {
				err = x.may(above)
			}
			if err == nil {
				err = x.makeDir(above)
			}
			if err != nil {
				x.note(e.Path[:i], err, nil)
				return
			}
		}
	}
	x.entry(e)
}

// may says why an entry cannot be exported.
func (x *exporter) may(e volume.StoredEntry) error {
	if e.Err != nil {
		return e.Err
	}
	if err := fits(path.Base(e.Path)); err != nil {
		return err
	}
	return x.apart(e.Path)
}

func (x *exporter) entry(e volume.StoredEntry) {
	err := x.may(e)
	switch {
	case x.ctx.Err() != nil:
	case err != nil:
		x.note(e.Path, err, nil)
	case e.Mode.IsDir():
		x.dir(e)
	case e.Mode.IsRegular() && transfer.IsLate(e.Path):
		x.late = append(x.late, e)
	case e.Mode.IsRegular():
		x.files <- e
	case e.Mode&fs.ModeSymlink != 0:
		x.note(e.Path, x.link(e), func(c *exportCounts) { c.Others++ })
	default:
		x.note(e.Path, errors.New("special files are exported on Linux only"), nil)
	}
}

// fits refuses names that mean something else on Windows: a place in another directory, a stream of another
// file, or another name.
func fits(name string) error {
	if runtime.GOOS == "windows" && name != "." && (strings.ContainsAny(name, `<>:"\|?*`) ||
		strings.ContainsFunc(name, unicode.IsControl) || strings.TrimRight(name, " .") != name) {
		return errors.New("a name that Windows cannot have")
	}
	return nil
}

// apart refuses a path that the filesystem does not tell apart from another one of this export: macOS and
// Windows take upper and lower case, and macOS also the two forms of é, for the same.
func (x *exporter) apart(p string) error {
	if !x.folds {
		return nil
	}
	folded := norm.NFC.String(cases.Fold().String(norm.NFC.String(p)))
	if other, taken := x.made[folded]; taken && other != p {
		return fmt.Errorf("this filesystem does not tell it apart from %s", other)
	}
	x.made[folded] = p
	return nil
}

// foldsNames reports whether a filesystem does not tell all names apart. Where nothing can be made, which the
// next step says, it does.
func foldsNames(r *os.Root) bool {
	name := fmt.Sprintf(".kmsfs-\u00e9-%x", rand.Uint64())
	f, err := r.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return true
	}
	f.Close()
	defer r.Remove(name)
	for _, other := range []string{strings.ToUpper(name), norm.NFD.String(name)} {
		if _, err := r.Lstat(other); err == nil {
			return true
		}
	}
	return false
}

func (x *exporter) dir(e volume.StoredEntry) {
	err := x.makeDir(e)
	var entries []volume.StoredEntry
	if err == nil {
		entries, err = x.s.List(e)
	}
	if err != nil {
		x.note(e.Path, err, nil)
	}
	for _, e := range entries {
		x.entry(e)
	}
}

// makeDir makes a directory in which the caller can make entries.
func (x *exporter) makeDir(e volume.StoredEntry) error {
	at := filepath.FromSlash(e.Path)
	err := x.to.Mkdir(at, 0o700)
	if errors.Is(err, fs.ErrExist) {
		var now fs.FileInfo
		if now, err = x.to.Lstat(at); err == nil && !now.IsDir() {
			err = errors.New("another entry is in the way of this directory")
		} else if err == nil && now.Mode().Perm()&0o700 != 0o700 {
			err = x.to.Chmod(at, 0o700)
		}
	}
	if err == nil {
		x.dirs = append(x.dirs, e)
	}
	return err
}

func (x *exporter) link(e volume.StoredEntry) error {
	target, err := x.s.Readlink(e)
	if err != nil {
		return err
	}
	at := filepath.FromSlash(e.Path)
	if now, err := x.to.Lstat(at); err == nil {
		if now.IsDir() {
			return errors.New("a directory is in the way of this symlink")
		}
		if err := x.to.Remove(at); err != nil {
			return err
		}
	}
	return x.to.Symlink(target, at)
}

// file exports one file.
func (x *exporter) file(e volume.StoredEntry) {
	if x.ctx.Err() != nil {
		return
	}
	same, n, err := x.copy(e)
	x.note(e.Path, err, func(c *exportCounts) {
		if same {
			c.Same++
		} else {
			c.Files++
			c.Bytes += n
		}
	})
}

func (x *exporter) copy(e volume.StoredEntry) (same bool, n int64, err error) {
	l, err := x.s.Open(e)
	if err != nil {
		return false, 0, err
	}
	defer l.Close()
	incomplete, err := x.s.Unlock(x.ctx, l)
	if err != nil {
		return false, 0, err
	}
	if l.Header != nil {
		n = l.Size()
	}
	at := filepath.FromSlash(e.Path)
	if now, err := x.to.Lstat(at); err == nil && !incomplete && now.Mode().IsRegular() && now.Size() == n && now.ModTime().Equal(e.ModTime) {
		return true, n, nil
	}
	tmp := filepath.FromSlash(transfer.Temporary(e.Path))
	if err := x.to.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, 0, err
	}
	f, err := x.to.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return false, 0, err
	}
	out := &sparseFile{ctx: x.ctx, f: f}
	if err = l.CopyTo(out, nil); err == nil {
		err = errors.Join(f.Truncate(out.size), f.Sync())
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = x.to.Rename(tmp, at)
	}
	if err != nil {
		x.to.Remove(tmp)
		return false, 0, err
	}
	if err := x.attributes(e); err != nil {
		return false, n, err
	}
	if incomplete {
		err = coded{errors.New("it was being written when it was copied; what opens was given"), exitIncomplete}
	}
	return false, n, err
}

// sparseFile writes to a new file, and leaves out what is zeros only, until the context ends.
type sparseFile struct {
	ctx  context.Context
	f    *os.File
	size int64
}

// Write implements [io.Writer].
func (w *sparseFile) Write(b []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	if !blockcrypt.IsHole(b) {
		if _, err := w.f.WriteAt(b, w.size); err != nil {
			return 0, err
		}
	}
	w.size += int64(len(b))
	return len(b), nil
}

// attributes gives permissions and time of modification.
func (x *exporter) attributes(e volume.StoredEntry) error {
	at := filepath.FromSlash(e.Path)
	return errors.Join(x.to.Chmod(at, e.Mode.Perm()), x.to.Chtimes(at, time.Time{}, e.ModTime))
}
