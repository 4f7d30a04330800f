//go:build linux && !portable

package volume

import "context"

// Waits is told when a call is about to wait, so that who handles requests can let somebody else
// go on with the next one.
type Waits interface {
	ForKey()  // for a key service
	ForDisk() // perhaps for the disk: a read of data that is not in the page cache
	Behind()  // for another call of the same file: how long it takes says nothing about the disk
}

// WaitsKey is the key of a context value of type [Waits].
type WaitsKey struct{}

// waitsOf returns the Waits of a context, which may have none.
func waitsOf(ctx context.Context) Waits {
	if w, ok := ctx.Value(WaitsKey{}).(Waits); ok {
		return w
	}
	return nobody{}
}

type nobody struct{}

func (nobody) ForKey()  {}
func (nobody) ForDisk() {}
func (nobody) Behind()  {}

// rlock takes mu for reading, and tells if it waits for another call.
func (f *file) rlock(ctx context.Context) {
	if !f.mu.TryRLock() {
		waitsOf(ctx).Behind()
		f.mu.RLock()
	}
}
