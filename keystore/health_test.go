package keystore

import (
	"context"
	"testing"
	"time"
)

// half draws the middle of all that can be drawn.
func half(d time.Duration) time.Duration { return d / 2 }

func failure(k Kind) *Error { return &Error{Kind: k, URI: "x:", Op: "unwrap", Err: context.Canceled} }

// Each case is a history of calls; the state is looked at after its last one.
func TestHealth(t *testing.T) {
	const maxAge, grace = 100 * time.Second, 1000 * time.Second
	throttled := failure(Outage)
	throttled.Answered = true
	type step struct {
		at    time.Duration // since the first proof
		op    string
		probe bool
		err   *Error
	}
	ok := func(at time.Duration, op string) step { return step{at, op, false, nil} }
	no := func(at time.Duration, op string, e *Error) step { return step{at, op, false, e} }
	probe := func(at time.Duration, e *Error) step { return step{at, "unwrap", true, e} }
	for name, c := range map[string]struct {
		steps   []step
		change  change        // of the last one
		wrong   Kind          // 0: it can be asked
		suspect bool          // a probe is due at once
		proven  time.Duration // the last proof
		next    time.Duration // the next probe, if it cannot be asked
	}{
		"a success proves":        {steps: []step{ok(5e9, "unwrap")}, proven: 5e9},
		"making a key proves":     {steps: []step{ok(5e9, "generate")}, proven: 5e9},
		"wrapping proves nothing": {steps: []step{ok(5e9, "wrap")}},
		"revoked": {steps: []step{no(1e9, "unwrap",
			failure(Revoked))}, change: failed, wrong: Revoked, next: 2e9},
		"revoked, as a new key shows": {steps: []step{no(1e9, "generate",
			failure(Revoked))}, change: failed, wrong: Revoked, next: 2e9},
		"a file that is denied is looked into": {steps: []step{no(1e9, "unwrap",
			failure(Denied))}, suspect: true},
		"a new key that is denied says nothing": {steps: []step{no(1e9, "generate", failure(Denied))}},
		"a denied probe is the verdict": {steps: []step{no(1e9, "unwrap",
			failure(Denied)),
			probe(2e9, failure(Denied))}, change: failed, wrong: Denied, suspect: true, next: 3e9},
		"a probe clears the suspicion": {steps: []step{no(1e9, "unwrap",
			failure(Denied)), probe(2e9, nil)}, proven: 2e9},
		"an outage": {steps: []step{no(1e9, "unwrap",
			failure(Outage))}, change: failed, wrong: Outage, next: 2e9},
		"no credentials": {steps: []step{no(1e9, "unwrap",
			failure(Credentials))}, change: failed, wrong: Credentials, next: 2e9},
		"an outage while others are answered": {steps: []step{ok(1e9, "unwrap"),
			no(3e9, "unwrap", failure(Outage))}, proven: 1e9},
		"an outage long after others": {steps: []step{ok(1e9, "unwrap"),
			no(7e9, "unwrap", failure(Outage))}, change: failed, wrong: Outage, proven: 1e9, next: 8e9},
		"a probe is never unlucky": {steps: []step{ok(1e9, "unwrap"),
			probe(3e9, failure(Outage))}, change: failed, wrong: Outage, proven: 1e9, next: 4e9},
		"fewer calls are asked for": {steps: []step{no(9e9, "unwrap", throttled)}},
		"a call that went away":     {steps: []step{no(1e9, "unwrap", failure(Canceled))}},
		"a damaged file":            {steps: []step{no(1e9, "unwrap", failure(Damaged))}},
		"a probe that is answered with nonsense": {steps: []step{probe(1e9, failure(Damaged))},
			change: failed, wrong: Outage, next: 2e9},
		"it comes back": {steps: []step{no(1e9, "unwrap",
			failure(Outage)), ok(9e9, "generate")}, change: restored, proven: 9e9},
		"wrapping brings nothing back": {steps: []step{no(1e9, "unwrap",
			failure(Outage)), ok(9e9, "wrap")}, wrong: Outage, next: 2e9},
		"a new key does not undo a verdict": {steps: []step{no(1e9, "unwrap",
			failure(Revoked)), ok(9e9, "generate")}, wrong: Revoked, proven: 9e9, next: 2e9},
		"unwrapping undoes a verdict": {steps: []step{no(1e9, "unwrap",
			failure(Revoked)), ok(9e9, "unwrap")}, change: restored, proven: 9e9},
		"a verdict outlasts an outage": {steps: []step{no(1e9, "unwrap",
			failure(Revoked)), probe(9e9, failure(Outage))}, change: failed, wrong: Revoked, next: 11e9},
		"probes come at growing times": {steps: []step{probe(0, failure(Outage)),
			probe(1e9, failure(Outage)),
			probe(3e9, failure(Outage))}, change: failed, wrong: Outage, next: 7e9},
		"but not more than half a minute apart": {steps: []step{probe(0, failure(Outage)),
			probe(0, failure(Outage)), probe(0, failure(Outage)), probe(0, failure(Outage)),
			probe(0, failure(Outage)), probe(0, failure(Outage)),
			probe(0, failure(Outage))}, change: failed, wrong: Outage, next: 30e9},
		"a call that fails starts them from there": {steps: []step{probe(0, failure(Outage)),
			probe(1e9, failure(Outage)),
			no(4e9, "unwrap", failure(Outage))}, change: failed, wrong: Outage, next: 5e9},
	} {
		t.Run(name, func(t *testing.T) {
			var h health
			var got change
			var at time.Duration
			for _, s := range c.steps {
				at = s.at
				got = h.note(at, outcome{s.op, s.probe, s.err}, half)
			}
			kind := Kind(0)
			if h.wrong() != nil {
				kind = h.wrong().Kind
			}
			if got != c.change || kind != c.wrong || h.suspect != c.suspect || h.proven != c.proven {
				t.Errorf("change %d, %v, suspect %v, proven at %v", got, kind, h.suspect, h.proven)
			}
			if kind != 0 {
				if h.next != c.next {
					t.Errorf("the next probe is at %v, want %v", h.next, c.next)
				}
				if h.due(h.next-1, maxAge, half) != h.suspect || !h.due(h.next, maxAge, half) {
					t.Errorf("at %v it is not due just then", h.next)
				}
			}
			// An outage is borne for a while; a verdict is not.
			wantNow, wantLate := kind == Revoked || kind == Denied, kind != 0
			if lost := h.lost(h.proven+grace, grace) != nil; lost != wantNow {
				t.Errorf("its keys are lost at once: %v", lost)
			}
			if lost := h.lost(h.proven+grace+1, grace) != nil; lost != wantLate {
				t.Errorf("its keys are lost after the grace: %v", lost)
			}
		})
	}
}

// A store that is good is proven before its last proof is too old, and not at once.
func TestHealthDue(t *testing.T) {
	const maxAge = 100 * time.Second
	for _, random := range []func(time.Duration) time.Duration{half,
		func(time.Duration) time.Duration { return 0 },
		func(d time.Duration) time.Duration { return d - 1 }} {
		h := health{proven: 7 * time.Second}
		due := time.Duration(-1)
		for at := h.proven; at < h.proven+maxAge; at += time.Second {
			if h.stale(at, maxAge) {
				t.Errorf("stale after %v", at-h.proven)
			}
			if h.due(at, maxAge, random) {
				due = at - h.proven
				break
			}
		}
		if due < maxAge*2/5 || due > maxAge/2 {
			t.Errorf("due after %v", due)
		}
		if !h.stale(h.proven+maxAge+1, maxAge) {
			t.Error("an old proof is not stale")
		}
	}
}
