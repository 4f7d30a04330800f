package keystoretest

import (
	"cmp"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// serveSTS answers GetCallerIdentity, AssumeRole and AssumeRoleWithWebIdentity, in the query
// protocol. A session's access key ID is SESSION and how many of its kind there were before, and
// for a web identity WEB and its token.
func (s *Server) serveSTS(w http.ResponseWriter, r *http.Request, body string) {
	q, _ := url.ParseQuery(body)
	op := q.Get("Action")
	s.mu.Lock()
	n := s.calls[op]
	s.calls[op]++
	if op == "AssumeRole" {
		s.agents["session "+q.Get("RoleSessionName")+" "+q.Get("DurationSeconds")] = true
	}
	fail, lasts, clock := s.fail, cmp.Or(s.session, time.Hour), s.clock
	s.mu.Unlock()
	now := time.Now().Add(clock)
	w.Header().Set("Date", now.UTC().Format(http.TimeFormat))
	if signed, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date")); err == nil &&
		now.Sub(signed).Abs() > 5*time.Minute {
		s.answerFailure(w, r,
			&Failure{Status: 403,
				Body: `<ErrorResponse><Error><Code>SignatureDoesNotMatch</Code><Message>Signature expired</Message></Error></ErrorResponse>`})
		return
	}
	if fail != nil {
		if f := fail(op); f != nil {
			s.answerFailure(w, r, f)
			return
		}
	}
	switch op {
	case "GetCallerIdentity":
		fmt.Fprintf(w,
			`<GetCallerIdentityResponse><GetCallerIdentityResult><Arn>arn:aws:iam::%s:user/test</Arn><UserId>X</UserId><Account>%[1]s</Account></GetCallerIdentityResult></GetCallerIdentityResponse>`, Account)
	case "AssumeRole":
		fmt.Fprintf(w,
			`<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>SESSION%d</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>%s</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>`,
			n, time.Now().Add(lasts).UTC().Format(time.RFC3339))
	case "AssumeRoleWithWebIdentity":
		fmt.Fprintf(w,
			`<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>WEB%s</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>%s</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`,
			q.Get("WebIdentityToken"), time.Now().Add(lasts).UTC().Format(time.RFC3339))
	default:
		w.WriteHeader(http.StatusBadRequest)
	}
}
