package keystore

import (
	"bytes"
	"context"
	"crypto/rand"
	"time"

	"kmsfs/blockcrypt"
)

// Branch keys. A service is asked for a key once in a while, and the data keys of many files are
// wrapped under it here (FORMAT.md, "Recipients"). Each file has the wrapped branch key beside its
// own, so that it opens by itself.

// branchFiles is how many files one branch key wraps at most.
const branchFiles = 1 << 16

// branch is the branch key of a store for new files. Its key is wiped when the ring's keys are.
type branch struct {
	busy chan struct{} // of one: taken by the call that makes the next key

	// Guarded by Ring.mu.
	id    [16]byte
	key   []byte // nil: the next file needs a new one
	blob  []byte // the key as its store has wrapped it
	made  time.Duration
	files int
}

// wipe ends the use of the key. Ring.mu is held.
func (b *branch) wipe() {
	clear(b.key)
	b.key = nil
}

// brancher wraps for a store under its branch key.
type brancher struct {
	r *Ring
	s *standing
}

func (b brancher) URI() string { return b.s.URI() }

// Matches implements [Matcher].
func (b brancher) Matches(uri string) bool { return Serves(b.s.Store, uri) }

func (b brancher) Unwrap(ctx context.Context, x Binding, w blockcrypt.Recipient) ([]byte, error) {
	return watched(b).Unwrap(ctx, x, w)
}

// Wrap asks the service only if there is no branch key that may go on to be used.
func (b brancher) Wrap(ctx context.Context, x Binding, key []byte) (blockcrypt.Recipient, error) {
	kek, id, blob, err := b.take(ctx)
	if err != nil {
		return blockcrypt.Recipient{}, err
	}
	defer clear(kek)
	wrapped, err := WrapLocal(kek, x, id, key)
	if err != nil {
		return blockcrypt.Recipient{}, &Error{Kind: Invalid, URI: b.URI(), Op: "wrap", Err: err}
	}
	return blockcrypt.Recipient{URI: b.URI(), Branch: append(id[:], blob...), Wrapped: wrapped}, nil
}

// take returns a copy of the branch key for one more file, a new one if need be.
func (b brancher) take(ctx context.Context) (kek []byte, id [16]byte, blob []byte, err error) {
	r, x := b.r, &b.s.branch
	if kek, id, blob = b.current(); kek != nil {
		return kek, id, blob, nil
	}
	select {
	case x.busy <- struct{}{}:
		defer func() { <-x.busy }()
	case <-ctx.Done():
		return nil, id, nil, &Error{Kind: Canceled, URI: b.URI(), Op: "generate", Err: ctx.Err()}
	}
	if kek, id, blob = b.current(); kek != nil { // another was faster
		return kek, id, blob, nil
	}
	rand.Read(id[:])
	kek, w, err := watched(b).Generate(ctx, Binding{ForBranch, r.volume, id})
	if err != nil {
		return nil, id, nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	x.wipe()
	if r.verdict() == nil && r.ctx.Err() == nil { // else it is for this file alone
		x.id, x.key, x.blob, x.made, x.files = id, bytes.Clone(kek), w.Wrapped, r.o.now(), 1
	}
	return kek, id, w.Wrapped, nil
}

// current returns a copy of the key that is used now, nil if there is none or it has had its time.
func (b brancher) current() (kek []byte, id [16]byte, blob []byte) {
	r, x := b.r, &b.s.branch
	r.mu.Lock()
	defer r.mu.Unlock()
	if x.key == nil || r.o.now()-x.made >= r.o.Branches || x.files >= branchFiles {
		return nil, id, nil
	}
	x.files++
	return bytes.Clone(x.key), x.id, x.blob
}

// wraps returns what wraps new keys for a store.
func (r *Ring) wraps(s *standing) Store {
	if r.o.Branches > 0 && generates(s.Store) {
		return brancher{r, s}
	}
	return watched{r, s}
}
