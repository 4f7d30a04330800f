package keystore

import (
	"context"
	"errors"

	"kmsfs/blockcrypt"
)

// Serves reports whether a store unwraps what was wrapped for a recipient: its own URI, or that
// of a replica of its key.
func Serves(s Store, uri string) bool {
	m, ok := s.(Matcher)
	return s.URI() == uri || ok && m.Matches(uri)
}

// StoreFor returns the store of a recipient: the one with this URI, else one that serves it, nil
// if there is none.
func StoreFor[S Store](stores []S, uri string) (none S) {
	for _, s := range stores {
		if s.URI() == uri {
			return s
		}
	}
	for _, s := range stores {
		if Serves(s, uri) {
			return s
		}
	}
	return none
}

// UnwrapFirst unwraps a key through the first recipient whose store is among these and can. The
// error is that of the first one that failed, or [Untrusted] if no store serves any of them.
func UnwrapFirst(ctx context.Context, stores []Store, b Binding,
	ws []blockcrypt.Recipient) ([]byte, error) {
	var first error
	for _, w := range ws {
		s := StoreFor(stores, w.URI)
		if s == nil {
			continue
		}
		key, err := s.Unwrap(ctx, b, w)
		if err == nil {
			return key, nil
		}
		if first == nil {
			first = err
		}
	}
	if first != nil {
		return nil, first
	}
	uri := ""
	if len(ws) > 0 {
		uri = ws[0].URI
	}
	return nil, &Error{Kind: Untrusted, URI: uri, Op: "unwrap",
		Err: errors.New("no key at hand is one that opens this")}
}
