//go:build linux && !portable

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/agestore"
	"kmsfs/keystore/local"
)

// Changes of a volume's recipients are made by the process that has the volume open for writing: the
// daemon, if it is mounted, else the command itself.

// recipientChange is one change of the list.
type recipientChange struct {
	Op         string `json:"op"`                   // "add", "remove" or "first"
	Key        string `json:"key"`                  // to add: a KEY; else a URI
	Passphrase []byte `json:"passphrase,omitempty"` // of a new passphrase recipient
}

// rewrapRequest is [volume.RewrapOptions] as a daemon is asked.
type rewrapRequest struct {
	From    string `json:"from,omitempty"`
	To      string `json:"to,omitempty"`
	Missing bool   `json:"missing,omitempty"`
	AtOnce  int    `json:"at_once"`
}

// failedFile is a file that could not be changed.
type failedFile struct {
	Path  string `json:"path"`
	Error string `json:"error"`
}

// news is a line of a daemon's answer, while it works and at its end.
type news struct {
	Recipients []string          `json:"recipients,omitempty"`
	Record     *volume.Record    `json:"record,omitempty"`
	URI        string            `json:"uri,omitempty"` // of the recipient that was changed
	Progress   *volume.Rewrapped `json:"progress,omitempty"`
	Rekeyed    *volume.Rekeyed   `json:"rekeyed,omitempty"`
	Path       string            `json:"path,omitempty"` // of ciphertext, or of plaintext
	Failed     *failedFile       `json:"failed,omitempty"`
	Fault      *fault            `json:"fault,omitempty"`
}

// fault is an error as one process tells it another.
type fault struct {
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
	Code    int    `json:"code"`
}

// faultOf makes an error one that another process can be told; nil of nil.
func faultOf(err error) *fault {
	if err == nil {
		return nil
	}
	return &fault{err.Error(), hintOf(err), exitCode(err)}
}

// err is the inverse of faultOf: it has the same hint and exit code.
func (f *fault) err() error {
	if f == nil {
		return nil
	}
	err := error(coded{errors.New(f.Message), f.Code})
	if f.Hint != "" {
		err = hint(err, "%s", f.Hint)
	}
	return err
}

// changed is what a change has made.
type changed struct {
	record *volume.Record // what the trust record should say
	uri    string         // of the recipient
}

// administrator changes a volume.
type administrator interface {
	recipients(ctx context.Context) ([]string, error)
	change(ctx context.Context, c recipientChange) (changed, error)
	rewrap(ctx context.Context, q rewrapRequest, tell func(news)) error
	rekey(ctx context.Context, q rekeyRequest, tell func(news)) error
	reheader(ctx context.Context, q reheaderRequest, tell func(news)) error
	setKeys(ctx context.Context, q setKeyRequest, tell func(news)) (*volume.Record, error)
	close() error
}

// administer calls f with an administrator of the volume in a directory.
func (k *keyFlags) administer(ctx context.Context, dir string, f func(administrator) error) error {
	dir, err := realDir(dir)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	var a administrator
	locked := volume.Writer(dir)
	if e, ok := errors.AsType[*volume.LockedError](locked); ok && !(e.Shared && e.Elsewhere()) {
		a, err = writerOf(dir, locked)
	} else {
		a, err = k.openForChange(ctx, dir)
	}
	if err != nil {
		return err
	}
	return errors.Join(f(a), a.close())
}

// openVolume is a volume that this process has open.
type openVolume struct {
	k *keyFlags
	v *volume.Volume
}

