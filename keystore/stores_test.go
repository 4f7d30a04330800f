package keystore_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
	"kmsfs/keystore/local"
)

// labeled is a store that marks what it wraps, and serves further URIs.
type labeled struct {
	uri  string
	also string
	err  error
	kind keystore.Kind // of err; Denied if zero
}

func (s labeled) URI() string             { return s.uri }
func (s labeled) Matches(uri string) bool { return uri == s.also }
func (s labeled) key() []byte             { return bytes.Repeat([]byte{s.uri[0]}, keystore.KeySize) }
func (s labeled) fault(op string) error {
	return &keystore.Error{Kind: cmp.Or(s.kind, keystore.Denied), URI: s.uri, Op: op, Err: s.err}
}
func (s labeled) Wrap(context.Context, keystore.Binding, []byte) (blockcrypt.Recipient, error) {
	return blockcrypt.Recipient{}, s.fault("wrap")
}

func (s labeled) Unwrap(context.Context, keystore.Binding, blockcrypt.Recipient) ([]byte, error) {
	if s.err != nil {
		return nil, s.fault("unwrap")
	}
	return s.key(), nil
}

func TestStoreFor(t *testing.T) {
	a, b := labeled{uri: "a:", also: "c:"}, labeled{uri: "c:", also: "d:"}
	stores := []keystore.Store{a, b}
	for uri, want := range map[string]keystore.Store{"a:": a, "c:": b, "d:": b,
		"x:": nil} { // its own before a replica's
		if got := keystore.StoreFor(stores, uri); got != want {
			t.Errorf("%s: %v", uri, got)
		}
	}
}

func TestUnwrapFirst(t *testing.T) {
	denied := errors.New("denied")
	good, bad, worse := labeled{uri: "g:"}, labeled{uri: "b:", err: denied}, labeled{uri: "w:",
		err: errors.New("worse")}
	ws := func(uris ...string) (out []blockcrypt.Recipient) {
		for _, u := range uris {
			out = append(out, blockcrypt.Recipient{URI: u})
		}
		return out
	}
	for name, c := range map[string]struct {
		stores []keystore.Store
		ws     []blockcrypt.Recipient
		key    []byte
		kind   keystore.Kind
		err    error
	}{
		"the first that can": {[]keystore.Store{bad, good}, ws("x:", "b:", "g:"), good.key(), 0, nil},
		"the first one's refusal": {[]keystore.Store{worse, bad}, ws("b:", "w:"), nil,
			keystore.Denied, denied},
		"none is at hand": {[]keystore.Store{good}, ws("x:", "y:"), nil, keystore.Untrusted, nil},
		"no recipient":    {[]keystore.Store{good}, nil, nil, keystore.Untrusted, nil},
	} {
		key, err := keystore.UnwrapFirst(t.Context(), c.stores, keystore.Binding{}, c.ws)
		if !bytes.Equal(key, c.key) || keystore.KindOf(err) != c.kind ||
			c.err != nil && !errors.Is(err, c.err) {
			t.Errorf("%s: %x, %v", name, key, err)
		}
	}
}

// A file is damaged only if every recipient says so: another one may be out of reach for now.
func TestDamagedBesideOutage(t *testing.T) {
	verdict := func(uri string, k keystore.Kind) labeled {
		return labeled{uri: uri, err: errors.New(uri), kind: k}
	}
	for _, c := range []struct{ first, second, want keystore.Kind }{
		{keystore.Damaged, keystore.Outage, keystore.Outage},
		{keystore.Outage, keystore.Damaged, keystore.Outage},
		{keystore.Damaged, keystore.Damaged, keystore.Damaged},
		{keystore.Denied, keystore.Outage, keystore.Denied},
	} {
		r := keystore.NewRing([16]byte{1},
			[]keystore.Store{verdict("a:", c.first), verdict("b:", c.second)}, keystore.RingOptions{})
		_, err := r.Unwrap(t.Context(), [16]byte{2}, []blockcrypt.Recipient{{URI: "a:"}, {URI: "b:"}})
		if keystore.KindOf(err) != c.want {
			t.Errorf("%v and %v: %v", c.first, c.second, err)
		}
		r.Close()
	}
}

