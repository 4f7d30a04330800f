package awskms

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"kmsfs/keystore"
)

const (
	renewAgain   = 15 * time.Second // after a renewal that failed, or brought nothing new
	reloadPause  = 10 * time.Second // a reload that a refusal asks for, at most so often
	clockIsWrong = 4 * time.Minute
)

// source gives the credentials. They are renewed early; if that fails the old ones are used
// while they last.
//
// A service that gives them can be silent for ever, and the SDK does not ask again while it
// waits. So after a silence for which no answer can be hoped (a credential_process has a
// minute) the chain is made again, as it is when the service has refused its credentials.
type source struct {
	origin
	cache           *aws.CredentialsCache // what clients use: it asks Retrieve
	load            func() (aws.CredentialsProvider, error)
	atMost, silence time.Duration

	mu     sync.Mutex
	chain  aws.CredentialsProvider // with a cache by [early]
	old    *aws.Credentials
	silent time.Time // since when nobody answers, zero while somebody does

	renewing *renewal  // after a refusal, nil if none is under way
	refused  time.Time // when the last one has come to its end
	renewed  bool      // its result
}

func (c *Clients) newSource(region string, cfg aws.Config) *source {
	s := &source{origin: c.originOf(cfg), chain: cfg.Credentials, atMost: c.o.Attempt * 2 / 3,
		silence: c.o.Attempt * 30, refused: c.reloaded, renewed: true}
	s.load = func() (aws.CredentialsProvider, error) {
		cfg, err := c.load(context.Background(), region)
		return cfg.Credentials, err
	}
	s.cache = aws.NewCredentialsCache(s)
	return s
}

// failed is an error of the chain, as callers see it.
func (s *source) failed(err error) error {
	if err == nil {
		return nil
	}
	if c, ok := errors.AsType[*credentialsError](err); ok {
		return c
	}
	e := &credentialsError{s.origin, err, s.passing(err)}
	if op := operationOf(err); op != nil && op.Service() == "STS" && op.Operation() == "AssumeRole" {
		e.hint = "see the role's trust policy, and whether its source may call sts:AssumeRole"
	}
	return e
}

// first waits for the first credentials, as long as a credential_process may take; others are
// waited for by each call.
func (s *source) first(ctx context.Context) error {
	s.mu.Lock()
	has := s.old != nil
	s.mu.Unlock()
	if has || !s.process {
		return nil
	}
	_, err := s.cache.Retrieve(ctx)
	if err != nil && ctx.Err() != nil {
		return err
	}
	return s.failed(err)
}

// awaitCredentials is first for a Region.
func (c *Clients) awaitCredentials(ctx context.Context, region string) error {
	if _, _, err := c.client(ctx, region); err != nil {
		return err
	}
	c.mu.Lock()
	s := c.source
	c.mu.Unlock()
	if s == nil {
		return nil
	}
	return s.first(ctx)
}

// Retrieve implements [aws.CredentialsProvider].
func (s *source) Retrieve(ctx context.Context) (aws.Credentials, error) {
	s.mu.Lock()
	chain, atMost := s.chain, s.atMost
	if s.process && s.old == nil {
		atMost = s.silence
	}
	s.mu.Unlock()
	short, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	begun := time.Now()
	c, err := chain.Retrieve(short)
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	switch {
	case err == nil:
		given := c
		s.old = &given
		s.silent = time.Time{}
	case short.Err() == nil:
		s.silent = time.Time{}
	case s.silent.IsZero() && now.Sub(begun) < s.silence:
		s.silent = begun
	case now.Sub(begun) >= s.silence || now.Sub(s.silent) > s.silence:
		if chain, err := s.load(); err == nil && chain != nil {
			s.chain, s.silent = chain, time.Time{}
		}
	}
	if err != nil {
		if s.old == nil || !s.old.CanExpire || !now.Before(ends(s.old)) {
			return aws.Credentials{}, s.failed(err)
		}
		c = *s.old
	}
	if c.CanExpire && !c.Expires.After(now) { // a source without longer-lived ones is not asked at each call
		end := ends(&c)
		if c.Expires = now.Add(renewAgain); err != nil && c.Expires.After(end) {
			c.Expires = end
		}
	}
	return c, nil
}

