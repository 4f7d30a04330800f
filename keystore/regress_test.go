package keystore_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// replicated makes keys by another replica than the one that is named, while its Region is away.
type replicated struct{ slow }

func (s *replicated) Matches(uri string) bool { return strings.HasPrefix(uri, "slow:mrk") }

func (s *replicated) Generate(ctx context.Context, b keystore.Binding) ([]byte, blockcrypt.Recipient, error) {
	key := make([]byte, keystore.KeySize)
	w, err := s.slow.Wrap(ctx, b, key)
	w.URI = "slow:mrk-elsewhere"
	return key, w, err
}

// A new key that another replica has made is one for the volume's recipient.
func TestKeyOfAnotherReplica(t *testing.T) {
	r := keystore.NewRing([16]byte{1}, []keystore.Store{&replicated{slow{uri: "slow:mrk-here"}}},
		keystore.RingOptions{})
	defer r.Close()
	k, err := r.NewKey(t.Context())
	if err != nil || len(k.Wrapped) != 1 || k.Wrapped[0].URI != "slow:mrk-elsewhere" {
		t.Fatalf("%+v, %v", k, err)
	}
	if _, err := r.Unwrap(t.Context(), k.ID, k.Wrapped); err != nil {
		t.Error(err)
	}
}

// revocable keeps branch keys, and so unwraps from memory what its service refuses by now.
type revocable struct {
	slow
	revoked atomic.Bool
}

func (s *revocable) Known(keystore.Binding, blockcrypt.Recipient) ([]byte, bool, error) {
	return make([]byte, keystore.KeySize), true, nil
}

func (s *revocable) Forget() {}

func (s *revocable) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	if len(w.Branch) > 0 {
		return make([]byte, keystore.KeySize), nil // from memory
	}
	if s.revoked.Load() {
		return nil, &keystore.Error{Kind: keystore.Revoked, URI: s.uri, Op: "unwrap", Err: errors.New("revoked")}
	}
	return s.slow.Unwrap(ctx, b, w)
}

// An answer from a store's memory, given just after the key was revoked, does not make it good
// again.
func TestMemoryDoesNotHeal(t *testing.T) {
	for range 100 {
		s, other := &revocable{slow: slow{uri: "slow:1"}}, &slow{uri: "slow:2"}
		r := keystore.NewRing([16]byte{1}, []keystore.Store{s, other}, keystore.RingOptions{})
		k, err := r.NewKey(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		under := k.Wrapped[:1:1]
		under[0].Branch = make([]byte, 17)
		plain := []blockcrypt.Recipient{{URI: s.uri, Wrapped: k.Wrapped[0].Wrapped}}
		s.revoked.Store(true)
		var wg sync.WaitGroup
		for i := range byte(64) {
			wg.Go(func() { r.Prefetch([16]byte{1, i}, under) })
		}
		if _, err := r.Unwrap(t.Context(), k.ID, plain); keystore.KindOf(err) != keystore.Revoked {
			t.Fatal(err)
		}
		wg.Wait()
		err = r.States()[0].Error
		r.Close()
		if keystore.KindOf(err) != keystore.Revoked {
			t.Fatalf("after it was revoked: %v", err)
		}
	}
}

// What a store answers from memory, as under a branch's key, proves nothing.
func TestMemoryIsNoProof(t *testing.T) {
	s := &branchy{slow: slow{uri: "slow:1"}}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{}, func(r *keystore.Ring) {
		k, err := r.NewKey(bg)
		if err != nil {
			t.Fatal(err)
		}
		k.Wrapped[0].Branch = make([]byte, 16)
		for _, asks := range []bool{false, true} {
			time.Sleep(time.Minute)
			s.asks = asks
			if _, known, err := r.UnwrapNow(k.ID, k.Wrapped); known == asks || err != nil {
				t.Fatalf("asked %v: known %v, %v", asks, known, err)
			}
			r.Forget(k.ID, k.Wrapped)
			if _, err := r.Unwrap(bg, k.ID, k.Wrapped); err != nil {
				t.Fatal(err)
			}
			r.Forget(k.ID, k.Wrapped)
			if proven := r.States()[0].Proven; (proven == 0) != asks {
				t.Errorf("asked %v: proven %v ago", asks, proven)
			}
		}
	})
}

// branchy is a store that knows the keys of all branches, unless it asks.
type branchy struct {
	slow
	asks bool
	down atomic.Bool // its service; keys in memory are known
}

func (s *branchy) Known(b keystore.Binding, w blockcrypt.Recipient) ([]byte, bool, error) {
	if s.asks {
		return nil, false, nil
	}
	key, err := s.slow.Unwrap(bg, b, w)
	return key, true, err
}

func (s *branchy) Forget() {}

func (s *branchy) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	if s.down.Load() && len(w.Branch) == 0 {
		return nil, &keystore.Error{Kind: keystore.Outage, URI: s.uri, Op: "unwrap",
			Err: errors.New("away")}
	}
	return s.slow.Unwrap(ctx, b, w)
}
