package awskms

import (
	"context"
	"slices"
	"sync"
	"time"

	"kmsfs/keystore"
)

// gate limits the calls to one Region: how many a second, since the quota is
// shared with the whole account, and how many at once. Waiting calls are let in by
// purpose, the most urgent first.
type gate struct {
	rate, burst float64 // calls a second, and how many may come at once

	mu       sync.Mutex
	tokens   float64
	filled   time.Time
	limit    int // calls at once
	flying   int
	waiting  [keystore.Purposes][]chan struct{}
	timer    *time.Timer
	recent   [100]bool // of the last calls, which were throttled
	at       int
	seen     int // of recent, since the limit was changed
	throttle int // true ones
}

const (
	defaultRate = 2000
	leastAtOnce = 16
	mostAtOnce  = 256 // at 20 ms a call, 12,800 a second: it is rate that limits them
)

func newGate(rate float64) *gate {
	if rate <= 0 {
		rate = defaultRate
	}
	return &gate{rate: rate, burst: 2 * rate, tokens: 2 * rate, filled: time.Now(), limit: mostAtOnce}
}

// enter waits for the right to make a call; leave gives it back.
func (g *gate) enter(ctx context.Context) error {
	c, raised := make(chan struct{}), keystore.Raised(ctx)
	for {
		p := keystore.PurposeOf(ctx)
		g.mu.Lock()
		g.waiting[p] = append(g.waiting[p], c)
		g.admit()
		g.mu.Unlock()
		select {
		case <-c:
			return nil
		case <-raised:
			raised = nil
		case <-ctx.Done():
		}
		if !g.withdraw(p, c) {
			return nil // it was let in just now
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// withdraw reports whether c was still waiting; it does not any more.
func (g *gate) withdraw(p keystore.Purpose, c chan struct{}) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	i := slices.Index(g.waiting[p], c)
	if i >= 0 {
		g.waiting[p] = slices.Delete(g.waiting[p], i, i+1)
	}
	return i >= 0
}

// leave ends a call. Half as many at once are made where more than half of the
// last ones were throttled, which it returns, one more otherwise.
func (g *gate) leave(throttled bool) (crowded bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.flying--
	if g.recent[g.at] {
		g.throttle--
	}
	if g.recent[g.at] = throttled; throttled {
		g.throttle++
	}
	g.at = (g.at + 1) % len(g.recent)
	g.seen = min(g.seen+1, len(g.recent))
	crowded = g.throttle > len(g.recent)/2
	switch {
	case crowded && g.seen == len(g.recent):
		g.limit, g.seen = max(leastAtOnce, g.limit/2), 0
	case !throttled && g.limit < mostAtOnce && !crowded && g.at == 0:
		g.limit++
	}
	g.admit()
	return crowded
}

// admit lets in who can be. mu is held.
func (g *gate) admit() {
	t := time.Now()
	g.tokens = min(g.burst, g.tokens+g.rate*t.Sub(g.filled).Seconds())
	g.filled = t
	for p := range g.waiting {
		for len(g.waiting[p]) > 0 {
			if g.flying >= g.limit {
				return
			}
			if g.tokens < 1 {
				g.later(time.Duration((1 - g.tokens) / g.rate * float64(time.Second)))
				return
			}
			close(g.waiting[p][0])
			g.waiting[p] = g.waiting[p][1:]
			g.flying++
			g.tokens--
		}
	}
}

// later admits again when there is a token.
func (g *gate) later(d time.Duration) {
	if g.timer != nil {
		return
	}
	g.timer = time.AfterFunc(d, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.timer = nil
		g.admit()
	})
}
