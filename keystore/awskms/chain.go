package awskms

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/endpointcreds"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds" // sessions of a role, as the SDK's chain makes them
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go/logging" // the SDK's interface of a logger

	"kmsfs/keystore"
)

// The SDK's configuration and its chain of credential providers.

const (
	roleSession = time.Hour
	renewEarly  = 5 * time.Minute
)

// load loads the SDK's configuration for a Region, "" for the configured one.
func (c *Clients) load(ctx context.Context, region string) (aws.Config, error) {
	hc := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
		t.MaxIdleConnsPerHost = mostAtOnce // the default of 10 makes most parallel calls open a connection
		t.MaxIdleConns = mostAtOnce
		t.OnProxyConnectResponse = func(_ context.Context, _ *url.URL, _ *http.Request, r *http.Response) error {
			if r.StatusCode != http.StatusOK {
				return &proxyError{r.StatusCode}
			}
			return nil
		}
	}).WithTimeout(c.o.Attempt) // of services that give credentials, which the SDK asks without a deadline
	if err := checkBundle(os.Getenv("AWS_CA_BUNDLE")); err != nil {
		return aws.Config{}, err
	}
	late := &lateSTS{}
	opts := []func(*config.LoadOptions) error{
		config.WithRetryer(func() aws.Retryer { return aws.NopRetryer{} }), // retry is in call
		config.WithHTTPClient(hc),
		config.WithLogger(logging.Nop{}), // every error is ours to tell
		inSession(hc, late),
	}
	if c.o.Profile != "" {
		opts = append(opts, config.WithSharedConfigProfile(c.o.Profile))
	}
	if region != "" {
		opts = append(opts, config.WithRegion(region))
	} else if c.o.Region != "" {
		opts = append(opts, config.WithRegion(c.o.Region))
	}
	cfg, err := config.LoadDefaultConfig(ctx, opts...)
	if err != nil {
		return cfg, badConfig(err)
	}
	client := sts.NewFromConfig(cfg)
	late.client.Store(client)
	if c.o.RoleARN != "" {
		cfg.Credentials = aws.NewCredentialsCache(stscreds.NewAssumeRoleProvider(roleClient{client,
			late}, c.o.RoleARN, session), early)
	}
	return cfg, nil
}

// checkBundle refuses a file of certificates that has none.
func checkBundle(path string) error {
	if path == "" {
		return nil
	}
	b, err := os.ReadFile(path)
	if err == nil && !x509.NewCertPool().AppendCertsFromPEM(b) {
		err = fmt.Errorf("%s has no certificate", path)
	}
	if err != nil {
		return &keystore.Error{Kind: keystore.Invalid, URI: Scheme, Op: "open",
			Err:  fmt.Errorf("AWS_CA_BUNDLE: %w", err),
			Hint: "name a PEM file of the CA's certificates, or unset AWS_CA_BUNDLE"}
	}
	return nil
}

