//go:build linux && !portable

package volume

import (
	"testing"
	"time"
)

// A duration that is a bucket's bound lies in it, and a longer one in the next.
func TestBucketOf(t *testing.T) {
	bound := firstBucket
	for i := range LatencyBuckets - 1 {
		if got := bucketOf(bound); got != i {
			t.Errorf("%v: bucket %d, want %d", bound, got, i)
		}
		if got := bucketOf(bound + 1); got != i+1 {
			t.Errorf("%v: bucket %d, want %d", bound+1, got, i+1)
		}
		bound *= 4
	}
	for d, want := range map[time.Duration]int{0: 0, -time.Second: 0, time.Hour: LatencyBuckets - 1} {
		if got := bucketOf(d); got != want {
			t.Errorf("%v: bucket %d, want %d", d, got, want)
		}
	}
}
