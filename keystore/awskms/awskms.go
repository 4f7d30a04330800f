// Package awskms wraps data keys under AWS KMS keys: GenerateDataKey, Encrypt,
// Decrypt (always with KeyId) and DescribeKey.
//
// Every wrapping carries the encryption context {kmsfs:volume, kmsfs:use} and,
// for files and branches, kmsfs:file or kmsfs:branch: see FORMAT.md. Region,
// credentials, profile and endpoint come from the SDK's default chain, unless
// [Options] say otherwise.
package awskms

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"kmsfs/blockcrypt"
	"kmsfs/keystore"
)

// Scheme of the URIs: the scheme is followed by the key's ARN, never by an alias.
const Scheme = "aws-kms:"

// Options of [New]; the zero value takes everything from the SDK's default chain.
type Options struct {
	Endpoint string // of KMS, instead of the Region's own
	Profile  string // of the shared configuration
	Region   string // for keys named by alias or ID
	RoleARN  string // assumed for all calls, in sessions of an hour

	GrantTokens []string // of grants that KMS may not know everywhere yet, at most 10

	RPS   float64         // calls a second and Region at most, 2,000 if zero: the quota is shared
	Meter *keystore.Meter // counts the calls

	Attempt time.Duration // the most that one attempt takes, 3 s if zero
	Total   time.Duration // the most that a call takes with its retries, 15 s if zero
}

// Clients makes stores. It keeps one client a Region, which [Clients.Reload]
// replaces.
type Clients struct {
	o Options

	mu       sync.Mutex
	clients  map[string]*kms.Client // by Region
	configs  map[string]aws.Config  // likewise
	gates    map[string]*gate
	source   *source // of the credentials, the same in all Regions; nil before the first client
	region   string
	key      string // the ARN of the last key that was opened
	reloaded time.Time
}

// New returns a maker of stores. It does not call anything.
func New(o Options) *Clients {
	if o.Attempt == 0 {
		o.Attempt = 3 * time.Second
	}
	if o.Total == 0 {
		o.Total = 15 * time.Second
	}
	return &Clients{o: o, clients: map[string]*kms.Client{}, configs: map[string]aws.Config{},
		gates: map[string]*gate{}}
}

// client returns the client of a Region, "" for the configured one.
func (c *Clients) client(ctx context.Context, region string) (*kms.Client, string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if region == "" {
		region = c.region
	}
	if k := c.clients[region]; k != nil {
		return k, region, nil
	}
	cfg, err := c.load(ctx, region)
	if err != nil {
		return nil, "", err
	}
	if cfg.Region == "" {
		return nil, "", &keystore.Error{Kind: keystore.Invalid, URI: Scheme, Op: "open",
			Err:  errors.New("no AWS Region is configured"),
			Hint: "set AWS_REGION, give --aws-region, or name the key by its ARN"}
	}
	if region == "" {
		region = cfg.Region
		c.region = region
	}
	if c.source == nil && cfg.Credentials != nil {
		c.source = c.newSource(region, cfg)
	}
	if c.source != nil {
		cfg.Credentials = c.source.cache
	}
	k := c.newClient(cfg)
	c.clients[region], c.configs[region] = k, cfg
	if c.gates[region] == nil {
		c.gates[region] = newGate(c.o.RPS)
	}
	return k, region, nil
}

func (c *Clients) newClient(cfg aws.Config) *kms.Client {
	return kms.NewFromConfig(cfg, func(o *kms.Options) {
		if c.o.Endpoint != "" {
			o.BaseEndpoint = &c.o.Endpoint
		}
	})
}

// Store wraps under one KMS key.
type Store struct {
	c      *Clients
	region string
	arn    string

	named *Store // of the replica that was named, where this one was taken for its Region
	route route  // between the two

	mu       sync.Mutex
	branches map[string]branchKey // by branch field, bounded
	asking   map[string]*asked    // branches that are asked for now
	forgot   uint64               // how often the branches were forgotten
}

var (
	_ keystore.Store       = (*Store)(nil)
	_ keystore.Generator   = (*Store)(nil)
	_ keystore.Matcher     = (*Store)(nil)
	_ keystore.Keeper      = (*Store)(nil)
	_ keystore.Reencrypter = (*Store)(nil)
	_ keystore.Prover      = (*Store)(nil)
)

