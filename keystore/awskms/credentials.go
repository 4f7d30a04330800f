package awskms

import (
	"context"
	"errors"
	"net/http"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds" // sessions of a role, as the SDK's chain makes them
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"kmsfs/keystore"
)

const (
	roleSession  = time.Hour
	renewEarly   = 5 * time.Minute
	renewAgain   = 15 * time.Second // after a renewal that failed
	reloadPause  = 10 * time.Second // a reload that a refusal asks for, at most so often
	clockIsWrong = 4 * time.Minute
)

// assume makes the configuration use the role of the options.
func (c *Clients) assume(cfg *aws.Config) {
	if c.o.RoleARN == "" {
		return
	}
	p := stscreds.NewAssumeRoleProvider(sts.NewFromConfig(*cfg), c.o.RoleARN, func(o *stscreds.AssumeRoleOptions) {
		host, _ := os.Hostname()
		o.RoleSessionName = sessionName("kmsfs-" + host)
		o.Duration = roleSession
	})
	cfg.Credentials = aws.NewCredentialsCache(&role{AssumeRoleProvider: p, atMost: c.o.Attempt * 2 / 3}, func(o *aws.CredentialsCacheOptions) { o.ExpiryWindow = renewEarly })
}

// role is a role's sessions, of which the old one is used while it lasts when a new
// one cannot be had.
type role struct {
	*stscreds.AssumeRoleProvider
	atMost time.Duration
	end    atomic.Pointer[time.Time] // of the last session
}

// Retrieve implements [aws.CredentialsProvider].
func (r *role) Retrieve(ctx context.Context) (aws.Credentials, error) {
	ctx, cancel := context.WithTimeout(ctx, r.atMost)
	defer cancel()
	c, err := r.AssumeRoleProvider.Retrieve(ctx)
	if err == nil {
		r.end.Store(&c.Expires)
	}
	return c, err
}

// HandleFailToRefresh implements [aws.HandleFailRefreshCredentialsCacheStrategy].
func (r *role) HandleFailToRefresh(_ context.Context, old aws.Credentials, err error) (aws.Credentials, error) {
	now, end := time.Now(), r.end.Load()
	if !old.HasKeys() || end == nil || !now.Before(*end) {
		return aws.Credentials{}, err
	}
	old.Expires = now.Add(renewAgain)
	if old.Expires.After(*end) {
		old.Expires = *end
	}
	old.Expires = old.Expires.Add(renewEarly) // which the cache takes off
	return old, nil
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
