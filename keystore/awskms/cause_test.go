package awskms_test

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kmsfs/keystore"
	"kmsfs/keystore/awskms"
	"kmsfs/keystore/keystoretest"
)

const testRole = "arn:aws:iam::111122223333:role/files"

// configured makes a file the AWS configuration, and takes the credentials out of the
// environment.
func configured(t *testing.T, text string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{"AWS_CONFIG_FILE": path, "AWS_ACCESS_KEY_ID": "",
		"AWS_SECRET_ACCESS_KEY": "", "HOME": filepath.Dir(path)} {
		t.Setenv(k, v)
	}
}

func wantError(t *testing.T, err error, kind keystore.Kind, says, hint string) {
	t.Helper()
	e, ok := errors.AsType[*keystore.Error](err)
	if !ok || e.Kind != kind || !strings.Contains(err.Error(), says) ||
		!strings.Contains(e.Hint, hint) || strings.Contains(err.Error(), "\n") {
		if ok {
			hint = e.Hint + ", want " + hint
		}
		t.Errorf("%v is %v, want %v and %q; hint: %s", err, keystore.KindOf(err), kind, says, hint)
	}
}

// The reason why there are no credentials is told, with a hint of its own.
func TestWhyNoCredentials(t *testing.T) {
	sts := func(code, message string) func(string) *keystoretest.Failure {
		return func(op string) *keystoretest.Failure {
			if !strings.HasPrefix(op, "AssumeRole") {
				return nil
			}
			return &keystoretest.Failure{Status: 403,
				Body: "<ErrorResponse><Error><Code>" + code + "</Code><Message>" + message +
					"</Message></Error></ErrorResponse>"}
		}
	}
	for name, c := range map[string]struct {
		config, profile string
		env             map[string]string
		fail            func(string) *keystoretest.Failure
		says, hint      string
	}{
		"none": {says: "none are configured", hint: "aws configure"},
		"a role that is denied": {config: "[profile base]\naws_access_key_id=A\naws_secret_access_key=s\n[profile r]\nrole_arn=" + testRole + "\nsource_profile=base\n", profile: "r",
			fail: sts("AccessDenied", "base may not sts:AssumeRole"),
			says: "AssumeRole: AccessDenied: base may not"},
		"an SSO session that is not there": {config: "[sso-session corp]\nsso_region=eu-central-1\nsso_start_url=https://corp.example/start\n[profile s]\nsso_session=corp\nsso_account_id=111122223333\nsso_role_name=x\n", profile: "s",
			says: "the SSO session of profile \"s\"", hint: "aws sso login --profile s"},
		"a process that fails": {config: "[profile p]\ncredential_process = sh -c 'exit 7'\n",
			profile: "p", says: "exit status 7", hint: "sh -c"},
		"a process that prints more than credentials": {config: "[profile p]\ncredential_process = sh -c 'echo {\\\"Version\\\":1,\\\"AccessKeyId\\\":\\\"AKP\\\",\\\"SecretAccessKey\\\":\\\"TOPSECRET\\\"}; echo renew'\n", profile: "p",
			says: "its output is not the JSON of credentials"},
		"half a pair of keys": {env: map[string]string{"AWS_ACCESS_KEY_ID": "AKIDTEST"},
			says: "AWS_SECRET_ACCESS_KEY is not", hint: "aws configure"},
		"a role without a source": {config: "[profile r]\nrole_arn=" + testRole + "\n",
			profile: "r", says: "the role of profile \"r\"", hint: "source_profile"},
		"a token that is missing": {env: map[string]string{"AWS_ROLE_ARN": testRole,
			"AWS_WEB_IDENTITY_TOKEN_FILE": "/no/such-token"},
			says: "/no/such-token: no such file", hint: "token file"},
		"a container's agent that has none": {env: map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:1/creds"}, says: "the container's credential service"},
	} {
		t.Run(name, func(t *testing.T) {
			srv := keystoretest.NewServer(t)
			arn := srv.AddKey("alias/x")
			configured(t, c.config)
			t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
			for k, v := range c.env {
				t.Setenv(k, v)
			}
			srv.Fail(c.fail)
			o := quick
			o.Profile = c.profile
			o.Meter = &keystore.Meter{}
			kind := keystore.Credentials
			if strings.Contains(name, "agent") { // it may come back, and is asked again for all of the time
				kind = keystore.Outage
			} else {
				o.Total = time.Minute
			}
			begun := time.Now()
			_, err := awskms.New(o).Open(t.Context(), "alias/x")
			if err == nil {
				t.Fatalf("%s opened", arn)
			}
			if took := time.Since(begun); took > 30*time.Second {
				t.Errorf("told after %v: it was tried again", took)
			}
			wantError(t, err, kind, c.says, c.hint)
			if strings.Contains(fmt.Sprint(err), "TOPSECRET") {
				t.Error("a secret is shown")
			}
			if n := o.Meter.Calls(); len(n) > 0 {
				t.Errorf("calls that were never sent are counted: %v", n)
			}
		})
	}
}

// A credential_process may take long, and is run once for a command, whether it succeeds or not.
func TestProcessRunsOnce(t *testing.T) {
	srv := keystoretest.NewServer(t)
	arn := srv.AddKey("alias/x")
	dir := process(t,
		`echo >>$DIR/runs; sleep $(cat $DIR/takes); test -e $DIR/fails && exit 1; echo '{"Version":1,"AccessKeyId":"AKIDTEST","SecretAccessKey":"s"}'`)
	for _, takes := range []string{"3", "0"} { // longer than Options.Total
		if err := os.WriteFile(dir+"/takes", []byte(takes), 0o600); err != nil {
			t.Fatal(err)
		}
		os.Remove(dir + "/runs")
		s, err := awskms.New(quick).Open(t.Context(), "alias/x")
		if takes == "0" {
			if keystore.KindOf(err) != keystore.Credentials {
				t.Errorf("it fails: %v", err)
			}
		} else if err == nil {
			_, _, err = s.Generate(t.Context(), fileKey)
			if err != nil || s.ARN() != arn {
				t.Errorf("it takes long: %v", err)
			}
		} else {
			t.Errorf("it takes long: %v", err)
		}
		if b, _ := os.ReadFile(dir + "/runs"); len(b) != 1 {
			t.Errorf("it was run %d times", len(b))
		}
		if err := os.WriteFile(dir+"/fails", nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// A container's agent that fails, or is away, for a moment is asked again.
func TestAgentRestarts(t *testing.T) {
	srv := keystoretest.NewServer(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	configured(t, "")
	t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://"+address)
	o := quick
	o.Total = 8 * time.Second
	begun := time.Now()
	time.AfterFunc(500*time.Millisecond, func() {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Error(err)
			return
		}
		agent := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if time.Since(begun) < time.Second {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintf(w,
				`{"AccessKeyId":"AKIDAGENT","SecretAccessKey":"s","Token":"t","Expiration":%q}`,
				time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
		})}}
		agent.Start()
		t.Cleanup(agent.Close)
	})
	s, err := awskms.New(o).Open(t.Context(), srv.AddKey(""))
	if err == nil {
		_, _, err = s.Generate(t.Context(), fileKey)
	}
	if err != nil {
		t.Error(err)
	}
}

// A role is assumed at the configured endpoint of STS, with a clock that is wrong too.
func TestRoleWithWrongClock(t *testing.T) {
	asRole(t, func(t *testing.T, srv *keystoretest.Server, o awskms.Options) {
		srv.SetClock(10 * time.Minute)
		s, err := awskms.New(o).Open(t.Context(), srv.AddKey(""))
		if err == nil {
			_, _, err = s.Generate(t.Context(), fileKey)
		}
		if err != nil {
			t.Error(err)
		}
	})
}

// An answer that is not one of KMS is told as such, and is neither a denial nor an outage of
// long: a proxy has no say about keys.
func TestForeignAnswers(t *testing.T) {
	for status, again := range map[int]bool{302: false, 403: false, 407: false, 429: true,
		500: true, 502: true} {
		var calls atomic.Int32
		proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			calls.Add(1)
			w.Header().Set("Location", "http://127.0.0.1:1/login")
			w.WriteHeader(status)
			fmt.Fprint(w, "<html>blocked</html>")
		}))
		keystoretest.NewServer(t)
		o := quick
		o.Attempt = o.Total // only the end of all the time can cut an attempt off
		o.Endpoint = proxy.URL
		o.Meter = &keystore.Meter{}
		_, err := awskms.New(o).Open(t.Context(), "alias/x")
		wantError(t, err, keystore.Outage, fmt.Sprintf("HTTP %d", status),
			"a proxy answered instead of KMS")
		if n := calls.Load(); again != (n > 1) {
			t.Errorf("%d: %d calls", status, n)
		}
		// The last attempt may have been cut off before its answer: then KMS may have been reached.
		most := uint64(0)
		if again {
			most = 1
		}
		counted := uint64(0)
		for _, c := range o.Meter.Calls() {
			counted += c.Count
		}
		if counted > most {
			t.Errorf("%d: counted %v of %d calls", status, o.Meter.Calls(), calls.Load())
		}
		proxy.Close()
	}
}

