package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/awskms"
)

func infoCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "info PATH",
		Short: "Show what a volume, or a ciphertext file, says of itself; needs no key",
		Args:  cobra.ExactArgs(1),
		RunE:  func(_ *cobra.Command, args []string) error { return info(args[0], asJSON) },
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// recipientInfo is a recipient in the output of info; blobs are standard base64.
type recipientInfo struct {
	URI     string `json:"uri"`
	ARN     string `json:"arn,omitempty"`
	Branch  []byte `json:"branch,omitempty"`
	Wrapped []byte `json:"wrapped"`
}

// volumeInfo is the output of info for a volume.
type volumeInfo struct {
	Type       string            `json:"type"`
	Format     int               `json:"format"`
	Volume     blockcrypt.ID     `json:"volume"`
	Generation uint64            `json:"generation"`
	Header     int               `json:"header"`
	Former     int               `json:"former_header,omitempty"` // of files that reheader has not changed yet
	Names      string            `json:"names"`
	Context    map[string]string `json:"encryption_context"`
	Recipients []recipientInfo   `json:"recipients"`

	Directories []directoryInfo `json:"directories"` // that have keys of their own
}

// directoryInfo is a directory with keys of its own, by its ID.
type directoryInfo struct {
	Directory  blockcrypt.ID   `json:"directory"`
	Recipients []recipientInfo `json:"recipients"`       // of new files; none: those of the directory above
	Former     []recipientInfo `json:"former,omitempty"` // that files may have yet
}

// fileInfo is the output of info for a ciphertext file.
type fileInfo struct {
	Type       string            `json:"type"`
	Empty      bool              `json:"empty,omitempty"`
	Format     int               `json:"format,omitempty"`
	Volume     blockcrypt.ID     `json:"volume"`
	File       blockcrypt.ID     `json:"file"`
	Directory  blockcrypt.ID     `json:"directory"`
	Header     int               `json:"header"`
	Context    map[string]string `json:"encryption_context"`
	Recipients []recipientInfo   `json:"recipients"`
	Ciphertext int64             `json:"ciphertext_size"`
	Plaintext  int64             `json:"plaintext_size"`
	State      stateInfo         `json:"state"`
}

type stateInfo struct {
	Size       int64    `json:"size"`
	Floor      int64    `json:"floor"`
	Session    string   `json:"session"`
	Generation uint64   `json:"generation"`
	Flags      []string `json:"flags"`
}

func recipientsInfo(rs []blockcrypt.Recipient) (out []recipientInfo) {
	for _, r := range rs {
		arn, ok := strings.CutPrefix(r.URI, awskms.Scheme)
		if !ok {
			arn = ""
		}
		out = append(out, recipientInfo{r.URI, arn, r.Branch, r.Wrapped})
	}
	return out
}

func info(path string, asJSON bool) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.IsDir() {
		return infoVolume(path, asJSON)
	}
	if filepath.Base(path) == blockcrypt.ConfigName {
		return infoVolume(filepath.Dir(path), asJSON)
	}
	return infoFile(path, asJSON)
}

// infoVolume prints what kmsfs.json says. Nothing of it is authenticated.
func infoVolume(dir string, asJSON bool) error {
	l, err := volume.Find(dir)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	defer l.Close()
	c := l.Config
	v := volumeInfo{"volume", c.Format, c.Volume, c.Generation, c.Header, c.Former, c.Names,
		awskms.Context(keystore.Binding{Use: keystore.ForVolume, Volume: c.Volume}),
		recipientsInfo(c.Recipients), []directoryInfo{}}
	for _, id := range c.DirectoryIDs() {
		keys := c.Directories[id]
		v.Directories = append(v.Directories, directoryInfo{id, recipientsInfo(keys.Recipients), recipientsInfo(keys.Former)})
	}
	if asJSON {
		return printJSON(v)
	}
	former := ""
	if v.Former != 0 {
		former = fmt.Sprintf(", files of before have %d: kmsfs reheader goes on", v.Former)
	}
	fmt.Printf("volume      %s\nformat      %d\nnames       %s\nheader      %d bytes%s\ngeneration  %d\n",
		v.Volume, v.Format, v.Names, v.Header, former, v.Generation)
	printRecipients(v.Recipients)
	for _, d := range v.Directories {
		fmt.Printf("directory   %s\n", d.Directory)
		for _, r := range d.Recipients {
			fmt.Printf("            new files are under %s\n", r.URI)
		}
		for _, r := range d.Former {
			fmt.Printf("            files may be under %s yet: kmsfs rewrap\n", r.URI)
		}
	}
	fmt.Println("Nothing of this is authenticated: that needs a key.")
	return nil
}

