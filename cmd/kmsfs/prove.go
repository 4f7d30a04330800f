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
	"kmsfs/keystore/local"
)

// proof is what kmsfs inventory --prove has found of one key's wrapped data keys.
type proof struct {
	Proven   int64 `json:"proven"`
	Refused  int64 `json:"refused"`
	Unproven int64 `json:"unproven"` // nobody could be asked
}

// proveAtOnce is how many wrapped keys are proven at the same time.
const proveAtOnce = 64

// prover proves the wrapped keys of files, several at the same time.
type prover struct {
	f     *inventoryFlags
	jobs  chan proveJob
	wg    sync.WaitGroup
	trust map[blockcrypt.ID]*volume.Record // of volumes

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
func (f *inventoryFlags) newProver(ctx context.Context) *prover {
	p := &prover{f: f, jobs: make(chan proveJob, 4*proveAtOnce),
		trust: map[blockcrypt.ID]*volume.Record{}, stores: map[string]keystore.Store{},
		branches: map[string]func() error{}, byURI: map[string]*proof{}}
	for range proveAtOnce {
		p.wg.Go(func() {
			for j := range p.jobs {
				p.prove(ctx, j)
			}
		})
	}
	return p
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
	var s keystore.Store
	var err error
	if !strings.HasPrefix(r.URI, local.PassphraseScheme) && (len(p.f.keys) > 0 || rec.Trusts(r.URI)) {
		var ss []keystore.Store
		ss, err = p.f.trusted(ctx, []blockcrypt.Recipient{r}, rec)
		if len(ss) > 0 {
			s = ss[0]
		}
	}
	if c, ok := errors.AsType[coded](err); ok && c.code == exitKey {
		err = nil // --key names another key
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
	case !asked:
		n.Unproven++
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
