package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"kmsfs/fs/volume"
	"kmsfs/fs/volume/check"
	"kmsfs/keystore"
)

type fsckFlags struct {
	keyFlags
	repair, noKeys, asJSON, yes bool

	findings []check.Finding
	repaired []check.Repaired
	total    check.Counts
	mended   bool // a check before the repair had findings other than notes
	shown    time.Time
}

func fsckCommand() *cobra.Command {
	f := &fsckFlags{}
	c := &cobra.Command{
		Use:   "fsck [--repair] [--no-keys] [--json] CIPHERDIR|FILE...",
		Short: "Check a volume, or single files, without mounting",
		Long: `Check a volume, or single ciphertext files, without mounting: the structure, every
name, every block, and one wrapped key of each file. Nothing is changed without --repair.

--repair does by itself what has one right answer: what a mount that did not end
well has left, lost places of directory IDs, leftovers. Of a file that is
damaged or was cut short it asks whether to keep what can be read as a copy
beside it. It never destroys the only copy of anything.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return f.run(contextOf(c), args)
		},
	}
	f.add(c, "check with this `KEY` (repeatable); default: what the trust record names")
	c.Flags().BoolVar(&f.repair, "repair", false, "repair what can be")
	c.Flags().BoolVar(&f.noKeys, "no-keys", false, "check only what needs no key")
	c.Flags().BoolVar(&f.asJSON, "json", false, "print the findings as JSON")
	c.Flags().BoolVar(&f.yes, "yes", false,
		"with --repair: keep what can be read of every damaged file, without asking")
	return c
}

// run checks one after the other, and reports all together.
func (f *fsckFlags) run(ctx context.Context, args []string) error {
	if f.repair && f.noKeys {
		return usageError{errors.New("--repair needs keys"), "kmsfs fsck"}
	}
	for _, path := range args {
		st, err := os.Stat(path)
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s does not exist", path)
		}
		if err != nil {
			return err
		}
		if st.IsDir() {
			err = f.volume(ctx, path)
		} else if f.repair {
			err = usageError{fmt.Errorf("%s: --repair is for volumes; kmsfs cat gives what opens of a file", path), "kmsfs fsck"}
		} else {
			err = f.file(ctx, path)
		}
		f.clearLine()
		if err != nil {
			return err
		}
	}
	return f.report()
}

// options are those of a check.
func (f *fsckFlags) options() check.Options {
	return check.Options{Found: f.found, Progress: f.progress}
}

func (f *fsckFlags) found(x check.Finding) {
	f.findings = append(f.findings, x)
	if !f.asJSON {
		f.clearLine()
		printFinding(x)
	}
}

// count adds up what was checked.
func (f *fsckFlags) count(d check.Counts) {
	t := &f.total
	t.Dirs, t.Files, t.Blocks, t.Bytes = t.Dirs+d.Dirs, t.Files+d.Files, t.Blocks+d.Blocks, t.Bytes+d.Bytes
}

// file checks a ciphertext file by itself.
func (f *fsckFlags) file(ctx context.Context, path string) error {
	l, err := volume.OpenLone(path)
	if err != nil {
		return named(path, err)
	}
	defer l.Close()
	if l.Header == nil {
		return nil
	}
	var stores []keystore.Store
	if !f.noKeys {
		if stores, err = f.loneStores(ctx, l); err != nil {
			return named(path, err)
		}
	}
	d, err := check.File(ctx, l, path, stores, f.options())
	f.count(d)
	return err
}

// volume checks a volume, and with --repair mends it and checks it again.
func (f *fsckFlags) volume(ctx context.Context, dir string) error {
	others := f.findings // a repair is about the findings of one volume
	f.findings = nil
	defer func() { f.findings = append(others, f.findings...) }()
	l, err := volume.Find(dir)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	defer l.Close()
	if err := f.besideWriter(l, dir); err != nil {
		return err
	}
	if f.noKeys {
		d, err := check.Structure(ctx, l, f.options())
		f.count(d)
		return err
	}
	err = f.check(ctx, dir)
	wrong := slices.ContainsFunc(f.findings, func(x check.Finding) bool { return x.Grade > check.Note })
	if err != nil || !f.repair || !wrong {
		return err
	}
	if err := f.mend(ctx, dir); err != nil {
		return err
	}
	// The rest.
	was := f.total
	f.findings, f.mended = nil, true
	say("checking again")
	err = f.check(ctx, dir)
	f.total = was
	return err
}

func (f *fsckFlags) unlock(ctx context.Context, dir string, readOnly bool) (*volume.Unlocked, error) {
	m := unlockFlags{keyFlags: f.keyFlags, readOnly: readOnly, acceptOlder: true}
	return m.unlock(ctx, dir)
}

// check checks a volume with its keys.
func (f *fsckFlags) check(ctx context.Context, dir string) error {
	u, err := f.unlock(ctx, dir, true)
	if err != nil {
		return err
	}
	defer u.Close()
	d, err := check.Volume(ctx, u, f.options())
	f.count(d)
	return err
}

// place names a finding's file: its ciphertext path, and the plaintext path if it is known.
func place(x check.Finding) string {
	path := shown(x.Path, true)
	if x.Name == "" {
		return path
	}
	return fmt.Sprintf("%s (%s)", path, strconv.Quote(x.Name))
}

// printFinding prints a finding for people, with its advice.
func printFinding(x check.Finding) {
	s := fmt.Sprintf("%-12s  %s: %s", x.Grade, place(x), x.Detail)
	if x.To > x.From {
		s += fmt.Sprintf("; bytes %d to %d are lost", x.From, x.To)
		if x.Grade == check.Damaged && x.Confirmed {
			s += ", which were confirmed"
		}
	}
	fmt.Println(s)
	if x.Advice != "" {
		fmt.Printf("              %s\n", x.Advice)
	}
}

// progress shows on a terminal how far the check is.
func (f *fsckFlags) progress(d *check.Counts) {
	if f.asJSON || time.Since(f.shown) < 100*time.Millisecond || !term.IsTerminal(int(os.Stderr.Fd())) {
		return
	}
	f.shown = time.Now()
	bar := ""
	if d.All && d.Expected > 0 {
		const width = 30
		n := int(min(d.Bytes, d.Expected) * width / d.Expected)
		bar = "[" + strings.Repeat("#", n) + strings.Repeat(".", width-n) + "] "
	}
	fmt.Fprintf(os.Stderr, "\r\033[K%s%d files, %d MiB", bar, d.Files, d.Bytes>>20)
}

// clearLine takes the line of progress away.
func (f *fsckFlags) clearLine() {
	if !f.shown.IsZero() {
		fmt.Fprint(os.Stderr, "\r\033[K")
		f.shown = time.Time{}
	}
}

// report says what was found in all, and picks the exit code.
func (f *fsckFlags) report() error {
	var n [check.Damaged + 1]int
	for _, x := range f.findings {
		n[x.Grade]++
	}
	if f.asJSON {
		fixed := []map[string]any{}
		for _, r := range f.repaired {
			x := map[string]any{"path": r.Path, "what": r.What, "done": r.Done}
			if r.Err != nil {
				x["error"] = r.Err.Error()
			}
			fixed = append(fixed, x)
		}
		findings := append([]check.Finding{}, f.findings...)
		slices.SortStableFunc(findings,
			func(a, b check.Finding) int { return strings.Compare(a.Path, b.Path) })
		if err := printJSON(map[string]any{"findings": findings, "repairs": fixed,
			"directories": f.total.Dirs, "files": f.total.Files, "blocks": f.total.Blocks,
			"bytes": f.total.Bytes}); err != nil {
			return err
		}
	} else {
		fmt.Printf("%d directories, %d files, %d blocks, %d KiB: ", f.total.Dirs, f.total.Files,
			f.total.Blocks, f.total.Bytes>>10)
		if len(f.findings) == 0 {
			fmt.Println("nothing is wrong")
		} else {
			fmt.Printf("%d damaged, %d unchecked, %d never confirmed, %d to be mended, %d notes\n",
				n[check.Damaged], n[check.Unchecked], n[check.Unconfirmed], n[check.Mendable],
				n[check.Note])
		}
	}
	switch {
	case n[check.Damaged] > 0:
		return quiet(exitDamaged)
	case n[check.Unchecked] > 0:
		return quiet(exitUnchecked)
	case n[check.Unconfirmed]+n[check.Mendable] > 0:
		return quiet(exitIncomplete)
	case f.mended:
		return quiet(exitRepaired)
	}
	return nil
}

// quiet is an exit code whose reason was printed.
type quiet int

func (q quiet) Error() string { return fmt.Sprint("exit code ", int(q)) }