// infoFile prints what the header of a ciphertext file says, and what aws kms decrypt needs.
func infoFile(path string, asJSON bool) error {
	l, err := volume.OpenLone(path)
	if err != nil {
		return named(path, err)
	}
	defer l.Close()
	if l.Header == nil {
		if asJSON {
			return printJSON(fileInfo{Type: "file", Empty: true})
		}
		fmt.Println("An empty file: it has no key and no header.")
		return nil
	}
	h := l.Header
	plain, damage := l.PlainSize()
	if s := h.State; damage == nil && plain != s.Size && s.Flags&(blockcrypt.Dirty|blockcrypt.Cut) == 0 {
		damage = &blockcrypt.DamageError{Class: blockcrypt.BadSize, Pos: -1,
			Detail: fmt.Sprintf("the length is that of %d bytes of plaintext, the state says %d",
				plain, s.Size)}
	}
	f := fileInfo{Type: "file", Format: blockcrypt.Version, Volume: h.Volume, File: h.File,
		Directory: h.Dir, Header: h.Geometry.Header(),
		Context: awskms.Context(l.Binding()), Recipients: recipientsInfo(h.Recipients),
		Ciphertext: l.Length, Plaintext: plain,
		State: stateInfo{h.State.Size, h.State.Floor, fmt.Sprintf("%016x", h.State.Session),
			h.State.Generation, flagNames(h.State.Flags)}}
	if asJSON {
		if err := printJSON(f); err != nil {
			return err
		}
		return namedOrNil(path, damage)
	}
	fmt.Printf("file        %s\nvolume      %s\nciphertext  %d bytes\nplaintext   %d bytes\nstate       size %d, floor %d, session %s, generation %d, %s\n",
		f.File, f.Volume, f.Ciphertext, f.Plaintext, f.State.Size, f.State.Floor, f.State.Session,
		f.State.Generation, strings.Join(f.State.Flags, " "))
	for _, key := range []string{"kmsfs:volume", "kmsfs:use", "kmsfs:file"} {
		fmt.Printf("context     %s=%s\n", key, f.Context[key])
	}
	printRecipients(f.Recipients)
	if h.Volume == (blockcrypt.ID{}) {
		fmt.Println("Made outside a volume: it has no origin.")
	}
	fmt.Println("Nothing of this is authenticated: that needs a key, and for the origin its volume.")
	return namedOrNil(path, damage)
}

func namedOrNil(path string, err error) error {
	if err == nil {
		return nil
	}
	return named(path, err)
}

// flagNames are the flags of a state in words.
func flagNames(flags uint32) []string {
	out := []string{}
	for i, name := range []string{"dirty", "sparse", "cut", "clone"} {
		if flags&(1<<i) != 0 {
			out = append(out, name)
		}
	}
	if flags&(blockcrypt.Dirty|blockcrypt.Cut) == 0 {
		out = append([]string{"clean"}, out...)
	}
	return out
}

func printRecipients(rs []recipientInfo) {
	for _, r := range rs {
		fmt.Printf("recipient   %s\n            wrapped key of %d bytes\n", r.URI, len(r.Wrapped))
	}
}

func printJSON(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(append(b, '\n'))
	return err
}