// openForChange opens a volume that is not mounted. Keys of recipients that are not at hand are no
// obstacle: they may be the ones to be replaced.
func (k *keyFlags) openForChange(ctx context.Context, dir string) (administrator, error) {
	m := unlockFlags{keyFlags: *k, incomplete: true}
	u, err := m.unlock(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer u.Close()
	v, err := u.Open(volume.Options{Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		NoPrefetch: true})
	if err != nil {
		return nil, err
	}
	*k = m.keyFlags // with the clients that it has made
	return &openVolume{k, v}, nil
}

func (o *openVolume) recipients(context.Context) ([]string, error) {
	return o.v.Recipients().List(), nil
}

func (o *openVolume) change(ctx context.Context, c recipientChange) (changed, error) {
	return o.k.changeRecipients(ctx, o.v, c)
}

func (o *openVolume) rewrap(ctx context.Context, q rewrapRequest, tell func(news)) error {
	return rewrapVolume(ctx, o.v, q, tell)
}

func (o *openVolume) rekey(ctx context.Context, q rekeyRequest, tell func(news)) error {
	return rekeyVolume(ctx, o.v, q, tell)
}

func (o *openVolume) reheader(ctx context.Context, q reheaderRequest, tell func(news)) error {
	return reheaderVolume(ctx, o.v, q, tell)
}

func (o *openVolume) close() error { return o.v.Close() }

// changeRecipients makes a change, in the process that has the volume open.
func (k *keyFlags) changeRecipients(ctx context.Context, v *volume.Volume,
	c recipientChange) (done changed, err error) {
	defer clear(c.Passphrase)
	rs := v.Recipients()
	switch done.uri = c.Key; c.Op {
	case "add":
		// A passphrase that is there already goes on with a change that was interrupted.
		if s := openedBy(rs.Entries(), c.Passphrase); s != nil {
			done.uri = s.URI()
			done.record, err = rs.Attach(s)
			break
		}
		var s keystore.Store
		if s, err = k.newRecipient(ctx, c); err == nil {
			done.uri = s.URI()
			done.record, err = rs.Add(ctx, s)
		}
	case "remove":
		done.record, err = rs.Remove(ctx, c.Key)
	case "first":
		done.record, err = rs.SetFirst(c.Key)
	default:
		err = fmt.Errorf("the change %q is not known", c.Op)
	}
	return done, err
}

// openedBy returns the store of the recipient that a passphrase opens, nil if there is none.
func openedBy(rs []blockcrypt.Recipient, passphrase []byte) keystore.Store {
	for _, r := range rs {
		if len(passphrase) > 0 && strings.HasPrefix(r.URI, local.PassphraseScheme) {
			if s, err := local.OpenPassphrase(r.URI, r.Branch, passphrase); err == nil {
				return s
			}
		}
	}
	return nil
}

// newRecipient opens the key of a new recipient.
func (k *keyFlags) newRecipient(ctx context.Context, c recipientChange) (keystore.Store, error) {
	if path, ok := strings.CutPrefix(c.Key, local.Scheme); ok {
		return local.OpenFile(path)
	}
	if name, ok := kmsName(c.Key); ok {
		return k.kms().Open(ctx, name)
	}
	if name := strings.TrimPrefix(c.Key, agestore.Scheme); agestore.Named(name) {
		return agestore.New(name)
	}
	if c.Key != passphraseKey {
		return nil, badKey(c.Key)
	}
	return local.NewPassphrase(c.Passphrase)
}

// rewrapVolume rewraps, in the process that has the volume open.
func rewrapVolume(ctx context.Context, v *volume.Volume, q rewrapRequest, tell func(news)) error {
	last := time.Time{}
	done, err := v.Recipients().Rewrap(ctx, volume.RewrapOptions{
		From: q.From, To: q.To, Same: sameKey, Missing: q.Missing, AtOnce: q.AtOnce,
		Progress: func(d volume.Rewrapped) {
			if time.Since(last) > 200*time.Millisecond {
				last = time.Now()
				tell(news{Progress: &d})
			}
		},
		Failed: func(at string, err error) { tell(news{Failed: &failedFile{at, err.Error()}}) },
	})
	tell(news{Progress: &done, Record: done.Record})
	return err
}

// mountDaemon is the daemon of a mounted volume.
type mountDaemon struct{ dev string }

// writerOf finds the daemon that has a volume open for writing; locked says that there is one.
func writerOf(dir string, locked error) (administrator, error) {
	ms, err := mounts()
	if err != nil {
		return nil, err
	}
	for _, m := range ms {
		writes := !strings.HasPrefix(m.options+",", "ro,")
		if m.fstype == "fuse.kmsfs" && m.source == dir && writes {
			return &mountDaemon{m.dev}, nil
		}
	}
	return nil, locked
}

// ask sends a request to the daemon, and calls tell with each line of its answer.
func (d *mountDaemon) ask(ctx context.Context, method, what string, body any, tell func(news)) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	defer clear(b) // it can have a passphrase
	err = converse(ctx, d.dev, question{method, what, bytes.NewReader(b)}, func(r io.Reader) error {
		for dec := json.NewDecoder(r); ; {
			var n news
			switch err := dec.Decode(&n); {
			case errors.Is(err, io.EOF):
				return nil
			case ctx.Err() != nil:
				return ctx.Err()
			case err != nil:
				return fmt.Errorf("the daemon's answer breaks off: %w", err)
			}
			if n.Fault != nil {
				return n.Fault.err()
			}
			tell(n)
		}
	})
	if errors.Is(err, errNoAnswer) && ctx.Err() == nil {
		err = hint(errors.New("the volume is mounted, and the daemon of the mount does not answer here"), "ask as the user who mounted it, or unmount it first")
	}
	return err
}

func (d *mountDaemon) recipients(ctx context.Context) (out []string, err error) {
	err = d.ask(ctx, http.MethodGet, "recipients", nil, func(n news) { out = n.Recipients })
	return out, err
}

// change makes the daemon change the recipients. Without the trust record in its answer, what it has
// done is not known to be whole.
func (d *mountDaemon) change(ctx context.Context, c recipientChange) (done changed, err error) {
	err = d.ask(ctx, http.MethodPost, "recipients", c, func(n news) { done = changed{n.Record, n.URI} })
	if err == nil && done.record == nil {
		err = errors.New("the daemon's answer lacks the trust record")
	}
	return done, err
}

