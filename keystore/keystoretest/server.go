// Package keystoretest has what tests of keystores share: a KMS server on
// loopback that obeys, and fails, on command, and the suite that every backend
// must pass.
package keystoretest

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Region and Account of the server's keys.
const (
	Region  = "eu-central-1"
	Account = "111122223333"
)

// Server speaks the AWS JSON 1.1 protocol of KMS on loopback. Its knobs may be
// turned while it serves.
type Server struct {
	URL string // of KMS, and of STS

	http    *httptest.Server
	mu      sync.Mutex        // guards the fields below
	keys    map[string]*key   // by ID
	aliases map[string]string // alias/… to ID
	seen
	knobs
}

// seen is what the server remembers of its calls.
type seen struct {
	calls  map[string]int // by operation
	active int
	most   int
	opened int                 // connections
	blobs  []map[string]string // contexts of all calls that had one
	agents map[string]bool
	number int // of the last request
	keep   bool
	made   [][]byte // data keys
}

// knobs are what tests turn.
type knobs struct {
	denied  map[string]bool // operations
	fail    func(op string) *Failure
	latency time.Duration
	refused map[string]string // access key IDs, with the error code
	policy  *policy           // of every key, nil if all is allowed
	roles   map[string]string // the principal's ARN by access key ID
	noFile  string            // a file ID that a policy forbids
	noARN   string            // an ARN whose policy forbids all
	away    string            // a Region whose calls fail
	clock   time.Duration     // how wrong the client's clock is, as the server sees it
	session time.Duration     // of a role, an hour if zero
	token   string            // of the grant without which keys cannot be used
}

// Failure is an answer that a test asks for: an error code of KMS, or any body.
type Failure struct {
	Status int
	Code   string // __type of the body
	Body   string // instead of a body made from Code
	Hang   bool   // no answer until the client goes away
}

type key struct {
	id, state, spec, usage, manager, policy string
	material                                [32]byte
}

// NewServer is [Start], and points the SDK's environment at the server.
func NewServer(t testing.TB) *Server {
	s := Start(t)
	for k, v := range Env(s.URL) {
		t.Setenv(k, v)
	}
	return s
}

// Start starts a server that ends with the test.
func Start(t testing.TB) *Server {
	s := &Server{keys: map[string]*key{}, aliases: map[string]string{}}
	s.calls, s.denied = map[string]int{}, map[string]bool{}
	s.agents, s.refused = map[string]bool{}, map[string]string{}
	s.http = httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	s.http.Config.ConnState = func(_ net.Conn, st http.ConnState) {
		if st == http.StateNew {
			s.mu.Lock()
			s.opened++
			s.mu.Unlock()
		}
	}
	s.http.Start()
	t.Cleanup(func() { s.http.Close() })
	s.URL = s.http.URL
	return s
}

// Restart takes the server away, with the calls that are under way, and begins it
// again at its address after the pause.
func (s *Server) Restart(t testing.TB, pause time.Duration) {
	t.Helper()
	s.http.Listener.Close()
	s.http.CloseClientConnections()
	time.Sleep(pause)
	l, err := net.Listen("tcp", s.http.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s.http.Close()
	s.http = &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(s.serve)}}
	s.http.Start()
}

// Env is the environment in which the SDK, or the aws command line, talks to a
// server at this URL and to nothing else.
func Env(url string) map[string]string {
	return map[string]string{
		"AWS_ENDPOINT_URL_KMS": url, "AWS_ENDPOINT_URL_STS": url, "AWS_REGION": Region,
		"AWS_DEFAULT_REGION": Region,
		"AWS_ACCESS_KEY_ID":  "AKIDTEST", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "",
		"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null",
		"AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
	}
}

// AddKey makes a symmetric key and returns its ARN. alias may be "".
func (s *Server) AddKey(alias string) string {
	return s.AddKeyLike(alias, "SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT", "CUSTOMER")
}

// AddKeyLike makes a key of another type.
func (s *Server) AddKeyLike(alias, spec, usage, manager string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return arn(s.newKey(alias, spec, usage, manager).id)
}