// ends is when credentials end from which [early] has taken its part.
func ends(c *aws.Credentials) time.Time { return c.Expires.Add(renewEarly) }

// renewal is one after a refusal.
type renewal struct {
	done chan struct{} // closed when it has come to its end
	ok   bool          // then: there are new credentials
}

// refresh asks for credentials again after a refusal of those that a call used which began
// then. It returns whether there is something to try again with: not where that was done
// just now, nor where none can be had, and then the old ones stay; nor where they take
// long, and then they are used when they come.
func (s *source) refresh(ctx context.Context, begun time.Time) bool {
	s.mu.Lock()
	switch {
	case s.renewing != nil:
	case s.refused.After(begun):
		defer s.mu.Unlock()
		return s.renewed // by another call
	case time.Since(s.refused) < reloadPause:
		s.mu.Unlock()
		return false
	default:
		s.renewing = &renewal{done: make(chan struct{})}
		go s.renew(s.renewing)
	}
	r := s.renewing
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, s.atMost)
	defer cancel()
	select {
	case <-r.done:
		return r.ok
	case <-ctx.Done():
		return false
	}
}

func (s *source) renew(r *renewal) {
	ctx, cancel := context.WithTimeout(context.Background(), s.silence)
	defer cancel()
	var c aws.Credentials
	chain, err := s.load()
	if err == nil && chain != nil {
		c, err = chain.Retrieve(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.ok = err == nil && chain != nil; r.ok {
		s.chain, s.old, s.silent = chain, &c, time.Time{}
		s.cache.Invalidate()
	}
	s.renewing, s.renewed, s.refused = nil, r.ok, time.Now()
	close(r.done)
}

// badConfig says what is wrong with the configuration that the SDK loads.
func badConfig(err error) error {
	e := &keystore.Error{Kind: keystore.Credentials, URI: Scheme, Op: "open", Err: err,
		Hint: "check the AWS configuration files and --aws-profile"}
	if _, mfa := errors.AsType[config.AssumeRoleTokenProviderNotSetError](err); mfa {
		e.Err = errors.New("the profile's role asks for a multi-factor code, which a mount cannot give")
		e.Hint = "name a role without mfa_serial, or get a session first: aws sts get-session-token"
	}
	return e
}

// Reload loads the configuration and its credentials again. If there are none, the error says
// why, and the old ones stay.
func (c *Clients) Reload(ctx context.Context) error {
	c.mu.Lock()
	region, used := c.region, c.source != nil
	c.mu.Unlock()
	if !used {
		return nil // no key of KMS is in use
	}
	cfg, err := c.load(ctx, region)
	if err != nil {
		return err
	}
	if cfg.Credentials == nil {
		return &keystore.Error{Kind: keystore.Credentials, URI: Scheme, Op: "reload",
			Err: errors.New("no AWS credentials are configured"), Hint: credentialsHint}
	}
	s := c.newSource(region, cfg)
	ctx, cancel := context.WithTimeout(ctx, s.silence)
	defer cancel()
	creds, err := s.chain.Retrieve(ctx)
	if err != nil {
		failed := &credentialsError{}
		errors.As(s.failed(err), &failed)
		return &keystore.Error{Kind: keystore.Credentials, URI: Scheme, Op: "reload", Err: failed,
			Hint: failed.hint}
	}
	if err := c.known(ctx, cfg, region); err != nil {
		return err
	}
	s.old = &creds
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.clients)
	c.reloaded = time.Now()
	s.refused = c.reloaded
	c.source = s
	return nil
}

// known asks KMS whether it knows new credentials, by a look at the key that was opened last.
// Only a refusal of the credentials themselves is an error: a key that may not be looked at,
// or an outage, says nothing of them.
func (c *Clients) known(ctx context.Context, cfg aws.Config, region string) error {
	c.mu.Lock()
	key := c.key
	c.mu.Unlock()
	if m := arnPattern.FindStringSubmatch(key); m != nil {
		region = m[2]
	}
	if key == "" {
		return nil
	}
	probe := New(c.o)
	cfg.Region = region
	probe.clients[region], probe.configs[region], probe.gates[region] = c.newClient(cfg), cfg, newGate(c.o.RPS)
	s := &Store{c: probe, region: region, arn: key, branches: map[string]branchKey{}}
	_, err := call(ctx, s, "reload", "DescribeKey", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.DescribeKeyOutput, error) {
		return k.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: &key, GrantTokens: c.o.GrantTokens}, o)
	})
	if e, ok := errors.AsType[*keystore.Error](err); ok &&
		(e.Kind == keystore.Credentials || e.Kind == keystore.Denied && !deniesAction(err)) {
		return e
	}
	return nil
}

