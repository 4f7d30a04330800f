package awskms_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/kms"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
	"kmsfs/keystore/awskms"
	"kmsfs/keystore/keystoretest"
)

// quick options: a failure need not take 15 s to show.
var quick = awskms.Options{Attempt: 500 * time.Millisecond, Total: 2 * time.Second}

func open(t *testing.T, name string) *awskms.Store {
	t.Helper()
	s, err := awskms.New(quick).Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSuite(t *testing.T) {
	srv := keystoretest.NewServer(t)
	arn := srv.AddKey("alias/a")
	s := open(t, "alias/a")
	if s.URI() != "aws-kms:"+arn {
		t.Fatalf("the alias became %s", s.URI())
	}
	keystoretest.Suite(t, s, open(t, srv.AddKey("")))
	for _, c := range srv.Contexts() {
		if len(c["kmsfs:volume"]) != 32 || c["kmsfs:use"] == "file" && len(c["kmsfs:file"]) != 32 ||
			c["kmsfs:use"] == "volume" && len(c) != 2 || len(c) > 3 {
			t.Fatalf("an encryption context of %v", c)
		}
	}
}

func TestSuiteMoto(t *testing.T) {
	url := keystoretest.Moto(t)
	cfg, err := config.LoadDefaultConfig(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := kms.NewFromConfig(cfg, func(o *kms.Options) { o.BaseEndpoint = &url })
	var arns []string
	for range 2 {
		k, err := c.CreateKey(t.Context(), &kms.CreateKeyInput{})
		if err != nil {
			t.Fatal(err)
		}
		arns = append(arns, *k.KeyMetadata.Arn)
	}
	if _, err := c.CreateAlias(t.Context(),
		&kms.CreateAliasInput{AliasName: aws.String("alias/moto"), TargetKeyId: &arns[0]}); err != nil {
		t.Fatal(err)
	}
	o := awskms.Options{Attempt: 10 * time.Second, Total: 30 * time.Second}
	s, err := awskms.New(o).Open(t.Context(), "alias/moto")
	if err != nil || s.ARN() != arns[0] {
		t.Fatal(s, err)
	}
	other, err := awskms.New(o).Open(t.Context(), arns[1])
	if err != nil {
		t.Fatal(err)
	}
	// It calls a key that it does not find, or one that is not the call's, a denial.
	keystoretest.Suite(t, s, other, keystore.Denied)
	if _, err := awskms.New(o).Open(t.Context(), "alias/none"); keystore.KindOf(err) != keystore.Revoked {
		t.Errorf("an alias that is not there: %v", err)
	}
}

func TestVerdicts(t *testing.T) {
	srv := keystoretest.NewServer(t)
	arn := srv.AddKey("")
	s := open(t, arn)
	b := keystore.Binding{Use: keystore.ForVolume}
	w, err := s.Wrap(t.Context(), b, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	unwrap := func() error { _, err := s.Unwrap(t.Context(), b, w); return err }
	for state, want := range map[string]keystore.Kind{"Disabled": keystore.Revoked,
		"PendingDeletion": keystore.Revoked, "PendingImport": keystore.Revoked,
		"Unavailable": keystore.Outage, "Enabled": 0} {
		srv.SetState(arn, state)
		if err := unwrap(); keystore.KindOf(err) != want {
			t.Errorf("a key that is %s: %v", state, err)
		}
	}
	srv.SetState(arn, "Enabled")
	for code, want := range map[string]keystore.Kind{
		"AccessDeniedException": keystore.Denied, "UnrecognizedClientException": keystore.Denied,
		"ExpiredTokenException": keystore.Credentials,
		"NotFoundException":     keystore.Revoked, "InvalidCiphertextException": keystore.Damaged,
		"IncorrectKeyException": keystore.Damaged,
		"ThrottlingException":   keystore.Outage, "KMSInternalException": keystore.Outage,
		"DependencyTimeoutException": keystore.Outage,
		"KeyUnavailableException":    keystore.Outage, "InvalidKeyUsageException": keystore.Invalid,
	} {
		srv.Fail(func(string) *keystoretest.Failure {
			return &keystoretest.Failure{Status: 400,
				Code: code}
		})
		err := unwrap()
		if keystore.KindOf(err) != want {
			t.Errorf("%s: %v", code, err)
		}
		if e, ok := errors.AsType[*keystore.Error](err); !ok ||
			!strings.HasPrefix(e.RequestID, "0123-test-") || !strings.Contains(err.Error(), code) ||
			strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: the error does not say so: %v", code, err)
		}
	}
	for name, f := range map[string]keystoretest.Failure{"500": {Status: 500},
		"503 in HTML": {Status: 503, Body: "<html>"}, "200 without JSON": {Body: "<html>"},
		"200 without a key": {Body: "{}"}, "429": {Status: 429}} {
		srv.Fail(func(string) *keystoretest.Failure { return &f })
		if err := unwrap(); keystore.KindOf(err) != keystore.Outage {
			t.Errorf("%s: %v", name, err)
		}
	}
	srv.Fail(func(string) *keystoretest.Failure { return &keystoretest.Failure{Status: 403} })
	if err := unwrap(); keystore.KindOf(err) != keystore.Denied {
		t.Errorf("403: %v", err)
	}
}

// A deadline in the middle of an attempt does not hide what the service has said.
func TestDeadlineTellsWhy(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s, err := awskms.New(awskms.Options{Attempt: time.Second,
		Total: 700 * time.Millisecond}).Open(t.Context(), srv.AddKey(""))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	srv.Fail(func(string) *keystoretest.Failure {
		if n++; n < 3 {
			return &keystoretest.Failure{Status: 400, Code: "KMSInternalException"}
		}
		return &keystoretest.Failure{Hang: true}
	})
	_, _, err = s.Generate(t.Context(), fileKey)
	if keystore.KindOf(err) != keystore.Outage || !strings.Contains(err.Error(), "KMSInternalException") {
		t.Error(err)
	}
}

func TestRetries(t *testing.T) {
	srv := keystoretest.NewServer(t)
	// Nothing here takes long: the time is for a busy machine.
	s, err := awskms.New(awskms.Options{Attempt: 5 * time.Second, Total: 20 * time.Second}).Open(t.Context(), srv.AddKey(""))
	if err != nil {
		t.Fatal(err)
	}
	left := 3
	srv.Fail(func(string) *keystoretest.Failure {
		if left--; left >= 0 {
			return &keystoretest.Failure{Status: 400, Code: "ThrottlingException"}
		}
		return nil
	})
	if _, _, err := s.Generate(t.Context(), keystore.Binding{Use: keystore.ForFile}); err != nil {
		t.Fatal(err)
	}
	if n := srv.Calls("GenerateDataKey"); n != 4 {
		t.Errorf("%d calls for three that were throttled and one that was not", n)
	}
	srv.Fail(func(string) *keystoretest.Failure {
		return &keystoretest.Failure{Status: 400, Code: "AccessDeniedException"}
	})
	// A denial is checked a second time, with credentials that are loaded again; the next
	// one, just after, is not.
	for i, want := range []int{6, 7} {
		s.Generate(t.Context(), keystore.Binding{Use: keystore.ForFile})
		if n := srv.Calls("GenerateDataKey"); n != want {
			t.Errorf("denied call %d: %d calls, want %d", i, n, want)
		}
	}
}

// While most calls are answered a throttled one is tried again soon, and ever later
// once most are throttled.
func TestThrottledPauses(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s := open(t, srv.AddKey(""))
	srv.Fail(func(string) *keystoretest.Failure {
		return &keystoretest.Failure{Status: 400, Code: "ThrottlingException"}
	})
	before := srv.Calls("GenerateDataKey")
	if _, _, err := s.Generate(t.Context(),
		keystore.Binding{Use: keystore.ForFile}); keystore.KindOf(err) != keystore.Outage {
		t.Errorf("throttled all the time: %v", err)
	}
	// Doubling from the first would make 8 in the 2 s, not doubling at all 80.
	if n := srv.Calls("GenerateDataKey") - before; n < 15 || n > 65 {
		t.Errorf("%d attempts", n)
	}
}

func TestDeadlines(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s := open(t, srv.AddKey(""))
	srv.Fail(func(string) *keystoretest.Failure { return &keystoretest.Failure{Hang: true} })
	begun := time.Now()
	if _, _, err := s.Generate(t.Context(),
		keystore.Binding{Use: keystore.ForFile}); keystore.KindOf(err) != keystore.Outage {
		t.Errorf("a server that hangs: %v", err)
	}
	if d := time.Since(begun); d > 10*time.Second {
		t.Errorf("it took %v", d)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := s.Generate(ctx,
		keystore.Binding{Use: keystore.ForFile}); keystore.KindOf(err) != keystore.Canceled {
		t.Errorf("a caller that went away: %v", err)
	}
	t.Setenv("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:1") // nobody listens
	if _, _, err := open(t, s.ARN()).Generate(t.Context(),
		keystore.Binding{Use: keystore.ForFile}); keystore.KindOf(err) != keystore.Outage {
		t.Errorf("an unreachable server: %v", err)
	}
}

func TestCredentials(t *testing.T) {
	srv := keystoretest.NewServer(t)
	arn := srv.AddKey("")
	for _, c := range []struct {
		id, secret string
		want       keystore.Kind
	}{{"EXPIRED", "s", keystore.Credentials}, {"UNKNOWN", "s", keystore.Denied},
		{"", "", keystore.Credentials}} {
		t.Setenv("AWS_ACCESS_KEY_ID", c.id)
		t.Setenv("AWS_SECRET_ACCESS_KEY", c.secret)
		if _, _, err := open(t, arn).Generate(t.Context(),
			keystore.Binding{Use: keystore.ForFile}); keystore.KindOf(err) != c.want {
			t.Errorf("the credentials %q: %v", c.id, err)
		}
	}
}

func TestNames(t *testing.T) {
	srv := keystoretest.NewServer(t)
	arn := srv.AddKey("alias/good")
	srv.AddKeyLike("alias/rsa", "RSA_2048", "ENCRYPT_DECRYPT", "CUSTOMER")
	srv.AddKeyLike("alias/hmac", "HMAC_256", "GENERATE_VERIFY_MAC", "CUSTOMER")
	srv.AddKeyLike("alias/managed", "SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT", "AWS")
	off := srv.AddKey("alias/off")
	srv.SetState(off, "Disabled")
	id := arn[strings.LastIndex(arn, "/")+1:]
	for _, name := range []string{"alias/good", arn, id, strings.Replace(arn, "key/"+id, "alias/good", 1)} {
		if s := open(t, name); s.ARN() != arn {
			t.Errorf("%s became %s", name, s.ARN())
		}
	}
	for name, want := range map[string]string{
		"alias/rsa": "RSA_2048", "alias/hmac": "HMAC_256", "alias/managed": "AWS-managed",
		"alias/aws/s3": "AWS-managed", "alias/none": "NotFoundException",
		"alias/off": "Disabled", "nonsense": "no KMS key", "arn:aws:s3:::bucket": "no KMS key",
		arn + "/../x": "no KMS key",
		"arn:aws:kms:evil.example.org/:111122223333:key/" + id: "no KMS key",
	} {
		_, err := awskms.New(quick).Open(t.Context(), name)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, a := range []string{"alias/rsa", "alias/off"} { // named by ARN, Check finds out
		bad := srv.AddKeyLike("", "RSA_2048", "ENCRYPT_DECRYPT", "CUSTOMER")
		if a == "alias/off" {
			bad = off
		}
		if err := open(t, bad).Check(t.Context()); err == nil {
			t.Errorf("%s by its ARN passes", a)
		}
	}
	srv.Deny("DescribeKey")
	if err := open(t, arn).Check(t.Context()); err != nil {
		t.Errorf("without the right to DescribeKey: %v", err)
	}
	t.Setenv("AWS_REGION", "")
	t.Setenv("AWS_DEFAULT_REGION", "")
	if _, err := awskms.New(quick).Open(t.Context(),
		"alias/good"); keystore.KindOf(err) != keystore.Invalid {
		t.Errorf("without a Region: %v", err)
	}
	if _, err := awskms.New(quick).Open(t.Context(), arn); err != nil {
		t.Errorf("an ARN names its Region: %v", err)
	}
}

func TestMatches(t *testing.T) {
	keystoretest.NewServer(t)
	const mrk = "arn:aws:kms:eu-central-1:111122223333:key/mrk-0123456789abcdef0123456789abcdef"
	s := open(t, mrk)
	for uri, want := range map[string]bool{
		"aws-kms:" + mrk: true,
		"aws-kms:" + strings.Replace(mrk, "eu-central-1", "us-east-1", 1):                        true,
		"aws-kms:" + strings.Replace(mrk, "111122223333", "111122223334", 1):                     false,
		"aws-kms:" + strings.Replace(mrk, "arn:aws:", "arn:aws-cn:", 1):                          false,
		"aws-kms:arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab": false,
		"local:00112233445566778899aabbccddeeff":                                                 false,
	} {
		if s.Matches(uri) != want {
			t.Errorf("%s: %v", uri, !want)
		}
	}
}

// Calls are made on the connections of those before them.
func TestConnectionsKept(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s := open(t, srv.AddKey(""))
	srv.SetLatency(5 * time.Millisecond)
	for range 20 {
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if _, _, err := s.Generate(t.Context(),
					keystore.Binding{Use: keystore.ForFile}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	if n, most := srv.Connections(), srv.MostAtOnce(); n > 300 || most < 20 {
		t.Errorf("%d connections for 2,000 calls, %d at once", n, most)
	}
}

func TestAnswerOfAnotherKey(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s := open(t, srv.AddKey(""))
	srv.Fail(func(op string) *keystoretest.Failure {
		return &keystoretest.Failure{Body: `{"KeyId":"arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab","Plaintext":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","CiphertextBlob":"AAAA"}`}
	})
	if _, _, err := s.Generate(t.Context(),
		keystore.Binding{Use: keystore.ForFile}); keystore.KindOf(err) != keystore.Damaged {
		t.Errorf("an answer for another key: %v", err)
	}
}

// An answer without a key is asked for again; one with a key of another length is
// damage.
func TestEmptyAnswer(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s := open(t, srv.AddKey(""))
	_, w, err := s.Generate(t.Context(), keystore.Binding{Use: keystore.ForFile})
	if err != nil {
		t.Fatal(err)
	}
	left := 0
	srv.Fail(func(string) *keystoretest.Failure {
		if left--; left >= 0 {
			return &keystoretest.Failure{Body: "{}"}
		}
		return nil
	})
	left = 2
	if _, _, err := s.Generate(t.Context(), keystore.Binding{Use: keystore.ForFile}); err != nil {
		t.Errorf("generate: %v", err)
	}
	left = 2
	if _, err := s.Unwrap(t.Context(), keystore.Binding{Use: keystore.ForFile}, w); err != nil {
		t.Errorf("unwrap: %v", err)
	}
	left = 1 << 30
	if _, err := s.Unwrap(t.Context(), keystore.Binding{Use: keystore.ForFile},
		w); keystore.KindOf(err) != keystore.Outage {
		t.Errorf("never a key: %v", err)
	}
	srv.Fail(func(string) *keystoretest.Failure {
		return &keystoretest.Failure{Body: fmt.Sprintf(`{"KeyId":%q,"Plaintext":"AAAA"}`, s.ARN())}
	})
	if _, err := s.Unwrap(t.Context(), keystore.Binding{Use: keystore.ForFile},
		w); keystore.KindOf(err) != keystore.Damaged {
		t.Errorf("a key of 3 bytes: %v", err)
	}
}

// A key that waits for its deletion is revoked, also for callers without the right to describe it.
func TestPendingDeletion(t *testing.T) {
	srv := keystoretest.NewServer(t)
	arn := srv.AddKey("")
	s := open(t, arn)
	srv.SetState(arn, "PendingDeletion")
	srv.Deny("DescribeKey")
	if _, _, err := s.Generate(t.Context(),
		keystore.Binding{Use: keystore.ForFile}); keystore.KindOf(err) != keystore.Revoked {
		t.Errorf("%v", err)
	}
}

// Forgetting the branches takes no key from an unwrap under way.
func TestForgetBranches(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s := open(t, srv.AddKey(""))
	branch, b := [16]byte{1}, keystore.Binding{Use: keystore.ForFile, ID: [16]byte{2}}
	kek, w, err := s.Generate(t.Context(), keystore.Binding{Use: keystore.ForBranch, ID: branch})
	if err != nil {
		t.Fatal(err)
	}
	blob, err := keystore.WrapLocal(kek, b, branch, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	x := blockcrypt.Recipient{URI: s.URI(), Branch: append(branch[:], w.Wrapped...), Wrapped: blob}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 300 {
				if _, err := s.Unwrap(t.Context(), b, x); err != nil {
					t.Error(err)
					return
				}
				s.Forget()
			}
		})
	}
	wg.Wait()
}

// A data key under a branch costs one call for the branch.
func TestBranch(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s := open(t, srv.AddKey(""))
	branch := [16]byte{1, 2, 3}
	kek, w, err := s.Generate(t.Context(), keystore.Binding{Use: keystore.ForBranch, ID: branch})
	if err != nil {
		t.Fatal(err)
	}
	for i := range byte(5) {
		b := keystore.Binding{Use: keystore.ForFile, ID: [16]byte{i}}
		blob, err := keystore.WrapLocal(kek, b, branch, make([]byte, 32))
		if err != nil {
			t.Fatal(err)
		}
		x := blockcrypt.Recipient{URI: s.URI(), Branch: append(branch[:], w.Wrapped...), Wrapped: blob}
		if _, err := s.Unwrap(t.Context(), b, x); err != nil {
			t.Fatal(err)
		}
		b.ID[7] = 9
		if _, err := s.Unwrap(t.Context(), b, x); keystore.KindOf(err) != keystore.Damaged {
			t.Errorf("the key of another file: %v", err)
		}
	}
	if n := srv.Calls("Decrypt"); n != 1 {
		t.Errorf("%d calls", n)
	}
	// Many at the same time cost one, and share its failure.
	blob, err := keystore.WrapLocal(kek, keystore.Binding{Use: keystore.ForFile}, branch, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	x := blockcrypt.Recipient{URI: s.URI(), Branch: append(branch[:], w.Wrapped...), Wrapped: blob}
	all := func() (failed int32) {
		s.Forget()
		var wg sync.WaitGroup
		var n atomic.Int32
		for range 50 {
			wg.Go(func() {
				if _, err := s.Unwrap(t.Context(), keystore.Binding{Use: keystore.ForFile}, x); err != nil {
					n.Add(1)
				}
			})
		}
		wg.Wait()
		return n.Load()
	}
	srv.SetLatency(20 * time.Millisecond)
	if failed, n := all(), srv.Calls("Decrypt"); failed != 0 || n != 2 {
		t.Errorf("%d of 50 failed, %d calls", failed, n-1)
	}
	srv.Deny("Decrypt")
	if failed, n := all(), srv.Calls("Decrypt"); failed != 50 || n > 4 {
		t.Errorf("%d of 50 failed, %d calls", failed, n-2)
	}
}

// A wrapped key is proven without the right to see it: not one of another binding, nor another blob.
func TestProve(t *testing.T) {
	srv := keystoretest.NewServer(t)
	s := open(t, srv.AddKey(""))
	file := keystore.Binding{Use: keystore.ForFile, Volume: [16]byte{1}, ID: [16]byte{2}}
	branch := keystore.Binding{Use: keystore.ForBranch, Volume: [16]byte{1}, ID: [16]byte{3}}
	_, w, err := s.Generate(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	_, kek, err := s.Generate(t.Context(), branch)
	if err != nil {
		t.Fatal(err)
	}
	under := blockcrypt.Recipient{Branch: append(branch.ID[:], kek.Wrapped...), Wrapped: []byte("any")}
	srv.Deny("Decrypt", "Encrypt", "GenerateDataKey")
	altered := blockcrypt.Recipient{Wrapped: append([]byte{}, w.Wrapped...)}
	altered.Wrapped[len(altered.Wrapped)-1] ^= 1
	other := file
	other.ID[0]++
	for what, c := range map[string]struct {
		b    keystore.Binding
		w    blockcrypt.Recipient
		want keystore.Kind
	}{
		"right":           {file, w, 0},
		"another file's":  {other, w, keystore.Damaged},
		"altered":         {file, altered, keystore.Damaged},
		"empty":           {file, blockcrypt.Recipient{}, keystore.Damaged},
		"under a branch":  {file, under, 0},
		"of another part": {keystore.Binding{Use: keystore.ForFile}, under, keystore.Damaged},
	} {
		if err := s.Prove(t.Context(), c.b, c.w); keystore.KindOf(err) != c.want || (err == nil) != (c.want == 0) {
			t.Errorf("%s: %v", what, err)
		}
	}
	srv.Deny("ReEncrypt")
	if err := s.Prove(t.Context(), file, w); keystore.KindOf(err) != keystore.Denied {
		t.Errorf("denied: %v", err)
	}
}
