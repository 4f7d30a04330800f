package awskms

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/endpointcreds"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds" // sessions of a role, as the SDK's chain makes them
	"github.com/aws/aws-sdk-go-v2/service/kms"

	"kmsfs/keystore"
)

const (
	roleSession  = time.Hour
	renewEarly   = 5 * time.Minute
	renewAgain   = 15 * time.Second // after a renewal that failed, or brought nothing new
	reloadPause  = 10 * time.Second // a reload that a refusal asks for, at most so often
	clockIsWrong = 4 * time.Minute
)

// inSession makes the SDK's chain ask for sessions of a role as for the role of the options,
// where the configuration does not say otherwise (it does not tell of 15 minutes, which
// are its default), and ask a container's agent as it asks all others.
func inSession(hc *awshttp.BuildableClient) config.LoadOptionsFunc {
	return func(o *config.LoadOptions) error {
		for _, f := range []config.LoadOptionsFunc{
			config.WithAssumeRoleCredentialOptions(session),
			config.WithWebIdentityRoleCredentialOptions(func(o *stscreds.WebIdentityRoleOptions) {
				o.RoleSessionName = cmp.Or(o.RoleSessionName, thisMachine())
			}),
			config.WithEndpointCredentialOptions(func(o *endpointcreds.Options) { o.HTTPClient = hc }),
			config.WithCredentialsCacheOptions(early),
		} {
			if err := f(o); err != nil {
				return err
			}
		}
		return nil
	}
}

func session(o *stscreds.AssumeRoleOptions) {
	o.RoleSessionName = cmp.Or(o.RoleSessionName, thisMachine())
	o.Duration = cmp.Or(o.Duration, roleSession)
}

// thisMachine names a role's sessions.
func thisMachine() string {
	host, _ := os.Hostname()
	return sessionName("kmsfs-" + host)
}

func early(o *aws.CredentialsCacheOptions) { o.ExpiryWindow = renewEarly }

// source gives the credentials of a Region. They are renewed early; where that fails the
// old ones are used while they last.
//
// Who gives them can be silent for ever, and whatever asks does not ask again while it
// waits. So after a silence for which no answer can be hoped (a credential_process has a
// minute) the chain is made anew, as it is when the service has refused what it gave.
type source struct {
	cache           *aws.CredentialsCache // what clients use: it asks Retrieve
	load            func() (aws.CredentialsProvider, error)
	atMost, silence time.Duration

	mu     sync.Mutex
	chain  aws.CredentialsProvider // with a cache by [early]
	old    *aws.Credentials
	silent time.Time // since when nobody answers, zero where somebody does

	renewing *renewal  // after a refusal, nil if none is under way
	refused  time.Time // when the last one has come to its end
	renewed  bool      // what it came to
}

func (c *Clients) newSource(region string, chain aws.CredentialsProvider) *source {
	s := &source{chain: chain, atMost: c.o.Attempt * 2 / 3, silence: c.o.Attempt * 30, refused: c.reloaded, renewed: true}
	s.load = func() (aws.CredentialsProvider, error) {
		cfg, err := c.load(context.Background(), region)
		return cfg.Credentials, err
	}
	s.cache = aws.NewCredentialsCache(s)
	return s
}