// Partition, Region, account and key are checked before they choose an endpoint.
var (
	arnPattern   = regexp.MustCompile(`^arn:(aws[a-z-]*):kms:([a-z]{2,4}(?:-[a-z]+)+-[0-9]{1,2}):([0-9]{12}):(key|alias)/([A-Za-z0-9:/_-]{1,256})$`)
	keyIDPattern = regexp.MustCompile(`^(mrk-[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$`)
)

// Named reports whether name is one that [Clients.Open] takes without the
// scheme: alias/… or an ARN of KMS.
func Named(name string) bool {
	return strings.HasPrefix(name, "alias/") ||
		strings.HasPrefix(name, "arn:aws") && strings.Contains(name, ":kms:")
}

// Open returns the store of a key named by alias, key ID, ARN or alias ARN. A
// key ARN is taken as it is; for the others KMS is asked, and a key that cannot
// serve is refused with the reason.
func (c *Clients) Open(ctx context.Context, name string) (*Store, error) {
	region, isKey := "", false
	if m := arnPattern.FindStringSubmatch(name); m != nil {
		region, isKey = m[2], m[4] == "key"
		if isKey && !keyIDPattern.MatchString(m[5]) {
			return nil, badName(name)
		}
	} else if !strings.HasPrefix(name, "alias/") && !keyIDPattern.MatchString(name) {
		return nil, badName(name)
	}
	if i := strings.Index(name, "alias/aws/"); i == 0 || i > 0 && name[i-1] == ':' {
		return nil, refused(name, "an AWS-managed key cannot be used: only AWS services may use it",
			"create a customer managed key: aws kms create-key")
	}
	_, region, err := c.client(ctx, region)
	if err != nil {
		return nil, err
	}
	s := &Store{c: c, region: region, arn: name, branches: map[string]branchKey{},
		asking: map[string]*asked{}}
	if !isKey {
		if s.arn, err = s.resolve(ctx, name, region); err != nil {
			return s, err
		}
	}
	c.mu.Lock()
	c.key = s.arn
	c.mu.Unlock()
	return s, nil
}

// OpenURI returns the store of a recipient's URI: a key ARN, nothing else, since
// what a file names must not be looked up. Of a multi-Region key it is the replica
// in the configured Region, if there is one that can be used.
func (c *Clients) OpenURI(ctx context.Context, uri string) (*Store, error) {
	name, ok := strings.CutPrefix(uri, Scheme)
	m := arnPattern.FindStringSubmatch(name)
	if !ok || m == nil || m[4] != "key" {
		return nil, refused(name, "the recipient is no ARN of a KMS key", "")
	}
	if _, own, err := c.client(ctx, ""); err == nil && own != m[2] && strings.HasPrefix(m[5], "mrk-") {
		ctx, cancel := context.WithTimeout(ctx, c.o.Attempt)
		defer cancel()
		if s, err := c.Open(ctx,
			fmt.Sprintf("arn:%s:kms:%s:%s:key/%s", m[1], own, m[3], m[5])); err == nil {
			if _, err := s.describe(ctx, s.arn); err == nil {
				s.named, err = c.Open(ctx, name)
				return s, err
			}
		}
	}
	return c.Open(ctx, name)
}

// Check asks KMS about the key and refuses one that cannot serve: asymmetric,
// HMAC, AWS-managed, or not enabled. Without the right to DescribeKey it
// passes, since what follows shows it.
func (s *Store) Check(ctx context.Context) error {
	_, err := s.describe(ctx, s.arn)
	if keystore.KindOf(err) == keystore.Denied {
		return nil
	}
	return err
}

func (s *Store) resolve(ctx context.Context, name, region string) (string, error) {
	md, err := s.describe(ctx, name)
	if e, ok := errors.AsType[*keystore.Error](err); ok {
		if errors.As(err, new(*types.NotFoundException)) {
			e.Hint = "there is no such key in Region " + region +
				"; give --aws-region, or name it by its ARN"
		} else if e.Kind == keystore.Denied && deniesAction(err) {
			e.Hint = "a key that is named by its ARN does without kms:DescribeKey; else see docs/keys.md, \"Key policy\""
		}
		return "", err
	}
	if err != nil {
		return "", err
	}
	if m := arnPattern.FindStringSubmatch(aws.ToString(md.Arn)); m == nil || m[4] != "key" {
		return "", &keystore.Error{Kind: keystore.Outage, URI: Scheme + name, Op: "describe",
			Err: fmt.Errorf("KMS answered with the ARN %q", aws.ToString(md.Arn))}
	}
	return *md.Arn, nil
}