// inSession makes the SDK's chain ask for sessions of a role as for the role of the options,
// unless the configuration says otherwise (it does not tell of 15 minutes, which are its
// default), and ask a container's agent as it asks all others.
func inSession(hc *awshttp.BuildableClient, late *lateSTS) config.LoadOptionsFunc {
	return func(o *config.LoadOptions) error {
		for _, f := range []config.LoadOptionsFunc{
			config.WithAssumeRoleCredentialOptions(func(o *stscreds.AssumeRoleOptions) {
				session(o)
				if o.Client != nil {
					o.Client = roleClient{o.Client, late}
				}
			}),
			config.WithWebIdentityRoleCredentialOptions(func(o *stscreds.WebIdentityRoleOptions) {
				o.RoleSessionName = cmp.Or(o.RoleSessionName, thisMachine())
				o.Client = late
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

// sessionName leaves the characters that STS takes in a name: [\w+=,.@-], 2 to 64.
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

// lateSTS is STS as the whole configuration has it. The SDK makes the clients of its chain
// while it loads the configuration, when it does not know the endpoints yet.
type lateSTS struct{ client atomic.Pointer[sts.Client] }

// AssumeRoleWithWebIdentity implements [stscreds.AssumeRoleWithWebIdentityAPIClient].
func (l *lateSTS) AssumeRoleWithWebIdentity(ctx context.Context,
	in *sts.AssumeRoleWithWebIdentityInput,
	o ...func(*sts.Options)) (*sts.AssumeRoleWithWebIdentityOutput, error) {
	return l.client.Load().AssumeRoleWithWebIdentity(ctx, in, o...)
}

// endpoint sets the endpoint of STS, if one is configured.
func (l *lateSTS) endpoint(o *sts.Options) {
	if c := l.client.Load(); c != nil && o.BaseEndpoint == nil {
		o.BaseEndpoint = c.Options().BaseEndpoint
	}
}

// roleClient assumes roles. It tries once more after an answer that told it of a wrong
// clock: the SDK corrects that from the second call on.
type roleClient struct {
	stscreds.AssumeRoleAPIClient
	late *lateSTS
}

// AssumeRole implements [stscreds.AssumeRoleAPIClient].
func (c roleClient) AssumeRole(ctx context.Context, in *sts.AssumeRoleInput,
	o ...func(*sts.Options)) (*sts.AssumeRoleOutput, error) {
	o = append(o, c.late.endpoint)
	out, err := c.AssumeRoleAPIClient.AssumeRole(ctx, in, o...)
	if err != nil && skewed(err) {
		out, err = c.AssumeRoleAPIClient.AssumeRole(ctx, in, o...)
	}
	return out, err
}

// origin says where credentials come from, for messages.
type origin struct {
	name    string // "the SSO session of profile \"x\"", for example; "" if nothing is configured
	hint    string // what to do if they cannot be had
	process bool   // a credential_process: it has a minute, and is not run again in vain
}

// originOf returns where the credentials of a configuration come from, in the order in which
// the SDK looks.
func (c *Clients) originOf(cfg aws.Config) origin {
	o := c.sourceOf(cfg)
	if c.o.RoleARN != "" {
		o.name = fmt.Sprintf("the role %s, by %s", c.o.RoleARN, cmp.Or(o.name, "this machine's role"))
	}
	return o
}

// sourceOf is originOf without the role of the options.
func (c *Clients) sourceOf(cfg aws.Config) origin {
	var shared *config.SharedConfig
	for _, s := range cfg.ConfigSources {
		if x, ok := s.(config.SharedConfig); ok {
			shared = &x
		}
	}
	env := c.o.Profile == ""
	switch {
	case env && os.Getenv("AWS_ACCESS_KEY_ID") != "" && os.Getenv("AWS_SECRET_ACCESS_KEY") != "":
		return origin{name: "the environment", hint: credentialsHint}
	case env && os.Getenv("AWS_WEB_IDENTITY_TOKEN_FILE") != "":
		return origin{name: "the web identity of AWS_WEB_IDENTITY_TOKEN_FILE",
			hint: "check the token file, AWS_ROLE_ARN and the role's trust policy"}
	case shared == nil:
		return machineOrigin()
	}
	return profileOrigin(shared)
}

func profileOrigin(p *config.SharedConfig) (o origin) {
	switch {
	case p.Source != nil:
		o = profileOrigin(p.Source)
	case p.CredentialSource == "Environment":
		o = origin{name: "the environment", hint: credentialsHint}
	case p.Credentials.HasKeys():
		o = origin{name: fmt.Sprintf("profile %q", p.Profile), hint: credentialsHint}
	case p.WebIdentityTokenFile != "":
		return origin{name: fmt.Sprintf("the web identity of profile %q", p.Profile),
			hint: "check web_identity_token_file, role_arn and the role's trust policy"}
	case p.SSOSession != nil || p.SSOAccountID != "" || p.SSOStartURL != "":
		o = origin{name: fmt.Sprintf("the SSO session of profile %q", p.Profile),
			hint: "aws sso login --profile " + p.Profile}
	case p.CredentialProcess != "":
		o = origin{name: fmt.Sprintf("the credential_process of profile %q", p.Profile),
			hint: "run it by hand: " + p.CredentialProcess, process: true}
	default:
		o = machineOrigin()
	}
	if p.RoleARN != "" {
		if p.Source == nil && p.CredentialSource == "" && o.name == "" {
			o.hint = fmt.Sprintf("name source_profile or credential_source in profile %q", p.Profile)
		}
		o.name = fmt.Sprintf("the role of profile %q, by %s", p.Profile,
			cmp.Or(o.name, "this machine's role"))
	}
	return o
}

// machineOrigin is the origin where no profile names one: a container's agent, or the
// machine's instance role.
func machineOrigin() origin {
	if os.Getenv("AWS_CONTAINER_CREDENTIALS_FULL_URI") != "" ||
		os.Getenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI") != "" {
		return origin{name: "the container's credential service",
			hint: "check the task's or the pod's role"}
	}
	return origin{hint: credentialsHint}
}

// NeedsDirectory reports whether the configuration may name files by paths that are relative
// to the current directory, which must then stay the same. Any argument of a
// credential_process may be such a path.
func (c *Clients) NeedsDirectory(ctx context.Context) bool {
	cfg, err := c.load(ctx, "")
	if err != nil {
		return false
	}
	relative := func(path string) bool { return path != "" && !filepath.IsAbs(path) }
	for _, s := range cfg.ConfigSources {
		shared, ok := s.(config.SharedConfig)
		for p := &shared; ok && p != nil; p = p.Source {
			command := strings.Fields(p.CredentialProcess)
			process := len(command) > 1 || len(command) == 1 && strings.Contains(command[0], "/") &&
				relative(command[0])
			if relative(p.WebIdentityTokenFile) || relative(p.CustomCABundle) || process {
				return true
			}
		}
	}
	return false
}

// AbsoluteEnvironment makes the paths absolute that the SDK takes from the environment, so
// that they mean the same from any directory.
func AbsoluteEnvironment() {
	for _, name := range []string{"AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CA_BUNDLE",
		"AWS_WEB_IDENTITY_TOKEN_FILE",
		"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "AWS_LOGIN_CACHE_DIRECTORY", "SSL_CERT_FILE",
		"SSL_CERT_DIR", "HOME"} {
		if path := os.Getenv(name); path != "" && !filepath.IsAbs(path) {
			if abs, err := filepath.Abs(path); err == nil {
				os.Setenv(name, abs)
			}
		}
	}
}
