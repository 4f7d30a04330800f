package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"kmsfs/fs/volume"
)

// listing prints entries of a volume that is not mounted.
type listing struct {
	unlockFlags
	long, cipher, asJSON, zero bool

	s        *volume.Stored
	match    func(listed) bool // nil: all
	patterns []string          // of names, that match looks at
	depth    int               // of directories below those that were named, -1: all
	sizes    bool              // of files are wanted
	wrong    int               // entries that cannot be read
	screen   bool              // stdout is a terminal
}

// listed is an entry with the fields that are printed, also as JSON.
type listed struct {
	Path   string    `json:"path"`               // below the volume
	Raw    []byte    `json:"path_raw,omitempty"` // in base64, of a path that is not UTF-8
	Type   string    `json:"type"`               // file, directory, symlink or other
	Size   int64     `json:"size"`               // of the plaintext, in bytes; -1 if it was not asked for
	Mode   string    `json:"mode"`
	Mtime  time.Time `json:"mtime"`
	Cipher string    `json:"cipher_path"` // below the ciphertext directory
	Target string    `json:"target,omitempty"`
	Error  string    `json:"error,omitempty"`

	e volume.StoredEntry
}

func lsCommand() *cobra.Command {
	var l listing
	var recursive bool
	c := &cobra.Command{
		Use:   "ls CIPHERDIR [PATH...]",
		Short: "List a volume, without a mount",
		Long: `List the directories with these plaintext PATHs in a volume, or its root, without a mount. Names that
begin with a dot are listed, too. The volume may be a backup, or be mounted.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if l.depth = 0; recursive {
				l.depth = -1
			}
			l.sizes = l.long || l.asJSON
			paths := args[1:]
			if len(paths) == 0 {
				paths = []string{"."}
			}
			return l.run(contextOf(c), args[0], paths)
		},
	}
	l.addFlags(c)
	c.Flags().BoolVarP(&recursive, "recursive", "R", false, "list what is below the directories, too")
	return c
}

// addFlags adds the flags that ls and find have.
func (l *listing) addFlags(c *cobra.Command) {
	l.add(c, openVolumeUsage)
	l.addIdentities(c)
	f := c.Flags()
	f.BoolVarP(&l.long, "long", "l", false, "print mode, size and time of modification, too")
	f.BoolVar(&l.cipher, "cipher", false, "print the ciphertext path after each path")
	f.BoolVar(&l.asJSON, "json", false, "print a line of JSON for each entry")
	f.BoolVarP(&l.zero, "print0", "0", false, "end each entry with a zero byte instead of a newline")
}

func (l *listing) run(ctx context.Context, dir string, paths []string) error {
	l.readOnly, l.acceptOlder = true, true
	l.screen = term.IsTerminal(int(os.Stdout.Fd()))
	u, err := l.unlock(ctx, dir)
	if err != nil {
		return err
	}
	defer u.Close()
	if l.s, err = u.Stored(); err != nil {
		return err
	}
	for _, p := range paths {
		e, err := l.s.Find(p)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s: there is no such file or directory in the volume", p)
		}
		if err != nil {
			return err
		}
		if !e.Mode.IsDir() {
			err = l.print(ctx, []volume.StoredEntry{e})
		} else {
			err = l.below(ctx, e, l.depth)
		}
		if err != nil {
			return err
		}
	}
	if l.wrong > 0 {
		return coded{hint(fmt.Errorf("%d entries cannot be read", l.wrong), "kmsfs fsck tells what is damaged"), exitDamaged}
	}
	return nil
}

// below lists a directory, and those in it down to a depth.
func (l *listing) below(ctx context.Context, dir volume.StoredEntry, depth int) error {
	entries, err := l.s.List(dir)
	if err != nil {
		l.fault(dir.Path, err)
		return ctx.Err()
	}
	if err := l.print(ctx, entries); err != nil {
		return err
	}
	for _, e := range entries {
		if e.Mode.IsDir() && e.Err == nil && depth != 0 {
			if err := l.below(ctx, e, depth-1); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

func (l *listing) fault(p string, err error) {
	l.wrong++
	say("%s: %v", shown(p, true), err)
}

// print prints the entries that match.
func (l *listing) print(ctx context.Context, entries []volume.StoredEntry) error {
	out := make([]listed, len(entries))
	var wg sync.WaitGroup
	turn := make(chan struct{}, transferAtOnce)
	for i, e := range entries {
		if ctx.Err() != nil {
			break
		}
		out[i] = listed{Path: e.Path, Type: typeOf(e.Mode), Size: -1, Mode: e.Mode.String(), Mtime: e.ModTime, Cipher: e.Cipher, e: e}
		if e.Err != nil || !l.sizes || e.Mode.IsDir() {
			continue
		}
		turn <- struct{}{}
		wg.Go(func() {
			defer func() { <-turn }()
			l.fill(&out[i])
		})
	}
	wg.Wait()
	for _, x := range out {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case x.e.Err != nil:
			l.fault(x.Path, x.e.Err)
			if l.match != nil && !matches(l.patterns, x.Path) {
				continue
			}
		case l.match != nil && !l.match(x):
			continue
		}
		if err := l.line(x); err != nil {
			return err
		}
	}
	return nil
}

// fill finds out the size of a file and the target of a symlink.
func (l *listing) fill(x *listed) {
	var err error
	switch {
	case x.e.Mode.IsRegular():
		x.Size, err = l.size(x.e)
	case x.e.Mode&fs.ModeSymlink != 0:
		x.Target, err = l.s.Readlink(x.e)
	}
	x.e.Err = err
}

func (l *listing) size(e volume.StoredEntry) (int64, error) {
	f, err := l.s.Open(e)
	if err != nil {
		return -1, err
	}
	defer f.Close()
	if f.Header == nil {
		return 0, nil
	}
	return f.PlainSize()
}

func typeOf(m fs.FileMode) string {
	switch {
	case m.IsRegular():
		return "file"
	case m.IsDir():
		return "directory"
	case m&fs.ModeSymlink != 0:
		return "symlink"
	}
	return "other"
}

// line prints one entry.
func (l *listing) line(x listed) error {
	if l.asJSON {
		if x.e.Err != nil {
			x.Error = x.e.Err.Error()
		}
		if !utf8.ValidString(x.Path) {
			x.Raw = []byte(x.Path)
		}
		b, err := json.Marshal(x)
		if err == nil {
			_, err = fmt.Printf("%s\n", b)
		}
		return err
	}
	if x.e.Err != nil {
		return nil // it was told
	}
	text := shown(x.Path, l.screen)
	if l.long {
		size := "-"
		if x.Size >= 0 {
			size = fmt.Sprint(x.Size)
		}
		text = fmt.Sprintf("%s %12s %s %s", x.Mode, size, x.Mtime.Format("2006-01-02 15:04"), text)
		if x.Target != "" {
			text += " -> " + shown(x.Target, l.screen)
		}
	}
	if l.cipher {
		text += "\t" + shown(x.Cipher, l.screen)
	}
	end := "\n"
	if l.zero {
		end = "\x00"
	}
	_, err := fmt.Print(text, end)
	return err
}

// shown is a name for a terminal: control characters, which could change what is on it, are question
// marks.
func shown(name string, screen bool) string {
	if !screen {
		return name
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, name)
}

// matches reports whether a name, or for a pattern with a slash the path, matches one of the patterns.
func matches(patterns []string, p string) bool {
	for _, pattern := range patterns {
		name := path.Base(p)
		if strings.Contains(pattern, "/") {
			// In a path * is any text, too: to path.Match a slash is what * does not stand for.
			name, pattern = strings.ReplaceAll(p, "/", "\x00"), strings.ReplaceAll(pattern, "/", "\x00")
		}
		if ok, _ := path.Match(pattern, name); ok { // a bad pattern was refused before
			return true
		}
	}
	return len(patterns) == 0
}
