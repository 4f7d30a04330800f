package keystore_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// A lock while there are no credentials, past the grace period, ends with unlock: from then on
// the verdict is that of the credentials.
func TestUnlockWithoutCredentials(t *testing.T) {
	s := &slow{uri: "slow:1"}
	var mu sync.Mutex
	var told []string
	o := keystore.RingOptions{MaxAge: time.Minute, Grace: time.Minute, Changed: func(err error) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, fmt.Sprint(err))
	}}
	bubble(t, []keystore.Store{s}, o, func(r *keystore.Ring) {
		k := fill(t, r, 1)[0]
		refuse(s, keystore.Credentials)
		r.Renew(bg, k.ID, k.Wrapped) // it shows that there are none
		locked := &keystore.Error{Kind: keystore.Credentials, Op: "unwrap", Err: errors.New("locked")}
		r.Suspend(locked)
		time.Sleep(5 * time.Minute)
		r.Resume()
		time.Sleep(10 * time.Second)
		if _, err := r.Unwrap(bg, k.ID, k.Wrapped); keystore.KindOf(err) != keystore.Credentials ||
			errors.Is(err, locked) {
			t.Errorf("after unlock: %v", err)
		}
		refuse(s, 0)
		r.Retry()
		time.Sleep(time.Minute)
		if _, err := r.Unwrap(bg, k.ID, k.Wrapped); err != nil {
			t.Errorf("with credentials again: %v", err)
		}
		mu.Lock()
		defer mu.Unlock()
		if len(told) != 3 || told[0] != fmt.Sprint(locked) || told[1] == told[0] || told[2] != "<nil>" {
			t.Errorf("told %q", told)
		}
	})
}

// The begin and the end of an outage are told, once each, also while no file fails.
func TestOutageIsTold(t *testing.T) {
	s := &slow{uri: "slow:1"}
	var mu sync.Mutex
	var told []error
	o := keystore.RingOptions{Reach: func(uri string, err error) {
		mu.Lock()
		defer mu.Unlock()
		if uri != s.uri {
			t.Errorf("told of %s", uri)
		}
		told = append(told, err)
	}}
	bubble(t, []keystore.Store{s}, o, func(r *keystore.Ring) {
		fill(t, r, 1)
		for range 2 {
			time.Sleep(time.Minute)
			refuse(s, keystore.Outage)
			time.Sleep(10 * time.Minute)
			refuse(s, 0)
			time.Sleep(10 * time.Minute)
		}
		mu.Lock()
		defer mu.Unlock()
		if len(told) != 4 || keystore.KindOf(told[0]) != keystore.Outage || told[1] != nil ||
			told[2] == nil || told[3] != nil {
			t.Errorf("told %v", told)
		}
	})
}

// A service that asks for fewer calls is not down, however long one caller is out of luck; nor
// does a key that another call is out of luck with count as refused.
func TestThrottlingIsNoOutage(t *testing.T) {
	s := &throttling{slow: slow{uri: "slow:1"}}
	bubble(t, []keystore.Store{s}, keystore.RingOptions{}, func(r *keystore.Ring) {
		k := fill(t, r, 1)[0]
		time.Sleep(time.Minute)
		begun := time.Now()
		if _, err := r.Unwrap(bg, [16]byte{9},
			[]blockcrypt.Recipient{{URI: s.uri,
				Wrapped: []byte("unlucky")}}); keystore.KindOf(err) != keystore.Outage ||
			time.Since(begun) < 15*time.Second {
			t.Errorf("the unlucky one, after %v: %v", time.Since(begun), err)
		}
		if st := r.States()[0]; st.Error != nil {
			t.Error("the store:", st.Error)
		}
		r.Forget(k.ID, k.Wrapped)
		if _, err := r.Unwrap(bg, k.ID, k.Wrapped); err != nil {
			t.Errorf("another: %v", err)
		}
		// One that joins a call shortly before its end has a call of its own.
		w := []blockcrypt.Recipient{{URI: s.uri, Wrapped: []byte("once")}}
		if !r.Prefetch([16]byte{8}, w) {
			t.Fatal("nothing is prefetched")
		}
		time.Sleep(14 * time.Second)
		if _, err := r.Unwrap(bg, [16]byte{8}, w); err != nil {
			t.Errorf("it joined an unlucky call: %v", err)
		}
	})
}

// throttling is a store that answers some calls for 15 s that there are too many.
type throttling struct {
	slow
	once bool
}

func (s *throttling) Unwrap(ctx context.Context, b keystore.Binding,
	w blockcrypt.Recipient) ([]byte, error) {
	switch {
	case string(w.Wrapped) == "once" && s.once:
		return make([]byte, keystore.KeySize), nil
	case string(w.Wrapped) == "once", string(w.Wrapped) == "unlucky":
		s.once = string(w.Wrapped) == "once"
		time.Sleep(15 * time.Second)
		return nil, &keystore.Error{Kind: keystore.Outage, URI: s.uri, Op: "unwrap", Answered: true,
			Err: errors.New("throttled")}
	}
	return s.slow.Unwrap(ctx, b, w)
}

// Keys of a local store count as made, too.
func TestLocalKeysAreCounted(t *testing.T) {
	r := keystore.NewRing([16]byte{1}, []keystore.Store{&immediate{}}, keystore.RingOptions{})
	defer r.Close()
	fill(t, r, 3)
	k, err := r.NewKey(bg)
	if err != nil {
		t.Fatal(err)
	}
	r.PutBack(k)
	if c := r.Counts(); c.Made != 4 || c.Wasted != 1 {
		t.Errorf("%d made, %d for nothing", c.Made, c.Wasted)
	}
}
