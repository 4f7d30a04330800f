package fs

import (
	"testing"
	"time"

	"kmsfs/fs/volume"
)

// The counts are those of the requests, with their errors, and a kind without a name is left out.
func TestMeter(t *testing.T) {
	s := &Server{loop: &loop{}}
	m := &s.loop.meter
	m.note(15, 5*time.Microsecond, 0)
	m.note(15, 50*time.Microsecond, -5)
	m.note(15, time.Hour, -5)
	m.note(opcodes-1, time.Second, 0)
	got := s.Metrics()
	if len(got.Requests) != 1 {
		t.Fatalf("%+v", got)
	}
	r := got.Requests[0]
	if r.Op != "read" || r.Count != 3 || r.Took != time.Hour+55*time.Microsecond ||
		r.Errnos["EIO"] != 2 || len(r.Errnos) != 1 {
		t.Errorf("%+v", r)
	}
	if r.Within[8e-6] != 1 || r.Within[128e-6] != 2 || len(r.Within) != volume.LatencyBuckets-1 {
		t.Errorf("%v", r.Within)
	}
}
