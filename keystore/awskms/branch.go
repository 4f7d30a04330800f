package awskms

import (
	"bytes"
	"context"
	"time"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// asked is a call for a branch key that is under way.
type asked struct {
	done chan struct{} // closed at its end
	err  error
}

// branchKey is an unwrapped branch key. It is good for a short time only: no use of it asks KMS
// whether it is still allowed.
type branchKey struct {
	key []byte
	at  time.Time
}

const (
	maxBranches = 256
	branchAge   = time.Minute
)

// Known implements [keystore.Keeper].
func (s *Store) Known(b keystore.Binding, w blockcrypt.Recipient) (key []byte, ok bool, err error) {
	s.mu.Lock()
	kek := s.kept(branchID(b.Volume, w.Branch))
	s.mu.Unlock()
	if kek == nil {
		return nil, false, nil
	}
	key, err = s.under(kek, b, w)
	return key, true, err
}

// under unwraps a key that is wrapped under a branch key, which it wipes.
func (s *Store) under(kek []byte, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	defer clear(kek)
	key, err := keystore.UnwrapLocal(kek, b, [16]byte(w.Branch), w.Wrapped)
	if err != nil {
		return nil, &keystore.Error{Kind: keystore.Damaged, URI: s.URI(), Op: "unwrap", Err: err}
	}
	return key, nil
}

func branchID(volume [16]byte, branch []byte) string { return string(volume[:]) + string(branch) }

// kept returns a copy of a branch's key, nil if it is not in memory. mu is held.
func (s *Store) kept(id string) []byte {
	if k := s.branches[id]; k.key != nil && time.Since(k.at) < branchAge {
		return bytes.Clone(k.key)
	}
	return nil
}

// branchKey returns a copy of a branch's key: that in memory, or it asks for it.
func (s *Store) branchKey(ctx context.Context, volume [16]byte, branch []byte) ([]byte, error) {
	id := branchID(volume, branch)
	for {
		s.mu.Lock()
		if k := s.kept(id); k != nil {
			s.mu.Unlock()
			return k, nil
		}
		c := s.asking[id]
		if c == nil {
			break // with mu
		}
		s.mu.Unlock()
		select { // many files that are opened at the same time cost one call
		case <-c.done:
			if c.err != nil && keystore.KindOf(c.err) != keystore.Canceled {
				return nil, c.err
			}
		case <-ctx.Done():
			return nil, &keystore.Error{Kind: keystore.Canceled, URI: s.URI(), Op: "unwrap", Err: ctx.Err()}
		}
	}
	c, forgot := &asked{done: make(chan struct{})}, s.forgot
	s.asking[id] = c
	s.mu.Unlock()
	b := keystore.Binding{Use: keystore.ForBranch, Volume: volume, ID: [16]byte(branch)}
	key, err := s.decrypt(ctx, b, branch[16:])
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.asking, id)
	c.err = err
	close(c.done)
	if err != nil {
		return nil, err
	}
	if s.forgot != forgot { // meanwhile: it is for this call alone
		return key, nil
	}
	clear(s.branches[id].key)
	if len(s.branches) >= maxBranches {
		s.forget()
	}
	s.branches[id] = branchKey{bytes.Clone(key), time.Now()}
	return key, nil
}

// Forget implements [keystore.Keeper].
func (s *Store) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgot++
	s.forget()
}

// forget is Forget; mu is held.
func (s *Store) forget() {
	for _, k := range s.branches {
		clear(k.key)
	}
	clear(s.branches)
}