func (d *mountDaemon) rewrap(ctx context.Context, q rewrapRequest, tell func(news)) error {
	return d.ask(ctx, http.MethodPost, "rewrap", q, tell)
}

func (d *mountDaemon) rekey(ctx context.Context, q rekeyRequest, tell func(news)) error {
	return d.ask(ctx, http.MethodPost, "rekey", q, tell)
}

func (d *mountDaemon) reheader(ctx context.Context, q reheaderRequest, tell func(news)) error {
	return d.ask(ctx, http.MethodPost, "reheader", q, tell)
}

func (d *mountDaemon) close() error { return nil }

// maxChange is how long a change of the recipients may be, in bytes.
const maxChange = 1 << 20

// serveChanges answers these requests, in the daemon.
func (c *control) serveChanges(mux *http.ServeMux) {
	answer := func(f func(r *http.Request, tell func(news)) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			tell := func(n news) {
				json.NewEncoder(w).Encode(n)
				http.NewResponseController(w).Flush()
			}
			if err := f(r, tell); err != nil {
				tell(news{Fault: faultOf(err)})
			}
		}
	}
	mux.HandleFunc("GET /recipients", answer(func(_ *http.Request, tell func(news)) error {
		tell(news{Recipients: c.v.Recipients().List()})
		return nil
	}))
	mux.HandleFunc("POST /recipients", answer(func(r *http.Request, tell func(news)) error {
		b, err := io.ReadAll(io.LimitReader(r.Body, maxChange))
		if err != nil {
			return err
		}
		defer clear(b) // it can have a passphrase
		var q recipientChange
		if err := json.Unmarshal(b, &q); err != nil {
			return err
		}
		done, err := c.keys.changeRecipients(r.Context(), c.v, q)
		if err == nil {
			c.log.Info("the recipients of the volume were changed", "change", q.Op, "key", done.uri)
			tell(news{Record: done.record, URI: done.uri})
		}
		return err
	}))
	mux.HandleFunc("POST /setkey", answer(func(r *http.Request, tell func(news)) error {
		var q setKeyRequest
		if err := json.NewDecoder(io.LimitReader(r.Body, maxChange)).Decode(&q); err != nil {
			return err
		}
		rec, err := setDirectoryKeys(r.Context(), c.keys, c.v, q, tell)
		if err == nil {
			c.log.Info("the keys of a directory were changed", "path", q.Path)
			tell(news{Record: rec})
		}
		return err
	}))
	mux.HandleFunc("POST /rewrap", answer(func(r *http.Request, tell func(news)) error {
		var q rewrapRequest
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
			return err
		}
		return rewrapVolume(r.Context(), c.v, q, tell)
	}))
	mux.HandleFunc("POST /reheader", answer(func(r *http.Request, tell func(news)) error {
		var q reheaderRequest
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
			return err
		}
		return reheaderVolume(r.Context(), c.v, q, tell)
	}))
	mux.HandleFunc("POST /path", answer(func(r *http.Request, tell func(news)) error {
		var q rekeyRequest
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
			return err
		}
		n, forget, err := nodeOf(r.Context(), c.v, q)
		if err != nil {
			return err
		}
		defer forget()
		if q.Cipher {
			tell(news{Path: n.PlainPath()})
		} else {
			tell(news{Path: n.CipherPath()})
		}
		return nil
	}))
	mux.HandleFunc("POST /rekey", answer(func(r *http.Request, tell func(news)) error {
		var q rekeyRequest
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
			return err
		}
		return rekeyVolume(r.Context(), c.v, q, tell)
	}))
}

// progressLine shows a line on the terminal that the next one replaces; nothing without a terminal.
type progressLine struct{ shown bool }

// show replaces the line.
func (p *progressLine) show(format string, args ...any) {
	if term.IsTerminal(int(os.Stderr.Fd())) {
		fmt.Fprintf(os.Stderr, "\r\x1b[K"+format, args...)
		p.shown = true
	}
}

// clear takes the line away, before something else is printed.
func (p *progressLine) clear() {
	if p.shown {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
}

// updateRecord writes the trust record after a change; path is that of a key file that was added.
func updateRecord(rec *volume.Record, dir, uri, path string) error {
	unlock, err := lockState()
	if err != nil {
		return err
	}
	defer unlock()
	old, err := readRecord(rec.Volume)
	if err != nil {
		return err
	}
	if old != nil {
		if old.Commitment == rec.Commitment && old.Generation > rec.Generation {
			rec.Recipients, rec.Generation = old.Recipients, old.Generation // of a change that came later
		}
		rec.Local, rec.Locals = old.Local, old.Locals
	}
	if path != "" {
		rec.SetLocal(uri, path)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	return writeRecord(rec, dir)
}
