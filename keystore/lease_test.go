package keystore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

var bg = context.Background() // a test's own context is from outside the bubble

// In a bubble of synctest time is simulated, and so is the ring's clock.
func bubbleClock() func() time.Duration {
	begun := time.Now()
	return func() time.Duration { return time.Since(begun) + time.Hour }
}

func bubble(t *testing.T, s []keystore.Store, o keystore.RingOptions, f func(r *keystore.Ring)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		o = o.Clock(bubbleClock())
		r := keystore.NewRing([16]byte{1}, s, o)
		defer r.Close()
		f(r)
	})
}

func refuse(s *slow, k keystore.Kind) {
	if k == 0 {
		s.err.Store(nil)
		return
	}
	s.err.Store(&keystore.Error{Kind: k, URI: s.uri, Op: "unwrap", Err: errors.New("as the test asked")})
}

func fill(t *testing.T, r *keystore.Ring, n int) []*keystore.DataKey {
	t.Helper()
	var out []*keystore.DataKey
	for range n {
		k, err := r.NewKey(bg)
		if err != nil {
			t.Fatal(err)
		}
		r.Learn(k)
		out = append(out, k)
	}
	return out
}

// 10,000 open files for an hour cost a call each two and a half minutes.
func TestLeaseIsCheap(t *testing.T) {
	s := &slow{uri: "slow:1"}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{}, func(r *keystore.Ring) {
		keys := fill(t, r, 10000)
		s.opens.Store(0)
		time.Sleep(time.Hour)
		if n := s.opens.Load(); n < 20 || n > 30 {
			t.Errorf("%d calls in an hour", n)
		}
		if _, ok, err := r.UnwrapNow(keys[0].ID, keys[0].Wrapped); !ok || err != nil {
			t.Errorf("after an hour: %v, %v", ok, err)
		}
	})
}

// With traffic the traffic is the proof: no call is made to see.
func TestTrafficIsTheProof(t *testing.T) {
	s := &slow{uri: "slow:1"}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{}, func(r *keystore.Ring) {
		ks := fill(t, r, 60)
		other := keystore.NewRing([16]byte{1}, []keystore.Store{s},
			keystore.RingOptions{}.Clock(bubbleClock())) // knows no keys
		defer other.Close()
		r.Close()
		s.opens.Store(0)
		for _, k := range ks {
			time.Sleep(time.Minute)
			if _, err := other.Unwrap(bg, k.ID, k.Wrapped); err != nil {
				t.Fatal(err)
			}
		}
		if n := s.opens.Load(); n != 60 {
			t.Errorf("%d calls for 60 files in an hour", n)
		}
	})
}

// A revoked key: told within MaxAge, remembered, and found again.
func TestRevokedAndBack(t *testing.T) {
	s := &slow{uri: "slow:1"}
	var told []error
	var mu sync.Mutex
	bubble(t, []keystore.Store{s}, keystore.RingOptions{Pool: 8,
		Changed: func(err error) {
			mu.Lock()
			told = append(told,
				err)
			mu.Unlock()
		}}, func(r *keystore.Ring) {
		k := fill(t, r, 20)[0]
		time.Sleep(10 * time.Second)
		refuse(s, keystore.Revoked)
		time.Sleep(5*time.Minute + time.Second)
		mu.Lock()
		if len(told) != 1 || keystore.KindOf(told[0]) != keystore.Revoked {
			t.Errorf("told %v", told)
		}
		mu.Unlock()
		for range 2 {
			if _, _, err := r.UnwrapNow(k.ID, k.Wrapped); keystore.KindOf(err) != keystore.Revoked {
				t.Errorf("a known key: %v", err)
			}
			if _, err := r.NewKey(bg); keystore.KindOf(err) != keystore.Revoked {
				t.Errorf("a new key: %v", err)
			}
		}
		if c := r.Counts(); c.Cached != 0 || c.Pool != 0 {
			t.Errorf("%d keys known and %d made ahead are left", c.Cached, c.Pool)
		}
		s.opens.Store(0)
		time.Sleep(10 * time.Minute)
		if n := s.opens.Load(); n < 10 || n > 60 {
			t.Errorf("%d probes in 10 minutes", n)
		}
		refuse(s, 0)
		time.Sleep(time.Minute)
		if key, err := r.Unwrap(bg, k.ID, k.Wrapped); err != nil || len(key) != 32 {
			t.Errorf("when it is back: %v", err)
		}
		mu.Lock()
		defer mu.Unlock()
		if len(told) != 2 || told[1] != nil {
			t.Errorf("told %v", told)
		}
	})
}

