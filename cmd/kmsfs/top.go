//go:build linux && !portable

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

func topCommand() *cobra.Command {
	var every time.Duration
	var times int
	c := &cobra.Command{
		Use:   "top MOUNTPOINT",
		Short: "Show what a mounted volume does, again and again",
		Long: `Show what a mounted volume does, again and again: bytes and requests a second, how long
requests took, calls to key services and what they cost, and the files that most bytes are read from and
written to. What the kernel answers from its cache is not seen. Ctrl-C ends it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if every < 100*time.Millisecond || times < 0 {
				return usageError{errors.New("--every must be at least 100ms, --times not negative"), "kmsfs top"}
			}
			return top(contextOf(c), args[0], every, times)
		},
	}
	c.Flags().DurationVar(&every, "every", time.Second, "the `TIME` to wait between two looks")
	c.Flags().IntVar(&times, "times", 0, "end after this `NUMBER` of looks; 0: go on")
	return c
}

// top shows the difference of two looks at a mount.
func top(ctx context.Context, dir string, every time.Duration, times int) error {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	tick := time.NewTicker(every)
	defer tick.Stop()
	var last stats
	bytes := map[string]uint64{}
	if _, err := hottest(dir, bytes); err != nil {
		return err
	}
	if err := ask(dir, http.MethodGet, "stats", &last); err != nil {
		return err
	}
	at := time.Now()
	for n := 0; times == 0 || n < times; n++ {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		var now stats
		if err := ask(dir, http.MethodGet, "stats", &now); err != nil {
			return err
		}
		took := time.Since(at)
		at = time.Now()
		files, err := hottest(dir, bytes)
		if err != nil {
			return err
		}
		if term.IsTerminal(int(os.Stdout.Fd())) {
			fmt.Print("\x1b[H\x1b[2J")
		}
		fmt.Print(topText(dir, &last, &now, took), hotText(files, took))
		last = now
	}
	return nil
}

// topText is one look: what happened in the time between two.
func topText(dir string, last, now *stats, took time.Duration) string {
	var b strings.Builder
	a := took.Seconds()
	rate := func(now, before uint64) float64 { return float64(now-min(now, before)) / a }
	state := ""
	if now.Locked {
		state = "  locked"
	}
	if now.Unwell != "" {
		state += "  NOT WELL: " + now.Unwell
	}
	fmt.Fprintf(&b, "%s%s\n", dir, state)
	fmt.Fprintf(&b, "read %s/s  written %s/s  %d requests in flight\n\n",
		bytesText(rate(now.Read, last.Read)), bytesText(rate(now.Written, last.Written)), now.InFlight)
	before := map[string]requestCount{}
	for _, r := range last.Requests {
		before[r.Op] = r
	}
	var busy []requestCount // in this interval
	for _, r := range now.Requests {
		if n := r.Count - before[r.Op].Count; n > 0 {
			busy = append(busy,
				requestCount{r.Op, n, r.Seconds - before[r.Op].Seconds, r.Errors - before[r.Op].Errors})
		}
	}
	slices.SortFunc(busy,
		func(x, y requestCount) int {
			return cmp.Or(cmp.Compare(y.Seconds, x.Seconds),
				cmp.Compare(x.Op, y.Op))
		})
	fmt.Fprintf(&b, "%-16s %12s %12s %12s\n", "requests", "a second", "took", "errors/s")
	for _, r := range busy {
		mean := time.Duration(r.Seconds / float64(r.Count) * float64(time.Second))
		fmt.Fprintf(&b, "%-16s %12.1f %12v %12.1f\n", r.Op, float64(r.Count)/a,
			mean.Round(time.Microsecond), float64(r.Errors)/a)
	}
	calls := map[string]uint64{}
	for _, c := range last.Calls {
		calls[c.Op+c.Purpose+c.Verdict] = c.Count
	}
	var shown int
	total := uint64(0)
	for _, c := range now.Calls {
		n := c.Count - calls[c.Op+c.Purpose+c.Verdict]
		total += n
		if n > 0 {
			if shown++; shown == 1 {
				fmt.Fprintf(&b, "\n%-16s %12s  %-12s %s\n", "key services", "a second", "purpose",
					"verdict")
			}
			fmt.Fprintf(&b, "%-16s %12.1f  %-12s %s\n", c.Op, float64(n)/a, c.Purpose, c.Verdict)
		}
	}
	fmt.Fprintf(&b,
		"\nkeys: %d in memory, %d of %d made ahead; cost now $%.4f an hour, so far $%.4f\n",
		now.Keys.Cached, now.Keys.Pool, now.Keys.PoolTarget, float64(total)/a*3600*callPrice(0),
		costOf(now))
	return b.String()
}

// hotAnswer says which files are used most.
type hotAnswer struct {
	Bytes map[string]uint64 `json:"bytes"` // that went to and from a node
	Paths map[string]string `json:"paths"` // of the nodes that were asked for
}

// hot answers which files are used most, and what the paths of some are.
func (c *control) hot(nodes []string) hotAnswer {
	a := hotAnswer{Bytes: map[string]uint64{}, Paths: map[string]string{}}
	for node, n := range c.server.Hot() {
		a.Bytes[strconv.FormatUint(node, 10)] = n
	}
	for _, node := range nodes[:min(len(nodes), hottestFiles)] {
		id, err := strconv.ParseUint(node, 10, 64)
		if err != nil {
			continue
		}
		if n := c.v.Node(id); n != nil {
			a.Paths[node] = n.PlainPath()
		}
	}
	return a
}

// hottestFiles is how many files top shows.
const hottestFiles = 5

// hotFile is a file and how many bytes went to and from it since the last look.
type hotFile struct {
	path  string
	bytes uint64
}

// hottest returns the files that most bytes went to and from since last, which it brings up to date.
func hottest(dir string, last map[string]uint64) (out []hotFile, err error) {
	var now hotAnswer
	if err := ask(dir, http.MethodGet, "hot", &now); err != nil {
		return nil, err
	}
	var nodes []string
	grown := map[string]uint64{}
	for node, n := range now.Bytes {
		if before := last[node]; n > before {
			grown[node] = n - before
			nodes = append(nodes, node)
		}
	}
	clear(last)
	maps.Copy(last, now.Bytes)
	slices.SortFunc(nodes, func(a, b string) int { return cmp.Or(cmp.Compare(grown[b], grown[a]), cmp.Compare(a, b)) })
	if nodes = nodes[:min(len(nodes), hottestFiles)]; len(nodes) == 0 {
		return nil, nil
	}
	if err := ask(dir, http.MethodGet, "hot?node="+strings.Join(nodes, "&node="), &now); err != nil {
		return nil, err
	}
	for _, node := range nodes {
		if p, ok := now.Paths[node]; ok { // it may have gone
			out = append(out, hotFile{p, grown[node]})
		}
	}
	return out, nil
}

// hotText is the list of the hottest files.
func hotText(files []hotFile, took time.Duration) string {
	var b strings.Builder
	for i, f := range files {
		if i == 0 {
			b.WriteString("\nfiles with most bytes a second\n")
		}
		fmt.Fprintf(&b, "%12s  %s\n", bytesText(float64(f.bytes)/took.Seconds()), shown(f.path, true))
	}
	return b.String()
}

// costOf is the price of all calls so far, without further trails.
func costOf(s *stats) (dollars float64) {
	for _, c := range s.Calls {
		dollars += float64(c.Count) * callPrice(0)
	}
	return dollars
}

// bytesText is a number of bytes with its unit.
func bytesText(n float64) string {
	for _, u := range []string{"B", "KiB", "MiB"} {
		if n < 1024 {
			return fmt.Sprintf("%.1f %s", n, u)
		}
		n /= 1024
	}
	return fmt.Sprintf("%.1f GiB", n)
}
