package blockcrypt

import (
	"bytes"
	"crypto/hmac"
	"encoding/hex"
	"encoding/json"
	"maps"
	"slices"
)

// ConfigName is the file at a volume's root that holds its [Config].
const ConfigName = "kmsfs.json"

// Names modes.
const (
	NamesEncrypted = "encrypted"
	NamesPlain     = "plain"
)

// Config is kmsfs.json: line 1 is JSON, line 2 the HMAC of line 1.
type Config struct {
	Format      int                  `json:"format"`
	Volume      ID                   `json:"volume"`
	Generation  uint64               `json:"generation"`
	Header      int                  `json:"header"`
	Former      int                  `json:"former_header,omitempty"` // that files may have which were not changed yet
	Names       string               `json:"names"`
	Shared      bool                 `json:"shared,omitempty"` // several hosts may write at the same time
	Recipients  []Recipient          `json:"recipients"`
	Directories map[ID]DirectoryKeys `json:"directories"` // by the IDs of directories
	Branch      *ConfigBranch        `json:"branch"`      // how new files are wrapped under branch keys; nil if they are not

	line, mac []byte
}

// DirectoryKeys are the recipients of the files below a directory. A random key is wrapped for each of
// them, which has no other use than to show whether the recipient unwraps.
type DirectoryKeys struct {
	Recipients []Recipient `json:"recipients,omitempty"` // of new files; none: those of the directory above
	Former     []Recipient `json:"former,omitempty"`     // that files may have yet which were made before
}

// ConfigBranch says how long a branch key is used for new files.
type ConfigBranch struct {
	Seconds int64 `json:"seconds"`
}

// Bounds of ConfigBranch.Seconds.
const (
	MinBranch = 60
	MaxBranch = 30 * 24 * 60 * 60
)

const maxConfig = 4 << 20

// ParseConfig decodes kmsfs.json. Nothing in it is authenticated until
// [Config.Verify]. Fields that are not known are refused.
func ParseConfig(b []byte) (*Config, error) {
	line, rest, ok := bytes.Cut(b, []byte("\n"))
	mac, tail, ok2 := bytes.Cut(rest, []byte("\n"))
	tag, err := hex.DecodeString(string(mac))
	ok = ok && ok2
	if !ok || len(b) > maxConfig {
		return nil, damaged(BadConfig, "not two lines")
	}
	var probe struct {
		Format *int `json:"format"`
	}
	if json.Unmarshal(line, &probe) != nil || probe.Format == nil {
		return nil, damaged(BadConfig, "not a kmsfs.json")
	}
	if *probe.Format != 1 {
		return nil, damaged(Unsupported, "format %d", *probe.Format)
	}
	c := &Config{line: bytes.Clone(line), mac: tag}
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if e := d.Decode(c); e != nil {
		return nil, damaged(BadConfig, "%v", e)
	}
	// One form only: what Encode writes.
	if again, e := json.Marshal(c); e != nil || !bytes.Equal(again, line) || err != nil ||
		len(tag) != 32 || hex.EncodeToString(tag) != string(mac) || len(tail) != 0 {
		return nil, damaged(BadConfig, "malformed")
	}
	return c, c.check()
}

// DirectoryIDs returns the directories that have keys of their own, in a fixed order.
func (c *Config) DirectoryIDs() []ID {
	return slices.SortedFunc(maps.Keys(c.Directories), func(a, b ID) int { return bytes.Compare(a[:], b[:]) })
}

func (c *Config) check() error {
	if _, err := NewGeometry(c.Header); err != nil {
		return damaged(BadConfig, "%d is no header size", c.Header)
	}
	if _, err := NewGeometry(c.Former); c.Former != 0 && (err != nil || c.Former == c.Header) {
		return damaged(BadConfig, "%d is no former header size", c.Former)
	}
	if c.Names != NamesEncrypted && c.Names != NamesPlain {
		return damaged(Unsupported, "names mode %q", c.Names)
	}
	for dir, keys := range c.Directories {
		if err := c.checkDirectory(dir, keys); err != nil {
			return err
		}
	}
	if b := c.Branch; b != nil && (b.Seconds < MinBranch || b.Seconds > MaxBranch) {
		return damaged(BadConfig, "branch keys of %d seconds", b.Seconds)
	}
	if _, err := encodeRecipients(c.Recipients); err != nil {
		return damaged(BadConfig, "%v", err)
	}
	return nil
}

func (c *Config) checkDirectory(dir ID, keys DirectoryKeys) error {
	if dir == c.Volume {
		return damaged(BadConfig, "keys of the root, whose recipients are the volume's")
	}
	if c.Names != NamesEncrypted {
		return damaged(BadConfig, "keys of directories, which have no IDs")
	}
	// No recipient stands twice.
	if _, err := encodeRecipients(slices.Concat(keys.Recipients, keys.Former)); err != nil {
		return damaged(BadConfig, "%v", err)
	}
	return nil
}

// Verify checks line 2; [BadConfigMAC] if line 1 was altered.
func (c *Config) Verify(vk *VolumeKeys) error {
	if !hmac.Equal(c.mac, vk.mac(vk.json, c.line)) {
		return damaged(BadConfigMAC, "kmsfs.json was altered")
	}
	return nil
}

// Encode returns the file's bytes.
func (c *Config) Encode(vk *VolumeKeys) ([]byte, error) {
	if c.Directories == nil {
		c.Directories = map[ID]DirectoryKeys{}
	}
	lists := [][]Recipient{c.Recipients}
	for _, keys := range c.Directories {
		lists = append(lists, keys.Recipients, keys.Former)
	}
	for _, list := range lists {
		for i := range list {
			if list[i].Branch == nil {
				list[i].Branch = []byte{}
			}
		}
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	line, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	mac := vk.mac(vk.json, line)
	b := append(append(bytes.Clone(line), '\n'), hex.EncodeToString(mac)+"\n"...)
	if len(b) > maxConfig {
		return nil, damaged(BadConfig, "more than %d bytes, from the keys of its directories", maxConfig)
	}
	c.line, c.mac = line, mac
	return b, nil
}
