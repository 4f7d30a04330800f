package awskms

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"time"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

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
	shortPause = 500 * time.Millisecond
	longPause  = 2 * time.Second
)

// call makes one call with its retries: those that a repetition can help, with jittered
// pauses, which grow unless only some calls are throttled, until Options.Total is over. Each
// attempt ends after Options.Attempt. The error is a verdict.
func call[T any](ctx context.Context, s *Store, op, name string,
	f func(context.Context, *kms.Client, func(*kms.Options)) (T, error)) (T, error) {
	var out T
	if err := s.c.awaitCredentials(ctx, s.region); err != nil {
		v, _ := s.verdict(ctx, op, err)
		return out, v
	}
	total := ctx // until the first attempt: to wait for the gate is no outage
	once, raised := map[second]bool{}, keystore.Raised(ctx)
	var told *keystore.Error
	for pause := firstPause; ; {
		gate, err := s.enter(total)
		if err != nil {
			if ctx.Err() == nil && told != nil {
				return out, told // its deadline came
			}
			if e, ok := errors.AsType[*keystore.Error](err); ok {
				return out, e
			}
			return out, &keystore.Error{Kind: keystore.Canceled, URI: s.URI(), Op: op, Err: err}
		}
		if total == ctx {
			var cancel context.CancelFunc
			total, cancel = context.WithTimeout(ctx, s.c.o.Total)
			defer cancel()
		}
		begun := time.Now()
		var k *kms.Client
		var crowded bool
		out, k, crowded, err = try(total, s, gate, name, f)
		if err == nil {
			return out, nil
		}
		v, again := s.verdict(ctx, op, err)
		if told != nil && v.Kind == keystore.Outage && v.RequestID == "" && total.Err() != nil {
			v = told // the deadline came in the middle of an attempt: the service had said this
		}
		told = v
		if makes[name] && v.Kind == keystore.Outage && sent(err) && !throttled(err) {
			return out, unsure(v)
		}
		if s.secondLook(ctx, refusal{k, begun, v.Kind, err}, once) {
			continue
		}
		if !again || total.Err() != nil {
			return out, v
		}
		most := longPause
		if keystore.PurposeOf(ctx) <= keystore.ForCreate && throttled(err) {
			most = shortPause // a program waits, and the service does answer
		}
		select {
		case <-time.After(rand.N(min(pause, most))):
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

// makes are the operations that make something each time they are called: they are not
// repeated unless the service surely did nothing.
var makes = map[string]bool{"CreateKey": true}

// unsure adds to an outage of such an operation that it may have been done all the same.
func unsure(v *keystore.Error) *keystore.Error {
	v.Hint = "it is not known whether the key was made: look for it (aws kms list-keys, or the console) before you try again"
	return v
}

// enter waits for the right to make a call.
func (s *Store) enter(ctx context.Context) (*gate, error) {
	if _, _, err := s.c.client(ctx, s.region); err != nil {
		return nil, err
	}
	g := s.c.gate(s.region)
	return g, g.enter(ctx)
}

// attempt makes a call once.
func attempt[T any](ctx context.Context, s *Store, name string,
	f func(context.Context, *kms.Client, func(*kms.Options)) (T, error)) (out T, err error) {
	gate, err := s.enter(ctx)
	if err != nil {
		return out, err
	}
	out, _, _, err = try(ctx, s, gate, name, f)
	return out, err
}

// try makes one attempt, for which the gate was entered, and counts it. It returns the client
// that was used, and whether most calls are throttled.
func try[T any](ctx context.Context, s *Store, gate *gate, name string,
	f func(context.Context, *kms.Client, func(*kms.Options)) (T, error)) (out T, k *kms.Client, crowded bool, err error) {
	if k, _, err = s.c.client(ctx, s.region); err != nil { // now, or it may be an old one
		gate.leave(false)
		return out, nil, false, err
	}
	purpose := keystore.PurposeOf(ctx)
	// The user agent says what a call was for, and so does CloudTrail.
	atMost, slow := s.c.o.Attempt, strings.HasPrefix(name, "Create")
	if slow { // it is better to wait than to try again
		atMost = s.c.o.Total
	}
	options := func(o *kms.Options) {
		o.AppID = "kmsfs-" + purpose.String()
		if b, ok := o.HTTPClient.(*awshttp.BuildableClient); ok && slow {
			o.HTTPClient = b.WithTimeout(atMost)
		}
	}
	begun := time.Now()
	attempt, done := context.WithTimeout(ctx, atMost)
	out, err = f(attempt, k, options)
	done()
	crowded = gate.leave(throttled(err))
	if err == nil || sent(err) {
		s.c.o.Meter.Record(name, purpose, s.meterKind(err), time.Since(begun))
	}
	return out, k, crowded, err
}

// meterKind is the kind under which an attempt is counted.
func (s *Store) meterKind(err error) keystore.Kind {
	if err == nil {
		return 0
	}
	if v, ok := errors.AsType[*keystore.Error](err); ok {
		return v.Kind
	}
	if c, ok := errors.AsType[coded](err); ok {
		if v, known := verdicts[c.ErrorCode()]; known && v.kind != 0 {
			return v.kind
		}
	}
	if h, ok := errors.AsType[httpCoded](err); ok && h.HTTPStatusCode() != 0 && foreign(err) == nil {
		switch c := h.HTTPStatusCode(); {
		case c == http.StatusForbidden || c == http.StatusUnauthorized:
			return keystore.Denied
		case c >= 400 && c < 500 && c != http.StatusTooManyRequests:
			return keystore.Invalid
		}
	}
	return keystore.Outage
}

// verdicts by error code; those that the SDK has no type for are told by code too.
var verdicts = map[string]struct {
	kind  keystore.Kind
	again bool
	hint  string
}{
	"DisabledException": {keystore.Revoked, false,
		"the key is disabled; its administrator enables it with aws kms enable-key"},
	"NotFoundException": {keystore.Revoked, false,
		"the key does not exist (any more) in this Region"},
	"AccessDeniedException": {keystore.Denied, false,
		"the key policy or IAM policy does not allow this; see docs/keys.md, \"Key policy\""},
	"UnrecognizedClientException": {keystore.Denied, false,
		"these credentials are not known to AWS"},
	"InvalidClientTokenId": {keystore.Denied, false,
		"these credentials are not known to AWS"},
	"InvalidSignatureException": {keystore.Denied, false,
		"check the secret key and this machine's clock"},
	"SignatureDoesNotMatch": {keystore.Denied, false,
		"check the secret key and this machine's clock"},
	"IncompleteSignature":                 {keystore.Denied, false, ""},
	"MissingAuthenticationTokenException": {keystore.Credentials, false, credentialsHint},
	"IncompleteSignatureException":        {keystore.Denied, false, ""},
	"MissingAuthenticationToken":          {keystore.Credentials, false, credentialsHint},
	"ExpiredTokenException": {keystore.Credentials, false,
		"the credentials have expired; renew them (aws sso login, or new keys)"},
	"ExpiredToken": {keystore.Credentials, false,
		"the credentials have expired; renew them (aws sso login, or new keys)"},
	"InvalidCiphertextException": {keystore.Damaged, false, ""},
	"IncorrectKeyException":      {keystore.Damaged, false, ""},
	"InvalidKeyUsageException": {keystore.Invalid, false,
		"the key must be symmetric and for ENCRYPT_DECRYPT"},
	"InvalidArnException":        {keystore.Invalid, false, ""},
	"ValidationException":        {keystore.Invalid, false, ""},
	"InvalidGrantTokenException": {keystore.Denied, false, ""},
	"KeyUnavailableException":    {keystore.Outage, true, ""},
	"KMSInternalException":       {keystore.Outage, true, ""},
	"DependencyTimeoutException": {keystore.Outage, true, ""},
	"ThrottlingException": {keystore.Outage, true,
		"KMS throttles this account; see its request quota"},
	"Throttling": {keystore.Outage, true,
		"KMS throttles this account; see its request quota"},
	"TooManyRequestsException": {keystore.Outage, true,
		"KMS throttles this account; see its request quota"},
	"RequestLimitExceeded": {keystore.Outage, true,
		"KMS throttles this account; see its request quota"},
	"ThrottledException": {keystore.Outage, true,
		"KMS throttles this account; see its request quota"},
	"RequestThrottled": {keystore.Outage, true,
		"KMS throttles this account; see its request quota"},
	"LimitExceededException": {keystore.Invalid, false,
		"a resource quota of the account is reached"},
	"AccessDenied": {keystore.Denied, false,
		"the key policy or IAM policy does not allow this; see docs/keys.md, \"Key policy\""},
	"ServiceUnavailable":            {keystore.Outage, true, ""},
	"ServiceUnavailableException":   {keystore.Outage, true, ""},
	"InternalServerError":           {keystore.Outage, true, ""},
	"RequestTimeout":                {keystore.Outage, true, ""},
	"RequestTimeoutException":       {keystore.Outage, true, ""},
	"InternalFailure":               {keystore.Outage, true, ""},
	"RequestExpired":                {keystore.Denied, false, "check this machine's clock"},
	"KMSInvalidStateException":      {0, false, ""}, // the key's state decides
	"KMSInvalidMacException":        {keystore.Damaged, false, ""},
	"UnsupportedOperationException": {keystore.Invalid, false, ""},
	"DryRunOperationException": {keystore.Invalid, false,
		""}, // a dry run would have been allowed; none is made
	"NotAuthorized":                   {keystore.Denied, false, ""},
	"OptInRequired":                   {keystore.Denied, false, ""},
	"CloudHsmClusterInvalidException": {keystore.Outage, true, ""},
}

const credentialsHint = "give AWS credentials: aws configure, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or --aws-profile"

// verdict sorts an error; again says whether a repetition can help.
func (s *Store) verdict(ctx context.Context, op string, err error) (e *keystore.Error, again bool) {
	e = &keystore.Error{Kind: keystore.Outage, URI: s.URI(), Op: op, Err: brief{err},
		RequestID: requestID(err), Answered: throttled(err)}
	if ctx.Err() != nil {
		e.Kind = keystore.Canceled
		return e, false
	}
	if v, ok := errors.AsType[*keystore.Error](err); ok { // an answer that cannot be
		return v, v.Kind == keystore.Outage
	}
	// First: the answers of services behind credentials look like those of KMS.
	if c, ok := errors.AsType[*credentialsError](err); ok {
		e.Err, e.RequestID = c, ""
		if e.Answered = false; c.passing {
			e.Hint = "the service that gives the credentials does not answer"
			if h, ok := errors.AsType[httpCoded](c.err); ok && h.HTTPStatusCode() != 0 {
				e.Hint = "the service that gives the credentials failed, or asks for fewer calls"
			}
			return e, true
		}
		e.Kind, e.Hint = keystore.Credentials, cmp.Or(c.hint, credentialsHint)
		return e, false
	}
	if f := foreign(err); f != nil {
		e.Err, e.Hint = f, foreignHint
		return e, f.status >= 500 || f.status < 300 ||
			f.status == http.StatusTooManyRequests // 200: an answer that does not parse
	}
	if c, ok := errors.AsType[coded](err); ok {
		if v, known := verdicts[c.ErrorCode()]; known {
			e.Kind, e.Hint = v.kind, v.hint
			if c.ErrorCode() == "KMSInvalidStateException" {
				e.Kind = s.invalidState(ctx, err)
				return e, e.Kind == keystore.Outage // a key that was just made, or an external key store that is late
			}
			return e, v.again
		}
	}
	if h, ok := errors.AsType[httpCoded](err); ok && h.HTTPStatusCode() != 0 {
		switch c := h.HTTPStatusCode(); {
		case c == http.StatusForbidden || c == http.StatusUnauthorized:
			e.Kind = keystore.Denied
			return e, false
		case c == http.StatusTooManyRequests || c >= 500 || c < 300:
			return e, true
		}
		e.Kind = keystore.Invalid // KMS has answered, and refuses
		return e, false
	}
	if e.Hint = misplaced(err); e.Hint != "" {
		return e, false
	}
	e.Hint = "check the network, AWS_ENDPOINT_URL_KMS and --aws-region"
	if n, ok := errors.AsType[*net.OpError](err); ok && n.Op == "proxyconnect" ||
		errors.As(err, new(*proxyError)) {
		e.Hint = proxyHint
	}
	return e, true
}

// invalidState finds what KMSInvalidStateException is about: revoked if the key is disabled or
// waiting for deletion or import, else an outage. The message says it ("… is pending
// deletion."); if it does not, KMS is asked.
func (s *Store) invalidState(ctx context.Context, err error) keystore.Kind {
	for _, state := range []string{"pending deletion", "pending import", "pending replica deletion",
		"disabled"} {
		if strings.Contains(strings.ToLower(err.Error()), state) {
			return keystore.Revoked
		}
	}
	ctx, cancel := context.WithTimeout(ctx, s.c.o.Attempt)
	defer cancel()
	out, err := attempt(ctx, s, "DescribeKey", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.DescribeKeyOutput, error) {
		return k.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: &s.arn, GrantTokens: s.c.o.GrantTokens}, o)
	})
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
