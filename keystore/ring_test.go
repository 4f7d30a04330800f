package keystore_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// slow is a store that counts and delays.
type slow struct {
	uri    string
	kek    [32]byte
	delay  time.Duration
	more   atomic.Int64 // nanoseconds, of delay
	wraps  atomic.Int32
	opens  atomic.Int32
	active atomic.Int32
	err    atomic.Pointer[keystore.Error]
}

func (s *slow) URI() string { return s.uri }

func (s *slow) wait(ctx context.Context) error {
	s.active.Add(1)
	defer s.active.Add(-1)
	if e := s.err.Load(); e != nil {
		return e
	}
	select {
	case <-time.After(s.delay + time.Duration(s.more.Load())):
		return nil
	case <-ctx.Done():
		return &keystore.Error{Kind: keystore.Canceled, URI: s.uri, Err: ctx.Err()}
	}
}

func (s *slow) Wrap(ctx context.Context, b keystore.Binding, key []byte) (blockcrypt.Recipient, error) {
	s.wraps.Add(1)
	if err := s.wait(ctx); err != nil {
		return blockcrypt.Recipient{}, err
	}
	blob, err := keystore.WrapLocal(s.kek[:], b, [16]byte{}, key)
	return blockcrypt.Recipient{URI: s.uri, Wrapped: blob}, err
}

func (s *slow) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	s.opens.Add(1)
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	return keystore.UnwrapLocal(s.kek[:], b, [16]byte{}, w.Wrapped)
}

// A key that is taken and given back costs no call.
func TestPoolLeavesFewAlone(t *testing.T) {
	s := &slow{uri: "slow:1"}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s}, keystore.RingOptions{Pool: 8})
	defer r.Close()
	time.Sleep(50 * time.Millisecond)
	if n := s.wraps.Load(); n != 0 {
		t.Errorf("%d keys were made before a file was", n)
	}
	k, err := r.NewKey(t.Context()) // the pool grows after the first creation
	if err != nil {
		t.Fatal(err)
	}
	r.PutBack(k)
	for until := time.Now().Add(10 * time.Second); r.Counts().Pool < r.Counts().PoolTarget; time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%d of %d keys", r.Counts().Pool, r.Counts().PoolTarget)
		}
	}
	// Those that are under way when the target has sunk to the present number come too.
	made := int32(-1)
	for made != s.wraps.Load() {
		made = s.wraps.Load()
		time.Sleep(100 * time.Millisecond)
	}
	var ks []*keystore.DataKey
	for range 5 { // one would not show: the target sinks all the time
		if k, err = r.NewKey(t.Context()); err != nil {
			t.Fatal(err)
		}
		ks = append(ks, k)
	}
	time.Sleep(50 * time.Millisecond)
	for _, k := range ks {
		r.PutBack(k)
	}
	if n := s.wraps.Load() - made; n != 0 {
		t.Errorf("taking some keys and giving them back makes %d", n)
	}
}

// A program that comes to wait for a key on its way makes that urgent.
func TestOpenRaisesPrefetch(t *testing.T) {
	s := &patient{}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s}, keystore.RingOptions{})
	defer r.Close()
	k, err := keystore.New(t.Context(), []keystore.Store{&s.slow},
		keystore.Binding{Use: keystore.ForFile, Volume: [16]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	if !r.Prefetch(k.ID, k.Wrapped) {
		t.Fatal("no prefetch")
	}
	if _, err := r.Unwrap(t.Context(), k.ID, k.Wrapped); err != nil {
		t.Error(err)
	}
}

// patient is a store that answers a prefetch when it has become urgent.
type patient struct{ slow }

func (s *patient) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	select {
	case <-keystore.Raised(ctx):
	case <-time.After(10 * time.Second):
		return nil, errors.New("nobody waits")
	}
	return s.slow.Unwrap(ctx, b, w)
}

func TestPoolRefills(t *testing.T) {
	s := &slow{uri: "slow:1", delay: 5 * time.Millisecond}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s}, keystore.RingOptions{Pool: 8})
	defer r.Close()
	seen := map[[16]byte]bool{}
	for range 100 {
		k, err := r.NewKey(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if seen[k.ID] {
			t.Fatal("the same key twice")
		}
		seen[k.ID] = true
	}
	r.Close()
	if n := s.wraps.Load(); n < 100 || n > 100+keystore.MaxPool {
		t.Errorf("%d keys made for 100 taken", n)
	}
}

func TestPoolOff(t *testing.T) {
	s := &slow{uri: "slow:1"}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s}, keystore.RingOptions{})
	defer r.Close()
	if s.wraps.Load() != 0 {
		t.Error("keys were made ahead")
	}
	k, err := r.NewKey(t.Context())
	if err != nil || s.wraps.Load() != 1 {
		t.Error(err)
	}
	r.PutBack(k)
	if k.Key != nil {
		t.Error("a key that nobody needs was not wiped")
	}
}