// sealer is a store that only wraps.
type sealer struct{ slow }

func (s *sealer) OnlySeals() bool { return true }

// A recipient that only wraps gets every new key, and is never asked to unwrap: that the others may
// not be used any more is not hidden by it.
func TestSealer(t *testing.T) {
	s, x := &slow{uri: "slow:1"}, &sealer{slow{uri: "sealer:1"}}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s, x}, keystore.RingOptions{})
	defer r.Close()
	k, err := r.NewKey(t.Context())
	if err != nil || len(k.Wrapped) != 2 || k.Wrapped[1].URI != x.uri {
		t.Fatalf("%v, %v", k, err)
	}
	// A store that fails for the first time: the key must not go to the other one alone.
	s.err.Store(&keystore.Error{Kind: keystore.Denied, URI: s.uri, Op: "wrap", Err: errors.New("denied")})
	for range 3 {
		if k, err := r.NewKey(t.Context()); err == nil {
			t.Errorf("a key that nobody here can unwrap: %+v", k.Wrapped)
		}
	}
	s.err.Store(nil)
	r.Retry()
	if _, err := r.Unwrap(t.Context(), k.ID,
		k.Wrapped[1:]); keystore.KindOf(err) != keystore.Untrusted || x.opens.Load() != 0 {
		t.Errorf("%v, asked %d times", err, x.opens.Load())
	}
	s.err.Store(&keystore.Error{Kind: keystore.Revoked, URI: s.uri, Op: "unwrap",
		Err: errors.New("disabled")})
	if _, err := r.Unwrap(t.Context(), k.ID, k.Wrapped); keystore.KindOf(err) != keystore.Revoked {
		t.Error(err)
	}
	if err := r.Prove(t.Context()); keystore.KindOf(err) != keystore.Revoked {
		t.Errorf("the only store that unwraps is revoked: %v", err)
	}
	if _, err := r.NewKey(t.Context()); keystore.KindOf(err) != keystore.Revoked {
		t.Errorf("a new key that nobody here could unwrap: %v", err)
	}
}

