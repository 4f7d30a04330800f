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
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"kmsfs/keystore"
)

const (
	roleSession  = time.Hour
	renewEarly   = 5 * time.Minute
	renewAgain   = 15 * time.Second // after a renewal that failed, or brought nothing new
	reloadPause  = 10 * time.Second // a reload that a refusal asks for, at most so often
	clockIsWrong = 4 * time.Minute
)

// inSession makes the SDK's chain ask for sessions of a role as [Clients.assume] does,
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

// assume makes the configuration use the role of the options, and any credentials for
// as long as they last.
func (c *Clients) assume(cfg *aws.Config) {
	p := cfg.Credentials
	if c.o.RoleARN != "" {
		p = aws.NewCredentialsCache(stscreds.NewAssumeRoleProvider(sts.NewFromConfig(*cfg), c.o.RoleARN, session), early)
	}
	if p != nil {
		cfg.Credentials = aws.NewCredentialsCache(&lasting{CredentialsProvider: p, atMost: c.o.Attempt * 2 / 3, silence: c.o.Attempt * 30, anew: c.Reload})
	}
}

// lasting are credentials that are renewed early; where that fails the old ones are
// used while they last. Where who gives them is silent for so long that an answer cannot
// be hoped for (a credential_process has a minute) they are asked for anew: whatever asks
// for them does not while it waits.
type lasting struct {
	aws.CredentialsProvider // by [early]
	atMost, silence         time.Duration
	anew                    func()

	mu    sync.Mutex
	old   *aws.Credentials
	since time.Time // of the silence, zero where there is none
}

// Retrieve implements [aws.CredentialsProvider].
func (l *lasting) Retrieve(ctx context.Context) (aws.Credentials, error) {
	short, cancel := context.WithTimeout(ctx, l.atMost)
	defer cancel()
	c, err := l.CredentialsProvider.Retrieve(short)
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	switch {
	case err == nil:
		l.old, l.since = &c, time.Time{}
	case l.old != nil && l.old.CanExpire && now.Before(ends(l.old)):
		c = *l.old
	case short.Err() == nil:
		l.since = time.Time{}
		return aws.Credentials{}, err
	default:
		if l.since.IsZero() {
			l.since = now
		} else if now.Sub(l.since) > l.silence {
			l.anew()
		}
		return aws.Credentials{}, err
	}
	if c.CanExpire && !c.Expires.After(now) { // who has none that last longer is not asked at each call
		end := ends(&c)
		if c.Expires = now.Add(renewAgain); c.Expires.After(end) {
			c.Expires = end
		}
	}
	return c, nil
}

// ends is when credentials end from which [early] has taken its part.
func ends(c *aws.Credentials) time.Time { return c.Expires.Add(renewEarly) }

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
	c.reloaded = time.Now()
}

// reloadOnce is Reload after a refusal of credentials that failed used; false where that was
// done just now, and did not help.
func (c *Clients) reloadOnce(failed *kms.Client, region string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.clients[region] != failed {
		return true // another call has
	}
	if time.Since(c.reloaded) < reloadPause {
		return false
	}
	clear(c.clients)
	c.reloaded = time.Now()
	return true
}

// renew makes the next calls use another client than k.
func (c *Clients) renew(k *kms.Client, region string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.clients[region] == k {
		delete(c.clients, region)
	}
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
func (s *Store) secondLook(ctx context.Context, k *kms.Client, v *keystore.Error, err error, once map[second]bool) bool {
	if v.Kind != keystore.Denied && v.Kind != keystore.Credentials || ctx.Err() != nil {
		return false
	}
	if !once[clockSkew] && (skewed(err) || unsigned(err)) {
		once[clockSkew] = true
		if !skewed(err) {
			s.c.renew(k, s.region) // with what the SDK knew of another clock
		}
		return true
	}
	if once[reload] || !s.c.reloadOnce(k, s.region) {
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