// One file that is denied is not the key.
func TestOneFileDenied(t *testing.T) {
	s := &picky{slow: slow{uri: "slow:1"}}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{}, func(r *keystore.Ring) {
		ks := fill(t, r, 3)
		s.denied = ks[1].ID
		other := keystore.NewRing([16]byte{1}, []keystore.Store{s},
			keystore.RingOptions{}.Clock(bubbleClock())) // knows no keys
		defer other.Close()
		if _, err := other.Unwrap(bg, ks[0].ID, ks[0].Wrapped); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if _, err := other.Unwrap(bg, ks[1].ID,
				ks[1].Wrapped); keystore.KindOf(err) != keystore.Denied {
				t.Errorf("the denied one: %v", err)
			}
			time.Sleep(10 * time.Second)
			if _, err := other.Unwrap(bg, ks[2].ID, ks[2].Wrapped); err != nil {
				t.Errorf("another: %v", err)
			}
		}
	})
}

// picky denies one file.
type picky struct {
	slow
	denied [16]byte
}

func (p *picky) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	if b.ID == p.denied {
		return nil, &keystore.Error{Kind: keystore.Denied, URI: p.uri, Op: "unwrap",
			Err: errors.New("not this one")}
	}
	return p.slow.Unwrap(ctx, b, w)
}

// An outage: known keys go on for Grace, counted from the last proof; who
// needs a call fails at once after the first; it recovers by itself.
func TestOutageAndGrace(t *testing.T) {
	s := &slow{uri: "slow:1"}
	var lost atomic.Int32
	bubble(t, []keystore.Store{s}, keystore.RingOptions{Pool: 8, Grace: 30 * time.Minute, Changed: func(err error) {
		if err != nil {
			lost.Add(1)
		}
	}}, func(r *keystore.Ring) {
		ks := fill(t, r, 3)
		cold := blockcrypt.Recipient{URI: s.uri, Wrapped: []byte("unknown")}
		time.Sleep(time.Minute)
		pool := r.Counts().Pool
		if pool == 0 {
			t.Fatal("nothing is made ahead")
		}
		refuse(s, keystore.Outage)
		if _, err := r.Unwrap(bg, [16]byte{9},
			[]blockcrypt.Recipient{cold}); keystore.KindOf(err) != keystore.Outage {
			t.Errorf("%v", err)
		}
		calls := s.opens.Load()
		for range 100 {
			if _, err := r.Unwrap(bg, [16]byte{9},
				[]blockcrypt.Recipient{cold}); keystore.KindOf(err) != keystore.Outage {
				t.Errorf("%v", err)
			}
		}
		if n := s.opens.Load() - calls; n > 1 {
			t.Errorf("%d calls while it is known to be away", n)
		}
		for range pool {
			if _, err := r.NewKey(bg); err != nil {
				t.Errorf("from the pool: %v", err)
			}
		}
		if _, err := r.NewKey(bg); keystore.KindOf(err) != keystore.Outage {
			t.Errorf("beyond the pool: %v", err)
		}
		s.opens.Store(0)
		time.Sleep(20 * time.Minute)
		if n := s.opens.Load(); n < 20 || n > 400 {
			t.Errorf("%d probes in 20 minutes", n)
		}
		if _, ok, err := r.UnwrapNow(ks[0].ID, ks[0].Wrapped); !ok || err != nil || lost.Load() != 0 {
			t.Errorf("within the grace: %v, %v", ok, err)
		}
		time.Sleep(20 * time.Minute)
		if _, _, err := r.UnwrapNow(ks[0].ID,
			ks[0].Wrapped); keystore.KindOf(err) != keystore.Outage || lost.Load() != 1 {
			t.Errorf("after it: %v, told %d times", err, lost.Load())
		}
		refuse(s, 0)
		time.Sleep(time.Minute)
		if _, err := r.Unwrap(bg, ks[0].ID, ks[0].Wrapped); err != nil {
			t.Errorf("when it is back: %v", err)
		}
		if _, err := r.NewKey(bg); err != nil {
			t.Errorf("when it is back: %v", err)
		}
	})
}