// AddMultiRegion makes a multi-Region key; the server answers for each replica's ARN.
func (s *Server) AddMultiRegion() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.newKey("", "SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT", "CUSTOMER")
	delete(s.keys, k.id)
	k.id = "mrk-" + strings.ReplaceAll(k.id, "-", "")
	s.keys[k.id] = k
	return arn(k.id)
}

func (s *Server) newKey(alias, spec, usage, manager string) *key {
	var b [16]byte
	rand.Read(b[:])
	h := hex.EncodeToString(b[:])
	k := &key{id: strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-"),
		state: "Enabled", spec: spec, usage: usage, manager: manager}
	rand.Read(k.material[:])
	s.keys[k.id] = k
	if alias != "" {
		s.aliases[alias] = k.id
	}
	return k
}

func arn(id string) string { return "arn:aws:kms:" + Region + ":" + Account + ":key/" + id }

// Policy returns the policy with which a key was made.
func (s *Server) Policy(arn string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keys[arn[strings.LastIndex(arn, "/")+1:]].policy
}

// SetState changes a key's state: Enabled, Disabled, PendingDeletion, PendingImport, Unavailable.
func (s *Server) SetState(arn, state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[arn[strings.LastIndex(arn, "/")+1:]].state = state
}

// Deny makes operations answer AccessDeniedException; none allows all again.
func (s *Server) Deny(ops ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.denied)
	for _, op := range ops {
		s.denied[op] = true
	}
}

// Fail asks f before each call; nil lets it go on.
func (s *Server) Fail(f func(op string) *Failure) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = f
}

// SetLatency delays every answer.
func (s *Server) SetLatency(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.latency = d
}

// Calls returns how often an operation was called, or with "in " and its name a
// Region; "" for all.
func (s *Server) Calls(op string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for o, c := range s.calls {
		if op == "" && !strings.HasPrefix(o, "in ") || op == o {
			n += c
		}
	}
	return n
}

// MostAtOnce returns how many calls were under way at once at most, since it was
// last asked.
func (s *Server) MostAtOnce() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() { s.most = s.active }()
	return s.most
}

// Connections returns how many connections were opened.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opened
}

// Agents returns the user agents that have called, "region " and what Region a call was
// signed for, and "session ", the name of a role's session, and its seconds.
func (s *Server) Agents() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.agents))
}

// Refuse makes calls with an access key ID fail with a code.
func (s *Server) Refuse(id, code string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refused[id] = code
}

// DenyFile makes calls for a file be denied, as a policy on the encryption context
// does; "" allows all.
func (s *Server) DenyFile(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noFile = id
}

// DenyARN makes calls for a key by this ARN be denied, as a replica's policy does; ""
// allows all.
func (s *Server) DenyARN(arn string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noARN = arn
}

// SetAway makes calls that are signed for a Region fail; "" brings it back.
func (s *Server) SetAway(region string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = region
}

// SetClock makes the server's clock go wrong, or the client's: it refuses what was
// signed more than 5 minutes ago.
func (s *Server) SetClock(ahead time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock = ahead
}

// SetSession sets how long the sessions of a role last, an hour if zero.
func (s *Server) SetSession(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.session = d
}

// NeedGrant makes keys usable only in calls with this grant token.
func (s *Server) NeedGrant(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.token = token
}

// KeepKeys makes the server remember the data keys that it makes, for [Server.Keys].
func (s *Server) KeepKeys() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keep = true
}

// Keys returns them.
func (s *Server) Keys() [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.made)
}

// Contexts returns the encryption contexts of the calls so far.
func (s *Server) Contexts() []map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.blobs)
}

// request has the fields of all operations that are served.
type request struct {
	KeyId               string
	Plaintext           []byte
	CiphertextBlob      []byte
	EncryptionContext   map[string]string
	KeySpec             string
	AliasName           string
	TargetKeyId         string
	PendingWindowInDays int
	Policy              string
	DryRun              bool
	GrantTokens         []string

	SourceKeyId, DestinationKeyId                         string
	SourceEncryptionContext, DestinationEncryptionContext map[string]string
}

type kmsError struct{ code, message string }

