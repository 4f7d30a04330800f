package awskms_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kmsfs/keystore"
	"kmsfs/keystore/awskms"
	"kmsfs/keystore/keystoretest"
)

var fileKey = keystore.Binding{Use: keystore.ForFile}

// A clock that is wrong by ten minutes, either way, and that jumps.
func TestClockSkew(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s := open(t, srv.AddKey(""))
	for _, ahead := range []time.Duration{10 * time.Minute, 0, -10 * time.Minute, 2 * time.Hour} {
		srv.SetClock(ahead)
		for range 2 {
			if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
				t.Errorf("the clock is wrong by %v: %v", -ahead, err)
			}
		}
	}
}

// A clock that jumps there and back, again and again.
func TestClockJumps(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s := open(t, srv.AddKey(""))
	for i := range 10 {
		srv.SetClock(time.Duration(i%2) * 10 * time.Minute)
		if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
			t.Errorf("jump %d: %v", i, err)
		}
	}
}

// Credentials in a file that is rewritten.
func TestReload(t *testing.T) {
	srv := keystoretest.NewServer(t)
	path := filepath.Join(t.TempDir(), "credentials")
	put := func(id string) {
		t.Helper()
		if err := os.WriteFile(path,
			fmt.Appendf(nil, "[default]\naws_access_key_id=%s\naws_secret_access_key=s\n", id),
			0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("FIRST")
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", path)
	c := awskms.New(quick)
	s, err := c.Open(t.Context(), srv.AddKey(""))
	if err != nil {
		t.Fatal(err)
	}
	generate := func() error { _, _, err := s.Generate(t.Context(), fileKey); return err }
	if err := generate(); err != nil {
		t.Fatal(err)
	}
	for _, code := range []string{"ExpiredTokenException", "UnrecognizedClientException"} {
		srv.Refuse("FIRST", code)
		put("SECOND")
		if err := generate(); err != nil {
			t.Errorf("after %s: %v", code, err)
		}
		srv.Refuse("FIRST", "")
		put("FIRST")
		c.Reload(t.Context())
		if err := generate(); err != nil {
			t.Error(err)
		}
		// For the next round, as if the last reload were long ago.
		c = awskms.New(quick)
		if s, err = c.Open(t.Context(), s.ARN()); err != nil {
			t.Fatal(err)
		}
		generate()
	}
	srv.Refuse("FIRST", "ExpiredTokenException")
	if err := generate(); keystore.KindOf(err) != keystore.Credentials {
		t.Errorf("none that are good: %v", err)
	}
	put("THIRD")
	c.Reload(t.Context())
	if err := generate(); err != nil {
		t.Errorf("after Reload: %v", err)
	}
}

// asRole runs a test with a role that is named by an option, and with one of a profile.
func asRole(t *testing.T, test func(*testing.T, *keystoretest.Server, awskms.Options)) {
	const arn = "arn:aws:iam::111122223333:role/kmsfs"
	t.Run("Option", func(t *testing.T) {
		srv, o := keystoretest.NewServer(t), quick
		o.RoleARN = arn
		test(t, srv, o)
	})
	t.Run("Profile", func(t *testing.T) {
		srv, o := keystoretest.NewServer(t), quick
		path := filepath.Join(t.TempDir(), "config")
		if err := os.WriteFile(path,
			[]byte("[profile base]\naws_access_key_id=AKIDTEST\naws_secret_access_key=s\n[profile role]\nrole_arn="+arn+"\nsource_profile=base\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("AWS_CONFIG_FILE", path)
		t.Setenv("AWS_ACCESS_KEY_ID", "")
		t.Setenv("AWS_SECRET_ACCESS_KEY", "")
		o.Profile = "role"
		test(t, srv, o)
	})
}

// A role is assumed once, for an hour, under a name that says who.
func TestRole(t *testing.T) {
	asRole(t, func(t *testing.T, srv *keystoretest.Server, o awskms.Options) {
		srv.Refuse("AKIDTEST", "AccessDeniedException") // only the session may
		s, err := awskms.New(o).Open(t.Context(), srv.AddKey(""))
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
				t.Fatal(err)
			}
		}
		if n := srv.Calls("AssumeRole"); n != 1 {
			t.Errorf("the role was assumed %d times", n)
		}
		named := func(a string) bool {
			return strings.HasPrefix(a, "session kmsfs-") &&
				strings.HasSuffix(a, " 3600")
		}
		if !slices.ContainsFunc(srv.Agents(), named) {
			t.Errorf("no session is named after this machine, for an hour: %q", srv.Agents())
		}
	})
}

// A role's session is renewed early; where STS fails or is silent then, the old one is
// used while it lasts, and after that it is an outage, no lack of credentials.
func TestRoleRenewal(t *testing.T) { asRole(t, testRoleRenewal) }

func testRoleRenewal(t *testing.T, srv *keystoretest.Server, o awskms.Options) {
	arn := srv.AddKey("")
	open := func() func() error {
		t.Helper()
		s, err := awskms.New(o).Open(t.Context(), arn)
		if err != nil {
			t.Fatal(err)
		}
		return func() error { _, _, err := s.Generate(t.Context(), fileKey); return err }
	}
	sts := func(f keystoretest.Failure) func(string) *keystoretest.Failure {
		return func(op string) *keystoretest.Failure {
			if op == "AssumeRole" {
				return &f
			}
			return nil
		}
	}
	away, silent := sts(keystoretest.Failure{Status: 503,
		Body: "<html>away</html>"}), sts(keystoretest.Failure{Hang: true})
	for _, how := range []func(string) *keystoretest.Failure{away, silent} {
		srv.Fail(nil)
		srv.SetSession(5*time.Minute + 2*time.Second) // to be renewed after 2 s
		generate := open()
		if err := generate(); err != nil {
			t.Fatal(err)
		}
		before := srv.Calls("AssumeRole")
		srv.Fail(how)
		time.Sleep(2500 * time.Millisecond)
		for range 5 {
			if err := generate(); err != nil {
				t.Errorf("while the session lasts: %v", err)
			}
		}
		if n := srv.Calls("AssumeRole") - before; n != 1 {
			t.Errorf("%d sessions were asked for, not one", n)
		}
	}
	// Without any session.
	srv.Fail(away)
	begun := time.Now()
	if err := open()(); keystore.KindOf(err) != keystore.Outage || time.Since(begun) < time.Second {
		t.Errorf("after %v: %v", time.Since(begun), err)
	}
	o.Total = 10 * time.Second // more than the longest pause
	for _, how := range []func(string) *keystoretest.Failure{away, silent} {
		srv.Fail(how)
		time.AfterFunc(time.Second, func() { srv.Fail(nil) })
		if err := open()(); err != nil {
			t.Errorf("STS came back: %v", err)
		}
	}
	srv.Fail(sts(keystoretest.Failure{Status: 403,
		Body: `<ErrorResponse><Error><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>`}))
	if err := open()(); keystore.KindOf(err) != keystore.Credentials {
		t.Errorf("a role that may not be assumed: %v", err)
	}
}

// process makes a credential_process the only source of credentials, a shell script.
func process(t *testing.T, script string) (dir string) {
	dir = t.TempDir()
	for name, text := range map[string]string{"script": script,
		"config": "[default]\ncredential_process = sh " + dir + "/script\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for k, v := range map[string]string{"AWS_CONFIG_FILE": dir + "/config", "AWS_ACCESS_KEY_ID": "",
		"AWS_SECRET_ACCESS_KEY": "", "DIR": dir} {
		t.Setenv(k, v)
	}
	return dir
}

// A source whose credentials all last less than 5 minutes is not asked at each call.
func TestShortCredentials(t *testing.T) {
	srv := keystoretest.NewServer(t)
	dir := process(t,
		`echo >>$DIR/asked; printf '{"Version":1,"AccessKeyId":"AKIDTEST","SecretAccessKey":"s","SessionToken":"t","Expiration":"%s"}' $(date -u -d "$(cat $DIR/lasts)" +%FT%TZ)`)
	for lasts, want := range map[string]int{"4 minutes": 1, "3 hours": 1} {
		if err := os.WriteFile(dir+"/lasts", []byte(lasts), 0o600); err != nil {
			t.Fatal(err)
		}
		os.Remove(dir + "/asked")
		s := open(t, srv.AddKey(""))
		for range 5 {
			if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
				t.Errorf("%s: %v", lasts, err)
			}
		}
		if b, err := os.ReadFile(dir + "/asked"); len(b) != want {
			t.Errorf("%s: asked %d times, %v", lasts, len(b), err)
		}
	}
}

// One who gives credentials and is silent for ever is not waited for for ever.
func TestSilentCredentials(t *testing.T) {
	srv := keystoretest.NewServer(t)
	dir := process(t,
		`if test -e $DIR/silent; then echo $$ >>$DIR/pids; exec sleep 600; fi; echo '{"Version":1,"AccessKeyId":"AKIDTEST","SecretAccessKey":"s"}'`)
	t.Cleanup(func() {
		b, _ := os.ReadFile(dir + "/pids")
		for _, s := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(s); err == nil {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	if err := os.WriteFile(dir+"/silent", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	o := awskms.Options{Attempt: 100 * time.Millisecond, Total: 500 * time.Millisecond} // 3 s of silence
	s, err := awskms.New(o).Open(t.Context(), srv.AddKey(""))
	if err != nil {
		t.Fatal(err)
	}
	generate := func() error { _, _, err := s.Generate(t.Context(), fileKey); return err }
	if err := generate(); keystore.KindOf(err) != keystore.Outage {
		t.Errorf("silent: %v", err)
	}
	os.Remove(dir + "/silent")
	for until := time.Now().Add(30 * time.Second); time.Now().Before(until); {
		if err = generate(); err == nil {
			return
		}
	}
	t.Errorf("it answers again: %v", err)
}

// New credentials that take longer to come than a call waits are used when they have.
func TestSlowRotation(t *testing.T) {
	srv := keystoretest.NewServer(t)
	dir := process(t,
		`if test -e $DIR/rotated; then sleep 1; printf '{"Version":1,"AccessKeyId":"SECOND","SecretAccessKey":"s"}'; else printf '{"Version":1,"AccessKeyId":"FIRST","SecretAccessKey":"s"}'; fi`)
	s := open(t, srv.AddKey(""))
	generate := func() error { _, _, err := s.Generate(t.Context(), fileKey); return err }
	if err := generate(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/rotated", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	srv.Refuse("FIRST", "UnrecognizedClientException")
	begun := time.Now()
	for err := generate(); err != nil; err = generate() {
		if keystore.KindOf(err) != keystore.Denied || time.Since(begun) > 8*time.Second {
			t.Fatalf("after %v: %v", time.Since(begun), err)
		}
	}
}

// In a container, credentials come from what EKS and ECS put into its environment.
func TestContainerCredentials(t *testing.T) {
	var asked atomic.Pointer[http.Request]
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r)
		fmt.Fprintf(w, `{"AccessKeyId":"AKIDAGENT","SecretAccessKey":"s","Token":"t","Expiration":%q}`,
			time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	}))
	defer agent.Close()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("TOKEN"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		env             map[string]string
		accessKey, auth string
	}{
		"a role for a service account": {map[string]string{"AWS_WEB_IDENTITY_TOKEN_FILE": token,
			"AWS_ROLE_ARN": "arn:aws:iam::111122223333:role/kmsfs"}, "WEBTOKEN", ""},
		"Pod Identity": {map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": agent.URL + "/v1/credentials",
			"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": token}, "AKIDAGENT", "TOKEN"},
		"ECS": {map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": agent.URL + "/v2/credentials/1",
			"AWS_CONTAINER_AUTHORIZATION_TOKEN": "FIXED"}, "AKIDAGENT", "FIXED"},
	} {
		t.Run(name, func(t *testing.T) {
			srv := keystoretest.NewServer(t)
			t.Setenv("AWS_ACCESS_KEY_ID", "")
			t.Setenv("AWS_SECRET_ACCESS_KEY", "")
			for k, v := range c.env {
				t.Setenv(k, v)
			}
			asked.Store(nil)
			s, err := awskms.New(quick).Open(t.Context(), srv.AddKey(""))
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
				t.Fatal(err)
			}
			if r := asked.Load(); c.auth != "" && (r == nil || r.Header.Get("Authorization") != c.auth) {
				t.Errorf("the agent was asked with another token: %v", r)
			}
			srv.Refuse(c.accessKey, "AccessDeniedException") // it is this one
			if _, _, err := s.Generate(t.Context(), fileKey); keystore.KindOf(err) != keystore.Denied {
				t.Errorf("%s is refused: %v", c.accessKey, err)
			}
		})
	}
}