// deniesAction reports whether a policy denies a call, and not the credentials are bad.
func deniesAction(err error) bool {
	c, ok := errors.AsType[coded](err)
	return ok && (c.ErrorCode() == "AccessDeniedException" || c.ErrorCode() == "AccessDenied")
}

func (s *Store) describe(ctx context.Context, name string) (*types.KeyMetadata, error) {
	out, err := call(ctx, s, "describe", "DescribeKey", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.DescribeKeyOutput, error) {
		return k.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: &name, GrantTokens: s.c.o.GrantTokens}, o)
	})
	if err != nil {
		return nil, err
	}
	md := out.KeyMetadata
	if md == nil {
		return nil, &keystore.Error{Kind: keystore.Outage, URI: s.URI(), Op: "describe",
			Err: errors.New("KMS answered without metadata")}
	}
	switch {
	case md.KeyManager == types.KeyManagerTypeAws:
		return nil, refused(name, "an AWS-managed key cannot be used: only AWS services may use it",
			"create a customer managed key: aws kms create-key")
	case md.KeySpec != types.KeySpecSymmetricDefault && md.KeySpec != "":
		return nil, refused(name,
			fmt.Sprintf("a key of type %s cannot be used: it must be symmetric (SYMMETRIC_DEFAULT)",
				md.KeySpec), "create one: aws kms create-key")
	case md.KeyUsage != types.KeyUsageTypeEncryptDecrypt && md.KeyUsage != "":
		return nil, refused(name,
			fmt.Sprintf("a key for %s cannot be used: it must be for ENCRYPT_DECRYPT", md.KeyUsage),
			"create one: aws kms create-key")
	}
	if kind := stateKind(md.KeyState); kind != 0 {
		return nil, &keystore.Error{Kind: kind, URI: Scheme + name, Op: "describe",
			Err:  fmt.Errorf("the key's state is %s", md.KeyState),
			Hint: "enable it: aws kms enable-key, after aws kms cancel-key-deletion where it is pending deletion"}
	}
	return md, nil
}

// ARN returns the key's ARN.
func (s *Store) ARN() string { return s.arn }

// URI implements [keystore.Store].
func (s *Store) URI() string { return Scheme + s.arn }

// Matches implements [keystore.Matcher]: the replicas of a multi-Region key are
// one recipient, by partition, account and ID.
func (s *Store) Matches(uri string) bool {
	return uri == s.URI() || SameKey(uri, s.URI())
}

// SameKey reports whether two recipients' URIs name one key, or replicas of one.
func SameKey(a, b string) bool {
	a, isA := strings.CutPrefix(a, Scheme)
	b, isB := strings.CutPrefix(b, Scheme)
	x, y := arnPattern.FindStringSubmatch(a), arnPattern.FindStringSubmatch(b)
	return isA && isB && x != nil && y != nil && x[1] == y[1] && x[3] == y[3] && x[4] == "key" &&
		x[5] == y[5] && (x[2] == y[2] || strings.HasPrefix(x[5], "mrk-"))
}

// Context returns the encryption context of a binding, as CloudTrail shows it.
func Context(b keystore.Binding) map[string]string {
	m := map[string]string{"kmsfs:volume": hex.EncodeToString(b.Volume[:]), "kmsfs:use": string(b.Use)}
	if b.Use != keystore.ForVolume {
		m["kmsfs:"+string(b.Use)] = hex.EncodeToString(b.ID[:])
	}
	return m
}

// Generate implements [keystore.Generator] by GenerateDataKey.
func (s *Store) Generate(ctx context.Context,
	b keystore.Binding) (key []byte, w blockcrypt.Recipient, err error) {
	w, err = replicas(ctx, s, func(ctx context.Context, s *Store) (w blockcrypt.Recipient, err error) {
		key, w, err = s.generate(ctx, b)
		return w, err
	})
	return key, w, err
}

func (s *Store) generate(ctx context.Context, b keystore.Binding) ([]byte, blockcrypt.Recipient, error) {
	out, err := call(ctx, s, "generate", "GenerateDataKey", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.GenerateDataKeyOutput, error) {
		out, err := k.GenerateDataKey(ctx,
			&kms.GenerateDataKeyInput{GrantTokens: s.c.o.GrantTokens, KeyId: &s.arn,
				KeySpec:           types.DataKeySpecAes256,
				EncryptionContext: Context(b)}, o)
		if err == nil {
			err = s.checkAnswer("generate", out.KeyId,
				len(out.Plaintext) == keystore.KeySize && len(out.CiphertextBlob) > 0)
		}
		return out, err
	})
	if err != nil {
		return nil, blockcrypt.Recipient{}, err
	}
	return out.Plaintext, blockcrypt.Recipient{URI: s.URI(), Wrapped: out.CiphertextBlob}, nil
}

