//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/awskms"
	"kmsfs/keystore/local"
)

// proof is what kmsfs inventory --prove has found of one key's wrapped data keys.
type proof struct {
	Proven   int64 `json:"proven"`
	Refused  int64 `json:"refused"`  // the key is switched off, or does not unwrap it
	Unproven int64 `json:"unproven"` // the key was not named, or denied, or did not answer
	Unasked  int64 `json:"unasked"`  // of an age recipient or a passphrase: there is no service to ask
}

// proveAtOnce is how many wrapped keys are proven at the same time.
const proveAtOnce = 64

// prover proves the wrapped keys of files, several at the same time.
type prover struct {
	f     *inventoryFlags
	jobs  chan proveJob
	wg    sync.WaitGroup
	trust map[blockcrypt.ID]*volume.Record // of volumes
	named []keystore.Store                 // by --key

	mu       sync.Mutex // guards the fields below
	stores   map[string]keystore.Store
	branches map[string]func() error // by recipient and branch: one proof is for all its files
	byURI    map[string]*proof
	failed   []failedFile // the first of them
}

type proveJob struct {
	path string
	hdr  *blockcrypt.Header
	r    blockcrypt.Recipient
}

// newProver begins the proofs; done ends them.
func (f *inventoryFlags) newProver(ctx context.Context) (*prover, error) {
	ctx = keystore.WithPurpose(ctx, keystore.ForRewrap)
	p := &prover{f: f, jobs: make(chan proveJob, 4*proveAtOnce),
		trust: map[blockcrypt.ID]*volume.Record{}, stores: map[string]keystore.Store{},
		branches: map[string]func() error{}, byURI: map[string]*proof{}}
	for _, key := range f.keys {
		if key == passphraseKey {
			return nil, usageError{errors.New("--prove asks key services, and key files: not a passphrase"),
				"kmsfs inventory"}
		}
		s, err := f.opened(ctx, key, nil)
		if err != nil {
			return nil, err
		}
		p.named = append(p.named, s)
	}
	for range proveAtOnce {
		p.wg.Go(func() {
			for j := range p.jobs {
				p.prove(ctx, j)
			}
		})
	}
	return p, nil
}

// add takes the wrapped keys of a file. It is called by one goroutine at a time.
func (p *prover) add(ctx context.Context, path string, hdr *blockcrypt.Header) error {
	for _, r := range hdr.Recipients {
		if err := p.open(ctx, hdr.Volume, r); err != nil {
			return err
		}
		p.jobs <- proveJob{path, hdr, r}
	}
	return nil
}

func (p *prover) done() {
	close(p.jobs)
	p.wg.Wait()
}

// open opens the store of a recipient, if the user named it or a trust record vouches for it: a
// header can name any key.
func (p *prover) open(ctx context.Context, id blockcrypt.ID, r blockcrypt.Recipient) error {
	p.mu.Lock()
	_, known := p.stores[r.URI]
	p.mu.Unlock()
	if known {
		return nil
	}
	rec, known := p.trust[id]
	if !known {
		var err error
		if rec, err = readRecord(id); err != nil {
			return err
		}
		p.trust[id] = rec
	}
	s := keystore.StoreFor(p.named, r.URI)
	var err error
	if len(p.named) == 0 && hasService(r.URI) && rec.Trusts(r.URI) {
		s, err = p.f.keyFlags.open(ctx, r, rec)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stores[r.URI] = s
	return err
}

func (p *prover) prove(ctx context.Context, j proveJob) {
	p.mu.Lock()
	s := p.stores[j.r.URI]
	p.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	b := keystore.Binding{Use: keystore.ForFile, Volume: j.hdr.Volume, ID: j.hdr.File}
	var err error
	asked := true
	if x, ok := s.(keystore.Prover); ok {
		err = p.once(j.r, func() error { return x.Prove(ctx, b, j.r) })
	} else if s != nil {
		var key []byte
		if key, err = s.Unwrap(ctx, b, j.r); err == nil {
			_, err = j.hdr.Unlock(key)
			clear(key)
		}
	} else {
		asked = false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.byURI[j.r.URI]
	if n == nil {
		n = &proof{}
		p.byURI[j.r.URI] = n
	}
	kind := keystore.KindOf(err)
	switch {
	case !asked && hasService(j.r.URI):
		n.Unproven++
	case !asked:
		n.Unasked++
	case err == nil:
		n.Proven++
	case kind == keystore.Damaged || kind == keystore.Revoked || kind == 0:
		n.Refused++
	default:
		n.Unproven++
	}
	if err != nil && len(p.failed) < mostErrors {
		p.failed = append(p.failed, failedFile{j.path, err.Error()})
	}
}

// hasService reports whether a recipient's wrapped keys can be proven without a person: by a service,
// or by a key file.
func hasService(uri string) bool {
	return strings.HasPrefix(uri, awskms.Scheme) || strings.HasPrefix(uri, local.Scheme)
}

// once proves a branch key one time for all the files under it.
func (p *prover) once(r blockcrypt.Recipient, prove func() error) error {
	if len(r.Branch) == 0 {
		return prove()
	}
	id := r.URI + "\x00" + string(r.Branch)
	p.mu.Lock()
	f := p.branches[id]
	if f == nil {
		f = sync.OnceValue(prove)
		p.branches[id] = f
	}
	p.mu.Unlock()
	return f()
}

// verdict says what was not proven.
func (p *prover) verdict() error {
	var refused, unproven int64
	for _, n := range p.byURI {
		refused, unproven = refused+n.Refused, unproven+n.Unproven
	}
	switch {
	case refused > 0:
		return coded{fmt.Errorf("%d wrapped keys are not good any more", refused), exitDamaged}
	case unproven > 0:
		return hint(coded{fmt.Errorf("%d wrapped keys could not be proven", unproven), exitUnchecked},
			"a key is proven if --key or the trust record names it, and AWS lets you call ReEncrypt from it and to it")
	}
	return nil
}