func TestPoolReportsAndRecovers(t *testing.T) {
	s := &slow{uri: "slow:1"}
	s.err.Store(&keystore.Error{Kind: keystore.Denied, URI: s.uri, Err: errors.New("no")})
	var reports atomic.Int32
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s},
		keystore.RingOptions{Pool: 4, Report: func(error) { reports.Add(1) }})
	defer r.Close()
	if _, err := r.NewKey(t.Context()); keystore.KindOf(err) != keystore.Denied {
		t.Errorf("%v", err)
	}
	time.Sleep(20 * time.Millisecond)
	if n := s.wraps.Load(); n > 40 {
		t.Errorf("a denied pool went on asking: %d calls", n)
	}
	s.err.Store(nil)
	if _, err := r.NewKey(t.Context()); err != nil || reports.Load() == 0 {
		t.Errorf("%v, %d reports", err, reports.Load())
	}
}

func TestUnwrapOnce(t *testing.T) {
	s := &slow{uri: "slow:1", delay: 20 * time.Millisecond}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s}, keystore.RingOptions{})
	defer r.Close()
	k, err := r.NewKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			got, err := r.Unwrap(t.Context(), k.ID, k.Wrapped)
			if err != nil || !bytes.Equal(got, k.Key) {
				t.Error(err)
			}
			clear(got) // each has its own
		})
	}
	wg.Wait()
	if n := s.opens.Load(); n != 1 {
		t.Errorf("%d calls for one key", n)
	}
}

// One who waits for another's call does not fail when that one goes away.
func TestUnwrapSurvivesTheFirst(t *testing.T) {
	s := &slow{uri: "slow:1", delay: 50 * time.Millisecond}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s}, keystore.RingOptions{})
	defer r.Close()
	k, err := r.NewKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	first, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { _, err := r.Unwrap(first, k.ID, k.Wrapped); done <- err }()
	for s.opens.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	go func() { time.Sleep(10 * time.Millisecond); cancel() }()
	if _, err := r.Unwrap(t.Context(), k.ID, k.Wrapped); err != nil {
		t.Error(err)
	}
	if err := <-done; keystore.KindOf(err) != keystore.Canceled {
		t.Errorf("the first: %v", err)
	}
}

// A cached key is bound to all that it was unwrapped from.
func TestCacheIsBound(t *testing.T) {
	s := &slow{uri: "slow:1"}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s}, keystore.RingOptions{})
	defer r.Close()
	k, err := r.NewKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Unwrap(t.Context(), k.ID, k.Wrapped); err != nil {
		t.Fatal(err)
	}
	other := k.ID
	other[0] ^= 1
	if _, err := r.Unwrap(t.Context(), other, k.Wrapped); err == nil {
		t.Error("the key of one file opens for another")
	}
	w := k.Wrapped[0]
	w.Branch = []byte{1}
	n := s.opens.Load()
	r.Unwrap(t.Context(), k.ID, []blockcrypt.Recipient{w})
	if s.opens.Load() == n {
		t.Error("another branch is the same to the cache")
	}
}

func TestWrongRecipientFallsThrough(t *testing.T) {
	a, b := &slow{uri: "slow:a", kek: [32]byte{1}}, &slow{uri: "slow:b", kek: [32]byte{2}}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{a, b}, keystore.RingOptions{})
	defer r.Close()
	k, err := r.NewKey(t.Context())
	if err != nil || len(k.Wrapped) != 2 {
		t.Fatal(err)
	}
	a.err.Store(&keystore.Error{Kind: keystore.Revoked, URI: a.uri, Err: errors.New("off")})
	if _, err := r.Unwrap(t.Context(), k.ID, k.Wrapped); err != nil {
		t.Errorf("one recipient is off, the other is not: %v", err)
	}
	b.err.Store(&keystore.Error{Kind: keystore.Outage, URI: b.uri, Err: errors.New("away")})
	k2, _ := keystore.New(t.Context(),
		[]keystore.Store{&slow{uri: "slow:a", kek: [32]byte{1}},
			&slow{uri: "slow:b", kek: [32]byte{2}}}, keystore.Binding{Use: keystore.ForFile,
			Volume: [16]byte{1}})
	if _, err := r.Unwrap(t.Context(), k2.ID, k2.Wrapped); keystore.KindOf(err) != keystore.Revoked {
		t.Errorf("both are off: %v", err)
	}
}

// The key of a new file, once learnt, is opened again without asking.
func TestLearn(t *testing.T) {
	s := &slow{uri: "slow:1"}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s}, keystore.RingOptions{})
	defer r.Close()
	k, err := r.NewKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, ok, err := r.UnwrapNow(k.ID, k.Wrapped); ok || err != nil || s.opens.Load() != 0 {
		t.Errorf("a key that nobody has asked for is there, %v, or was asked for", err)
	}
	r.Learn(k)
	got, ok, err := r.UnwrapNow(k.ID, k.Wrapped)
	if err != nil || !ok || !bytes.Equal(got, k.Key) || s.opens.Load() != 0 {
		t.Errorf("%v, %v, %d calls", ok, err, s.opens.Load())
	}
}