// Retrieve implements [aws.CredentialsProvider].
func (s *source) Retrieve(ctx context.Context) (aws.Credentials, error) {
	short, cancel := context.WithTimeout(ctx, s.atMost)
	defer cancel()
	s.mu.Lock()
	chain := s.chain
	s.mu.Unlock()
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
	case s.silent.IsZero():
		s.silent = now
	case now.Sub(s.silent) > s.silence:
		if chain, err := s.load(); err == nil && chain != nil {
			s.chain, s.silent = chain, time.Time{}
		}
	}
	if err != nil {
		if s.old == nil || !s.old.CanExpire || !now.Before(ends(s.old)) {
			return aws.Credentials{}, err
		}
		c = *s.old
	}
	if c.CanExpire && !c.Expires.After(now) { // who has none that last longer is not asked at each call
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

// anew asks for credentials anew after a refusal of those that a call used which began
// then. It returns whether there is something to try again with: not where that was done
// just now, nor where none can be had, and then the old ones stay; nor where they take
// long, and then they are used when they come.
func (s *source) anew(ctx context.Context, begun time.Time) bool {
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

// sessionName leaves what STS takes in a name: [\w+=,.@-], 2 to 64.
func sessionName(s string) string {
	b := []byte(s[:min(len(s), 64)])
	for i, c := range b {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '-', c == '_':
		default:
			b[i] = '-'
		}
	}
	return string(b)
}

// badConfig says what is wrong with the configuration that the SDK loads.
func badConfig(err error) error {
	e := &keystore.Error{Kind: keystore.Credentials, URI: Scheme, Op: "open", Err: err, Hint: "check the AWS configuration files and --aws-profile"}
	if _, mfa := errors.AsType[config.AssumeRoleTokenProviderNotSetError](err); mfa {
		e.Err = errors.New("the profile's role asks for a multi-factor code, which a mount cannot give")
		e.Hint = "name a role without mfa_serial, or get a session first: aws sts get-session-token"
	}
	return e
}

// Reload makes the next calls load the configuration and its credentials anew.
func (c *Clients) Reload() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.clients)
	clear(c.sources)
	c.reloaded = time.Now()
}

// replace makes the next calls use another client than k.
func (c *Clients) replace(k *kms.Client, region string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.clients[region] == k {
		delete(c.clients, region)
	}
}

// anew is [source.anew] of a Region.
func (c *Clients) anew(ctx context.Context, region string, begun time.Time) bool {
	c.mu.Lock()
	s, reloaded := c.sources[region], c.reloaded
	c.mu.Unlock()
	if s == nil {
		return reloaded.After(begun) // the next client has others
	}
	return s.anew(ctx, begun)
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
)

// secondLook reports whether a refusal is to be tried again: with the clock that
// the service has told, then with credentials that were loaded anew; each once.
func (s *Store) secondLook(ctx context.Context, k *kms.Client, begun time.Time, v *keystore.Error, err error, once map[second]bool) bool {
	if v.Kind != keystore.Denied && v.Kind != keystore.Credentials || ctx.Err() != nil {
		return false
	}
	if !once[clockSkew] && (skewed(err) || unsigned(err)) {
		once[clockSkew] = true
		if !skewed(err) {
			s.c.replace(k, s.region) // with what the SDK knew of another clock
		}
		return true
	}
	if once[reload] || !s.c.anew(ctx, s.region, begun) {
		return false
	}
	once[reload], once[clockSkew] = true, false
	return true
}

// unsigned reports whether a signature was refused. Where the clocks agree that can be
// because they did not before.
func unsigned(err error) bool {
	c, ok := errors.AsType[coded](err)
	return ok && slices.Contains([]string{"InvalidSignatureException", "SignatureDoesNotMatch", "RequestExpired"}, c.ErrorCode())
}

// skewed reports whether the service's clock is another than ours.
func skewed(err error) bool {
	r, ok := errors.AsType[*awshttp.ResponseError](err)
	if !ok || r.Response == nil {
		return false
	}
	t, perr := http.ParseTime(r.Response.Header.Get("Date"))
	return perr == nil && time.Since(t).Abs() > clockIsWrong
}

// throttled reports whether the service has asked for fewer calls.
func throttled(err error) bool {
	c, ok := errors.AsType[coded](err)
	if ok {
		switch c.ErrorCode() {
		case "ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded", "LimitExceededException":
			return true
		}
	}
	h, ok := errors.AsType[httpCoded](err)
	return ok && h.HTTPStatusCode() == http.StatusTooManyRequests
}

// TemporaryEnvironment reports whether the environment holds credentials that
// end, and that nobody renews.
func TemporaryEnvironment() bool {
	return os.Getenv("AWS_ACCESS_KEY_ID") != "" && os.Getenv("AWS_SESSION_TOKEN") != ""
}