// After a long sleep of the machine what is known waits for a proof.
func TestSleepCounts(t *testing.T) {
	s := &slow{uri: "slow:1"}
	synctest.Test(t, func(t *testing.T) {
		clock := bubbleClock()
		var asleep atomic.Int64
		r := keystore.NewRing([16]byte{1}, []keystore.Store{s},
			keystore.RingOptions{}.Clock(func() time.Duration {
				return clock() +
					time.Duration(asleep.Load())
			}))
		defer r.Close()
		k := fill(t, r, 1)[0]
		refuse(s, keystore.Revoked)
		asleep.Store(int64(time.Hour))
		if _, ok, err := r.UnwrapNow(k.ID, k.Wrapped); ok && err == nil {
			t.Error("a key is used, an hour after its proof")
		}
		if _, err := r.Unwrap(bg, k.ID, k.Wrapped); keystore.KindOf(err) != keystore.Revoked {
			t.Errorf("%v", err)
		}
	})
}

// EachKey: a file's key is asked for again after MaxAge, whatever others proved.
func TestEachKey(t *testing.T) {
	s := &slow{uri: "slow:1"}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{EachKey: true}, func(r *keystore.Ring) {
		ks := fill(t, r, 2)
		s.opens.Store(0)
		time.Sleep(4 * time.Minute)
		r.Unwrap(bg, ks[0].ID, ks[0].Wrapped)
		if err := r.Renew(bg, ks[1].ID, ks[1].Wrapped); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Minute)
		if _, ok, err := r.UnwrapNow(ks[0].ID, ks[0].Wrapped); ok || err != nil {
			t.Errorf("an old key is used: %v", err)
		}
		if _, err := r.Unwrap(bg, ks[0].ID, ks[0].Wrapped); err != nil {
			t.Error(err)
		}
		if _, ok, _ := r.UnwrapNow(ks[0].ID, ks[0].Wrapped); !ok {
			t.Error("a key that was just asked for is not used")
		}
	})
}

// The pool follows bursts, and sinks again.
func TestPoolFollowsBursts(t *testing.T) {
	s := &slow{uri: "slow:1", delay: 20 * time.Millisecond}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{Pool: 8}, func(r *keystore.Ring) {
		at := func(what string, want int) {
			t.Helper()
			if c := r.Counts(); c.Pool != want || c.PoolTarget != want {
				t.Errorf("%s: %d of %d keys, want %d", what, c.Pool, c.PoolTarget, want)
			}
		}
		time.Sleep(time.Second)
		at("before a file is made", 0)
		fill(t, r, 1)
		time.Sleep(time.Second)
		if c := r.Counts(); c.Pool < 60 {
			t.Errorf("after one creation: %d", c.Pool)
		}
		fill(t, r, 200)
		time.Sleep(time.Second)
		if c := r.Counts(); c.Pool < 150 || c.Pool > 210 {
			t.Errorf("after a burst of 200: %d", c.Pool)
		}
		fill(t, r, 5000)
		time.Sleep(2 * time.Second)
		if c := r.Counts(); c.Pool < keystore.MaxPool-100 || c.Pool > keystore.MaxPool {
			t.Errorf("after a burst of 5,000: %d", c.Pool)
		}
		time.Sleep(11 * time.Minute)
		if c := r.Counts(); c.PoolTarget != 8 {
			t.Errorf("11 minutes later it wants %d", c.PoolTarget)
		}
		k, _ := r.NewKey(bg)
		r.PutBack(k)
		r.Suspend(&keystore.Error{Kind: keystore.Credentials, Err: errors.New("locked")})
		if c := r.Counts(); c.Pool != 0 || c.Cached != 0 || c.Wasted < 200 {
			t.Errorf("locked: %+v", c)
		}
		if _, err := r.NewKey(bg); keystore.KindOf(err) != keystore.Credentials {
			t.Errorf("locked: %v", err)
		}
		r.Resume()
		if _, err := r.NewKey(bg); err != nil {
			t.Errorf("unlocked: %v", err)
		}
	})
}

// 2,000 creations, one each 100 µs: where the pool begins with 8 keys they are soon
// not waited for any more, by few calls more than there are creations; the pool is
// filled when they are over, and then none of as many more waits.
func TestPoolKeepsPace(t *testing.T) {
	s := &slow{uri: "slow:1", delay: 20 * time.Millisecond}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{Pool: 8}, func(r *keystore.Ring) {
		time.Sleep(time.Second)
		burst := func() time.Duration {
			begun := time.Now()
			for range 2000 {
				fill(t, r, 1)
				time.Sleep(100 * time.Microsecond)
			}
			return time.Since(begun)
		}
		cold, calls := burst(), s.wraps.Load()
		time.Sleep(2 * time.Second)
		if n := r.Counts().Pool; n < 1900 || n > keystore.MaxPool {
			t.Errorf("%d keys after the burst", n)
		}
		filled := burst()
		t.Logf("%v by %d calls, then %v", cold, calls, filled)
		if cold > 400*time.Millisecond || calls > 3000 {
			t.Errorf("2,000 creations took %v and %d calls", cold, calls)
		}
		if filled > 200*time.Millisecond {
			t.Errorf("2,000 more took %v", filled)
		}
	})
}

