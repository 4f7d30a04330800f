//go:build linux && !portable

package volume

import (
	"errors"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// reports writes faults to the log, each once.
type reports struct {
	log *slog.Logger

	mu    sync.Mutex
	last  map[string]time.Time // when each fault was logged
	kinds map[string]uint64    // how many were logged, by the class of damage or the kind of a key service's failure
}

// reportAgain is when the failure of a key service, or a full disk, is told again: it may be
// another one.
const reportAgain = time.Minute

// fault logs a fault once for each what and error, a key service's and that of a full disk, which
// every file has, once for all and again after a while. When it returns the log has it, whoever
// wrote it.
func (r *reports) fault(what, msg string, err error) {
	e, ok := errors.AsType[*keystore.Error](err)
	if ok && (e.Kind == keystore.Canceled || e == errSuspended) { // no faults
		return
	}
	key, again, hint := what+"\x00"+err.Error(), false, ""
	switch {
	case ok: // the text has the number of the request
		key, again, hint = what+"\x00"+e.URI+"\x00"+e.Op+"\x00"+e.Kind.String(), true, e.Hint
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		key, again = msg+"\x00"+err.Error(), true
		hint = "free space on the disk of the ciphertext directory; other files may have failed too"
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if t, known := r.last[key]; known && (!again || time.Since(t) < reportAgain) {
		return
	}
	if len(r.last) >= 10000 || r.last == nil {
		r.last = map[string]time.Time{}
	}
	r.last[key] = time.Now()
	if r.kinds == nil {
		r.kinds = map[string]uint64{}
	}
	r.kinds[kindOf(err)]++
	attrs := []any{"at", what, "error", err}
	if ok {
		attrs = append(attrs, "kind", e.Kind.String())
	}
	if hint != "" {
		attrs = append(attrs, "hint", hint)
	}
	r.log.Error(msg, attrs...)
}

// kindOf sorts a fault: by the class of damage, by the kind of a key service's failure, or "other".
func kindOf(err error) string {
	if c := blockcrypt.ClassOf(err); c != "" {
		return "damage-" + string(c)
	}
	if k := keystore.KindOf(err); k != 0 {
		return "key-" + k.String()
	}
	return "other"
}

// report logs a fault, see [reports.fault].
func (v *Volume) report(what, msg string, err error) { v.reports.fault(what, msg, err) }
