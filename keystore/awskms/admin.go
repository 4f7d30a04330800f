package awskms

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"kmsfs/keystore"
)

// Admin makes and manages keys in one Region.
type Admin struct{ s *Store }

// Admin returns it: of the Region that an ARN names, else of the configured one.
func (c *Clients) Admin(ctx context.Context, name string) (*Admin, error) {
	region := ""
	if m := arnPattern.FindStringSubmatch(strings.TrimPrefix(name, Scheme)); m != nil {
		region = m[2]
	}
	_, region, err := c.client(ctx, region)
	if err != nil {
		return nil, err
	}
	return &Admin{&Store{c: c, region: region, arn: region, branches: map[string]branchKey{}}}, nil
}

// Key is a key as it is listed and shown.
type Key struct {
	ARN      string `json:"arn"`
	Alias    string `json:"alias,omitempty"`
	State    string `json:"state"`
	Spec     string `json:"spec,omitempty"`
	Usage    string `json:"usage,omitempty"`
	Origin   string `json:"origin,omitempty"`
	Created  string `json:"created,omitempty"`
	Deletion string `json:"deletion,omitempty"`
}

// What administrators and users may do: neither the other's.
var (
	adminActions = []string{"kms:CancelKeyDeletion", "kms:CreateAlias", "kms:DeleteAlias",
		"kms:DescribeKey", "kms:DisableKey", "kms:EnableKey", "kms:GetKeyPolicy",
		"kms:GetKeyRotationStatus", "kms:EnableKeyRotation", "kms:DisableKeyRotation",
		"kms:ListAliases", "kms:ListKeyPolicies", "kms:ListResourceTags", "kms:PutKeyPolicy",
		"kms:ScheduleKeyDeletion", "kms:TagResource", "kms:UntagResource", "kms:UpdateAlias",
		"kms:UpdateKeyDescription"}
	userActions = []string{"kms:Decrypt", "kms:DescribeKey", "kms:Encrypt", "kms:GenerateDataKey",
		"kms:ReEncryptFrom", "kms:ReEncryptTo"}
)

type statement struct {
	Sid       string
	Effect    string
	Principal struct{ AWS []string }
	Action    []string
	Resource  string
}

// AdminActions returns the actions of those who manage a key, and cannot use it.
func AdminActions() []string { return slices.Clone(adminActions) }

// Policy returns the key policy, as JSON, that lets admins manage a key and users
// use it; without any, the account decides by its own policies.
func (a *Admin) Policy(ctx context.Context, admins, users []string) (string, error) {
	account := ""
	for _, p := range []*[]string{&admins, &users} {
		if len(*p) > 0 {
			continue
		}
		if account == "" {
			var err error
			if account, err = a.account(ctx); err != nil {
				return "", err
			}
		}
		*p = []string{account}
	}
	make := func(sid string, who, actions []string) statement {
		st := statement{Sid: sid, Effect: "Allow", Action: actions, Resource: "*"}
		st.Principal.AWS = who
		return st
	}
	b, err := json.MarshalIndent(map[string]any{"Version": "2012-10-17",
		"Statement": []statement{make("administrators", admins, adminActions),
			make("users", users, userActions)}}, "", "  ")
	return string(b), err
}

// account returns the principal that stands for the caller's account.
func (a *Admin) account(ctx context.Context) (string, error) {
	c := a.s.c
	if _, _, err := c.client(ctx, a.s.region); err != nil {
		return "", err
	}
	c.mu.Lock()
	cfg := c.configs[a.s.region]
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, c.o.Total)
	defer cancel()
	client := sts.NewFromConfig(cfg)
	out, err := client.GetCallerIdentity(ctx, nil)
	for pause := 200 * time.Millisecond; err != nil && ctx.Err() == nil; pause *= 2 {
		// The client knows the right time from the second call on.
		if _, again := a.s.verdict(ctx, "open", err); !again && !skewed(err) || pause > longPause {
			break
		}
		time.Sleep(pause)
		out, err = client.GetCallerIdentity(ctx, nil)
	}
	if err != nil {
		v, _ := a.s.verdict(ctx, "open", err)
		if _, ok := errors.AsType[*credentialsError](err); !ok {
			v.Err = fmt.Errorf("the account is not known: %s", causeOf(err))
			v.Hint = "name the administrators and users: --admin ARN --user ARN"
		}
		return "", v
	}
	partition, _, _ := strings.Cut(strings.TrimPrefix(aws.ToString(out.Arn), "arn:"), ":")
	return "arn:" + partition + ":iam::" + aws.ToString(out.Account) + ":root", nil
}

