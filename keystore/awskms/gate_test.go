package awskms

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsfs/keystore"
)

// The most urgent are let in first, and no more at once than the limit.
func TestGateOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1e6)
		ctx := context.Background()
		for range mostAtOnce {
			if err := g.enter(ctx); err != nil {
				t.Fatal(err)
			}
		}
		var mu sync.Mutex
		var order []keystore.Purpose
		for _, p := range []keystore.Purpose{keystore.ForRewrap, keystore.ForPrefetch,
			keystore.ForPool, keystore.ForCreate, keystore.ForOpen, keystore.ForLease} {
			go func() {
				if g.enter(keystore.WithPurpose(ctx, p)) == nil {
					mu.Lock()
					order = append(order, p)
					mu.Unlock()
				}
			}()
			synctest.Wait()
		}
		gone, cancel := context.WithCancel(ctx)
		go func() { // who goes away takes no place
			if g.enter(gone) == nil {
				t.Error("let in after it went away")
			}
		}()
		synctest.Wait()
		cancel()
		synctest.Wait()
		if len(order) != 0 {
			t.Errorf("%d too many are let in", len(order))
		}
		for range 6 {
			g.leave(false)
			synctest.Wait()
		}
		if len(order) != 6 {
			t.Fatalf("let in %v", order)
		}
		raised, raise := keystore.WithRaise(ctx, keystore.ForRewrap) // a program waits for it now
		for _, c := range []context.Context{keystore.WithPurpose(ctx, keystore.ForCreate), raised} {
			go func() {
				if g.enter(c) == nil {
					mu.Lock()
					order = append(order, keystore.PurposeOf(c))
					mu.Unlock()
				}
			}()
		}
		synctest.Wait()
		raise()
		synctest.Wait()
		for range 2 {
			g.leave(false)
			synctest.Wait()
		}
		want := []keystore.Purpose{keystore.ForLease, keystore.ForOpen, keystore.ForCreate,
			keystore.ForPool, keystore.ForPrefetch, keystore.ForRewrap, keystore.ForOpen,
			keystore.ForCreate}
		for i, p := range want {
			if i >= len(order) || order[i] != p {
				t.Fatalf("let in %v, want %v", order, want)
			}
		}
	})
}

// The configured number of calls a second, after a burst.
func TestGateRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(100)
		begun := time.Now()
		for range 700 {
			if err := g.enter(context.Background()); err != nil {
				t.Fatal(err)
			}
			g.leave(false)
		}
		// 200 at once, 500 at 100 a second.
		if d := time.Since(begun); d < 4900*time.Millisecond || d > 5100*time.Millisecond {
			t.Errorf("700 calls took %v", d)
		}
	})
}

// Fewer at once where most are throttled, never fewer than some, and more again.
func TestGateThrottled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1e6)
		call := func(n int, throttled bool) {
			for range n {
				if err := g.enter(context.Background()); err != nil {
					t.Fatal(err)
				}
				g.leave(throttled)
			}
		}
		call(100, true)
		if g.limit != mostAtOnce/2 {
			t.Errorf("%d at once after 100 throttled calls", g.limit)
		}
		call(2000, true)
		if g.limit != leastAtOnce {
			t.Errorf("%d at once after 2,000", g.limit)
		}
		call(2000, false)
		if g.limit < leastAtOnce+10 || g.limit > leastAtOnce+30 {
			t.Errorf("%d at once after 2,000 good ones", g.limit)
		}
	})
}

func TestSessionName(t *testing.T) {
	for in, want := range map[string]string{"kmsfs-host.example.org": "kmsfs-host.example.org",
		"kmsfs-ein Rechner/ü": "kmsfs-ein-Rechner---"} {
		if got := sessionName(in); got != want {
			t.Errorf("%q became %q", in, got)
		}
	}
	if got := sessionName(string(make([]byte, 100))); len(got) != 64 {
		t.Errorf("%d characters", len(got))
	}
}
