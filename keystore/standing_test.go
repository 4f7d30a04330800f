package keystore_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// A caller that waits when the ring is suspended, or when the service is found to be
// away, ends at once, with the verdict; so does who only joined.
func TestWaitingEnds(t *testing.T) {
	for _, how := range []keystore.Kind{keystore.Credentials, keystore.Outage} {
		s := &slow{uri: "slow:1", delay: 15 * time.Second}
		bubble(t, []keystore.Store{s}, keystore.RingOptions{}, func(r *keystore.Ring) {
			w := []blockcrypt.Recipient{{URI: s.uri, Wrapped: []byte("x")}}
			got := make(chan error, 4)
			for range 2 {
				go func() { _, err := r.Unwrap(bg, [16]byte{1}, w); got <- err }()
			}
			go func() { _, err := r.Unwrap(bg, [16]byte{2}, w); got <- err }()
			go func() { _, err := r.NewKey(bg); got <- err }()
			time.Sleep(time.Second)
			begun := time.Now()
			if how == keystore.Credentials {
				locked := make(chan struct{})
				defer func() { <-locked }()
				go func() {
					r.Suspend(&keystore.Error{Kind: how, Err: errors.New("locked")})
					close(locked)
				}()
			} else {
				refuse(s, how)
				r.Unwrap(bg, [16]byte{3}, w)
			}
			for range 4 {
				if err := <-got; keystore.KindOf(err) != how {
					t.Errorf("%v: %v", how, err)
				}
			}
			if d := time.Since(begun); d > 0 {
				t.Errorf("%v: they ended after %v", how, d)
			}
		})
	}
}

// A call that fails though others are answered says nothing of the service, and ends
// none of them.
func TestUnluckyCall(t *testing.T) {
	s := &unlucky{slow: slow{uri: "slow:1", delay: 100 * time.Millisecond}}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{}, func(r *keystore.Ring) {
		k := fill(t, r, 1)[0]
		bad, good := make(chan error), make(chan error, 4)
		go func() {
			_, err := r.Unwrap(bg, [16]byte{9},
				[]blockcrypt.Recipient{{URI: s.uri, Wrapped: []byte("unlucky")}})
			bad <- err
		}()
		for range 4 {
			go func() {
				var err error
				for range 200 {
					err = errors.Join(err, r.Renew(bg, k.ID, k.Wrapped))
				}
				good <- err
			}()
		}
		if err := <-bad; keystore.KindOf(err) != keystore.Outage {
			t.Errorf("the unlucky one: %v", err)
		}
		for range 4 {
			if err := <-good; err != nil {
				t.Fatal("the others:", err)
			}
		}
		if st := r.States()[0]; st.Error != nil {
			t.Error("the store:", st.Error)
		}
	})
}

// One that fails long after the last answer is an outage, though it was begun before.
func TestOutageAfterAnswer(t *testing.T) {
	s := &unlucky{slow: slow{uri: "slow:1", delay: 100 * time.Millisecond}}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{}, func(r *keystore.Ring) {
		time.AfterFunc(time.Second, func() { r.NewKey(bg) })
		_, err := r.Unwrap(bg, [16]byte{9},
			[]blockcrypt.Recipient{{URI: s.uri, Wrapped: []byte("unlucky")}})
		if keystore.KindOf(err) != keystore.Outage || r.States()[0].Error == nil {
			t.Errorf("%v, and the store is %v", err, r.States()[0].Error)
		}
	})
}

type unlucky struct{ slow }

func (s *unlucky) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	if string(w.Wrapped) == "unlucky" {
		time.Sleep(15*time.Second + time.Millisecond)
		return nil, &keystore.Error{Kind: keystore.Outage, URI: s.uri, Op: "unwrap",
			Err: errors.New("throttled")}
	}
	return s.slow.Unwrap(ctx, b, w)
}