// Identity returns where the credentials came from, and whose they are.
func (c *Clients) Identity(ctx context.Context) (source, arn string, err error) {
	_, region, err := c.client(ctx, "")
	if err != nil {
		return "", "", err
	}
	c.mu.Lock()
	cfg := c.configs[region]
	c.mu.Unlock()
	s := &Store{c: c, region: region}
	ctx, cancel := context.WithTimeout(ctx, c.o.Total)
	defer cancel()
	creds, err := cfg.Credentials.Retrieve(ctx)
	if err == nil {
		var out *sts.GetCallerIdentityOutput
		if out, err = sts.NewFromConfig(cfg).GetCallerIdentity(ctx, nil); err == nil {
			return creds.Source, aws.ToString(out.Arn), nil
		}
	}
	v, _ := s.verdict(ctx, "open", err)
	return creds.Source, "", v
}

// Create makes a symmetric key with this policy and alias, and returns its ARN. It leaves no
// key behind if the alias cannot be given to it.
func (a *Admin) Create(ctx context.Context, alias, policy string) (string, error) {
	if arn, ok := a.target(ctx, alias); ok {
		return "", &keystore.Error{Kind: keystore.Invalid, URI: Scheme, Op: "create",
			Err:  fmt.Errorf("there is a key with the alias %q already: %s", alias, arn),
			Hint: "use it, or choose another alias"}
	}
	out, err := call(ctx, a.s, "create", "CreateKey", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.CreateKeyOutput, error) {
		return k.CreateKey(ctx,
			&kms.CreateKeyInput{Policy: &policy, KeySpec: types.KeySpecSymmetricDefault,
				KeyUsage: types.KeyUsageTypeEncryptDecrypt, Origin: types.OriginTypeAwsKms,
				Description: aws.String("kmsfs")}, o)
	})
	if err != nil {
		return "", err
	}
	if out.KeyMetadata == nil || out.KeyMetadata.Arn == nil {
		return "", &keystore.Error{Kind: keystore.Outage, URI: Scheme, Op: "create",
			Err: errors.New("KMS answered without a key")}
	}
	arn := *out.KeyMetadata.Arn
	_, err = call(ctx, a.s, "create", "CreateAlias", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.CreateAliasOutput, error) {
		return k.CreateAlias(ctx, &kms.CreateAliasInput{AliasName: &alias, TargetKeyId: &arn}, o)
	})
	if err == nil {
		return arn, nil
	}
	// An earlier attempt of ours may have come through.
	if has, ok := a.target(ctx, alias); ok && has == arn {
		return arn, nil
	}
	e, ok := errors.AsType[*keystore.Error](err)
	if _, derr := a.ScheduleDeletion(ctx, arn, 7); ok && derr == nil {
		e.Hint = "the new key is deleted in 7 days; choose another alias, or see who may use this one"
	} else if ok {
		e.Hint = "the key " + arn + " was made, and has no alias; it can be used by its ARN, or deleted: kmsfs key schedule-deletion"
	}
	return "", err
}

// target returns the key that an alias names; ok is false if there is none, or it cannot be
// seen.
func (a *Admin) target(ctx context.Context, alias string) (arn string, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, a.s.c.o.Total)
	defer cancel()
	out, err := attempt(ctx, a.s, "DescribeKey", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.DescribeKeyOutput, error) {
		return k.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: &alias}, o)
	})
	if err != nil || out.KeyMetadata == nil {
		return "", false
	}
	return aws.ToString(out.KeyMetadata.Arn), true
}