// A container's agent that is silent once is asked again.
func TestSilentAgent(t *testing.T) {
	srv := keystoretest.NewServer(t)
	var asked atomic.Int32
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 1 {
			<-r.Context().Done()
			return
		}
		fmt.Fprintf(w,
			`{"AccessKeyId":"AKIDAGENT","SecretAccessKey":"s","Token":"t","Expiration":%q}`,
			time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	}))
	defer agent.Close()
	for k, v := range map[string]string{"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "",
		"AWS_CONTAINER_CREDENTIALS_FULL_URI": agent.URL} {
		t.Setenv(k, v)
	}
	o := quick
	o.Total = 4 * time.Second // less than the SDK would wait
	s, err := awskms.New(o).Open(t.Context(), srv.AddKey(""))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
		t.Error(err)
	}
}

// A refusal asks for credentials again; if none can be had the old ones, which are good
// for all else, stay.
func TestRefusalWithoutSTS(t *testing.T) {
	asRole(t, func(t *testing.T, srv *keystoretest.Server, o awskms.Options) {
		o.Attempt, o.Total = 2*time.Second, 8*time.Second // a busy machine is slow, too
		s, err := awskms.New(o).Open(t.Context(), srv.AddKey(""))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
			t.Fatal(err)
		}
		srv.Fail(func(op string) *keystoretest.Failure {
			if op == "AssumeRole" {
				return &keystoretest.Failure{Hang: true}
			}
			return nil
		})
		other := fileKey
		other.ID[0] = 1
		srv.DenyFile(awskms.Context(other)["kmsfs:file"])
		if _, _, err := s.Generate(t.Context(), other); keystore.KindOf(err) != keystore.Denied {
			t.Errorf("a file that is forbidden: %v", err)
		}
		if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
			t.Errorf("one that is not: %v", err)
		}
		if n := srv.Calls("AssumeRole"); n != 2 {
			t.Errorf("%d sessions were asked for", n)
		}
	})
}

