//go:build linux && !portable

package volume

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// A Latency counts how long something takes. To count one costs some nanoseconds, and no lock.
type Latency struct {
	buckets [LatencyBuckets]atomic.Uint64 // by duration, see bucketOf
	nanos   atomic.Uint64
}

const (
	firstBucket = 8 * time.Microsecond // each bucket reaches four times as far as the one before

	// LatencyBuckets is how many buckets there are. The last one has no end.
	LatencyBuckets = 12
)

// bucketOf returns the bucket of a duration.
func bucketOf(d time.Duration) int {
	return min((bits.Len64(uint64(max(0, d-1)/firstBucket))+1)/2, LatencyBuckets-1)
}

// Note counts a duration.
func (l *Latency) Note(took time.Duration) {
	l.buckets[bucketOf(took)].Add(1)
	l.nanos.Add(uint64(took))
}

// Durations are the counts of a [Latency].
type Durations struct {
	Count  uint64
	Took   time.Duration      // all of them
	Within map[float64]uint64 // how many took so many seconds at most; all buckets but the last
}

// Durations returns the counts.
func (l *Latency) Durations() Durations {
	out := Durations{Took: time.Duration(l.nanos.Load()), Within: map[float64]uint64{}}
	bound := firstBucket
	for i := range l.buckets {
		out.Count += l.buckets[i].Load()
		if i < LatencyBuckets-1 {
			out.Within[bound.Seconds()] = out.Count
			bound *= 4
		}
	}
	return out
}

// backing counts how long calls take in which the filesystem of the ciphertext waits for its disk.
type backing struct {
	read   Latency // of pages that are not in its page cache
	sync   Latency // fsync and the like
	settle Latency // until pages are not being written, before they are overwritten
}

func (b *backing) took(op string, d time.Duration) {
	switch op {
	case "pread":
		b.read.Note(d)
	case "sync_file_range":
		b.settle.Note(d)
	default:
		b.sync.Note(d)
	}
}

// durations returns the counts by the kind of call.
func (b *backing) durations() map[string]Durations {
	return map[string]Durations{"read": b.read.Durations(), "sync": b.sync.Durations(), "settle": b.settle.Durations()}
}