// List returns the keys that have an alias which is not AWS's own.
func (a *Admin) List(ctx context.Context) ([]Key, error) {
	var keys []Key
	var marker *string
	for {
		out, err := call(ctx, a.s, "list", "ListAliases", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.ListAliasesOutput, error) {
			return k.ListAliases(ctx, &kms.ListAliasesInput{Marker: marker}, o)
		})
		if err != nil {
			return keys, err
		}
		for _, x := range out.Aliases {
			if name := aws.ToString(x.AliasName); x.TargetKeyId != nil &&
				!strings.HasPrefix(name, "alias/aws/") {
				k, err := a.Show(ctx, *x.TargetKeyId)
				if err != nil {
					k = Key{ARN: *x.TargetKeyId, State: "?"} // no right to look at it
				}
				k.Alias = name
				keys = append(keys, k)
			}
		}
		if marker = out.NextMarker; !out.Truncated || marker == nil {
			slices.SortFunc(keys, func(a, b Key) int { return strings.Compare(a.Alias, b.Alias) })
			return keys, nil
		}
	}
}

// Show returns a key named by alias, ID or ARN, in whatever state it is.
func (a *Admin) Show(ctx context.Context, name string) (Key, error) {
	name = strings.TrimPrefix(name, Scheme)
	out, err := call(ctx, a.s, "describe", "DescribeKey", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.DescribeKeyOutput, error) {
		return k.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: &name}, o)
	})
	if err != nil {
		return Key{}, err
	}
	md := out.KeyMetadata
	if md == nil {
		return Key{}, &keystore.Error{Kind: keystore.Outage, URI: Scheme + name, Op: "describe",
			Err: errors.New("KMS answered without metadata")}
	}
	k := Key{ARN: aws.ToString(md.Arn), State: string(md.KeyState), Spec: string(md.KeySpec),
		Usage: string(md.KeyUsage), Origin: string(md.Origin)}
	if strings.HasPrefix(name, "alias/") {
		k.Alias = name
	}
	if md.CreationDate != nil {
		k.Created = md.CreationDate.UTC().Format(time.RFC3339)
	}
	if md.DeletionDate != nil {
		k.Deletion = md.DeletionDate.UTC().Format(time.RFC3339)
	}
	return k, nil
}

// Enable lets a key be used again.
func (a *Admin) Enable(ctx context.Context, arn string) error {
	_, err := call(ctx, a.s, "enable", "EnableKey", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.EnableKeyOutput, error) {
		return k.EnableKey(ctx, &kms.EnableKeyInput{KeyId: &arn}, o)
	})
	return err
}

// Disable makes a key unusable until [Admin.Enable].
func (a *Admin) Disable(ctx context.Context, arn string) error {
	_, err := call(ctx, a.s, "disable", "DisableKey", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.DisableKeyOutput, error) {
		return k.DisableKey(ctx, &kms.DisableKeyInput{KeyId: &arn}, o)
	})
	return err
}

// ScheduleDeletion deletes a key in 7 to 30 days, and returns when.
func (a *Admin) ScheduleDeletion(ctx context.Context, arn string, days int) (string, error) {
	out, err := call(ctx, a.s, "delete", "ScheduleKeyDeletion", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.ScheduleKeyDeletionOutput, error) {
		return k.ScheduleKeyDeletion(ctx,
			&kms.ScheduleKeyDeletionInput{KeyId: &arn, PendingWindowInDays: aws.Int32(int32(days))}, o)
	})
	if err != nil || out.DeletionDate == nil {
		return "", err
	}
	return out.DeletionDate.UTC().Format(time.RFC3339), nil
}

// CancelDeletion keeps a key that was to be deleted; it is disabled then.
func (a *Admin) CancelDeletion(ctx context.Context, arn string) error {
	_, err := call(ctx, a.s, "cancel-deletion", "CancelKeyDeletion", func(ctx context.Context, k *kms.Client, o func(*kms.Options)) (*kms.CancelKeyDeletionOutput, error) {
		return k.CancelKeyDeletion(ctx, &kms.CancelKeyDeletionInput{KeyId: &arn}, o)
	})
	return err
}