// When the recipients change, no key is handed out that was wrapped for those before: not from the
// pool, not one that is given back, not one that is on its way.
func TestSetStores(t *testing.T) {
	a, b := &slow{uri: "slow:a", delay: time.Millisecond}, &slow{uri: "slow:b"}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{a}, keystore.RingOptions{Pool: 8})
	defer r.Close()
	held, err := r.NewKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for until := time.Now().Add(10 * time.Second); r.Counts().Pool == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("the pool stays empty")
		}
	}
	a.more.Store(int64(50 * time.Millisecond)) // keys are on their way
	for range 3 {
		if _, err := r.NewKey(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	r.SetStores([]keystore.Store{a, b}, keystore.Sample{})
	r.PutBack(held)
	for i := range 200 {
		k, err := r.NewKey(t.Context())
		if err != nil || len(k.Wrapped) != 2 {
			t.Fatalf("key %d is wrapped for %d recipients, %v", i, len(k.Wrapped), err)
		}
		k.Wipe()
	}
	k, err := r.NewKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.SetStores([]keystore.Store{b}, keystore.Sample{})
	if _, err := r.Unwrap(t.Context(), k.ID, k.Wrapped[:1]); keystore.KindOf(err) != keystore.Untrusted {
		t.Errorf("by a store that is trusted no more: %v", err)
	}
	if _, err := r.Unwrap(t.Context(), k.ID, k.Wrapped); err != nil {
		t.Error(err)
	}
}

// A store that retires opens what it has wrapped, and gets no new key until the stores are set again.
func TestRetire(t *testing.T) {
	a, b, x := &slow{uri: "slow:a"}, &slow{uri: "slow:b"}, &sealer{slow{uri: "sealer:1"}}
	all := []keystore.Store{a, b, x}
	r := keystore.NewRing([16]byte{1}, all, keystore.RingOptions{Pool: 8})
	defer r.Close()
	old, err := r.NewKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []keystore.Store{a, x} {
		r.Retire(s)
		for range 20 {
			k, err := r.NewKey(t.Context())
			if err != nil || slices.ContainsFunc(k.Wrapped,
				func(w blockcrypt.Recipient) bool { return w.URI == s.URI() }) {
				t.Fatalf("%+v, %v", k, err)
			}
		}
		if r.Current(old) {
			t.Error("a key from before is current")
		}
		if r.Opens(old.Wrapped[:1]) || !r.Opens(old.Wrapped) {
			t.Error("a key for the one that retires alone is good for a new file")
		}
	}
	if _, err := r.Unwrap(t.Context(), old.ID, old.Wrapped[:1]); err != nil {
		t.Errorf("by the store that retires: %v", err)
	}
	r.SetStores(all, keystore.Sample{})
	if k, err := r.NewKey(t.Context()); err != nil || len(k.Wrapped) != 3 {
		t.Errorf("afterwards: %+v, %v", k, err)
	}
}

// A volume that is under a local key alone can get a key of a service while it is mounted: from
// then on that has to be proven.
func TestSetStoresThatWait(t *testing.T) {
	var clock atomic.Int64
	l, err := local.New(make([]byte, keystore.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	s := &slow{uri: "slow:1"}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{l},
		keystore.RingOptions{MaxAge: time.Minute}.Clock(func() time.Duration { return time.Duration(clock.Load()) }))
	defer r.Close()
	if r.Waits() {
		t.Error("a local key is waited for")
	}
	b := keystore.Binding{Use: keystore.ForVolume, Volume: [16]byte{1}}
	sample, err := s.Wrap(t.Context(), b, make([]byte, keystore.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	r.SetStores([]keystore.Store{s}, keystore.SampleOfVolume([16]byte{1}, []blockcrypt.Recipient{sample}))
	if !r.Waits() {
		t.Error("a service is not waited for")
	}
	// Nothing is opened or made meanwhile: the proof is made by itself.
	clock.Store(int64(90 * time.Second))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := r.Prove(ctx); err != nil || s.opens.Load() == 0 {
		t.Errorf("no proof of a key that was added: %v", err)
	}
	k, err := r.NewKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Unwrap(t.Context(), k.ID, k.Wrapped); err != nil {
		t.Fatal(err)
	}
	s.err.Store(&keystore.Error{Kind: keystore.Revoked, URI: s.uri, Op: "unwrap",
		Err: errors.New("disabled")})
	clock.Store(int64(4 * time.Minute))
	if err := r.Prove(t.Context()); keystore.KindOf(err) != keystore.Revoked {
		t.Errorf("two minutes later: %v", err)
	}
}

// kept is a store that keeps branch keys.
type kept struct {
	slow
	forgot atomic.Int32
}

func (s *kept) Known(keystore.Binding, blockcrypt.Recipient) ([]byte, bool, error) {
	return nil, false, nil
}

func (s *kept) Forget() { s.forgot.Add(1) }

// A store that is trusted no more wipes the branch keys that it has in memory; one that stays does not.
func TestSetStoresForgets(t *testing.T) {
	a, b := &kept{slow: slow{uri: "slow:a"}}, &kept{slow: slow{uri: "slow:b"}}
	r := keystore.NewRing([16]byte{1}, []keystore.Store{a, b}, keystore.RingOptions{})
	defer r.Close()
	r.SetStores([]keystore.Store{b}, keystore.Sample{})
	if a.forgot.Load() == 0 || b.forgot.Load() != 0 {
		t.Errorf("the one that went wiped %d times, the other %d times", a.forgot.Load(), b.forgot.Load())
	}
}
