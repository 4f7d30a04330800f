package keystore

import (
	"context"
	"errors"
	"slices"

	"kmsfs/blockcrypt"
)

// Rewrap wraps the data key of a file, which a recipient of the ring from unwraps, for another
// recipient, which r trusts. Where the service of both can do it the key stays there. Else it comes
// here, and must be the file's.
func (r *Ring) Rewrap(ctx context.Context, from *Ring, h *blockcrypt.Header, to string) (blockcrypt.Recipient, error) {
	b := Binding{ForFile, r.volume, h.File}
	ctx = WithPurpose(ctx, ForRewrap)
	stores, sealers := r.trusted()
	var s Store
	if x := StoreFor(sealers, to); x != nil {
		s = x
	} else if x := StoreFor(stores, to); x != nil {
		s = r.wraps(x)
		if re, ok := x.Store.(Reencrypter); ok {
			for _, c := range from.candidates(h.Recipients) {
				w, ok, err := re.Reencrypt(ctx, b, c.w, c.s.Store)
				if ok && (err == nil || KindOf(err) == Canceled) {
					return w, err // else Decrypt and Encrypt may be allowed, or another recipient may work
				}
			}
		}
	} else {
		return blockcrypt.Recipient{}, &Error{Kind: Untrusted, URI: to, Op: "wrap",
			Err: errors.New("the volume does not name this recipient")}
	}
	key, err := from.Unwrap(ctx, h.File, h.Recipients)
	if err != nil {
		return blockcrypt.Recipient{}, err
	}
	defer clear(key)
	if _, err := h.Unlock(key); err != nil {
		return blockcrypt.Recipient{}, err
	}
	return s.Wrap(ctx, b, key)
}

// Opens reports whether a recipient among these is trusted, can unwrap, and is not about to go.
func (r *Ring) Opens(ws []blockcrypt.Recipient) bool {
	cs := r.candidates(ws)
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(cs, func(c candidate) bool { return !c.s.retiring })
}

// Good reports whether a recipient among these is trusted, and its key is not known to be lost.
func (l *lease) Good(ws []blockcrypt.Recipient) bool {
	r := l.r
	cs := r.candidates(ws)
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.suspended == nil && slices.ContainsFunc(cs, func(c candidate) bool { return c.s.wrong() == nil })
}

// StillUnwraps reports whether the service of a recipient still takes a wrapped key, without the right to
// see it.
func (r *Ring) StillUnwraps(ctx context.Context, file [16]byte, ws []blockcrypt.Recipient) bool {
	ctx = WithPurpose(ctx, ForRewrap)
	for _, c := range r.candidates(ws) {
		if p, ok := c.s.Store.(Prover); ok && p.Prove(ctx, Binding{ForFile, r.volume, file}, c.w) == nil {
			return true
		}
	}
	return false
}