func (e *kmsError) Error() string { return e.code }

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	op := strings.TrimPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")
	body, _ := io.ReadAll(r.Body)
	if op == "" {
		s.serveSTS(w, r, string(body))
		return
	}
	s.mu.Lock()
	s.calls[op]++
	s.active++
	s.most = max(s.most, s.active)
	s.agents[r.UserAgent()] = true
	away := false
	if scope := strings.Split(r.Header.Get("Authorization"), "/"); len(scope) > 2 {
		s.agents["region "+scope[2]] = true
		s.calls["in "+scope[2]]++
		away = scope[2] == s.away
	}
	s.number++
	id := fmt.Sprintf("0123-test-%d", s.number)
	latency, fail, clock := s.latency, s.fail, s.clock
	s.mu.Unlock()
	now := time.Now().Add(clock)
	w.Header().Set("Date", now.UTC().Format(http.TimeFormat))
	defer func() {
		s.mu.Lock()
		s.active--
		s.mu.Unlock()
	}()
	if latency > 0 {
		select {
		case <-time.After(latency):
		case <-r.Context().Done():
			return
		}
	}
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.Header().Set("X-Amzn-RequestId", id)
	if signed, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date")); err == nil &&
		now.Sub(signed).Abs() > 5*time.Minute {
		s.answerFailure(w, r, &Failure{Status: 400, Code: "InvalidSignatureException"})
		return
	}
	if away {
		s.answerFailure(w, r, &Failure{Status: http.StatusServiceUnavailable})
		return
	}
	if fail != nil {
		if f := fail(op); f != nil {
			s.answerFailure(w, r, f)
			return
		}
	}
	var q request
	if err := json.Unmarshal(body, &q); err != nil {
		s.answerFailure(w, r, &Failure{Status: 400, Code: "SerializationException"})
		return
	}
	out, err := s.operate(op, credential(r), &q)
	if e, ok := err.(*kmsError); ok {
		s.answerFailure(w, r,
			&Failure{Status: 400, Code: e.code,
				Body: fmt.Sprintf(`{"__type":%q,"message":%q}`, e.code, e.message)})
		return
	}
	json.NewEncoder(w).Encode(out)
}

func (s *Server) answerFailure(w http.ResponseWriter, r *http.Request, f *Failure) {
	if f.Hang {
		<-r.Context().Done()
		return
	}
	if f.Status != 0 {
		w.WriteHeader(f.Status)
	}
	if f.Body != "" {
		io.WriteString(w, f.Body)
	} else if f.Code != "" {
		fmt.Fprintf(w, `{"__type":%q,"message":"as the test asked"}`, f.Code)
	}
}

func credential(r *http.Request) string {
	_, c, _ := strings.Cut(r.Header.Get("Authorization"), "Credential=")
	c, _, _ = strings.Cut(c, "/")
	return c
}

