// Package keystore makes, wraps and unwraps data keys. It knows no files.
//
// A [Store] wraps and unwraps for one recipient: a local key, a KMS key, a key of age. The stores
// are in keystore/local, keystore/awskms and keystore/agestore. [Ring] puts the stores that
// a volume trusts together, with a pool of keys made ahead and a cache of
// unwrapped ones. No key is used because somebody's bytes name it: a Ring
// unwraps only through the stores that it was given.
//
// A store's failures are of type [*Error], with a [Kind]. The package writes no log; see
// [RingOptions].Report.
package keystore

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"kmsfs/blockcrypt"
)

// KeySize is the size of a data key in bytes.
const KeySize = 32

// Use says what a data key is for. It is part of what a wrapping is bound to.
type Use string

// The uses.
const (
	ForFile      Use = "file"
	ForBranch    Use = "branch"
	ForVolume    Use = "volume"
	ForDirectory Use = "directory" // shows that a directory's recipients unwrap
)

// A Binding is what a wrapped key is bound to: unwrapping under another fails.
// ID is the file's, the branch's or the directory's, zero for a volume key.
type Binding struct {
	Use    Use
	Volume [16]byte
	ID     [16]byte
}

// A Store wraps and unwraps for one recipient. Its methods may be called by
// several goroutines and end when ctx does; their errors are of type [*Error].
type Store interface {
	// URI names the recipient: scheme:rest, see FORMAT.md.
	URI() string
	// Wrap wraps a key of KeySize bytes.
	Wrap(ctx context.Context, b Binding, key []byte) (blockcrypt.Recipient, error)
	// Unwrap returns the KeySize bytes that were wrapped under b.
	Unwrap(ctx context.Context, b Binding, w blockcrypt.Recipient) ([]byte, error)
}

// A Generator is a Store whose service makes data keys itself.
type Generator interface {
	Generate(ctx context.Context, b Binding) (key []byte, w blockcrypt.Recipient, err error)
}

// A Matcher is a Store that also answers for other URIs: a multi-Region key.
type Matcher interface {
	Matches(uri string) bool
}

// An Immediate is a Store that waits for nobody: a local key.
type Immediate interface {
	Immediate()
}

// A Sealer is a Store that may be able only to wrap, since what unwraps is kept elsewhere.
type Sealer interface {
	OnlySeals() bool
}

// OnlySeals reports whether a store cannot unwrap.
func OnlySeals(s Store) bool {
	x, ok := s.(Sealer)
	return ok && x.OnlySeals()
}

// A Reencrypter is a Store whose service rewraps a data key from another of its keys to this one,
// without showing it to anybody (ReEncrypt of KMS). ok is false if it does not do that for this pair.
type Reencrypter interface {
	Reencrypt(ctx context.Context, b Binding, w blockcrypt.Recipient, from Store) (out blockcrypt.Recipient, ok bool, err error)
}

// A Prover is a Store whose service can tell that it still unwraps a key, without giving it to
// anybody. Of a key under a branch key it is the branch key that is proven.
type Prover interface {
	Prove(ctx context.Context, b Binding, w blockcrypt.Recipient) error
}

// A Keeper is a Store that keeps branch keys in memory for a short time.
type Keeper interface {
	// Known unwraps a key that is under a branch key in memory, and asks no service. ok is false
	// if there is none; then Unwrap asks the service.
	Known(b Binding, w blockcrypt.Recipient) (key []byte, ok bool, err error)
	// Forget wipes the branch keys.
	Forget()
}

// Kind sorts failures by the remedy that they call for. Zero is no kind.
type Kind int

// The kinds, and the errno in which a mounted volume shows each.
const (
	Revoked     Kind = iota + 1 // the key is disabled, deleted or waiting for it: EKEYREVOKED
	Denied                      // the service does not let these credentials use it: EKEYREJECTED
	Credentials                 // expired, or none found: EKEYEXPIRED
	Outage                      // no answer in time, or none that makes sense: ETIMEDOUT
	Untrusted                   // the recipient is one that nobody named: ENOKEY
	Damaged                     // the wrapped key does not unwrap: EIO
	Canceled                    // the caller went away: EINTR
	Invalid                     // the request itself is wrong, such as a key of another type: EIO
)

func (k Kind) String() string {
	return [...]string{"none", "revoked", "denied", "credentials", "outage", "untrusted", "damaged",
		"canceled", "invalid"}[k]
}

// An Error says why a key could not be made, wrapped or unwrapped.
type Error struct {
	Kind      Kind
	URI       string // the recipient
	Op        string // such as "generate", "wrap", "unwrap", "describe"
	RequestID string // the service's, if it gave one
	Hint      string // what to do about it, if that is known
	Answered  bool   // of an outage: the service did answer, and only asks for fewer calls
	Err       error
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%s: %s: %v", e.URI, e.Op, e.Err)
	if e.URI == "" || strings.HasSuffix(e.URI, ":") { // no recipient, or only the kind that it was to be
		s = e.Err.Error()
	}
	if e.RequestID != "" {
		s += " (request " + e.RequestID + ")"
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// KindOf returns the kind of the [*Error] in err's chain, 0 if there is none.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return 0
}
