package keystore

import "time"

// health is the state of one store, as the outcomes of its calls show it: when it last proved
// that its key may be used, and whether it can be used now. It makes no calls and knows no clock;
// all times are those of the ring's clock.
//
// A data key that was unwrapped or generated proves that the store's key may be used, for all files
// under it. Without traffic a probe proves it, twice in the time for which a proof is good: it
// unwraps a key of this volume's.
//
//	state     left by                      to
//	good      "revoked"                    bad
//	good      "denied" of an unwrapping    good, suspect: a probe is due at once
//	good      an outage, no credentials    down, but for an unlucky call that is no probe
//	good      another error of a probe     down: what a probe unwraps is known to be good
//	any       "denied" of a probe          bad
//	bad       an unwrapping that succeeds  good
//	down      any success but of wrapping  good
//	down      "revoked"                    bad
//	bad       an outage, no credentials    bad
//
// Each failure that makes a store bad or down plans the next probe, after a time that doubles from
// probe to probe.
//
// A call is unlucky if it failed while the service answered others, or if the service only asked
// for fewer calls: that says nothing of the service.
type health struct {
	proven   time.Duration // the last proof
	answered time.Duration // when the service last answered anything
	bad      *Error        // the verdict on the key: revoked, denied
	down     *Error        // it cannot be asked: an outage, no credentials
	suspect  bool          // a call was denied: the key, or only that file?
	next     time.Duration // when it is probed again
	pause    time.Duration // between probes while it is bad or down
}

const (
	firstRetry = time.Second
	longRetry  = 30 * time.Second
	lately     = 5 * time.Second // for an answer to others
)

// outcome is that of a call.
type outcome struct {
	op    string // "generate", "wrap" or "unwrap"
	probe bool   // it was made to see whether the key may be used
	err   *Error // nil: it succeeded
}

// change is what an outcome makes of a state, as far as others have to act on it.
type change int

const (
	unchanged change = iota
	restored         // it can be used again
	failed           // it cannot be used, and calls under way are for nothing
)

// wrong returns why the store is not asked now, nil if it can be.
func (h *health) wrong() *Error {
	if h.bad != nil {
		return h.bad
	}
	return h.down
}

// lost returns why keys that this store has unwrapped may not be used any more, nil if they may.
func (h *health) lost(now, grace time.Duration) *Error {
	if h.bad != nil {
		return h.bad
	}
	if h.down != nil && now-h.proven > grace {
		return h.down
	}
	return nil
}

// stale reports whether the last proof is too old, as after a long sleep: cached keys are not
// used until the next proof. A store that is down is never stale: lost decides about its keys.
func (h *health) stale(now, maxAge time.Duration) bool {
	return h.down == nil && now-h.proven > maxAge
}

// note takes the outcome of a call. random draws a time from 0 up to its argument.
func (h *health) note(now time.Duration, o outcome, random func(time.Duration) time.Duration) change {
	e := o.err
	unlucky := e != nil && e.Kind == Outage && (e.Answered || h.answered > 0 && now-h.answered < lately)
	if e == nil || e.Answered || e.Kind != Outage && e.Kind != Credentials && e.Kind != Canceled {
		h.answered = now
	}
	if e == nil {
		return h.succeeded(now, o)
	}
	switch {
	case e.Kind == Revoked:
		h.bad, h.down = e, nil
	case e.Kind == Denied && !o.probe:
		// Perhaps this file alone, or new keys alone, are not allowed.
		h.suspect = h.suspect || o.op == "unwrap"
		return unchanged
	case e.Kind == Denied:
		h.bad, h.down = e, nil
	case unlucky && !o.probe && h.wrong() == nil:
		return unchanged
	case e.Kind == Outage || e.Kind == Credentials:
		h.down = e
	case o.probe && e.Kind != Canceled: // it is a key of this volume: the service does not answer sensibly
		h.down = &Error{Kind: Outage, URI: e.URI, Op: e.Op, RequestID: e.RequestID, Err: e.Err}
	default:
		return unchanged
	}
	if h.pause = min(max(2*h.pause, firstRetry), longRetry); !o.probe {
		h.pause = firstRetry
	}
	h.next = now + min(max(h.pause/2+random(h.pause), firstRetry), longRetry)
	return failed
}

// succeeded is note of a success. Wrapping proves nothing: it needs another right than unwrapping.
// Generating needs another right too, but it shows that the key is enabled: it counts as a proof,
// and lifts no verdict.
func (h *health) succeeded(now time.Duration, o outcome) (c change) {
	if o.op == "wrap" {
		return unchanged
	}
	h.proven = now
	if h.bad != nil && !o.probe && o.op != "unwrap" {
		return unchanged
	}
	if h.wrong() != nil {
		c = restored
	}
	h.bad, h.down, h.suspect, h.pause = nil, nil, false, 0
	return c
}

// due reports whether the store is to be probed. While it is good it plans the next probe within
// half of maxAge, at random, so that not all volumes ask at once.
func (h *health) due(now, maxAge time.Duration, random func(time.Duration) time.Duration) bool {
	switch {
	case h.suspect:
		return true
	case h.wrong() != nil:
		return now >= h.next
	}
	if half := maxAge / 2; now-h.proven < half-half/5 {
		h.next = h.proven + half - random(half/5+1)
		return false
	}
	return now >= h.next || h.stale(now, maxAge)
}
