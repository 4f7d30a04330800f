package awskms

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"

	"kmsfs/keystore"
)

// coded is what the SDK's errors of a service have in common.
type coded interface {
	error
	ErrorCode() string
}

// httpCoded is what errors with an HTTP answer have in common.
type httpCoded interface {
	error
	HTTPStatusCode() int
}

const (
	firstPause = 25 * time.Millisecond
	longPause  = 2 * time.Second
)

// call makes one call with its retries: those that a repetition can help, with
// jittered pauses, which grow unless only some calls are throttled, until
// Options.Total is over. Each attempt ends after Options.Attempt. The error is a
// verdict.
func call[T any](ctx context.Context, s *Store, op, name string, f func(context.Context, *kms.Client, func(*kms.Options)) (T, error)) (T, error) {
	keystore.Waits(ctx)
	total := ctx // until the first attempt: to wait for the gate is no outage
	once, raised := map[second]bool{}, keystore.Raised(ctx)
	var told *keystore.Error
	for pause := firstPause; ; {
		var out T
		gate := s.c.gate(s.region)
		if err := gate.enter(total); err != nil {
			if ctx.Err() == nil && told != nil {
				return out, told // its deadline came
			}
			return out, &keystore.Error{Kind: keystore.Canceled, URI: s.URI(), Op: op, Err: err}
		}
		k, _, err := s.c.client(ctx, s.region) // now, or it may be an old one
		if err != nil {
			gate.leave(false)
			return out, err
		}
		if total == ctx {
			var cancel context.CancelFunc
			total, cancel = context.WithTimeout(ctx, s.c.o.Total)
			defer cancel()
		}
		purpose := keystore.PurposeOf(ctx)
		// The user agent says what a call was for, and so does CloudTrail.
		agent := func(o *kms.Options) { o.AppID = "kmsfs-" + purpose.String() }
		begun := time.Now()
		attempt, done := context.WithTimeout(total, s.c.o.Attempt)
		out, err = f(attempt, k, agent)
		done()
		took := time.Since(begun)
		crowded := gate.leave(throttled(err))
		if err == nil {
			s.c.o.Meter.Record(name, purpose, 0, took)
			return out, nil
		}
		v, again := s.verdict(ctx, k, op, err)
		if told != nil && v.Kind == keystore.Outage && v.RequestID == "" && total.Err() != nil {
			v = told // the deadline came in the middle of an attempt: this is what the service had said
		}
		told = v
		s.c.o.Meter.Record(name, purpose, v.Kind, took)
		if s.secondLook(ctx, k, begun, v, err, once) {
			continue
		}
		if !again || total.Err() != nil {
			return out, v
		}
		select {
		case <-time.After(rand.N(pause)):
		case <-raised: // a program has begun to wait
			raised = nil
		case <-total.Done():
			return out, v
		}
		// Where only some are throttled the next attempt has every chance: longer pauses
		// would only make the others wait that come after this one.
		if crowded || !throttled(err) {
			pause = min(2*pause, longPause)
		}
	}
}