// A gateway's denial in JSON has no number of a request of KMS: it takes no keys away.
func TestGatewayDenials(t *testing.T) {
	for _, body := range []string{`{"code":"blocked","message":"x"}`,
		`{"__type":"AccessDeniedException","message":"x"}`, `{"message":"Forbidden"}`} {
		gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, body)
		}))
		keystoretest.NewServer(t)
		o := quick
		o.Endpoint = gateway.URL
		_, err := awskms.New(o).Open(t.Context(), "alias/x")
		wantError(t, err, keystore.Outage, "HTTP 403", "a proxy answered")
		gateway.Close()
	}
}

// A proxy that refuses to connect is told with its status, at once.
func TestProxyRefuses(t *testing.T) {
	if os.Getenv("KMSFS_TEST_PROXY") == "" { // net/http reads the variable once in a process
		proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusProxyAuthRequired) }))
		defer proxy.Close()
		c := exec.Command(os.Args[0], "-test.run", "^TestProxyRefuses$", "-test.v")
		c.Env = append(os.Environ(), "KMSFS_TEST_PROXY=1", "HTTPS_PROXY="+proxy.URL, "NO_PROXY=",
			"no_proxy=")
		if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	srv := keystoretest.NewServer(t)
	arn := srv.AddKey("")
	o := quick
	o.Total = time.Minute
	o.Endpoint = "https://kms.example.com"
	begun := time.Now()
	s, err := awskms.New(o).Open(t.Context(), arn)
	if err == nil {
		_, _, err = s.Generate(t.Context(), fileKey)
	}
	wantError(t, err, keystore.Outage, "HTTP 407", "HTTPS_PROXY")
	if took := time.Since(begun); took > 30*time.Second {
		t.Errorf("told after %v: it was tried again", took)
	}
}

