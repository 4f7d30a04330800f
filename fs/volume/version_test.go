//go:build linux && !portable

package volume

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A header that was read is believed while the file has the same times, if the filesystem's clock had gone
// on since: two changes within one of its steps have the same time.
func TestVersion(t *testing.T) {
	stat := func(changed time.Duration, size int64) *unix.Stat_t {
		return &unix.Stat_t{Ctim: unix.NsecToTimespec(int64(changed)), Size: size}
	}
	const s, ms = time.Second, time.Millisecond
	for _, c := range []struct {
		name           string
		clock, changed time.Duration
		then           *unix.Stat_t
		same           bool
	}{
		{"unchanged", 100 * s, 98 * s, stat(98*s, 5), true},
		{"another time", 100 * s, 98 * s, stat(98*s+1, 5), false},
		{"another length", 100 * s, 98 * s, stat(98*s, 6), false},
		{"changed just before it was read", 100 * s, 99*s + 500*ms, stat(99*s+500*ms, 5), false},
		{"no proof of life yet", 0, 98 * s, stat(98*s, 5), false},
		{"a time in the future", 100 * s, 200 * s, stat(200*s, 5), false},
	} {
		var p peers
		p.clock.Store(int64(c.clock))
		if got := p.versionOf(stat(c.changed, 5)).is(c.then); got != c.same {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	if (version{}).is(stat(0, 0)) {
		t.Error("a file that nobody has looked at is believed")
	}
}