// verdicts by error code; those that the SDK has no type for are told by code too.
var verdicts = map[string]struct {
	kind  keystore.Kind
	again bool
	hint  string
}{
	"DisabledException":                   {keystore.Revoked, false, "the key is disabled; its administrator enables it with aws kms enable-key"},
	"NotFoundException":                   {keystore.Revoked, false, "the key does not exist (any more) in this Region"},
	"AccessDeniedException":               {keystore.Denied, false, "the key policy or IAM policy does not allow this; see README.md, \"Key policy\""},
	"UnrecognizedClientException":         {keystore.Denied, false, "these credentials are not known to AWS"},
	"InvalidClientTokenId":                {keystore.Denied, false, "these credentials are not known to AWS"},
	"InvalidSignatureException":           {keystore.Denied, false, "check the secret key and this machine's clock"},
	"SignatureDoesNotMatch":               {keystore.Denied, false, "check the secret key and this machine's clock"},
	"IncompleteSignature":                 {keystore.Denied, false, ""},
	"MissingAuthenticationTokenException": {keystore.Credentials, false, credentialsHint},
	"IncompleteSignatureException":        {keystore.Denied, false, ""},
	"MissingAuthenticationToken":          {keystore.Credentials, false, credentialsHint},
	"ExpiredTokenException":               {keystore.Credentials, false, "the credentials have expired; renew them (aws sso login, or new keys)"},
	"ExpiredToken":                        {keystore.Credentials, false, "the credentials have expired; renew them (aws sso login, or new keys)"},
	"InvalidCiphertextException":          {keystore.Damaged, false, ""},
	"IncorrectKeyException":               {keystore.Damaged, false, ""},
	"InvalidKeyUsageException":            {keystore.Invalid, false, "the key must be symmetric and for ENCRYPT_DECRYPT"},
	"InvalidArnException":                 {keystore.Invalid, false, ""},
	"ValidationException":                 {keystore.Invalid, false, ""},
	"InvalidGrantTokenException":          {keystore.Denied, false, ""},
	"KeyUnavailableException":             {keystore.Outage, true, ""},
	"KMSInternalException":                {keystore.Outage, true, ""},
	"DependencyTimeoutException":          {keystore.Outage, true, ""},
	"ThrottlingException":                 {keystore.Outage, true, "KMS throttles this account; see its request quota"},
	"Throttling":                          {keystore.Outage, true, "KMS throttles this account; see its request quota"},
	"TooManyRequestsException":            {keystore.Outage, true, "KMS throttles this account; see its request quota"},
	"RequestLimitExceeded":                {keystore.Outage, true, "KMS throttles this account; see its request quota"},
	"LimitExceededException":              {keystore.Outage, true, ""},
	"ServiceUnavailable":                  {keystore.Outage, true, ""},
	"InternalFailure":                     {keystore.Outage, true, ""},
	"RequestExpired":                      {keystore.Denied, false, "check this machine's clock"},
	"KMSInvalidStateException":            {0, false, ""}, // the key's state decides
	"KMSInvalidMacException":              {keystore.Damaged, false, ""},
	"UnsupportedOperationException":       {keystore.Invalid, false, ""},
	"DryRunOperationException":            {keystore.Outage, false, ""},
	"NotAuthorized":                       {keystore.Denied, false, ""},
	"OptInRequired":                       {keystore.Denied, false, ""},
	"CloudHsmClusterInvalidException":     {keystore.Outage, true, ""},
}

const credentialsHint = "give AWS credentials: aws configure, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or --aws-profile"

// verdict sorts an error; again says whether a repetition can help.
func (s *Store) verdict(ctx context.Context, k *kms.Client, op string, err error) (e *keystore.Error, again bool) {
	e = &keystore.Error{Kind: keystore.Outage, URI: s.URI(), Op: op, Err: brief{err}, RequestID: requestID(err)}
	if ctx.Err() != nil {
		e.Kind = keystore.Canceled
		return e, false
	}
	if v, ok := errors.AsType[*keystore.Error](err); ok { // an answer that cannot be
		return v, v.Kind == keystore.Outage
	}
	// First: what the services behind credentials answer looks like KMS's answers.
	if cerr := s.credentials(ctx, k); cerr != nil {
		if ctx.Err() != nil {
			e.Kind = keystore.Canceled
			return e, false
		}
		if passing(cerr) {
			e.Hint = "the service that gives the credentials does not answer"
			return e, true
		}
		e.Kind, e.Hint, e.Err = keystore.Credentials, credentialsHint, noCredentials{err}
		return e, false
	}
	if c, ok := errors.AsType[coded](err); ok {
		if v, known := verdicts[c.ErrorCode()]; known {
			e.Kind, e.Hint = v.kind, v.hint
			if c.ErrorCode() == "KMSInvalidStateException" {
				e.Kind = s.invalidState(ctx, k, err)
			}
			return e, v.again
		}
	}
	if h, ok := errors.AsType[httpCoded](err); ok && h.HTTPStatusCode() != 0 {
		switch c := h.HTTPStatusCode(); {
		case c == http.StatusForbidden || c == http.StatusUnauthorized:
			e.Kind = keystore.Denied
			return e, false
		case c == http.StatusTooManyRequests || c >= 500 || c < 300: // 200 without an answer that parses
			return e, true
		}
		return e, false
	}
	e.Hint = "check the network, AWS_ENDPOINT_URL_KMS and --aws-region"
	return e, true // the network
}

