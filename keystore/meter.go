package keystore

import (
	"cmp"
	"math"
	"slices"
	"sync"
	"time"
)

// Meter counts the calls to key services: each attempt, since each is paid for.
// The zero value is ready; a nil one counts nothing.
type Meter struct {
	mu      sync.Mutex
	calls   map[Calls]uint64 // Count is 0 in the keys
	buckets [64]uint64       // by duration: each is a quarter longer than the one before
	took    time.Duration    // all together
}

// Calls is how often one kind of call was made.
type Calls struct {
	Op      string // the service's name of the operation
	Purpose string
	Verdict string // "ok", or the [Kind]
	Count   uint64
}

const bucketGrowth = 1.25

// Record counts an attempt that took d.
func (m *Meter) Record(op string, p Purpose, verdict Kind, d time.Duration) {
	if m == nil {
		return
	}
	v := "ok"
	if verdict != 0 {
		v = verdict.String()
	}
	b := 0
	if n := float64(d) / float64(100*time.Microsecond); n > 1 {
		b = min(len(m.buckets)-1, 1+int(math.Log(n)/math.Log(bucketGrowth)))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.calls == nil {
		m.calls = map[Calls]uint64{}
	}
	m.calls[Calls{Op: op, Purpose: p.String(), Verdict: v}]++
	m.buckets[b]++
	m.took += d
}

// Durations returns how many attempts took so many seconds at most, how many there were, and how
// long they took together.
func (m *Meter) Durations() (within map[float64]uint64, count uint64, took time.Duration) {
	within = map[float64]uint64{}
	if m == nil {
		return within, 0, 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, n := range m.buckets {
		count += n
		if i%4 == 0 && i < len(m.buckets)-1 { // each a 2.4th of the next
			within[math.Pow(bucketGrowth, float64(i))/10/1000] = count
		}
	}
	return within, count, m.took
}

// Calls returns the counts, in order.
func (m *Meter) Calls() []Calls {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []Calls
	for c, n := range m.calls {
		c.Count = n
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b Calls) int {
		return cmp.Or(cmp.Compare(a.Op, b.Op), cmp.Compare(a.Purpose, b.Purpose),
			cmp.Compare(a.Verdict, b.Verdict))
	})
	return out
}

// Quantile returns the duration that a share q of the attempts took at most, to
// a quarter.
func (m *Meter) Quantile(q float64) time.Duration {
	if m == nil {
		return 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	total := uint64(0)
	for _, n := range m.buckets {
		total += n
	}
	left := uint64(math.Ceil(q * float64(total)))
	for i, n := range m.buckets {
		if n >= left && left > 0 {
			return time.Duration(math.Pow(bucketGrowth, float64(i)) * float64(time.Millisecond) / 10)
		}
		left -= n
	}
	return 0
}