// MayGenerate returns nil if these credentials may make data keys that are bound like this. It makes
// none: KMS is asked with DryRun.
func (s *Store) MayGenerate(ctx context.Context, b keystore.Binding) error {
	_, err := call(ctx, s, "generate", "GenerateDataKey", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.GenerateDataKeyOutput, error) {
		out, err := k.GenerateDataKey(ctx,
			&kms.GenerateDataKeyInput{GrantTokens: s.c.o.GrantTokens, KeyId: &s.arn,
				KeySpec:           types.DataKeySpecAes256,
				EncryptionContext: Context(b), DryRun: aws.Bool(true)}, o)
		if _, ok := errors.AsType[*types.DryRunOperationException](err); ok {
			return out, nil // it would have been made
		}
		return out, err
	})
	return err
}

// MayWrap is MayGenerate for wrapping data keys, by Encrypt.
func (s *Store) MayWrap(ctx context.Context, b keystore.Binding) error {
	_, err := call(ctx, s, "wrap", "Encrypt", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.EncryptOutput, error) {
		in := &kms.EncryptInput{GrantTokens: s.c.o.GrantTokens, KeyId: &s.arn,
			Plaintext: make([]byte, keystore.KeySize), EncryptionContext: Context(b), DryRun: aws.Bool(true)}
		out, err := k.Encrypt(ctx, in, o)
		if _, ok := errors.AsType[*types.DryRunOperationException](err); ok {
			return out, nil // it would have been wrapped
		}
		return out, err
	})
	return err
}

// Wrap implements [keystore.Store] by Encrypt.
func (s *Store) Wrap(ctx context.Context, b keystore.Binding, key []byte) (blockcrypt.Recipient, error) {
	return replicas(ctx, s,
		func(ctx context.Context, s *Store) (blockcrypt.Recipient, error) { return s.wrap(ctx, b, key) })
}

func (s *Store) wrap(ctx context.Context, b keystore.Binding, key []byte) (blockcrypt.Recipient, error) {
	out, err := call(ctx, s, "wrap", "Encrypt", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.EncryptOutput, error) {
		out, err := k.Encrypt(ctx,
			&kms.EncryptInput{GrantTokens: s.c.o.GrantTokens, KeyId: &s.arn, Plaintext: key,
				EncryptionContext: Context(b)}, o)
		if err == nil {
			err = s.checkAnswer("wrap", out.KeyId, len(out.CiphertextBlob) > 0)
		}
		return out, err
	})
	if err != nil {
		return blockcrypt.Recipient{}, err
	}
	return blockcrypt.Recipient{URI: s.URI(), Wrapped: out.CiphertextBlob}, nil
}

// Reencrypt implements [keystore.Reencrypter] by ReEncrypt, for two keys of one Region. The
// encryption context stays.
func (s *Store) Reencrypt(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient,
	from keystore.Store) (out blockcrypt.Recipient, ok bool, err error) {
	f, ok := from.(*Store)
	if !ok || f.region != s.region || f.c != s.c || len(w.Branch) > 0 || !isBlob(w.Wrapped) {
		return out, false, nil
	}
	blob, err := s.reencrypt(ctx, b, w.Wrapped, f)
	if err != nil {
		return out, true, err
	}
	return blockcrypt.Recipient{URI: s.URI(), Wrapped: blob}, true, nil
}

func (s *Store) reencrypt(ctx context.Context, b keystore.Binding, blob []byte, from *Store) ([]byte, error) {
	in := &kms.ReEncryptInput{GrantTokens: s.c.o.GrantTokens, CiphertextBlob: blob,
		SourceKeyId: &from.arn, SourceEncryptionContext: Context(b),
		DestinationKeyId: &s.arn, DestinationEncryptionContext: Context(b)}
	out, err := call(ctx, s, "wrap", "ReEncrypt", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.ReEncryptOutput, error) {
		out, err := k.ReEncrypt(ctx, in, o)
		if err == nil {
			err = errors.Join(from.checkAnswer("wrap", out.SourceKeyId, true),
				s.checkAnswer("wrap", out.KeyId, len(out.CiphertextBlob) > 0))
		}
		return out, err
	})
	if err != nil {
		return nil, err
	}
	return out.CiphertextBlob, nil
}

