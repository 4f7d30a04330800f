package awskms

import (
	"context"
	"fmt"
	"sync"
	"time"

	"kmsfs/keystore"
)

// route says which of two replicas of a multi-Region key is asked: the own Region's, or
// the one that was named.
type route struct {
	mu sync.Mutex

	answered  time.Time // when the own one did last, zero if never
	namedOnly bool      // it denied the first call, which the named one allowed

	away   time.Time // when the own Region was last found to be away, zero if it is not
	helped time.Time // when the named one has answered instead last
	alone  time.Time // until when the named one is not asked: its Region was away too
}

const (
	homeAgain  = 15 * time.Second // after which a Region that was away is tried again
	aloneAfter = time.Minute      // after which the other one is
)

// replicas makes a call with s; where another replica was named, perhaps with that one:
//   - for good where the own one denies the very first call that is answered, and the
//     named one does not. Later the own one's denials count, or taking a right away would
//     not show before it is taken away everywhere;
//   - while the own Region is away, from the call on after one that has found that out.
//     The named one can only help then: a verdict comes from the own one, or it is an
//     outage.
func replicas[T any](ctx context.Context, s *Store, f func(context.Context, *Store) (T, error)) (T, error) {
	if s.named == nil {
		return f(ctx, s)
	}
	r, begun := &s.route, time.Now()
	namedOnly, away, try := r.next(begun)
	switch {
	case namedOnly:
		return f(ctx, s.named)
	case !away:
		out, err := f(ctx, s)
		if r.said(err, begun) {
			named, nerr := f(ctx, s.named)
			if r.helps(nerr, begun, true); nerr == nil {
				return named, nil
			}
		}
		return out, err
	}
	home := func() (out T, err error, is bool) {
		short, cancel := context.WithTimeout(ctx, s.c.o.Attempt)
		defer cancel()
		out, err = f(short, s)
		return out, err, r.back(err)
	}
	denied := false
	if try {
		out, err, is := home()
		if is {
			return out, err
		}
		denied = keystore.KindOf(err) == keystore.Denied
	}
	out, err := f(ctx, s.named)
	if r.helps(err, begun, denied) {
		return out, err
	}
	out, oerr, is := home()
	if is || keystore.KindOf(oerr) == keystore.Denied || ctx.Err() != nil {
		return out, oerr
	}
	return out, &keystore.Error{Kind: keystore.Outage, URI: s.URI(), Op: "ask the replicas",
		Err: fmt.Errorf("its Region does not answer, and the replica that was named refuses: %v", err)}
}

// next returns whether the named replica is asked for good, whether the own Region is
// away, and whether it is to be tried again.
func (r *route) next(now time.Time) (namedOnly, away, try bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	away = !r.away.IsZero()
	if try = away && now.Sub(r.away) > homeAgain; try {
		r.away = now // others do not
	}
	return r.namedOnly, away, try
}

// said notes what the own replica has answered, and reports whether the named one is to
// be asked too. A call that was throttled, or failed while others were answered, says
// nothing of the Region.
func (r *route) said(err error, begun time.Time) (too bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	switch keystore.KindOf(err) {
	case 0:
		r.answered = now
	case keystore.Outage:
		if !throttled(err) && !r.answered.After(begun) && now.After(r.alone) {
			r.away = now
		}
	case keystore.Denied:
		return r.answered.IsZero() && now.After(r.alone)
	}
	return false
}

// back notes what the own replica, whose Region was away, has answered, and reports
// whether that is the answer to the call.
func (r *route) back(err error) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch keystore.KindOf(err) {
	case keystore.Outage, keystore.Canceled:
		return false
	case keystore.Denied:
		if r.answered.IsZero() {
			return false
		}
	case 0:
		r.answered = time.Now()
	}
	r.away = time.Time{}
	return true
}

// helps notes what the named replica has answered to a call that the own one has denied,
// or while its Region is away. It reports whether that is the answer in the second case.
func (r *route) helps(err error, begun time.Time, denied bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch keystore.KindOf(err) {
	case 0:
		r.helped = time.Now()
		r.namedOnly = r.namedOnly || denied && r.answered.IsZero()
	case keystore.Outage:
		if !throttled(err) && !r.helped.After(begun) {
			r.away, r.alone = time.Time{}, time.Now().Add(aloneAfter)
		}
	case keystore.Denied, keystore.Revoked:
		return false
	}
	return true
}
