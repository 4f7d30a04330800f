package volume

import (
	"errors"
	"log/slog"
	"sync"
	"time"

	"kmsfs/keystore"
)

// reports writes faults to the log, each once.
type reports struct {
	log *slog.Logger

	mu   sync.Mutex
	last map[string]time.Time // when each fault was logged
}

// reportAgain is when a key service's failure is told again: it may be another one.
const reportAgain = time.Minute

// fault logs a fault once for each what and error, a key service's again after a
// while. When it returns the log has it, whoever wrote it.
func (r *reports) fault(what, msg string, err error) {
	e, ok := errors.AsType[*keystore.Error](err)
	if ok && (e.Kind == keystore.Canceled || e == errSuspended) { // no faults
		return
	}
	key := what + "\x00" + err.Error()
	if ok { // the text has the number of the request
		key = what + "\x00" + e.URI + "\x00" + e.Op + "\x00" + e.Kind.String()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if t, known := r.last[key]; known && (!ok || time.Since(t) < reportAgain) {
		return
	}
	if len(r.last) >= 10000 || r.last == nil {
		r.last = map[string]time.Time{}
	}
	r.last[key] = time.Now()
	attrs := []any{"at", what, "error", err}
	if ok {
		attrs = append(attrs, "kind", e.Kind.String())
		if e.Hint != "" {
			attrs = append(attrs, "hint", e.Hint)
		}
	}
	r.log.Error(msg, attrs...)
}