// Prove implements [keystore.Prover] by ReEncrypt for the same key, whose answer is dropped: KMS
// decrypts what it is given, and the caller need not be allowed to.
func (s *Store) Prove(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) error {
	blob := w.Wrapped
	if len(w.Branch) > 16 {
		b = keystore.Binding{Use: keystore.ForBranch, Volume: b.Volume, ID: [16]byte(w.Branch)}
		blob = w.Branch[16:]
	}
	if !isBlob(blob) {
		return &keystore.Error{Kind: keystore.Damaged, URI: s.URI(), Op: "unwrap",
			Err: errors.New("the wrapped key has a length that none has")}
	}
	_, err := s.reencrypt(ctx, b, blob, s)
	return err
}

// isBlob reports whether KMS can have made a wrapped key of this length.
func isBlob(b []byte) bool { return len(b) > 0 && len(b) <= maxBlob }

// maxBlob is how long a wrapped key may be, in bytes: the bound of the API.
const maxBlob = 6144

// Unwrap implements [keystore.Store] by Decrypt; a key under a branch costs a
// call for the branch only.
func (s *Store) Unwrap(ctx context.Context, b keystore.Binding, w blockcrypt.Recipient) ([]byte, error) {
	if len(w.Branch) == 0 {
		return s.decrypt(ctx, b, w.Wrapped)
	}
	if len(w.Branch) <= 16 {
		return nil, &keystore.Error{Kind: keystore.Damaged, URI: s.URI(), Op: "unwrap",
			Err: errors.New("the branch is cut short")}
	}
	kek, err := s.branchKey(ctx, b.Volume, w.Branch)
	if err != nil {
		return nil, err
	}
	return s.under(kek, b, w)
}

func (s *Store) decrypt(ctx context.Context, b keystore.Binding, blob []byte) ([]byte, error) {
	return replicas(ctx, s,
		func(ctx context.Context, s *Store) ([]byte, error) { return s.decryptHere(ctx, b, blob) })
}

func (s *Store) decryptHere(ctx context.Context, b keystore.Binding, blob []byte) ([]byte, error) {
	if len(blob) == 0 || len(blob) > maxBlob {
		return nil, &keystore.Error{Kind: keystore.Damaged, URI: s.URI(), Op: "unwrap",
			Err: errors.New("the wrapped key has an impossible length")}
	}
	out, err := call(ctx, s, "unwrap", "Decrypt", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.DecryptOutput, error) {
		out, err := k.Decrypt(ctx,
			&kms.DecryptInput{GrantTokens: s.c.o.GrantTokens, KeyId: &s.arn, CiphertextBlob: blob,
				EncryptionContext: Context(b)}, o)
		if err == nil {
			err = s.checkAnswer("unwrap", out.KeyId, len(out.Plaintext) > 0)
		}
		return out, err
	})
	if err != nil {
		return nil, err
	}
	if len(out.Plaintext) != keystore.KeySize {
		return nil, &keystore.Error{Kind: keystore.Damaged, URI: s.URI(), Op: "unwrap",
			Err: fmt.Errorf("the wrapped key has %d bytes, not %d", len(out.Plaintext), keystore.KeySize)}
	}
	return out.Plaintext, nil
}

// checkAnswer refuses an answer that names another key or lacks what was asked for.
func (s *Store) checkAnswer(op string, keyID *string, complete bool) error {
	if !complete {
		return &keystore.Error{Kind: keystore.Outage, URI: s.URI(), Op: op,
			Err: errors.New("KMS answered without a key")}
	}
	if !s.Matches(Scheme + aws.ToString(keyID)) {
		return &keystore.Error{Kind: keystore.Damaged, URI: s.URI(), Op: op,
			Err: fmt.Errorf("KMS answered for another key, %q", aws.ToString(keyID))}
	}
	return nil
}

func badName(name string) error {
	return refused(name, fmt.Sprintf("%q is no KMS key: alias/NAME, a key ID or an ARN is", name), "")
}

func refused(name, why, hint string) error {
	return &keystore.Error{Kind: keystore.Invalid, URI: Scheme + name, Op: "open",
		Err: errors.New(why), Hint: hint}
}
