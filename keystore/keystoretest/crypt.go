package keystoretest

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"slices"
	"strings"
)

// What the server does with keys: the cryptographic operations of KMS.

// reencrypt is Decrypt by one key and Encrypt by another, each with its own right.
func (s *Server) reencrypt(credential string, q *request) (any, error) {
	if s.denied["ReEncrypt"] {
		return nil, &kmsError{"AccessDeniedException",
			"User: arn:aws:iam::" + Account + ":user/test is not authorized to perform: kms:ReEncryptFrom"}
	}
	from, err := s.withKey("ReEncryptFrom", credential,
		&request{KeyId: q.SourceKeyId, CiphertextBlob: q.CiphertextBlob,
			EncryptionContext: q.SourceEncryptionContext})
	if err != nil {
		return nil, err
	}
	in := from.(map[string]any)
	to, err := s.withKey("ReEncryptTo", credential,
		&request{KeyId: q.DestinationKeyId, Plaintext: in["Plaintext"].([]byte),
			EncryptionContext: q.DestinationEncryptionContext})
	if err != nil {
		return nil, err
	}
	out := to.(map[string]any)
	return map[string]any{"SourceKeyId": in["KeyId"], "KeyId": out["KeyId"],
		"CiphertextBlob": out["CiphertextBlob"]}, nil
}

func (s *Server) crypt(op string, k *key, q *request) (any, error) {
	switch op {
	case "GenerateDataKey":
		plain := make([]byte, 32)
		rand.Read(plain)
		if s.keep {
			s.made = append(s.made, slices.Clone(plain))
		}
		return map[string]any{"KeyId": arn(k.id), "Plaintext": plain,
			"CiphertextBlob": k.wrap(plain, q.EncryptionContext)}, nil
	case "Encrypt", "ReEncryptTo":
		return map[string]any{"KeyId": arn(k.id),
			"CiphertextBlob": k.wrap(q.Plaintext, q.EncryptionContext)}, nil
	case "Decrypt", "ReEncryptFrom":
		if len(q.CiphertextBlob) < 36+12+16 {
			return nil, &kmsError{"InvalidCiphertextException", ""}
		}
		if id := string(q.CiphertextBlob[:36]); id != k.id {
			if s.keys[id] == nil {
				return nil, &kmsError{"InvalidCiphertextException", ""}
			}
			return nil, &kmsError{"IncorrectKeyException",
				"The key ID in the request does not identify a CMK that can perform this operation."}
		}
		plain, err := k.aead().Open(nil, q.CiphertextBlob[36:48], q.CiphertextBlob[48:],
			canonical(q.EncryptionContext))
		if err != nil {
			return nil, &kmsError{"InvalidCiphertextException", ""}
		}
		return map[string]any{"KeyId": arn(k.id), "Plaintext": plain}, nil
	}
	return nil, &kmsError{"UnknownOperationException", op}
}

func (k *key) aead() cipher.AEAD {
	b, err := aes.NewCipher(k.material[:])
	if err != nil {
		panic(err)
	}
	a, err := cipher.NewGCM(b)
	if err != nil {
		panic(err)
	}
	return a
}

// wrap makes a blob: key ID, nonce, ciphertext.
func (k *key) wrap(plain []byte, context map[string]string) []byte {
	nonce := make([]byte, 12)
	rand.Read(nonce)
	return append(append([]byte(k.id), nonce...), k.aead().Seal(nil, nonce, plain, canonical(context))...)
}

func canonical(context map[string]string) []byte {
	var pairs []string
	for k, v := range context {
		pairs = append(pairs,
			base64.StdEncoding.EncodeToString([]byte(k))+"="+base64.StdEncoding.EncodeToString([]byte(v)))
	}
	slices.Sort(pairs)
	return []byte(strings.Join(pairs, ","))
}