// A second recipient that cannot be reached is left out, and told.
func TestMissingRecipient(t *testing.T) {
	a, b := &slow{uri: "slow:a"}, &slow{uri: "slow:b"}
	var told atomic.Int32
	bubble(t, []keystore.Store{a,
		b}, keystore.RingOptions{Report: func(error) { told.Add(1) }}, func(r *keystore.Ring) {
		if k := fill(t, r, 1)[0]; len(k.Wrapped) != 2 {
			t.Errorf("%d recipients", len(k.Wrapped))
		}
		time.Sleep(6 * time.Second) // its last answer was not lately
		refuse(b, keystore.Outage)
		for range 5 {
			if k := fill(t, r, 1)[0]; len(k.Wrapped) != 1 || k.Wrapped[0].URI != "slow:a" {
				t.Errorf("%d recipients", len(k.Wrapped))
			}
		}
		if told.Load() == 0 || b.wraps.Load() > 4 {
			t.Errorf("told %d times, asked %d times", told.Load(), b.wraps.Load())
		}
		refuse(a, keystore.Outage)
		if _, err := r.NewKey(bg); keystore.KindOf(err) != keystore.Outage {
			t.Errorf("none can be reached: %v", err)
		}
	})
}

// One recipient that is revoked does not matter where another can be asked.
func TestOneOfTwoRevoked(t *testing.T) {
	a, b := &slow{uri: "slow:a"}, &slow{uri: "slow:b"}
	bubble(t, []keystore.Store{a, b}, keystore.RingOptions{}, func(r *keystore.Ring) {
		k := fill(t, r, 1)[0]
		other := keystore.NewRing([16]byte{1}, []keystore.Store{a, b},
			keystore.RingOptions{}.Clock(bubbleClock())) // knows no keys
		defer other.Close()
		refuse(b, keystore.Revoked)
		if _, err := other.Unwrap(bg, [16]byte{7},
			[]blockcrypt.Recipient{{URI: "slow:b",
				Wrapped: []byte("x")}}); keystore.KindOf(err) != keystore.Revoked {
			t.Fatal(err)
		}
		if _, ok, err := other.UnwrapNow(k.ID, k.Wrapped); ok || err != nil {
			t.Errorf("not asked: %v, %v", ok, err)
		}
		if _, err := other.Unwrap(bg, k.ID, k.Wrapped); err != nil {
			t.Errorf("asked: %v", err)
		}
		if _, ok, err := other.UnwrapNow(k.ID, k.Wrapped); !ok || err != nil {
			t.Errorf("known: %v, %v", ok, err)
		}
	})
}

// A call that waits for a new key when the ring is suspended gets the verdict, not the key.
func TestLockWhileCreating(t *testing.T) {
	s := &slow{uri: "slow:1", delay: time.Second}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{Pool: 8}, func(r *keystore.Ring) {
		time.Sleep(100 * time.Millisecond)
		got := make(chan error)
		go func() {
			_, err := r.NewKey(bg)
			got <- err
		}()
		synctest.Wait()
		r.Suspend(&keystore.Error{Kind: keystore.Credentials, Err: errors.New("locked")})
		if err := <-got; keystore.KindOf(err) != keystore.Credentials {
			t.Errorf("it got a key: %v", err)
		}
		if c := r.Counts(); c.Pool != 0 {
			t.Errorf("%d keys were kept", c.Pool)
		}
	})
}

// A call that waits for a new key is not told of a denial that is older than its waiting.
func TestOldDenial(t *testing.T) {
	s := &lateDenial{slow: slow{uri: "slow:1"}}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{Pool: 1}, func(r *keystore.Ring) {
		go r.NewKey(bg) // the first call, denied, and not answered for a second
		time.Sleep(time.Second / 2)
		begun := time.Now()
		if _, err := r.NewKey(bg); err != nil || time.Since(begun) != time.Second/2 {
			t.Errorf("after %v: %v", time.Since(begun), err)
		}
	})
}

type lateDenial struct {
	slow
	calls atomic.Int32
}

