package main

import (
	"errors"
	"fmt"
	"math"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func findCommand() *cobra.Command {
	var l listing
	var in, kinds []string
	var newer, older, larger, smaller string
	c := &cobra.Command{
		Use:   "find CIPHERDIR [PATTERN...]",
		Short: "Find files of a volume by name, type, time or size, without a mount",
		Long: `Print the plaintext paths of all entries of a volume whose name matches one of the patterns, or of all
entries. In a pattern * is any text, ? one character and [a-z] one of these; a pattern with a slash is
compared with the whole path below the volume. The volume may be a backup, or be mounted.

  kmsfs find --cipher --newer 24h cipher '*.odt'

With --cipher, a backup tool can restore just these files.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			wanted, err := newCriteria(args[1:], kinds, [4]string{newer, older, larger, smaller})
			if err != nil {
				return usageError{err, c.CommandPath()}
			}
			l.match, l.patterns, l.depth = wanted.match, wanted.patterns, -1
			l.sizes = l.long || l.asJSON || wanted.sizes
			return l.run(contextOf(c), args[0], in)
		},
	}
	l.addFlags(c)
	f := c.Flags()
	f.StringArrayVar(&in, "in", []string{"."}, "look below this plaintext `PATH` only (repeatable)")
	f.StringSliceVar(&kinds, "type", nil, "`TYPE` of the entries: f(ile), d(irectory), l (symlink) (repeatable)")
	f.StringVar(&newer, "newer", "", "modified after this `TIME`: 2026-11-30, 2026-11-30T12:00:00Z, or 24h or 30d ago")
	f.StringVar(&older, "older", "", "modified before this `TIME`")
	f.StringVar(&larger, "larger", "", "files of at least this `SIZE`, like 500, 20k, 3M or 1G")
	f.StringVar(&smaller, "smaller", "", "files of at most this `SIZE`")
	return c
}

// criteria say which entries find prints.
type criteria struct {
	patterns      []string
	kinds         map[string]bool // none: all
	after, before time.Time
	least, most   int64
	sizes         bool // least or most was given
}

// newCriteria takes the flags newer, older, larger and smaller in this order.
func newCriteria(patterns, kinds []string, flags [4]string) (c criteria, err error) {
	c = criteria{patterns: patterns, kinds: map[string]bool{}, most: math.MaxInt64}
	for _, p := range patterns {
		if _, err := path.Match(p, ""); err != nil {
			return c, fmt.Errorf("%q is no pattern: %w", p, err)
		}
	}
	for _, k := range kinds {
		kind, ok := map[string]string{"f": "file", "d": "directory", "l": "symlink"}[k[:min(1, len(k))]]
		if !ok {
			return c, fmt.Errorf("%q is no type: f, d and l are", k)
		}
		c.kinds[kind] = true
	}
	now := time.Now()
	for i, t := range []*time.Time{&c.after, &c.before} {
		if flags[i] != "" {
			if *t, err = parseTime(flags[i], now); err != nil {
				return c, err
			}
		}
	}
	for i, n := range []*int64{&c.least, &c.most} {
		if f := flags[2+i]; f != "" {
			c.sizes = true
			if *n, err = parseSize(f); err != nil {
				return c, err
			}
		}
	}
	return c, nil
}

func (c criteria) match(x listed) bool {
	return matches(c.patterns, x.Path) && (len(c.kinds) == 0 || c.kinds[x.Type]) &&
		!x.Mtime.Before(c.after) && (c.before.IsZero() || x.Mtime.Before(c.before)) &&
		(!c.sizes || x.Type == "file" && c.least <= x.Size && x.Size <= c.most)
}

// parseTime reads a date, a time, or how long ago it was.
func parseTime(s string, now time.Time) (time.Time, error) {
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04", "2006-01-02 15:04", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.Atoi(days); err == nil && n >= 0 {
			return now.AddDate(0, 0, -n), nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	return now, fmt.Errorf("%q is no time: 2026-11-30, 2026-11-30T12:00:00Z, 24h and 30d are", s)
}

// parseSize reads a number of bytes, with k, M, G or T for powers of 1,024.
func parseSize(s string) (int64, error) {
	digits, shift := s, 0
	for i, unit := range []string{"k", "m", "g", "t"} {
		if d, ok := strings.CutSuffix(strings.ToLower(s), unit); ok {
			digits, shift = d, 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err == nil && (n < 0 || n > math.MaxInt64>>shift) {
		err = errors.New("out of range")
	}
	if err != nil {
		return 0, fmt.Errorf("%q is no size: 500, 20k, 3M and 1G are", s)
	}
	return n << shift, nil
}
