//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus" // the text format that monitoring systems read
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"kmsfs/fs"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

// collector gives the counts of a mount to Prometheus, when they are asked for.
type collector struct {
	v     *volume.Volume
	s     *fs.Server
	meter *keystore.Meter
}

// desc describes a metric.
func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("kmsfs_"+name, help, labels, nil)
}

// The metrics. docs/operations.md lists them.
var (
	descBuild   = desc("build_info", "1, with the version of kmsfs.", "version")
	descHealthy = desc("healthy",
		"1 if the volume is well: its keys may be used, and no file waits for a repair.")
	descLocked  = desc("locked", "1 while the volume is locked by kmsfs lock.")
	descRequest = desc("request_duration_seconds", "How long requests of programs took.", "op")
	descErrors  = desc("request_errors_total", "Requests that were answered with an error.", "op",
		"errno")
	descInFlight = desc("requests_in_flight", "Requests that are being answered, or wait to be.")
	descRead     = desc("read_bytes_total", "Bytes of files that the kernel has read.")
	descWritten  = desc("written_bytes_total", "Bytes of files that the kernel has written.")
	descCalls    = desc("key_calls_total", "Attempts to call a key service.", "op", "purpose", "verdict")
	descCall     = desc("key_call_duration_seconds", "How long attempts to call a key service took.")
	descLookups  = desc("key_lookups_total",
		"Data keys that were needed, by whether memory had them.", "answer")
	descPrefetch = desc("keys_prefetched_total",
		"Data keys that were unwrapped ahead, by whether they were used.", "used")
	descMade = desc("keys_made_total",
		"Data keys that were made, by whether they were wasted.", "wasted")
	descCached = desc("keys_cached", "Data keys in memory.")
	descPool   = desc("keys_pool", "Data keys that were made ahead and not used yet.")
	descTarget = desc("keys_pool_target", "How many data keys are to be made ahead.")
	descProven = desc("recipient_proven_seconds",
		"How long ago a recipient last proved that its key may be used.", "uri")
	descUsable    = desc("recipient_usable", "1 if a recipient is asked, 0 while it is not.", "uri")
	descFaults    = desc("faults_total", "Faults that were logged, by kind.", "kind")
	descBacking   = desc("backing_duration_seconds", "How long calls took in which the ciphertext's filesystem waited for its disk.", "op")
	descFree      = desc("backing_free_bytes", "Bytes that are free on the ciphertext's filesystem.")
	descSize      = desc("backing_size_bytes", "Size of the ciphertext's filesystem.")
	descOpenFiles = desc("open_descriptors", "Descriptors of the ciphertext that the daemon has open.")
)

// Describe implements [prometheus.Collector].
func (c *collector) Describe(ch chan<- *prometheus.Desc) { ch <- descHealthy }

// Collect implements [prometheus.Collector].
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	vitals := c.v.Vitals()
	gauge(descBuild, 1, version)
	gauge(descHealthy, oneIf(vitals.Err == nil))
	gauge(descLocked, oneIf(c.v.Suspended() != nil))
	m := c.s.Metrics()
	for _, r := range m.Requests {
		ch <- prometheus.MustNewConstHistogram(descRequest, r.Count, r.Took.Seconds(), r.Within, r.Op)
		for errno, n := range r.Errnos {
			counter(descErrors, n, r.Op, errno)
		}
	}
	for op, d := range vitals.Backing {
		ch <- prometheus.MustNewConstHistogram(descBacking, d.Count, d.Took.Seconds(), d.Within, op)
	}
	gauge(descInFlight, float64(m.InFlight))
	counter(descRead, m.Read)
	counter(descWritten, m.Written)
	for _, x := range c.meter.Calls() {
		counter(descCalls, x.Count, x.Op, x.Purpose, x.Verdict)
	}
	within, n, took := c.meter.Durations()
	ch <- prometheus.MustNewConstHistogram(descCall, n, took.Seconds(), within)
	k := c.v.KeyCounts()
	counter(descLookups, k.Hits, "memory")
	counter(descLookups, k.Misses, "asked")
	counter(descPrefetch, k.PrefetchUsed, "yes")
	counter(descPrefetch, k.Prefetched-min(k.Prefetched, k.PrefetchUsed), "no")
	counter(descMade, k.Wasted, "yes")
	counter(descMade, k.Made-min(k.Made, k.Wasted), "no")
	gauge(descCached, float64(k.Cached))
	gauge(descPool, float64(k.Pool))
	gauge(descTarget, float64(k.PoolTarget))
	for _, r := range c.v.KeyStates() {
		gauge(descProven, r.Proven.Seconds(), r.URI)
		gauge(descUsable, oneIf(r.Error == nil), r.URI)
	}
	for kind, n := range vitals.Faults {
		counter(descFaults, n, kind)
	}
	if st, err := c.v.Statfs(); err == nil {
		gauge(descFree, float64(st.Bavail)*float64(st.Frsize))
		gauge(descSize, float64(st.Blocks)*float64(st.Frsize))
	}
	gauge(descOpenFiles, float64(vitals.Descriptors))
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// monitoring returns what a monitoring system asks: /metrics and /healthz.
func (c *control) monitoring() *http.ServeMux {
	reg := prometheus.NewRegistry()
	reg.MustRegister(&collector{c.v, c.server, c.meter}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if err := c.v.Vitals().Err; err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// profiles are for whoever develops kmsfs, or is asked to send one. They hold no content of files.
func profiles(mux *http.ServeMux) {
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
}

// checkMetricsAddr refuses an address that is not on loopback: anybody who reaches it may read it.
func checkMetricsAddr(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); err == nil && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		err = errors.New("only an address of loopback is taken: let a proxy that authenticates serve others")
	}
	if err != nil {
		return usageError{fmt.Errorf("--metrics-addr %s: %w", addr, err), "kmsfs mount"}
	}
	return nil
}

// listenMetrics opens the TCP address of --metrics-addr.
func listenMetrics(addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("--metrics-addr: %w", err)
	}
	return l, nil
}

// serveMetrics serves l until stop is called.
func (c *control) serveMetrics(l net.Listener) (stop func()) {
	srv := &http.Server{Handler: c.monitoring(), ReadHeaderTimeout: 5 * time.Second,
		ErrorLog: slog.NewLogLogger(c.log.Handler(), slog.LevelWarn)}
	go srv.Serve(l)
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		srv.Shutdown(ctx)
	}
}
