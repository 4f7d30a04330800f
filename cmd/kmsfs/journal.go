//go:build linux && !portable

package main

import (
	"context"
	"log/slog"
	"strings"

	"github.com/coreos/go-systemd/v22/journal" // fields that journalctl can select by
)

// logHandler returns what formats the log: text, or with --log-format json a line of JSON for each event.
// A daemon in the foreground whose stderr is the journal gives it fields instead: KMSFS_AT, KMSFS_ERROR
// and the like.
func (s *session) logHandler(format string) slog.Handler {
	if q, ok := s.out.(*pipeLog); ok && format == "" {
		if yes, err := journal.StderrIsJournalStream(); err == nil && yes && journal.Enabled() {
			return &journalHandler{q: q, volume: s.volume}
		}
	}
	if format == "json" {
		if q, ok := s.out.(*pipeLog); ok {
			q.json = true
		}
		return slog.NewJSONHandler(s.out, nil)
	}
	return slog.NewTextHandler(s.out, nil)
}

// journalHandler is a [slog.Handler] that writes to the journal of systemd.
type journalHandler struct {
	q      *pipeLog
	volume string
	attrs  []slog.Attr
}

// Enabled implements [slog.Handler].
func (h *journalHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

// Handle implements [slog.Handler]. The message has the fields, too, for who reads only that.
func (h *journalHandler) Handle(_ context.Context, r slog.Record) error {
	fields := map[string]string{"KMSFS_VOLUME": h.volume}
	text := strings.Builder{}
	text.WriteString(r.Message)
	add := func(a slog.Attr) bool {
		value := a.Value.Resolve().String()
		fields["KMSFS_"+fieldName(a.Key)] = value
		text.WriteString("; " + a.Key + ": " + value)
		return true
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	priority := journal.PriInfo
	switch {
	case r.Level >= slog.LevelError:
		priority = journal.PriErr
	case r.Level >= slog.LevelWarn:
		priority = journal.PriWarning
	}
	h.q.put(func() {
		if journal.Send(text.String(), priority, fields) != nil {
			h.q.w.Write([]byte(text.String() + "\n"))
		}
	})
	return nil
}

// fieldName is a name that the journal takes: capitals, digits and underscores.
func fieldName(key string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case 'A' <= r && r <= 'Z', '0' <= r && r <= '9':
			return r
		case 'a' <= r && r <= 'z':
			return r - 'a' + 'A'
		}
		return '_'
	}, key)
}

// WithAttrs implements [slog.Handler].
func (h *journalHandler) WithAttrs(as []slog.Attr) slog.Handler {
	more := *h
	more.attrs = append(append([]slog.Attr(nil), h.attrs...), as...)
	return &more
}

// WithGroup implements [slog.Handler]. kmsfs has no groups.
func (h *journalHandler) WithGroup(string) slog.Handler { return h }
