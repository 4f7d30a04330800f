package keystore_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"testing"

	"kmsfs/keystore"
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
func (s labeled) Wrap(context.Context, keystore.Binding, []byte) (keystore.Wrapped, error) {
	return keystore.Wrapped{}, s.fault("wrap")
}

func (s labeled) Unwrap(context.Context, keystore.Binding, keystore.Wrapped) ([]byte, error) {
	if s.err != nil {
		return nil, s.fault("unwrap")
	}
	return s.key(), nil
}

func TestStoreFor(t *testing.T) {
	a, b := labeled{uri: "a:", also: "c:"}, labeled{uri: "c:", also: "d:"}
	stores := []keystore.Store{a, b}
	for uri, want := range map[string]keystore.Store{"a:": a, "c:": b, "d:": b, "x:": nil} { // its own before a replica's
		if got := keystore.StoreFor(stores, uri); got != want {
			t.Errorf("%s: %v", uri, got)
		}
	}
}

func TestUnwrapFirst(t *testing.T) {
	denied := errors.New("denied")
	good, bad, worse := labeled{uri: "g:"}, labeled{uri: "b:", err: denied}, labeled{uri: "w:", err: errors.New("worse")}
	ws := func(uris ...string) (out []keystore.Wrapped) {
		for _, u := range uris {
			out = append(out, keystore.Wrapped{URI: u})
		}
		return out
	}
	for name, c := range map[string]struct {
		stores []keystore.Store
		ws     []keystore.Wrapped
		key    []byte
		kind   keystore.Kind
		err    error
	}{
		"the first that can":      {[]keystore.Store{bad, good}, ws("x:", "b:", "g:"), good.key(), 0, nil},
		"the first one's refusal": {[]keystore.Store{worse, bad}, ws("b:", "w:"), nil, keystore.Denied, denied},
		"none is at hand":         {[]keystore.Store{good}, ws("x:", "y:"), nil, keystore.Untrusted, nil},
		"no recipient":            {[]keystore.Store{good}, nil, nil, keystore.Untrusted, nil},
	} {
		key, err := keystore.UnwrapFirst(t.Context(), c.stores, keystore.Binding{}, c.ws)
		if !bytes.Equal(key, c.key) || keystore.KindOf(err) != c.kind || c.err != nil && !errors.Is(err, c.err) {
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
		r := keystore.NewRing([16]byte{1}, []keystore.Store{verdict("a:", c.first), verdict("b:", c.second)}, keystore.RingOptions{})
		_, err := r.Unwrap(t.Context(), [16]byte{2}, []keystore.Wrapped{{URI: "a:"}, {URI: "b:"}})
		if keystore.KindOf(err) != c.want {
			t.Errorf("%v and %v: %v", c.first, c.second, err)
		}
		r.Close()
	}
}
