package awskms

import (
	"context"
	"sync"
	"time"

	"kmsfs/keystore"
)

// route says which of two replicas of a multi-Region key is asked: this Region's own,
// or the one that was named.
type route struct {
	mu sync.Mutex

	answered      time.Time // when the own one did last, zero if never
	namedAnswered bool
	namedOnly     bool      // the own one's policy forbids what the named one's allows
	ownOnly       bool      // the named one was asked, and cannot be used
	away          time.Time // when the own Region was last found to be away, zero if it is not
}

const homeAgain = time.Minute // after which a Region that was away is tried again

// replicas makes a call with s; where another replica was named, perhaps with that one:
//   - for good where the own one forbids the very first call, and the named one does
//     not. Later it counts what the own one says, or taking a right away would not show
//     before it is taken away everywhere;
//   - while the own Region is away, from the call on after one that has found that out.
//     A replica that has never answered has no say then: it may not be for this machine.
func replicas[T any](ctx context.Context, s *Store, f func(context.Context, *Store) (T, error)) (T, error) {
	if s.named == nil {
		return f(ctx, s)
	}
	r := &s.route
	named, away, try := r.next()
	if try {
		short, cancel := context.WithTimeout(ctx, s.c.o.Attempt)
		out, err := f(short, s)
		cancel()
		if named = r.tried(keystore.KindOf(err)); !named {
			return out, err
		}
	}
	if named {
		out, err := f(ctx, s.named)
		if !away || r.namedSaid(keystore.KindOf(err)) {
			return out, err
		}
	}
	begun := time.Now()
	out, err := f(ctx, s)
	if r.said(keystore.KindOf(err), begun, throttled(err)) {
		if out, nerr := f(ctx, s.named); nerr == nil {
			r.forbidden()
			return out, nil
		}
	}
	return out, err
}

// next returns whether the named replica is asked, whether that is because the own
// Region is away, and whether that one is to be tried first.
func (r *route) next() (named, away, try bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.namedOnly || r.away.IsZero() {
		return r.namedOnly, false, false
	}
	try = time.Since(r.away) > homeAgain
	if try {
		r.away = time.Now() // others do not
	}
	return true, true, try
}

// tried notes what the own Region, which was away, has answered, and reports whether the
// named replica is asked on.
func (r *route) tried(k keystore.Kind) (named bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case k == keystore.Outage, k == keystore.Canceled:
		return true
	case k == keystore.Denied && r.answered.IsZero() && r.namedAnswered:
		r.namedOnly = true
		return true
	}
	r.away = time.Time{}
	if k == 0 {
		r.answered = time.Now()
	}
	return false
}

// namedSaid notes what the named replica has answered while the own Region is away, and
// reports whether that is the answer.
func (r *route) namedSaid(k keystore.Kind) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case k == 0:
		r.namedAnswered = true
	case k == keystore.Outage:
		r.away = time.Time{} // the next one asks the own Region
	case (k == keystore.Denied || k == keystore.Revoked) && !r.namedAnswered:
		r.away, r.ownOnly = time.Time{}, true
		return false
	}
	return true
}

// said notes what the own replica has answered to a call, and reports whether the named
// one is to be asked instead. A call that was throttled, or failed while others were
// answered, says nothing of the Region.
func (r *route) said(k keystore.Kind, begun time.Time, throttled bool) (instead bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch k {
	case 0:
		r.answered = time.Now()
	case keystore.Outage:
		if !throttled && !r.ownOnly && !r.namedOnly && !r.answered.After(begun) {
			r.away = time.Now()
		}
	case keystore.Denied:
		return r.answered.IsZero()
	}
	return false
}

// forbidden notes that the named replica allows what the own one has forbidden.
func (r *route) forbidden() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.namedOnly = r.answered.IsZero()
}
