package awskms

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/credentials/processcreds"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// The true cause of a failure, in one line, and what to do about it.

// credentialsError says that there were no credentials to sign a request with.
type credentialsError struct {
	origin
	err     error
	passing bool // a service that gives them did not answer
}

func (e *credentialsError) Unwrap() error { return e.err }

func (e *credentialsError) Error() string {
	if e.name == "" {
		id, secret := os.Getenv("AWS_ACCESS_KEY_ID") != "", os.Getenv("AWS_SECRET_ACCESS_KEY") != ""
		h, answered := errors.AsType[httpCoded](e.err)
		switch {
		case id && !secret:
			return "there are no AWS credentials that can be used: AWS_ACCESS_KEY_ID is set, and AWS_SECRET_ACCESS_KEY is not"
		case secret && !id:
			return "there are no AWS credentials that can be used: AWS_SECRET_ACCESS_KEY is set, and AWS_ACCESS_KEY_ID is not"
		case e.passing || answered && h.HTTPStatusCode() != 0 && h.HTTPStatusCode() != http.StatusNotFound:
			return "no AWS credentials from this machine's instance role: " + causeOf(e.err)
		}
		return "there are no AWS credentials that can be used: none are configured, and the machine has no instance role"
	}
	return fmt.Sprintf("no AWS credentials from %s: %s", e.name, causeOf(e.err))
}

// causeOf returns the innermost cause of an error of the SDK, with the operation of AWS that
// failed, if one did.
func causeOf(err error) string {
	prefix := ""
	if op := operationOf(err); op != nil {
		prefix, err = op.Service()+" "+op.Operation()+": ", op.Err
	}
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		return p.Error()
	}
	if p, ok := errors.AsType[*processcreds.ProviderError](err); ok {
		return processCause(p.Err)
	}
	if c, ok := errors.AsType[interface {
		coded
		ErrorMessage() string
	}](err); ok && c.ErrorCode() != "" && c.ErrorCode() != unknownCode {
		return prefix + c.ErrorCode() + ": " + c.ErrorMessage()
	}
	if h, ok := errors.AsType[httpCoded](err); ok && h.HTTPStatusCode() != 0 {
		return fmt.Sprintf("%sHTTP %d", prefix, h.HTTPStatusCode())
	}
	if n, ok := errors.AsType[*net.OpError](err); ok {
		return prefix + n.Error()
	}
	return prefix + plain(err)
}

// operationOf returns the innermost operation of AWS that failed: of a role by another role it
// is that of the first one.
func operationOf(err error) (op *smithy.OperationError) {
	for {
		next, ok := errors.AsType[*smithy.OperationError](err)
		if !ok {
			return op
		}
		op, err = next, next.Err
	}
}

// plain is an error of the SDK without its own chain around it.
func plain(err error) string {
	switch {
	case errors.As(err, new(*aws.RequestCanceledError)), isTimeout(err), errors.Is(err,
		context.DeadlineExceeded):
		return "no answer in time"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "the connection was cut off"
	}
	for next := errors.Unwrap(err); next != nil; next = errors.Unwrap(err) {
		err = next
	}
	return err.Error()
}

// processCause says why a credential_process gave no credentials. Its output is never shown:
// there may be secrets in it.
func processCause(err error) string {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return "it has not ended after a minute"
	case errors.As(err, new(*exec.ExitError)), errors.As(err, new(*exec.Error)):
		return plain(err)
	}
	if s := err.Error(); !strings.ContainsAny(s, "{}\"\n") && len(s) < 200 {
		return s // "missing AccessKeyId in process output", for example
	}
	return "its output is not the JSON of credentials"
}

// proxyError says that a proxy refused to connect.
type proxyError struct{ status int }

func (p *proxyError) Error() string {
	return fmt.Sprintf("the proxy refused to connect: HTTP %d %s", p.status, http.StatusText(p.status))
}

const proxyHint = "check HTTPS_PROXY and NO_PROXY"

// passing reports whether credentials lack because a service that gives them (STS, SSO, a
// container's or a machine's) could not be reached, or failed. A machine without an instance
// role has none.
func (o origin) passing(err error) bool {
	if errors.As(err, new(*processcreds.ProviderError)) {
		return false // it has had its minute
	}
	if c, ok := errors.AsType[coded](err); ok && c.ErrorCode() == "IDPCommunicationError" {
		return true // which AWS asks to try again
	}
	if h, ok := errors.AsType[httpCoded](err); ok && h.HTTPStatusCode() != 0 {
		return h.HTTPStatusCode() >= 500 || throttled(err)
	}
	if op := operationOf(err); op != nil && op.Service() == "ec2imds" {
		return false
	}
	return errors.As(err, new(*aws.RequestCanceledError)) || isTimeout(err) ||
		errors.As(err, new(*net.OpError)) && misplaced(err) == ""
}

func isTimeout(err error) bool {
	t, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](err)
	return ok && t.Timeout()
}