// A role that asks for a code cannot be used by a mount.
func TestMFA(t *testing.T) {
	srv := keystoretest.NewServer(t)
	path := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(path,
		[]byte("[profile base]\naws_access_key_id=AKIDTEST\naws_secret_access_key=s\n[profile mfa]\nrole_arn=arn:aws:iam::111122223333:role/r\nsource_profile=base\nmfa_serial=arn:aws:iam::111122223333:mfa/x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{"AWS_CONFIG_FILE": path, "AWS_ACCESS_KEY_ID": "",
		"AWS_SECRET_ACCESS_KEY": ""} {
		t.Setenv(k, v)
	}
	o := quick
	o.Profile = "mfa"
	_, err := awskms.New(o).Open(t.Context(), srv.AddKey(""))
	if keystore.KindOf(err) != keystore.Credentials || !strings.Contains(err.Error(), "multi-factor") {
		t.Errorf("%v", err)
	}
}

// The network goes away between the request and its answer; the server is
// another one afterwards.
func TestBrokenAnswers(t *testing.T) {
	srv := keystoretest.NewServer(t)
	arn := srv.AddKey("")
	var n atomic.Int32
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1)%2 == 1 { // cut off in the middle of the answer
			c, buf, err := w.(http.Hijacker).Hijack()
			if err == nil {
				buf.WriteString("HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.1\r\nContent-Length: 500\r\n\r\n{\"KeyId\":")
				buf.Flush()
				c.Close()
			}
			return
		}
		req, _ := http.NewRequest(r.Method, srv.URL, r.Body)
		req.Header = r.Header
		req.Host = r.Host
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		maps.Copy(w.Header(), resp.Header)
		w.WriteHeader(resp.StatusCode)
		buf := make([]byte, 1<<16)
		k, _ := resp.Body.Read(buf)
		w.Write(buf[:k])
	}))
	defer proxy.Close()
	o := quick
	o.Endpoint = proxy.URL
	o.Meter = &keystore.Meter{}
	s, err := awskms.New(o).Open(t.Context(), arn)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
		t.Errorf("an answer that is cut off is tried again: %v", err)
	}
	calls := o.Meter.Calls()
	if len(calls) != 2 || calls[0].Verdict != "ok" || calls[1].Verdict != "outage" ||
		calls[0].Op != "GenerateDataKey" || calls[0].Purpose != "open" {
		t.Errorf("counted %v", calls)
	}
	if q := o.Meter.Quantile(0.5); q <= 0 || q > time.Minute {
		t.Errorf("half of the calls took %v", q)
	}
}

