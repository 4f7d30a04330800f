//go:build linux && !portable

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"kmsfs/fs"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

// A mounted volume is asked and told over a Unix socket, never through the
// mounted path: HTTP, mode 0600, named by the mount's device number. So a command reaches the
// mount that it sees itself: the same path can be another mount in another mount namespace.

// control serves the socket of a mount.
type control struct {
	v      *volume.Volume
	server *fs.Server
	meter  *keystore.Meter
	reload func(context.Context) error
	keys   *keyFlags // by which the volume was mounted
	log    *slog.Logger
	since  time.Time

	cancel context.CancelFunc // of requests that are being answered
	path   string
	socket unix.Stat_t
	srv    *http.Server
}

// socketPath returns where the socket of a mount is.
func socketPath(dev string) (string, error) {
	dir := ""
	switch x := os.Getenv("XDG_RUNTIME_DIR"); {
	case os.Geteuid() == 0: // also where sudo has left another user's environment, or a boot none
		dir = "/run/kmsfs"
	case x != "":
		dir = filepath.Join(x, "kmsfs")
	default:
		state, err := statePath()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(state, "run")
	}
	return filepath.Join(dir, perMount(dev)), nil
}

// viaFD calls f with a name of the socket that is short enough for its address,
// whatever its directory is called.
func viaFD(path string, f func(name string) error) error {
	d, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(d)
	var st unix.Stat_t
	if err := unix.Fstat(d, &st); err != nil {
		return err
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s is not this user's alone", filepath.Dir(path))
	}
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", d, filepath.Base(path)))
}