// A file of certificates that is not there is told by the name of its variable.
func TestNoBundle(t *testing.T) {
	srv := keystoretest.NewServer(t)
	arn := srv.AddKey("")
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{empty, empty + ".not-there"} {
		t.Setenv("AWS_CA_BUNDLE", path)
		_, err := awskms.New(quick).Open(t.Context(), arn)
		wantError(t, err, keystore.Invalid, "AWS_CA_BUNDLE: ", "unset AWS_CA_BUNDLE")
	}
}

// A refusal of KMS that is not in the table is a refusal, and no outage.
func TestUnknownRefusals(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s := open(t, srv.AddKey(""))
	for code, want := range map[string]keystore.Kind{"MalformedPolicyDocumentException": keystore.Invalid, "TagException": keystore.Invalid, "SerializationException": keystore.Invalid,
		"AccessDenied": keystore.Denied, "LimitExceededException": keystore.Invalid,
		"SomethingNewException": keystore.Invalid} {
		before := srv.Calls("GenerateDataKey")
		srv.Fail(func(string) *keystoretest.Failure {
			return &keystoretest.Failure{Status: 400,
				Code: code}
		})
		if _, _, err := s.Generate(t.Context(), fileKey); keystore.KindOf(err) != want {
			t.Errorf("%s: %v", code, err)
		}
		if n := srv.Calls("GenerateDataKey") - before; n > 2 {
			t.Errorf("%s: %d calls", code, n)
		}
	}
}

// AWS calls these passing: a signature that is bad once, a key that was just made, an external
// key store that is late.
func TestPassingAnswers(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s := open(t, srv.AddKey(""))
	for _, f := range []keystoretest.Failure{
		{Status: 400, Code: "InvalidSignatureException"}, {Status: 400, Code: "NotFoundException"},
		{Status: 400, Code: "DependencyTimeoutException"},
		{Status: 400, Code: "KMSInvalidStateException",
			Body: `{"__type":"KMSInvalidStateException","message":"The external key store proxy did not respond within the timeout interval."}`},
		{Status: 400, Code: "KMSInvalidStateException",
			Body: `{"__type":"KMSInvalidStateException","message":"the key is Creating."}`},
	} {
		n := 0
		srv.Fail(func(op string) *keystoretest.Failure {
			if n++; n == 1 && op == "GenerateDataKey" {
				return &f
			}
			return nil
		})
		if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
			t.Errorf("once %s: %v", f.Code, err)
		}
	}
}