// misplaced returns what to do about an error that shows that something on this machine is
// wrong and stays so: a certificate that is not trusted, an endpoint that cannot be. "" if it
// is none.
func misplaced(err error) string {
	if p, ok := errors.AsType[*proxyError](err); ok {
		if p.status >= 500 {
			return ""
		}
		return proxyHint
	}
	switch {
	case errors.As(err, new(x509.CertificateInvalidError)):
		return "the certificate is not valid now: check this machine's clock, or the proxy"
	case errors.As(err, new(x509.UnknownAuthorityError)), errors.As(err,
		new(x509.HostnameError)), errors.As(err,
		new(*tls.CertificateVerificationError)), errors.As(err, new(x509.SystemRootsError)):
		return "the certificate is not trusted: name the file of its CA by AWS_CA_BUNDLE, or check the endpoint and the proxy"
	case errors.As(err, new(tls.RecordHeaderError)), errors.Is(err, http.ErrSchemeMismatch):
		return "the endpoint does not speak TLS, or only TLS: check http:// and https:// in AWS_ENDPOINT_URL_KMS"
	case !errors.As(err, new(*smithyhttp.RequestSendError)) && !isTimeout(err) &&
		!errors.As(err, new(*net.OpError)) && !errors.As(err, new(*smithyhttp.ResponseError)):
		return "check the AWS configuration: AWS_ENDPOINT_URL_KMS, --aws-endpoint and --aws-region"
	}
	if u, ok := errors.AsType[*url.Error](err); ok && !isTimeout(err) {
		if _, network := errors.AsType[*net.OpError](u.Err); !network &&
			(u.Op == "parse" || strings.HasPrefix(u.Err.Error(), "unsupported protocol scheme") ||
				strings.HasPrefix(u.Err.Error(), "http: no Host in request URL")) {
			return "check AWS_ENDPOINT_URL_KMS, --aws-endpoint and HTTPS_PROXY: an endpoint is like https://host"
		}
	}
	return ""
}

// foreignAnswer is an HTTP answer that KMS did not give: a proxy's or a load balancer's.
type foreignAnswer struct {
	status   int
	location string
	err      error
}

func (f *foreignAnswer) Unwrap() error { return f.err }

func (f *foreignAnswer) Error() string {
	s := fmt.Sprintf("the answer is not one of KMS: HTTP %d %s", f.status, http.StatusText(f.status))
	if f.location != "" {
		s += fmt.Sprintf(" to %q", f.location)
	}
	return s
}

const (
	unknownCode = "UnknownError" // of the SDK, for an answer without a code
	foreignHint = "a proxy answered instead of KMS: check HTTPS_PROXY, NO_PROXY and AWS_ENDPOINT_URL_KMS"
)

// foreign returns the answer if it is not one of KMS, which names its errors and numbers its
// requests; else nil. A denial counts only with the number of a request, since it takes keys
// away.
func foreign(err error) *foreignAnswer {
	h, ok := errors.AsType[httpCoded](err)
	if !ok || h.HTTPStatusCode() == 0 {
		return nil
	}
	c, named := errors.AsType[coded](err)
	named = named && c.ErrorCode() != "" && c.ErrorCode() != unknownCode
	status := h.HTTPStatusCode()
	if requestID(err) != "" || named && status != http.StatusForbidden &&
		status != http.StatusUnauthorized {
		return nil
	}
	f := &foreignAnswer{status: status, err: err}
	if r, ok := errors.AsType[*smithyhttp.ResponseError](err); ok && r.Response != nil {
		f.location = r.Response.Header.Get("Location")
	}
	return f
}

// sent reports whether an attempt that failed reached a service: those are paid for. A
// request that nobody answered may have.
func sent(err error) bool {
	if errors.As(err, new(*credentialsError)) {
		return false
	}
	if h, ok := errors.AsType[httpCoded](err); ok && h.HTTPStatusCode() != 0 {
		return h.HTTPStatusCode() < 300 || foreign(err) == nil // an answer of 200 may be cut off
	}
	if n, ok := errors.AsType[*net.OpError](err); ok && n.Op == "dial" {
		return false
	}
	return misplaced(err) == "" && !errors.As(err, new(*net.DNSError))
}

// brief is the cause of an error, in one line.
type brief struct{ error }

func (b brief) Unwrap() error { return b.error }

func (b brief) Error() string {
	if c, ok := errors.AsType[interface {
		coded
		ErrorMessage() string
	}](b.error); ok && c.ErrorCode() != unknownCode {
		return c.ErrorCode() + ": " + c.ErrorMessage()
	}
	if h, ok := errors.AsType[httpCoded](b.error); ok && h.HTTPStatusCode() != 0 {
		return fmt.Sprintf("HTTP %d %s, without a reason", h.HTTPStatusCode(),
			http.StatusText(h.HTTPStatusCode()))
	}
	if n, ok := errors.AsType[*net.OpError](b.error); ok {
		return n.Error()
	}
	return plain(b.error)
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
		case "ThrottlingException", "Throttling", "ThrottledException", "RequestThrottled", "RequestThrottledException", "TooManyRequestsException", "RequestLimitExceeded", "SlowDown":
			return true
		}
	}
	h, ok := errors.AsType[httpCoded](err)
	return ok && h.HTTPStatusCode() == http.StatusTooManyRequests
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