// A grace below zero is none: the first failure takes the keys away.
func TestNoGrace(t *testing.T) {
	s := &slow{uri: "slow:1"}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{Grace: -1}, func(r *keystore.Ring) {
		k := fill(t, r, 1)[0]
		refuse(s, keystore.Outage)
		time.Sleep(5 * time.Minute)
		if _, _, err := r.UnwrapNow(k.ID, k.Wrapped); keystore.KindOf(err) != keystore.Outage {
			t.Errorf("%v", err)
		}
	})
}

// A service that answers what cannot be is asked as seldom as one that is away, and
// its keys are good for the grace.
func TestProbeGarbled(t *testing.T) {
	for _, kind := range []keystore.Kind{keystore.Damaged, keystore.Invalid} {
		s := &slow{uri: "slow:1", delay: 20 * time.Millisecond}
		bubble(t, []keystore.Store{s}, keystore.RingOptions{Grace: 30 * time.Minute}, func(r *keystore.Ring) {
			k := fill(t, r, 1)[0]
			refuse(s, kind)
			s.opens.Store(0)
			time.Sleep(20 * time.Minute)
			if n := s.opens.Load(); n < 20 || n > 400 {
				t.Errorf("%v: %d probes in 20 minutes", kind, n)
			}
			if _, ok, err := r.UnwrapNow(k.ID, k.Wrapped); !ok || err != nil {
				t.Errorf("%v, within the grace: %v, %v", kind, ok, err)
			}
			time.Sleep(20 * time.Minute)
			if _, _, err := r.UnwrapNow(k.ID, k.Wrapped); keystore.KindOf(err) != keystore.Outage {
				t.Errorf("%v, after it: %v", kind, err)
			}
			refuse(s, 0)
			time.Sleep(time.Minute)
			if _, err := r.Unwrap(bg, k.ID, k.Wrapped); err != nil {
				t.Errorf("%v, mended: %v", kind, err)
			}
		})
	}
}

// After an outage the pool is filled again, though nothing is created.
func TestPoolAfterOutage(t *testing.T) {
	s := &slow{uri: "slow:1", delay: time.Millisecond}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{Pool: 8}, func(r *keystore.Ring) {
		fill(t, r, 10)
		time.Sleep(2 * time.Second)
		refuse(s, keystore.Outage)
		fill(t, r, 30)
		time.Sleep(time.Minute)
		if c := r.Counts(); c.Pool > 40 {
			t.Fatalf("%d keys in the outage", c.Pool)
		}
		refuse(s, 0)
		time.Sleep(time.Minute)
		if c := r.Counts(); c.Pool < c.PoolTarget*3/4 {
			t.Errorf("%d of %d keys after it", c.Pool, c.PoolTarget)
		}
	})
}

// A key that is not used, or was refused, is no burst.
func TestPoolCountsUse(t *testing.T) {
	s := &slow{uri: "slow:1", delay: time.Millisecond}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{Pool: 8}, func(r *keystore.Ring) {
		fill(t, r, 1) // that there is something to be probed by
		for range 3000 {
			k, err := r.NewKey(bg)
			if err != nil {
				t.Fatal(err)
			}
			r.PutBack(k)
		}
		refuse(s, keystore.Revoked)
		time.Sleep(5 * time.Minute)
		for range 3000 {
			if _, err := r.NewKey(bg); keystore.KindOf(err) != keystore.Revoked {
				t.Fatal(err)
			}
		}
		refuse(s, 0)
		time.Sleep(time.Minute)
		fill(t, r, 1)
		time.Sleep(time.Minute)
		if n := s.wraps.Load(); n > 200 {
			t.Errorf("%d keys were made for one file", n)
		}
	})
}

// With EachKey too, what is known goes on in an outage, for the grace.
func TestEachKeyInOutage(t *testing.T) {
	s := &slow{uri: "slow:1"}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{EachKey: true}, func(r *keystore.Ring) {
		k := fill(t, r, 1)[0]
		refuse(s, keystore.Outage)
		time.Sleep(20 * time.Minute)
		if _, ok, err := r.UnwrapNow(k.ID, k.Wrapped); !ok || err != nil {
			t.Errorf("%v, %v", ok, err)
		}
	})
}