func (s *lateDenial) Wrap(ctx context.Context, b keystore.Binding,
	key []byte) (blockcrypt.Recipient, error) {
	if s.calls.Add(1) == 1 {
		time.Sleep(time.Second)
		return blockcrypt.Recipient{}, &keystore.Error{Kind: keystore.Denied, URI: s.uri,
			Op: "wrap", Err: errors.New("as the test asked")}
	}
	return s.slow.Wrap(ctx, b, key)
}

// keeper is a store that remembers where the keys lie that it has given.
type keeper struct {
	slow
	given [][]byte
}

func (s *keeper) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	key, err := s.slow.Unwrap(ctx, b, w)
	s.given = append(s.given, key)
	return key, err
}

func (s *keeper) Generate(ctx context.Context, b keystore.Binding) ([]byte, blockcrypt.Recipient, error) {
	key := bytes.Repeat([]byte{7}, keystore.KeySize)
	w, err := s.Wrap(ctx, b, key)
	return key, w, err
}

// New keys that come too late are counted.
func TestLockCountsWhatComes(t *testing.T) {
	s := &keeper{slow: slow{uri: "slow:1", delay: 300 * time.Millisecond}}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{Pool: 8}, func(r *keystore.Ring) {
		fill(t, r, 1) // the pool is filled from then on
		time.Sleep(100 * time.Millisecond)
		r.Suspend(&keystore.Error{Kind: keystore.Credentials, Err: errors.New("locked")})
		time.Sleep(time.Second)
		if c := r.Counts(); c.Made < 8 || c.Wasted != c.Made-1 || s.wraps.Load() != int32(c.Made) {
			t.Errorf("%+v, %d calls", c, s.wraps.Load())
		}
	})
}

// What a call brings that nobody waits for any more is wiped before Suspend returns.
func TestLockWipesWhatComes(t *testing.T) {
	s := &keeper{slow: slow{uri: "slow:1", delay: 300 * time.Millisecond}}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{}, func(r *keystore.Ring) {
		k := fill(t, r, 1)[0]
		r.Forget(k.ID, k.Wrapped)
		begun, got := time.Now(), make(chan error)
		go func() {
			_, err := r.Unwrap(bg, k.ID, k.Wrapped)
			got <- err
		}()
		time.AfterFunc(100*time.Millisecond,
			func() {
				r.Suspend(&keystore.Error{Kind: keystore.Credentials,
					Err: errors.New("locked")})
				got <- nil
			})
		if err := <-got; keystore.KindOf(err) != keystore.Credentials ||
			time.Since(begun) != 100*time.Millisecond {
			t.Errorf("after %v: %v", time.Since(begun), err)
		}
		<-got
		if d := time.Since(begun); len(s.given) != 1 ||
			!bytes.Equal(s.given[0], make([]byte, keystore.KeySize)) || d > 310*time.Millisecond {
			t.Errorf("locked after %v, with the key %x", d, s.given)
		}
	})
}

// Keys that many empty files hold leave the cache its place.
func TestManyKeysHeld(t *testing.T) {
	s := &slow{uri: "slow:1"}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s}, keystore.RingOptions{})
	defer r.Close()
	var held []*keystore.DataKey
	for range 20000 {
		k, err := r.NewKey(bg)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, k)
	}
	k := held[0]
	if _, err := r.Unwrap(bg, k.ID, k.Wrapped); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := r.UnwrapNow(k.ID, k.Wrapped); !ok || err != nil {
		t.Errorf("a key that was asked for is not known: %v, %v", ok, err)
	}
}

// What a cached key costs.
func TestCacheMemory(t *testing.T) {
	s := &slow{uri: "slow:1"}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s}, keystore.RingOptions{})
	defer r.Close()
	ks := make([]*keystore.DataKey, 16384)
	for i := range ks {
		ks[i] = &keystore.DataKey{Key: make([]byte, 32),
			Wrapped: []blockcrypt.Recipient{{URI: s.uri, Wrapped: []byte{1, 2, 3}}}}
		for j := range ks[i].ID {
			ks[i].ID[j] = byte(rand.Uint32())
		}
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for _, k := range ks {
		r.Learn(k)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if n := r.Counts().Cached; n != len(ks) {
		t.Fatal(n)
	}
	if each := (int64(after.HeapAlloc)-int64(before.HeapAlloc))/int64(len(ks)) +
		keystore.KeySize; each > 300 {
		t.Errorf("%d bytes for each cached key", each)
	} else {
		t.Log(fmt.Sprint(each, " bytes for each cached key, 32 of them locked"))
	}
	runtime.KeepAlive(ks)
}