func (s *Server) operate(op, credential string, q *request) (any, error) {
	switch credential {
	case "":
		return nil, &kmsError{"MissingAuthenticationToken", "Request is missing Authentication Token"}
	case "EXPIRED":
		return nil, &kmsError{"ExpiredTokenException",
			"The security token included in the request is expired"}
	case "UNKNOWN":
		return nil, &kmsError{"UnrecognizedClientException",
			"The security token included in the request is invalid."}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if code := s.refused[credential]; code != "" {
		return nil, &kmsError{code, "The security token included in the request is not accepted"}
	}
	if q.EncryptionContext != nil {
		s.blobs = append(s.blobs, q.EncryptionContext)
	}
	switch op {
	case "ListAliases":
		var out []map[string]any
		for alias, id := range s.aliases {
			out = append(out, map[string]any{"AliasName": alias, "TargetKeyId": id})
		}
		return map[string]any{"Aliases": out, "Truncated": false}, nil
	case "CreateKey":
		k := s.newKey("", "SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT", "CUSTOMER")
		k.policy = q.Policy
		return map[string]any{"KeyMetadata": s.metadata(k)}, nil
	case "CreateAlias":
		if _, there := s.aliases[q.AliasName]; there {
			return nil, &kmsError{"AlreadyExistsException",
				"An alias with the name " + q.AliasName + " already exists"}
		}
		s.aliases[q.AliasName] = q.TargetKeyId[strings.LastIndex(q.TargetKeyId, "/")+1:]
		return map[string]any{}, nil
	}
	if op == "ReEncrypt" {
		return s.reencrypt(credential, q)
	}
	return s.withKey(op, credential, q)
}

// withKey is an operation on one key. mu is held.
func (s *Server) withKey(op, credential string, q *request) (any, error) {
	var k *key
	if op == "Decrypt" && q.KeyId == "" && len(q.CiphertextBlob) > 36 {
		k = s.keys[string(q.CiphertextBlob[:36])]
	} else {
		k = s.find(q.KeyId)
	}
	if s.denied[op] || op != "DescribeKey" && q.KeyId == s.noARN && q.KeyId != "" ||
		s.noFile != "" && q.EncryptionContext["kmsfs:file"] == s.noFile {
		return nil, &kmsError{"AccessDeniedException",
			"User: arn:aws:iam::" + Account + ":user/test is not authorized to perform: kms:" + op}
	}
	if s.policy != nil && !s.policy.allows(s.roles[credential], "kms:"+op, q.EncryptionContext) {
		return nil, &kmsError{"AccessDeniedException",
			"User: " + s.roles[credential] + " is not authorized to perform: kms:" + op +
				" because no resource-based policy allows the action"}
	}
	if s.token != "" && !slices.Contains(q.GrantTokens, s.token) {
		return nil, &kmsError{"AccessDeniedException",
			"User: " + s.roles[credential] + " is not authorized to perform: kms:" + op +
				" because no grant allows the action"}
	}
	if k == nil {
		return nil, &kmsError{"NotFoundException", "Key '" + arn(q.KeyId) + "' does not exist"}
	}
	switch op {
	case "DescribeKey":
		return map[string]any{"KeyMetadata": s.metadata(k)}, nil
	case "DisableKey":
		k.state = "Disabled"
		return map[string]any{}, nil
	case "EnableKey":
		k.state = "Enabled"
		return map[string]any{}, nil
	case "ScheduleKeyDeletion":
		k.state = "PendingDeletion"
		return map[string]any{"KeyId": arn(k.id),
			"DeletionDate": time.Now().Add(7 * 24 * time.Hour).Unix()}, nil
	case "CancelKeyDeletion":
		k.state = "Disabled"
		return map[string]any{"KeyId": arn(k.id)}, nil
	}
	switch k.state {
	case "Enabled":
	case "Disabled":
		return nil, &kmsError{"DisabledException", arn(k.id) + " is disabled."}
	default:
		said := map[string]string{"PendingDeletion": "pending deletion",
			"PendingImport": "pending import"}[k.state]
		return nil, &kmsError{"KMSInvalidStateException", arn(k.id) + " is " + cmp.Or(said, k.state) + "."}
	}
	if k.spec != "SYMMETRIC_DEFAULT" {
		return nil, &kmsError{"InvalidKeyUsageException", "the key is of type " + k.spec}
	}
	if q.DryRun {
		return nil, &kmsError{"DryRunOperationException",
			"The request would have succeeded, but the DryRun option is set."}
	}
	return s.crypt(op, k, q)
}

func (s *Server) find(name string) *key {
	name = strings.TrimPrefix(name, "arn:aws:kms:"+Region+":"+Account+":")
	if id, ok := s.aliases[name]; ok {
		return s.keys[id]
	}
	if _, id, ok := strings.Cut(name, ":"+Account+":key/mrk-"); ok { // a replica
		name = "mrk-" + id
	}
	return s.keys[strings.TrimPrefix(name, "key/")]
}

func (s *Server) metadata(k *key) map[string]any {
	return map[string]any{"KeyId": k.id, "Arn": arn(k.id), "AWSAccountId": Account,
		"Enabled": k.state == "Enabled", "KeyState": k.state,
		"KeyUsage": k.usage, "KeySpec": k.spec, "CustomerMasterKeySpec": k.spec,
		"KeyManager": k.manager, "CreationDate": 1.7e9, "Description": "", "Origin": "AWS_KMS"}
}