// After a long sleep of the machine no key of the pool is given before there is a
// proof, and a caller that asks whether keys may be used waits for one.
func TestSleepAndPool(t *testing.T) {
	s := &slow{uri: "slow:1", delay: 100 * time.Millisecond}
	synctest.Test(t, func(t *testing.T) {
		clock := bubbleClock()
		var asleep atomic.Int64
		r := keystore.NewRing([16]byte{1}, []keystore.Store{s},
			keystore.RingOptions{Pool: 8}.Clock(func() time.Duration {
				return clock() +
					time.Duration(asleep.Load())
			}))
		defer r.Close()
		fill(t, r, 1)
		time.Sleep(10 * time.Second)
		if err := r.Prove(bg); err != nil {
			t.Error(err)
		}
		asleep.Store(int64(time.Hour))
		begun := time.Now()
		if err := r.Prove(bg); err != nil || time.Since(begun) != s.delay {
			t.Errorf("after %v: %v", time.Since(begun), err)
		}
		refuse(s, keystore.Revoked)
		asleep.Store(int64(3 * time.Hour))
		if _, err := r.NewKey(bg); keystore.KindOf(err) != keystore.Revoked {
			t.Errorf("a new key: %v", err)
		}
		if err := r.Prove(bg); keystore.KindOf(err) != keystore.Revoked {
			t.Errorf("a proof: %v", err)
		}
		// A lock ends the waiting, however long the probe takes.
		refuse(s, 0)
		time.Sleep(time.Minute)
		s.more.Store(int64(10 * time.Second))
		asleep.Store(int64(4 * time.Hour))
		begun = time.Now()
		time.AfterFunc(time.Second,
			func() { r.Suspend(&keystore.Error{Kind: keystore.Credentials, Err: errors.New("locked")}) })
		if err := r.Prove(bg); keystore.KindOf(err) != keystore.Credentials ||
			time.Since(begun) != time.Second {
			t.Errorf("locked, after %v: %v", time.Since(begun), err)
		}
		r.Resume()
		time.Sleep(time.Minute)
		s.more.Store(0)
		short, cancel := context.WithCancel(bg)
		cancel()
		asleep.Store(int64(5 * time.Hour))
		time.Sleep(time.Minute)
		asleep.Store(int64(7 * time.Hour))
		if err := r.Prove(short); keystore.KindOf(err) != keystore.Canceled {
			t.Errorf("who does not wait: %v", err)
		}
	})
}

// A branch's key in memory satisfies no probe, and no open after a long sleep.
func TestProbeAsks(t *testing.T) {
	s := &branchy{slow: slow{uri: "slow:1"}}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{}, func(r *keystore.Ring) {
		k := fill(t, r, 1)[0]
		w := k.Wrapped
		w[0].Branch = []byte{1}
		for range 100 { // of which none is what probes unwrap
			r.Learn(&keystore.DataKey{ID: k.ID, Key: k.Key, Wrapped: w})
		}
		s.down.Store(true)
		time.Sleep(20 * time.Minute)
		if st := r.States()[0]; st.Error == nil || st.Proven < 15*time.Minute {
			t.Errorf("proven %v ago, %v", st.Proven, st.Error)
		}
	})
}

// Changed is told of each verdict, not only of the first.
func TestEachVerdictIsTold(t *testing.T) {
	s := &slow{uri: "slow:1"}
	var kinds []keystore.Kind
	bubble(t, []keystore.Store{s}, keystore.RingOptions{Grace: 10 * time.Minute,
		Changed: func(err error) { kinds = append(kinds, keystore.KindOf(err)) }}, func(r *keystore.Ring) {
		fill(t, r, 1)
		refuse(s, keystore.Outage)
		time.Sleep(20 * time.Minute)
		refuse(s, keystore.Revoked)
		time.Sleep(time.Minute)
		r.Suspend(&keystore.Error{Kind: keystore.Credentials, Err: errors.New("locked")})
		r.Resume()
		refuse(s, 0)
		time.Sleep(time.Minute)
		synctest.Wait()
		want := []keystore.Kind{keystore.Outage, keystore.Revoked, keystore.Credentials,
			keystore.Revoked, 0}
		if len(kinds) != len(want) {
			t.Fatalf("told %v, want %v", kinds, want)
		}
		for i, k := range want {
			if kinds[i] != k {
				t.Fatalf("told %v, want %v", kinds, want)
			}
		}
	})
}

