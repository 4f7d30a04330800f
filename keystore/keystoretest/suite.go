package keystoretest

import (
	"bytes"
	"context"
	"crypto/rand"
	"slices"
	"sync"
	"testing"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// Suite is what every backend must do. s is a store, other one of the same kind
// with another key. A wrapped key that is not right is [keystore.Damaged]; also
// names other kinds that this backend may give.
func Suite(t *testing.T, s, other keystore.Store, also ...keystore.Kind) {
	refused := func(t *testing.T, s keystore.Store, b keystore.Binding, w blockcrypt.Recipient, what string, i int) {
		t.Helper()
		key, err := s.Unwrap(context.Background(), b, w)
		if k := keystore.KindOf(err); key != nil || k != keystore.Damaged && !slices.Contains(also, k) {
			t.Errorf("%s %d: %x, %v (%s)", what, i, key, err, k)
		}
	}
	ctx := t.Context()
	b := keystore.Binding{Use: keystore.ForFile}
	rand.Read(b.Volume[:])
	rand.Read(b.ID[:])
	key := make([]byte, keystore.KeySize)
	rand.Read(key)
	w := wrap(t, s, b, key)

	t.Run("RoundTrip", func(t *testing.T) {
		for _, use := range []keystore.Use{keystore.ForFile, keystore.ForBranch, keystore.ForVolume, keystore.ForDirectory} {
			b := b
			if b.Use = use; use == keystore.ForVolume {
				b.ID = [16]byte{}
			}
			w := wrap(t, s, b, key)
			if w.URI != s.URI() || bytes.Contains(w.Wrapped, key) {
				t.Fatalf("wrapped for %q as %x", w.URI, w.Wrapped)
			}
			got, err := s.Unwrap(ctx, b, w)
			if err != nil || !bytes.Equal(got, key) {
				t.Fatalf("use %s: %x, %v", use, got, err)
			}
		}
	})
	t.Run("WrappingsDiffer", func(t *testing.T) {
		if bytes.Equal(w.Wrapped, wrap(t, s, b, key).Wrapped) {
			t.Fatal("the same key wraps to the same bytes twice")
		}
	})
	t.Run("Binding", func(t *testing.T) {
		bs := []keystore.Binding{b, b, b, b, b}
		bs[0].Volume[3] ^= 1
		bs[1].ID[5] ^= 1
		bs[2].Use = keystore.ForBranch
		bs[3].Use, bs[3].ID = keystore.ForVolume, [16]byte{}
		bs[4].Use = keystore.ForDirectory
		for i, x := range bs {
			refused(t, s, x, w, "binding", i)
		}
	})
	t.Run("Damage", func(t *testing.T) {
		for i := range w.Wrapped {
			x := w
			x.Wrapped = bytes.Clone(w.Wrapped)
			x.Wrapped[i] ^= 0x10
			refused(t, s, b, x, "byte", i)
		}
		for _, n := range []int{0, 1, 12, len(w.Wrapped) - 1} {
			x := w
			x.Wrapped = w.Wrapped[:n]
			refused(t, s, b, x, "length", n)
		}
	})
	t.Run("OtherKey", func(t *testing.T) { refused(t, other, b, w, "other", 0) })
	t.Run("Generate", func(t *testing.T) {
		g, ok := s.(keystore.Generator)
		if !ok {
			t.Skip("this backend's keys are made here")
		}
		k1, w1, err := g.Generate(ctx, b)
		if err != nil {
			t.Fatal(err)
		}
		k2, _, err := g.Generate(ctx, b)
		if err != nil || bytes.Equal(k1, k2) || len(k1) != keystore.KeySize {
			t.Fatalf("two keys: %x, %x, %v", k1, k2, err)
		}
		got, err := s.Unwrap(ctx, b, w1)
		if err != nil || !bytes.Equal(got, k1) {
			t.Fatalf("%x, %v", got, err)
		}
	})
	t.Run("Ring", func(t *testing.T) { suiteRing(t, s, other) })
}

func suiteRing(t *testing.T, s, other keystore.Store) {
	var volume [16]byte
	rand.Read(volume[:])
	r := keystore.NewRing(volume, []keystore.Store{s, other},
		keystore.RingOptions{Pool: 4, Report: func(err error) { t.Error(err) }})
	defer r.Close()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 4 {
				k, err := r.NewKey(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				for i := range k.Wrapped { // each recipient alone suffices
					got, err := r.Unwrap(t.Context(), k.ID, k.Wrapped[i:i+1])
					if err != nil || !bytes.Equal(got, k.Key) {
						t.Errorf("recipient %d: %x, %v", i, got, err)
					}
				}
			}
		})
	}
	wg.Wait()
	only := keystore.NewRing(volume, []keystore.Store{other}, keystore.RingOptions{})
	defer only.Close()
	b := keystore.Binding{Use: keystore.ForFile, Volume: volume}
	if _, err := only.Unwrap(t.Context(), b.ID,
		[]blockcrypt.Recipient{wrap(t, s, b,
			make([]byte, 32))}); keystore.KindOf(err) != keystore.Untrusted {
		t.Errorf("a recipient that nobody named: %v", err)
	}
}

func wrap(t *testing.T, s keystore.Store, b keystore.Binding, key []byte) blockcrypt.Recipient {
	t.Helper()
	w, err := s.Wrap(context.Background(), b, key)
	if err != nil {
		t.Fatal(err)
	}
	return w
}