// brief says what the service has answered, or what the network, without the
// SDK's own chain around it.
type brief struct{ error }

func (b brief) Unwrap() error { return b.error }

func (b brief) Error() string {
	if c, ok := errors.AsType[interface {
		coded
		ErrorMessage() string
	}](b.error); ok {
		return c.ErrorCode() + ": " + c.ErrorMessage()
	}
	if n, ok := errors.AsType[*net.OpError](b.error); ok {
		return n.Error()
	}
	return b.error.Error()
}

type noCredentials struct{ error }

func (n noCredentials) Unwrap() error { return n.error }
func (noCredentials) Error() string   { return "there are no AWS credentials that can be used" }

// invalidState finds what KMSInvalidStateException is about: revoked where the
// key is disabled or waiting for deletion or import, else an outage. The message
// says it ("… is pending deletion."); where it does not, KMS is asked.
func (s *Store) invalidState(ctx context.Context, k *kms.Client, err error) keystore.Kind {
	for _, state := range []string{"pending deletion", "pending import", "pending replica deletion", "disabled"} {
		if strings.Contains(strings.ToLower(err.Error()), state) {
			return keystore.Revoked
		}
	}
	ctx, cancel := context.WithTimeout(ctx, s.c.o.Attempt)
	defer cancel()
	out, err := k.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: &s.arn})
	if err != nil || out.KeyMetadata == nil {
		return keystore.Outage
	}
	if k := stateKind(out.KeyMetadata.KeyState); k != 0 {
		return k
	}
	return keystore.Outage
}

func stateKind(st types.KeyState) keystore.Kind {
	switch st {
	case types.KeyStateDisabled, types.KeyStatePendingDeletion, types.KeyStatePendingImport, types.KeyStatePendingReplicaDeletion:
		return keystore.Revoked
	case types.KeyStateUnavailable, types.KeyStateCreating, types.KeyStateUpdating:
		return keystore.Outage
	}
	return 0
}

// credentials returns why the SDK had no credentials to sign with, nil if it had.
func (s *Store) credentials(ctx context.Context, k *kms.Client) error {
	ctx, cancel := context.WithTimeout(ctx, s.c.o.Attempt)
	defer cancel()
	creds := k.Options().Credentials
	if creds == nil {
		return errors.New("none are configured")
	}
	_, err := creds.Retrieve(ctx)
	return err
}

// passing reports whether credentials lack because a service that gives them (STS,
// SSO, a container's or a machine's) could not be reached, or failed. Where no
// machine's service is there at all, there are none.
func passing(err error) bool {
	op, ok := errors.AsType[*smithy.OperationError](err)
	if !ok {
		return errors.As(err, new(*aws.RequestCanceledError)) || errors.Is(err, context.DeadlineExceeded) // one that is silent
	}
	if h, ok := errors.AsType[httpCoded](err); ok && h.HTTPStatusCode() != 0 {
		return h.HTTPStatusCode() >= 500 || throttled(err)
	}
	return op.Service() != "ec2imds"
}

func requestID(err error) string {
	if r, ok := errors.AsType[interface {
		error
		ServiceRequestID() string
	}](err); ok {
		return r.ServiceRequestID()
	}
	return ""
}