// A recipient that may not wrap new keys costs no second key, and is not asked for
// each file.
func TestForbiddenRecipient(t *testing.T) {
	a, b := &slow{uri: "slow:a"}, &slow{uri: "slow:b"}
	bubble(t, []keystore.Store{a, b}, keystore.RingOptions{}, func(r *keystore.Ring) {
		refuse(b, keystore.Denied)
		for _, k := range fill(t, r, 100) {
			if len(k.Wrapped) != 1 || k.Wrapped[0].URI != "slow:a" {
				t.Fatalf("for %d recipients", len(k.Wrapped))
			}
		}
		if a.wraps.Load() != 100 || b.wraps.Load() != 1 {
			t.Errorf("%d and %d calls", a.wraps.Load(), b.wraps.Load())
		}
		refuse(b, 0)
		time.Sleep(2 * time.Minute)
		if k := fill(t, r, 1)[0]; len(k.Wrapped) != 2 {
			t.Errorf("allowed again: for %d recipients", len(k.Wrapped))
		}
	})
}

// If a local recipient's part is damaged, another is not asked by a caller that cannot wait.
func TestUnwrapNowAsksNobody(t *testing.T) {
	a, b := &immediate{slow{uri: "slow:a", kek: [32]byte{1}}}, &slow{uri: "slow:b", kek: [32]byte{2}}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{a, b}, keystore.RingOptions{})
	defer r.Close()
	k, err := r.NewKey(bg)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok, err := r.UnwrapNow(k.ID, k.Wrapped); !ok || err != nil {
		t.Errorf("whole: %v, %v", ok, err)
	}
	k.Wrapped[0].Wrapped[3] ^= 1
	if _, ok, err := r.UnwrapNow(k.ID, k.Wrapped); ok || err != nil || b.opens.Load() != 0 {
		t.Errorf("damaged: %v, %v, %d calls", ok, err, b.opens.Load())
	}
	if _, err := r.Unwrap(bg, k.ID, k.Wrapped); err != nil || b.opens.Load() != 1 {
		t.Errorf("by the other: %v, %d calls", err, b.opens.Load())
	}
}

type immediate struct{ slow }

func (*immediate) Immediate() {}

// Of several recipients the one that answered last is asked first.
func TestLastSuccessFirst(t *testing.T) {
	a, b := &slow{uri: "slow:a", kek: [32]byte{1}}, &slow{uri: "slow:b", kek: [32]byte{2}}
	bubble(t, []keystore.Store{a, b}, keystore.RingOptions{MaxAge: time.Hour}, func(r *keystore.Ring) {
		k := fill(t, r, 1)[0]
		forget := func() { r.Forget(k.ID, k.Wrapped) }
		forget()
		if _, err := r.Unwrap(bg, k.ID, k.Wrapped); err != nil || a.opens.Load() != 1 ||
			b.opens.Load() != 0 {
			t.Errorf("at first: %d and %d calls, %v", a.opens.Load(), b.opens.Load(), err)
		}
		time.Sleep(5 * time.Minute)
		if err := r.Renew(bg, k.ID, k.Wrapped[1:]); err != nil { // b answers
			t.Fatal(err)
		}
		forget()
		a.opens.Store(0)
		b.opens.Store(0)
		if _, err := r.Unwrap(bg, k.ID, k.Wrapped); err != nil || a.opens.Load() != 0 ||
			b.opens.Load() != 1 {
			t.Errorf("when the second has answered: %d and %d calls, %v", a.opens.Load(),
				b.opens.Load(), err)
		}
	})
}
