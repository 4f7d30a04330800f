package keystore

import (
	"context"
	"sync"
)

// Purpose is what a call to a key service is made for, the most urgent first.
type Purpose int

// The purposes. A service's log tells them apart: see keystore/awskms.
const (
	ForLease    Purpose = iota // to see that the key may still be used: seldom, and not to be late
	ForOpen                    // a program waits for a file's key
	ForCreate                  // a program waits for a new key
	ForPool                    // new keys made ahead
	ForPrefetch                // files that a program is likely to open next
	ForRewrap
	Purposes int = iota // how many there are
)

func (p Purpose) String() string {
	return [...]string{"lease", "open", "create", "pool", "prefetch", "rewrap"}[p]
}

type purposeKey struct{}

// WithPurpose says what calls under the context are made for; without, it is
// [ForOpen].
func WithPurpose(ctx context.Context, p Purpose) context.Context {
	return context.WithValue(ctx, purposeKey{}, p)
}

type raisedKey struct{}

// WithRaise is [WithPurpose] for calls that a program may come to wait for: raise
// makes their purpose [ForOpen].
func WithRaise(ctx context.Context, p Purpose) (_ context.Context, raise func()) {
	c := make(chan struct{})
	return context.WithValue(WithPurpose(ctx, p), raisedKey{}, c), sync.OnceFunc(func() { close(c) })
}

// Raised returns a channel that is closed when the purpose of calls under ctx is
// raised, nil if it cannot be.
func Raised(ctx context.Context) <-chan struct{} {
	c, _ := ctx.Value(raisedKey{}).(chan struct{})
	return c
}

// PurposeOf returns what calls under ctx are made for.
func PurposeOf(ctx context.Context) Purpose {
	select {
	case <-Raised(ctx):
		return ForOpen
	default:
	}
	if p, ok := ctx.Value(purposeKey{}).(Purpose); ok {
		return p
	}
	return ForOpen
}