// A fault of this machine that does not pass by itself is told at once.
func TestMisplaced(t *testing.T) {
	srv := keystoretest.NewServer(t)
	arn := srv.AddKey("")
	var handshakes atomic.Int32
	secret := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500) }))
	secret.Config.ConnState = func(_ net.Conn, st http.ConnState) {
		if st == http.StateNew {
			handshakes.Add(1)
		}
	}
	secret.Config.ErrorLog = log.New(io.Discard, "", 0)
	secret.StartTLS()
	defer secret.Close()
	for endpoint, c := range map[string]struct{ says, hint string }{
		secret.URL: {"certificate", "AWS_CA_BUNDLE"},
		strings.Replace(srv.URL, "http", "https", 1): {"", "speak TLS"},
		"localhost:4566": {"", "https://host"},
	} {
		o := awskms.Options{Endpoint: endpoint}
		begun := time.Now()
		s, err := awskms.New(o).Open(t.Context(), arn)
		if err == nil {
			_, _, err = s.Generate(t.Context(), fileKey)
		}
		wantError(t, err, keystore.Outage, c.says, c.hint)
		if took := time.Since(begun); took > 10*time.Second { // Total is 15 s
			t.Errorf("%s: told after %v", endpoint, took)
		}
	}
	if n := handshakes.Load(); n > 2 {
		t.Errorf("%d handshakes", n)
	}
	// With the CA named, it is used.
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca,
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secret.Certificate().Raw}),
		0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_CA_BUNDLE", ca)
	o := quick
	o.Endpoint = secret.URL
	s, err := awskms.New(o).Open(t.Context(), arn)
	if err == nil {
		_, _, err = s.Generate(t.Context(), fileKey)
	}
	if err == nil || strings.Contains(err.Error(), "certificate") {
		t.Errorf("with AWS_CA_BUNDLE: %v", err)
	}
}