// replace makes the next calls use another client than k.
func (c *Clients) replace(k *kms.Client, region string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.clients[region] == k {
		delete(c.clients, region)
	}
}

// refresh is [source.refresh].
func (c *Clients) refresh(ctx context.Context, begun time.Time) bool {
	c.mu.Lock()
	s := c.source
	c.mu.Unlock()
	return s != nil && s.refresh(ctx, begun)
}

func (c *Clients) gate(region string) *gate {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gates[region]
}

// second is a reason to look a second time before a refusal counts.
type second int

const (
	clockSkew second = iota + 1 // the SDK corrects it from the answer's date
	reload
	notFound // a key or an alias that was just made is not seen everywhere at once
)

// justMade is how long KMS is given to find a key that it did not find at first.
const justMade = time.Second

// refusal is a call that the service has refused.
type refusal struct {
	client *kms.Client
	begun  time.Time
	kind   keystore.Kind
	err    error
}

// secondLook reports whether a refusal is to be tried again: with the clock that the service
// has told, then with credentials that were loaded again, or after a moment if it did not
// find the key; each once. Credentials that could not be had are no refusal.
func (s *Store) secondLook(ctx context.Context, r refusal, once map[second]bool) bool {
	if ctx.Err() != nil || errors.As(r.err, new(*credentialsError)) {
		return false
	}
	if errors.As(r.err, new(*types.NotFoundException)) && !once[notFound] {
		once[notFound] = true
		select {
		case <-time.After(min(justMade, s.c.o.Total/10)):
			return true
		case <-ctx.Done():
			return false
		}
	}
	if r.kind != keystore.Denied && r.kind != keystore.Credentials {
		return false
	}
	if !once[clockSkew] && (skewed(r.err) || unsigned(r.err)) {
		once[clockSkew] = true
		if !skewed(r.err) {
			s.c.replace(r.client, s.region) // with what the SDK knew of another clock
		}
		return true
	}
	if once[reload] || !s.c.refresh(ctx, r.begun) {
		return false
	}
	once[reload], once[clockSkew] = true, false
	return true
}

// unsigned reports whether a signature was refused. Where the clocks agree that can be
// because they did not before.
func unsigned(err error) bool {
	c, ok := errors.AsType[coded](err)
	return ok && slices.Contains([]string{"InvalidSignatureException", "SignatureDoesNotMatch",
		"RequestExpired"}, c.ErrorCode())
}

// TemporaryEnvironment reports whether the environment holds credentials that
// end, and that nobody renews.
func TemporaryEnvironment() bool {
	return os.Getenv("AWS_ACCESS_KEY_ID") != "" && os.Getenv("AWS_SESSION_TOKEN") != ""
}
