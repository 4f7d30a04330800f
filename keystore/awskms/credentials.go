package awskms

import (
	"context"
	"errors"
	"net/http"
	"os"
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
	cfg.Credentials = aws.NewCredentialsCache(p, func(o *aws.CredentialsCacheOptions) { o.ExpiryWindow = renewEarly })
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
	if !once[clockSkew] && skewed(err) {
		once[clockSkew] = true
		return true
	}
	if once[reload] || !s.c.reloadOnce(k, s.region) {
		return false
	}
	once[reload], once[clockSkew] = true, false
	return true
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