// A reload with a configuration that is broken takes no good credentials away.
func TestBrokenReload(t *testing.T) {
	srv := keystoretest.NewServer(t)
	path := filepath.Join(t.TempDir(), "credentials")
	good := []byte("[default]\naws_access_key_id=AKIDTEST\naws_secret_access_key=s\n")
	for k, v := range map[string]string{"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "",
		"AWS_SHARED_CREDENTIALS_FILE": path, "AWS_EC2_METADATA_DISABLED": "true"} {
		t.Setenv(k, v)
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	c := awskms.New(quick)
	s, err := c.Open(t.Context(), srv.AddKey(""))
	if err != nil {
		t.Fatal(err)
	}
	generate := func() error { _, _, err := s.Generate(t.Context(), fileKey); return err }
	if err := generate(); err != nil {
		t.Fatal(err)
	}
	for _, broken := range []string{"", "[default\n", "[default]\naws_access_key_id=\n",
		"[default]\ncredential_process = false\n"} {
		if err := os.WriteFile(path, []byte(broken), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := c.Reload(t.Context()); keystore.KindOf(err) != keystore.Credentials {
			t.Errorf("%q: %v", broken, err)
		}
		if err := generate(); err != nil {
			t.Errorf("%q: the old ones: %v", broken, err)
		}
	}
	if err := os.WriteFile(path,
		[]byte("[default]\naws_access_key_id=SECOND\naws_secret_access_key=s\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	srv.Refuse("SECOND", "UnrecognizedClientException") // they are not known to KMS (yet)
	if err := c.Reload(t.Context()); err == nil {
		t.Error("credentials that KMS does not know are loaded")
	}
	if err := generate(); err != nil {
		t.Errorf("the old ones: %v", err)
	}
	srv.Refuse("SECOND", "")
	srv.Deny("DescribeKey") // the right to look at the key is not needed
	defer srv.Deny()
	srv.Refuse("AKIDTEST", "UnrecognizedClientException")
	if err := errors.Join(c.Reload(t.Context()), generate()); err != nil {
		t.Errorf("a good one: %v", err)
	}
	if err := awskms.New(quick).Reload(t.Context()); err != nil {
		t.Errorf("without a key of KMS: %v", err)
	}
}

// Making a key with an alias that exists leaves none behind; one that takes long, or whose
// answer is lost, is not made twice.
func TestCreateLeavesNothing(t *testing.T) {
	srv := keystoretest.NewServer(t)
	old := srv.AddKey("alias/old")
	a, err := awskms.New(quick).Admin(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.Create(t.Context(), "alias/old", "{}")
	wantError(t, err, keystore.Invalid, old, "another alias")
	if n := srv.Calls("CreateKey"); n != 0 {
		t.Errorf("%d keys were made", n)
	}
	// Without the right to look, the alias shows too late.
	srv.Deny("DescribeKey")
	_, err = a.Create(t.Context(), "alias/old", "{}")
	wantError(t, err, keystore.Invalid, "AlreadyExists", "deleted in 7 days")
	if n := srv.Calls("ScheduleKeyDeletion"); n != 1 {
		t.Errorf("%d keys are deleted again", n)
	}
	srv.Deny()
	srv.SetLatency(time.Second) // longer than Options.Attempt
	before := srv.Calls("CreateKey")
	if _, err := a.Create(t.Context(), "alias/slow", "{}"); err != nil {
		t.Errorf("a slow answer: %v", err)
	}
	srv.SetLatency(0)
	if n := srv.Calls("CreateKey") - before; n != 1 {
		t.Errorf("a slow answer: made %d times", n)
	}
	for _, f := range []keystoretest.Failure{{Status: 500, Code: "KMSInternalException"},
		{Hang: true}, {Status: 502, Body: "<html>"}} {
		before = srv.Calls("CreateKey")
		srv.Fail(func(op string) *keystoretest.Failure {
			if op == "CreateKey" {
				return &f
			}
			return nil
		})
		_, err = a.Create(t.Context(), "alias/lost", "{}")
		if n := srv.Calls("CreateKey") - before; n != 1 || keystore.KindOf(err) != keystore.Outage {
			t.Errorf("%+v: made %d times, %v", f, n, err)
		}
	}
	n := 0
	srv.Fail(func(op string) *keystoretest.Failure {
		if n++; op == "CreateKey" && n < 4 {
			return &keystoretest.Failure{Status: 400, Code: "ThrottlingException"}
		}
		return nil
	})
	if _, err := a.Create(t.Context(), "alias/throttled", "{}"); err != nil {
		t.Errorf("throttled: %v", err)
	}
}

// The look at a key's state that a verdict takes counts as a call, within the rate limit.
func TestVerdictIsCounted(t *testing.T) {
	srv := keystoretest.NewServer(t)
	o := quick
	o.Attempt, o.Total = time.Minute, time.Minute
	o.Meter = &keystore.Meter{}
	s, err := awskms.New(o).Open(t.Context(), srv.AddKey(""))
	if err != nil {
		t.Fatal(err)
	}
	var failed atomic.Int32 // then it succeeds: no deadline cuts a call off
	srv.Fail(func(op string) *keystoretest.Failure {
		if op == "GenerateDataKey" && failed.Add(1) <= 2 {
			return &keystoretest.Failure{Status: 400, Code: "KMSInvalidStateException"}
		}
		return nil
	})
	if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
		t.Fatal(err)
	}
	counted := uint64(0)
	for _, c := range o.Meter.Calls() {
		if c.Op == "DescribeKey" {
			counted += c.Count
		}
	}
	if n := srv.Calls("DescribeKey"); n == 0 || counted != uint64(n) {
		t.Errorf("%d looks, %d counted", n, counted)
	}
}

// Paths that are relative to the directory in which a mount was started are known.
func TestRelativePaths(t *testing.T) {
	keystoretest.NewServer(t)
	for text, want := range map[string]bool{
		"[default]\nregion=eu-central-1\n":                                                                    false,
		"[default]\ncredential_process = ./get\n":                                                             true,
		"[default]\ncredential_process = get\n":                                                               false,
		"[default]\ncredential_process = /bin/get\n":                                                          false,
		"[default]\nrole_arn=" + testRole + "\nweb_identity_token_file = token\n":                             true,
		"[default]\nrole_arn=" + testRole + "\nsource_profile=b\n[profile b]\ncredential_process = bin/get\n": true,
	} {
		configured(t, text)
		if got := awskms.New(quick).NeedsDirectory(t.Context()); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
	t.Chdir(t.TempDir())
	t.Setenv("AWS_CONFIG_FILE", "aws/config")
	awskms.AbsoluteEnvironment()
	if p := os.Getenv("AWS_CONFIG_FILE"); !filepath.IsAbs(p) || !strings.HasSuffix(p, "/aws/config") {
		t.Errorf("AWS_CONFIG_FILE is %s", p)
	}
}
