//go:build linux && !portable

package volume

import (
	"sync"
	"time"
)

// absentFor is how long a name that was taken away is known to be absent. The kernel believes an answer
// that a name is absent for longer.
const absentFor = time.Second

// mostAbsent bounds the names that are remembered of a directory.
const mostAbsent = 64

// absent are the names of a directory that a rename or an unlink of this mount took away just now.
// Programs ask for such a name again at once: that of a lock, a journal or a temporary file. Looking it
// up waits for no disk then.
//
// Names come in while the directory's entries are held alone, so that nobody makes one meanwhile.
type absent struct {
	mu    sync.Mutex
	names map[string]time.Time // of ciphertext, with the time at which they went
}

// gone notes that a name was taken away. The directory's entries are held for writing.
func (a *absent) gone(cname string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.names) >= mostAbsent || a.names == nil {
		a.names = map[string]time.Time{}
	}
	a.names[cname] = time.Now()
}

// is reports whether a name is known to be absent. The directory's entries are held.
func (a *absent) is(cname string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	at, ok := a.names[cname]
	return ok && time.Since(at) < absentFor
}

// comes notes that a name is about to be made. The directory's entries are held.
func (a *absent) comes(cname string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.names, cname)
}