// Keys are made, listed, switched and deleted; the policy keeps principals that manage a
// key apart from those that use it.
func TestAdmin(t *testing.T) {
	srv := keystoretest.NewServer(t)
	a, err := awskms.New(quick).Admin(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	policy, err := a.Policy(t.Context(), nil, []string{"arn:aws:iam::111122223333:user/eve"})
	if err != nil {
		t.Fatal(err)
	}
	var p struct {
		Statement []struct {
			Sid       string
			Principal struct{ AWS []string }
			Action    []string
		}
	}
	if err := json.Unmarshal([]byte(policy), &p); err != nil || len(p.Statement) != 2 {
		t.Fatalf("%v: %s", err, policy)
	}
	for i, who := range []string{"arn:aws:iam::111122223333:root", "arn:aws:iam::111122223333:user/eve"} {
		st := p.Statement[i]
		if !slices.Equal(st.Principal.AWS, []string{who}) {
			t.Errorf("%s: %v", st.Sid, st.Principal.AWS)
		}
		uses := slices.Contains(st.Action, "kms:Decrypt")
		manages := slices.Contains(st.Action, "kms:DisableKey")
		if uses == manages || uses != (i == 1) {
			t.Errorf("%s may do %v", st.Sid, st.Action)
		}
	}
	arn, err := a.Create(t.Context(), "alias/new", policy)
	if err != nil || srv.Policy(arn) != policy {
		t.Fatalf("%v, policy %q", err, srv.Policy(arn))
	}
	state := func(want string) {
		t.Helper()
		if k, err := a.Show(t.Context(), "alias/new"); err != nil || k.State != want || k.ARN != arn {
			t.Errorf("%+v, %v, want %s", k, err, want)
		}
	}
	state("Enabled")
	for _, step := range []struct {
		do   func() error
		want string
	}{
		{func() error { return a.Disable(t.Context(), arn) }, "Disabled"},
		{func() error { return a.Enable(t.Context(), arn) }, "Enabled"},
		{func() error { _, err := a.ScheduleDeletion(t.Context(), arn, 7); return err }, "PendingDeletion"},
		{func() error { return a.CancelDeletion(t.Context(), arn) }, "Disabled"},
	} {
		if err := step.do(); err != nil {
			t.Error(err)
		}
		state(step.want)
	}
	if ks, err := a.List(t.Context()); err != nil || len(ks) != 1 || ks[0].Alias != "alias/new" ||
		ks[0].ARN != arn {
		t.Errorf("%+v, %v", ks, err)
	}
}
