package keystore_test

import (
	"context"
	"crypto/rand"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// maker is a service that makes keys, and knows branches.
type maker struct {
	slow
	generated atomic.Int32
}

func (s *maker) Generate(ctx context.Context, b keystore.Binding) ([]byte, blockcrypt.Recipient, error) {
	s.generated.Add(1)
	if b.Use != keystore.ForBranch {
		return nil, blockcrypt.Recipient{}, errors.New("not for a branch")
	}
	key := make([]byte, keystore.KeySize)
	rand.Read(key)
	w, err := s.Wrap(ctx, b, key)
	return key, w, err
}

func (s *maker) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	if len(w.Branch) == 0 {
		return s.slow.Unwrap(ctx, b, w)
	}
	id := [16]byte(w.Branch)
	kek, err := s.slow.Unwrap(ctx,
		keystore.Binding{Use: keystore.ForBranch, Volume: b.Volume, ID: id},
		blockcrypt.Recipient{Wrapped: w.Branch[16:]})
	if err != nil {
		return nil, err
	}
	return keystore.UnwrapLocal(kek, b, id, w.Wrapped)
}

// One call makes the keys of many files, until its time or its files are over. Each file opens by
// itself.
func TestBranchKeys(t *testing.T) {
	var clock atomic.Int64
	s := &maker{slow: slow{uri: "maker:1", delay: time.Millisecond}}
	o := keystore.RingOptions{Pool: 8, Branches: time.Hour,
		MaxAge: 100 * time.Hour}.Clock(func() time.Duration { return time.Duration(clock.Load()) })
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s}, o)
	defer r.Close()
	var mu sync.Mutex
	var keys []*keystore.DataKey
	take := func(n int) {
		t.Helper()
		k, err := r.NewKey(t.Context())
		if err != nil {
			t.Error(err)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if n%100 == 0 {
			keys = append(keys, k)
		}
	}
	var wg sync.WaitGroup
	for range 8 { // at the same time, from the first one on
		wg.Go(func() {
			for n := range 200 {
				take(n)
			}
		})
	}
	wg.Wait()
	if n := s.generated.Load(); n != 1 {
		t.Errorf("%d calls for 1,600 files", n)
	}
	clock.Add(int64(time.Hour))
	for range 3000 { // more than the pool holds
		take(1)
	}
	if n := s.generated.Load(); n != 2 {
		t.Errorf("%d calls, an hour later", n)
	}
	for range 70_000 {
		take(1)
	}
	if n := s.generated.Load(); n != 3 && n != 4 {
		t.Errorf("%d calls, after 70,000 files more", n)
	}
	fresh := keystore.NewRing([16]byte{1}, []keystore.Store{s}, keystore.RingOptions{})
	defer fresh.Close()
	ids := map[string]bool{}
	for _, k := range keys {
		if got, err := fresh.Unwrap(t.Context(), k.ID, k.Wrapped); err != nil ||
			string(got) != string(k.Key) {
			t.Errorf("%x, %v", got, err)
		}
		if ids[string(k.Key)] {
			t.Error("two files have one data key")
		}
		ids[string(k.Key)] = true
	}
}

// When the key may not be used any more, the branch key is gone with the others: it makes no file,
// and when the key comes back it is another one.
func TestBranchKeyRevoked(t *testing.T) {
	s := &maker{slow: slow{uri: "maker:1"}}
	changed := make(chan error, 4)
	r := keystore.NewRing([16]byte{1}, []keystore.Store{s},
		keystore.RingOptions{Branches: time.Hour, Changed: func(err error) { changed <- err }})
	defer r.Close()
	k, err := r.NewKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	first := k.Wrapped[0].Branch
	suspended := &keystore.Error{Kind: keystore.Credentials, Op: "unwrap", Err: errors.New("suspended")}
	r.Suspend(suspended)
	if _, err := r.NewKey(t.Context()); !errors.Is(err, suspended) {
		t.Errorf("while it is suspended: %v", err)
	}
	r.Resume()
	if k, err = r.NewKey(t.Context()); err != nil || string(k.Wrapped[0].Branch) == string(first) {
		t.Errorf("the same branch key as before: %v", err)
	}
	s.err.Store(&keystore.Error{Kind: keystore.Revoked, URI: s.uri, Op: "unwrap",
		Err: errors.New("disabled")})
	r.Unwrap(t.Context(), [16]byte{9}, []blockcrypt.Recipient{{URI: s.uri, Wrapped: []byte("x")}})
	if _, err := r.NewKey(t.Context()); keystore.KindOf(err) != keystore.Revoked {
		t.Errorf("a new file under a revoked key: %v", err)
	}
}