// start serves until stop.
func (c *control) start(dev string) (err error) {
	if c.path, err = socketPath(dev); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(c.path), 0o700); err != nil {
		return err
	}
	if err := os.Remove(c.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var l net.Listener
	if err := viaFD(c.path, func(name string) error {
		if l, err = net.Listen("unix", name); err == nil {
			l.(*net.UnixListener).SetUnlinkOnClose(false) // by that name it could not
			err = os.Chmod(name, 0o600)
		}
		if err == nil {
			err = unix.Lstat(name, &c.socket)
		}
		return err
	}); err != nil {
		return err
	}
	c.since = time.Now()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /stats",
		func(w http.ResponseWriter, _ *http.Request) { json.NewEncoder(w).Encode(c.stats()) })
	mux.HandleFunc("GET /hot", func(w http.ResponseWriter, r *http.Request) {
		json.NewEncoder(w).Encode(c.hot(r.URL.Query()["node"]))
	})
	mux.HandleFunc("POST /lock", func(w http.ResponseWriter, _ *http.Request) {
		if err := c.v.Suspend(); err != nil {
			first, _, _ := strings.Cut(err.Error(), "\n")
			http.Error(w,
				fmt.Sprintf("it is locked, but what programs had written is not all on the disk: %s; the log names the files", first), http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("POST /unlock", func(http.ResponseWriter, *http.Request) { c.v.Resume() })
	mux.HandleFunc("POST /reload", func(w http.ResponseWriter, r *http.Request) {
		if err := c.reloadNow(r.Context()); err != nil {
			http.Error(w, fmt.Sprintf("the old credentials stay: %v", err), http.StatusInternalServerError)
		}
	})
	c.serveChanges(mux)
	watched := c.monitoring()
	mux.Handle("GET /metrics", watched)
	mux.Handle("GET /healthz", watched)
	profiles(mux)
	base, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	c.srv = &http.Server{BaseContext: func(net.Listener) context.Context { return base },
		Handler: mux, ReadHeaderTimeout: 5 * time.Second,
		ErrorLog: slog.NewLogLogger(c.log.Handler(), slog.LevelWarn)}
	go c.srv.Serve(l)
	return nil
}

// reloadNow loads credentials and configuration again. If that fails the old ones stay.
func (c *control) reloadNow(ctx context.Context) error {
	if err := c.reload(ctx); err != nil {
		c.log.Error("credentials and configuration could not be loaded again; the old ones stay",
			"error", err, "hint", hintOf(err))
		return err
	}
	c.v.RetryKeys()
	c.log.Info("credentials and configuration were loaded again")
	return nil
}

// stop ends what is being answered, and removes the socket, unless it is the next mount's.
func (c *control) stop() {
	if c.srv == nil {
		return
	}
	c.cancel() // a rewrap ends after the files that it is at
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := c.srv.Shutdown(ctx); err != nil {
		c.log.Error("a request to the daemon does not end", "error", err)
	}
	var now unix.Stat_t
	if unix.Lstat(c.path, &now) == nil && now.Ino == c.socket.Ino &&
		now.Dev == c.socket.Dev { // or it is the next mount's
		os.Remove(c.path)
	}
}

// ask sends a request to the daemon of a mount, and decodes its answer into out
// unless that is nil.
func ask(dir, method, what string, out any) error {
	m, err := mountAt(dir)
	if err != nil {
		return err
	}
	err = askMount(context.Background(), m.dev, method, what, out)
	switch {
	case !errors.Is(err, errNoAnswer):
		return err
	case m.isDead():
		return hint(fmt.Errorf("the daemon of the mount at %s has died", m.dir),
			"kmsfs umount %s, and mount it again", m.dir)
	}
	return hint(fmt.Errorf("the daemon of the mount at %s does not answer here", dir),
		"ask as the user who mounted it, with the same runtime directory (not from another container)")
}

var errNoAnswer = errors.New("the daemon does not answer")

// askMount is ask of the mount with a device number.
func askMount(ctx context.Context, dev, method, what string, out any) error {
	return converse(ctx, dev, question{method: method, path: what}, func(r io.Reader) error {
		b, err := io.ReadAll(r)
		if err == nil && out != nil {
			err = json.Unmarshal(b, out)
		}
		return err
	})
}

// question is a request to the daemon of a mount.
type question struct {
	method, path string
	body         io.Reader // nil: none
}

// converse sends a question to the daemon of a mount, and reads its answer with read.
func converse(ctx context.Context, dev string, q question, read func(io.Reader) error) error {
	path, err := socketPath(dev)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (c net.Conn, err error) {
		verr := viaFD(path, func(name string) error {
			c, err = net.Dial("unix", name)
			return err
		})
		return c, errors.Join(verr, err)
	}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, q.method, "http://kmsfs/"+q.path, q.body)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return errNoAnswer
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		return fmt.Errorf("the daemon answered: %s", bytes.TrimSpace(b))
	}
	return read(resp.Body)
}

// controlCommands are those that ask the daemon of a mount, and take no other flags.
func controlCommands() []*cobra.Command {
	simple := func(use, short, long, what, done string) *cobra.Command {
		return &cobra.Command{Use: use + " MOUNTPOINT", Short: short, Long: long, Args: cobra.ExactArgs(1), RunE: func(_ *cobra.Command, args []string) error {
			if err := ask(args[0], http.MethodPost, what, nil); err != nil {
				return err
			}
			fmt.Printf(done+"\n", args[0])
			return nil
		}}
	}
	return []*cobra.Command{
		simple("lock", "Wipe the keys of a mounted volume",
			`Wipe the keys of a mounted volume. What programs have written is written to the
disk first, and the kernel forgets what it knows of the files. Until kmsfs
unlock all files and names in the mount answer "Key has expired", and nothing waits.`, "lock", "%s is locked."),
		simple("unlock", "Let a locked volume be used again",
			"Let a locked volume be used again: keys are asked for as they are needed.", "unlock",
			"%s is unlocked."),
		simple("reload", "Load AWS credentials and configuration again",
			`Load AWS credentials and configuration again, as SIGHUP does. If there are none
that can be used, the command fails and the mount keeps the old ones. If AWS
refuses the credentials, the daemon loads them again by itself.`, "reload", "%s has loaded its credentials again."),
		statsCommand(),
	}
}

// stats is the answer of kmsfs stats. Its JSON is for programs: a field's name stays.
type stats struct {
	Hours      float64        `json:"hours"` // since the volume was mounted
	Locked     bool           `json:"locked"`
	ReadOnly   bool           `json:"read_only"` // the daemon has the volume open so, whatever the kernel allows
	Calls      []callCount    `json:"calls"`
	P50        float64        `json:"p50_ms"` // of the calls' durations
	P90        float64        `json:"p90_ms"`
	P99        float64        `json:"p99_ms"`
	Keys       keyCounts      `json:"keys"`
	Recipients []recipient    `json:"recipients"`
	Requests   []requestCount `json:"requests"`
	InFlight   int            `json:"requests_in_flight"`
	Read       uint64         `json:"read_bytes"` // of files, by the kernel
	Written    uint64         `json:"written_bytes"`
	Unwell     string         `json:"unwell,omitempty"` // why the volume is not well
	Cost       float64        `json:"cost_dollars"`
	Monthly    float64        `json:"cost_dollars_a_month"`
}

// callCount is how often one kind of call to a key service was made.
type callCount struct {
	Op      string `json:"op"` // the service's name of the operation
	Purpose string `json:"purpose"`
	Verdict string `json:"verdict"` // "ok", or the kind of failure
	Count   uint64 `json:"count"`
}

// requestCount is how often one kind of request was made.
type requestCount struct {
	Op      string  `json:"op"`
	Count   uint64  `json:"count"`
	Seconds float64 `json:"seconds"` // that all took together
	Errors  uint64  `json:"errors"`
}

// keyCounts are the data keys of a mount.
type keyCounts struct {
	Hits         uint64 `json:"hits"` // answers from memory
	Misses       uint64 `json:"misses"`
	Prefetched   uint64 `json:"prefetched"`
	PrefetchUsed uint64 `json:"prefetch_used"`
	Made         uint64 `json:"made"`
	Wasted       uint64 `json:"wasted"` // made for nothing
	Cached       int    `json:"cached"`
	Pool         int    `json:"pool"` // made ahead, and not used yet
	PoolTarget   int    `json:"pool_target"`
}

type recipient struct {
	URI    string  `json:"uri"`
	Proven float64 `json:"proven_seconds_ago"`
	Error  string  `json:"error,omitempty"`
}

// stats are the figures of this mount so far.
func (c *control) stats() stats {
	ms := func(q float64) float64 { return float64(c.meter.Quantile(q)) / float64(time.Millisecond) }
	s := stats{Hours: time.Since(c.since).Hours(), Locked: c.v.Suspended() != nil, ReadOnly: c.v.ReadOnly(), P50: ms(0.5),
		P90: ms(0.9), P99: ms(0.99), Keys: keyCounts(c.v.KeyCounts()), Calls: []callCount{},
		Recipients: []recipient{}, Requests: []requestCount{}}
	m := c.server.Metrics()
	s.InFlight, s.Read, s.Written = m.InFlight, m.Read, m.Written
	for _, r := range m.Requests {
		x := requestCount{Op: r.Op, Count: r.Count, Seconds: r.Took.Seconds()}
		for _, n := range r.Errnos {
			x.Errors += n
		}
		s.Requests = append(s.Requests, x)
	}
	if err := c.v.Vitals().Err; err != nil {
		s.Unwell = err.Error()
	}
	for _, x := range c.meter.Calls() {
		s.Calls = append(s.Calls, callCount(x))
	}
	for _, r := range c.v.KeyStates() {
		x := recipient{URI: r.URI, Proven: r.Proven.Seconds()}
		if r.Error != nil {
			x.Error = r.Error.Error()
		}
		s.Recipients = append(s.Recipients, x)
	}
	return s
}

// Prices in dollars (AWS KMS and CloudTrail, all Regions but a few).
const (
	perCall  = 0.03 / 10000
	perEvent = 2.0 / 100000 // of each trail but the first
	month    = 730.0        // hours
)

// callPrice is what a call costs that so many trails beside the free one record.
func callPrice(trails uint) float64 { return perCall + float64(trails)*perEvent }

func statsCommand() *cobra.Command {
	var asJSON, prom bool
	var trails uint
	c := &cobra.Command{
		Use:   "stats MOUNTPOINT",
		Short: "Tell what a mounted volume has asked key services, and what that costs",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if prom {
				return printMetrics(args[0])
			}
			var s stats
			if err := ask(args[0], http.MethodGet, "stats", &s); err != nil {
				return err
			}
			s.price(trails)
			if asJSON {
				enc := json.NewEncoder(os.Stdout)
				enc.SetIndent("", "  ")
				return enc.Encode(s)
			}
			s.print()
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	c.Flags().BoolVar(&prom, "prometheus", false, "all metrics, in the text format of Prometheus")
	trailsFlag(c, &trails)
	return c
}

// printMetrics prints what --metrics-addr serves.
func printMetrics(dir string) error {
	m, err := mountAt(dir)
	if err != nil {
		return err
	}
	return converse(context.Background(), m.dev, question{method: http.MethodGet, path: "metrics"}, func(r io.Reader) error {
		_, err := io.Copy(os.Stdout, r)
		return err
	})
}

func trailsFlag(c *cobra.Command, trails *uint) {
	c.Flags().UintVar(trails, "trails", 0,
		"how many CloudTrail `TRAILS` beside the free one record these calls")
}

// price puts the dollars in. What the first hour has cost may not be what the next
// ones do: it counts as a whole one.
func (s *stats) price(trails uint) {
	for _, c := range s.Calls {
		s.Cost += float64(c.Count) * callPrice(trails)
	}
	s.Monthly = s.Cost / max(s.Hours, 1) * month
}

func (s *stats) print() {
	total := uint64(0)
	fmt.Printf("calls to key services, since %s\n",
		(time.Duration(s.Hours * float64(time.Hour))).Round(time.Second))
	for _, c := range s.Calls {
		total += c.Count
		fmt.Printf("  %-16s %-9s %-12s %8d\n", c.Op, c.Purpose, c.Verdict, c.Count)
	}
	if total > 0 {
		fmt.Printf("  latency          50%% %.1f ms, 90%% %.1f ms, 99%% %.1f ms\n", s.P50, s.P90, s.P99)
	}
	k := s.Keys
	fmt.Printf("keys known        %d (%d answers from memory, %d asked for)\n", k.Cached, k.Hits, k.Misses)
	fmt.Printf("keys made ahead   %d of %d (%d made, %d for nothing)\n", k.Pool, k.PoolTarget,
		k.Made, k.Wasted)
	fmt.Printf("keys prefetched   %d (%d used)\n", k.Prefetched, k.PrefetchUsed)
	for _, r := range s.Recipients {
		state := fmt.Sprintf("proven %s ago",
			(time.Duration(r.Proven * float64(time.Second))).Round(time.Second))
		switch {
		case r.Error != "":
			state = r.Error
		case r.Proven == 0:
			state = "local"
		}
		fmt.Printf("recipient         %s: %s\n", r.URI, state)
	}
	fmt.Printf("cost so far       $%.4f, at this rate $%.2f a month\n", s.Cost, s.Monthly)
	if s.Locked {
		fmt.Println("The volume is locked.")
	}
}

// estimate says what a new volume under KMS keys will cost.
func estimate(ms []made, trails uint, branches time.Duration) string {
	n := 0.0 // calls for each file
	for _, m := range ms {
		if strings.HasPrefix(m.store.URI(), "aws-kms:") {
			n++
		}
	}
	if n == 0 {
		return ""
	}
	const files, idle = 100000, month * 60 / 2.5 * 1.1 // one proof in 2.5 minutes, with jitter
	where, further := "", fmt.Sprintf("; each CloudTrail trail but the first adds $%.2f and $%.2f",
		n*files*perEvent, n*idle*perEvent)
	if trails > 0 {
		where, further = fmt.Sprintf(" where CloudTrail trails record each call, %d beside the free one", trails), ""
	}
	if branches > 0 {
		return fmt.Sprintf("Cost%s: one call for up to 65,536 new files in %v, and again when they are first read, and at most $%.2f a month for each mount. The keys themselves are $1 a month each.",
			where, branches, n*idle*callPrice(trails))
	}
	return fmt.Sprintf("Cost%s: $%.2f for each 100,000 files made or first read, and at most $%.2f a month for each mount%s. The first new file of a mount makes up to %d keys ahead, a burst of new files up to %d. The keys themselves are $1 a month each.",
		where, n*files*callPrice(trails), n*idle*callPrice(trails), further, keystore.FirstPool,
		keystore.MaxPool)
}
