package tests

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kmsfs/keystore/keystoretest"
	"kmsfs/tests/independent"
)

const text = "休みがほしい。温泉に行きたい。\n"

// walk is a user with an AWS account, which is an emulator.
type walk struct {
	*mounted
	t testing.TB
}

func (w *walk) aws(args ...string) []byte {
	w.t.Helper()
	c := exec.Command("aws", append([]string{"--output", "json"}, args...)...)
	c.Env = w.env
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		w.t.Fatalf("aws %s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	return out
}

func newWalk(t testing.TB, url string) *walk {
	needFUSE(t)
	needTool(t, "aws")
	base := t.TempDir()
	m := &mounted{t: t, base: base, cipher: filepath.Join(base, "cipher"), dir: filepath.Join(base, "mnt")}
	m.env = append(os.Environ(), "XDG_STATE_HOME="+filepath.Join(base, "state"),
		"XDG_CONFIG_HOME="+filepath.Join(base, "config"),
		"XDG_RUNTIME_DIR="+filepath.Join(base, "run"), "AWS_PAGER=")
	for k, v := range keystoretest.Env(url) {
		m.env = append(m.env, k+"="+v)
	}
	for _, d := range []string{m.cipher, m.dir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(m.cleanup)
	return &walk{m, t}
}

type key struct {
	KeyMetadata struct{ KeyId, Arn string }
}

// createKey makes a customer master key with a policy and an alias.
func (w *walk) createKey(alias string) key {
	w.t.Helper()
	policy := `{"Version":"2012-10-17","Statement":[
		{"Sid":"administrators","Effect":"Allow","Principal":{"AWS":"arn:aws:iam::123456789012:root"},"Action":["kms:Create*","kms:Describe*","kms:Enable*","kms:List*","kms:Put*","kms:Update*","kms:Revoke*","kms:Disable*","kms:Get*","kms:Delete*","kms:ScheduleKeyDeletion","kms:CancelKeyDeletion"],"Resource":"*"},
		{"Sid":"users","Effect":"Allow","Principal":{"AWS":"arn:aws:iam::123456789012:root"},"Action":["kms:GenerateDataKey","kms:Decrypt","kms:DescribeKey"],"Resource":"*"}]}`
	var k key
	if err := json.Unmarshal(w.aws("kms", "create-key", "--description", "kmsfs", "--policy",
		policy), &k); err != nil {
		w.t.Fatal(err)
	}
	w.aws("kms", "create-alias", "--alias-name", alias, "--target-key-id", k.KeyMetadata.KeyId)
	return k
}

type fileInfo struct {
	Volume     string            `json:"volume"`
	Context    map[string]string `json:"encryption_context"`
	Recipients []struct {
		URI, ARN string
		Wrapped  []byte
	}
}

// The whole path, with the real command line of AWS against moto_server: what
// kmsfs has written, others open, with nothing but FORMAT.md.
func TestWalkMoto(t *testing.T) {
	w := newWalk(t, keystoretest.Moto(t))
	const alias = "alias/mksamba-masterkey"
	k := w.createKey(alias)
	if out := w.kmsfs("init", "--key", alias, w.cipher); !strings.Contains(out, k.KeyMetadata.Arn) {
		t.Errorf("init does not say the key: %s", out)
	}
	w.mount()
	write(t, w.path("text"), []byte(text))
	want(t, w.path("text"), []byte(text))
	w.umount()
	file := w.ciphertexts(1)[0]
	plainKey := w.openByHand(file)
	// Neither a plaintext nor a plaintext key is on the disk, anywhere.
	w.nowhere([]byte("休みがほしい"), plainKey, []byte(base64.StdEncoding.EncodeToString(plainKey)),
		[]byte(fmt.Sprintf("%x", plainKey)))

	// One file, with no volume.
	in, sealed, out := filepath.Join(w.base, "in"), filepath.Join(w.base,
		"sealed"), filepath.Join(w.base, "out")
	write(t, in, []byte(text))
	w.kmsfs("encrypt", "--key", alias, in, sealed)
	w.openByHand(sealed)
	if got := w.kmsfs("decrypt", sealed, out); !strings.Contains(got,
		"unverified: aws-kms:"+k.KeyMetadata.Arn) {
		t.Errorf("decrypt does not say which key the file named: %s", got)
	}
	want(t, out, []byte(text))
	// A file of the volume, elsewhere, with no volume around it.
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(w.base, "restored"), b)
	if got := w.kmsfs("cat", filepath.Join(w.base, "restored")); got != text {
		t.Errorf("cat: %q", got)
	}
}

// openByHand unwraps a file's key by aws kms decrypt, with no key ID, decodes
// the file independently, and returns the key.
func (w *walk) openByHand(file string) []byte {
	w.t.Helper()
	var info fileInfo
	if err := json.Unmarshal([]byte(w.kmsfs("info", "--json", file)), &info); err != nil {
		w.t.Fatal(err)
	}
	if len(info.Recipients) != 1 || info.Context["kmsfs:use"] != "file" ||
		info.Context["kmsfs:volume"] != info.Volume || len(info.Context) != 3 {
		w.t.Fatalf("info says %+v", info)
	}
	blob := filepath.Join(w.base, "blob")
	write(w.t, blob, info.Recipients[0].Wrapped)
	context, err := json.Marshal(info.Context)
	if err != nil {
		w.t.Fatal(err)
	}
	var answer struct{ Plaintext []byte }
	if err := json.Unmarshal(w.aws("kms", "decrypt", "--ciphertext-blob", "fileb://"+blob,
		"--encryption-context", string(context)), &answer); err != nil {
		w.t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		w.t.Fatal(err)
	}
	if bytes.Contains(b, []byte("休み")) || bytes.Contains(b, answer.Plaintext) {
		w.t.Error("the ciphertext holds the plaintext, or its key")
	}
	got, err := independent.Decode(b, answer.Plaintext, nil)
	if err != nil || string(got) != text {
		w.t.Fatalf("decoded independently: %q, %v", got, err)
	}
	return answer.Plaintext
}

// nowhere fails where one of these stands in a file below the test's directory.
func (w *walk) nowhere(secrets ...[]byte) {
	w.t.Helper()
	err := filepath.WalkDir(w.base, func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(p)
		for _, s := range secrets {
			if bytes.Contains(b, s) {
				w.t.Errorf("%s holds %q", p, s)
			}
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// The same against our own server, with what moto does not know: key states.
func TestWalkKeyStates(t *testing.T) {
	srv := keystoretest.NewServer(t)
	w := newWalk(t, srv.URL)
	w.faults = true
	k := w.createKey("alias/mksamba-masterkey")
	w.kmsfs("init", "--key", "alias/mksamba-masterkey", w.cipher)
	w.options = []string{"--audit", "strict"} // or the next file's key would be known
	w.mount()
	for i := range 5 {
		write(t, w.path(fmt.Sprint(i)), []byte(text))
	}
	w.remount()
	for i, step := range []struct {
		args []string
		want string
	}{
		{[]string{"disable-key", "--key-id", k.KeyMetadata.KeyId}, "Key has been revoked"},
		{[]string{"enable-key", "--key-id", k.KeyMetadata.KeyId}, text},
		{[]string{"schedule-key-deletion", "--key-id", k.KeyMetadata.KeyId,
			"--pending-window-in-days", "7"}, "Key has been revoked"},
		{[]string{"cancel-key-deletion", "--key-id", k.KeyMetadata.KeyId},
			"Key has been revoked"}, // it is disabled then
		{[]string{"enable-key", "--key-id", k.KeyMetadata.KeyId}, text},
	} {
		w.aws(append([]string{"kms"}, step.args...)...)
		// Each time a file whose key was not unwrapped yet.
		// A verdict is remembered, until a probe finds another.
		var got []byte
		for until := time.Now().Add(20 * time.Second); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
			if got, _ = exec.Command("cat",
				w.path(fmt.Sprint(i))).CombinedOutput(); strings.Contains(string(got), step.want) {
				break
			}
		}
		if !strings.Contains(string(got), step.want) {
			t.Errorf("after %s: %q", step.args[0], got)
		}
	}
	if srv.Calls("GenerateDataKey") == 0 {
		t.Error("no data key was generated")
	}
}
