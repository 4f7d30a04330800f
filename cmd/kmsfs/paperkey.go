//go:build linux && !portable

package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/keystore"
	"kmsfs/keystore/local"
)

// A local key on paper: four lines of 8 bytes of the key, each with 2 bytes of a checksum that covers
// the line's number, in the alphabet of RFC 4648 base32. A slip of the pen shows in its line.

const (
	paperLines = 4
	paperBytes = keystore.KeySize / paperLines
	paperSum   = 2
)

var paperCode = base32.StdEncoding.WithPadding(base32.NoPadding)

// paperKey returns the lines of a key.
func paperKey(key []byte) []string {
	var out []string
	for i := range paperLines {
		part := key[i*paperBytes:][:paperBytes]
		text := paperCode.EncodeToString(append(append([]byte{}, part...), paperCheck(i, part)...))
		var groups []string
		for len(text) > 0 {
			groups, text = append(groups, text[:4]), text[4:]
		}
		out = append(out, fmt.Sprintf("%d  %s", i+1, strings.Join(groups, "-")))
	}
	return out
}

func paperCheck(line int, part []byte) []byte {
	sum := sha256.Sum256(append([]byte{'k', 'm', 's', 'f', 's', ' ', byte('1' + line), ' '}, part...))
	return sum[:paperSum]
}

// readPaperKey reads the lines of a key in any order of upper and lower case, with or without their
// numbers and hyphens.
func readPaperKey(r io.Reader) ([]byte, error) {
	key := make([]byte, 0, keystore.KeySize)
	s := bufio.NewScanner(r)
	for len(key) < keystore.KeySize && s.Scan() {
		n := len(key) / paperBytes
		text := strings.ToUpper(strings.TrimSpace(s.Text()))
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		text = strings.TrimPrefix(text, fmt.Sprintf("%d ", n+1))
		text = strings.NewReplacer(" ", "", "-", "", "0", "O", "1", "I", "8",
			"B").Replace(text) // characters that are easily taken for others
		b, err := paperCode.DecodeString(text)
		if err != nil || len(b) != paperBytes+paperSum ||
			string(b[paperBytes:]) != string(paperCheck(n, b[:paperBytes])) {
			return nil, fmt.Errorf("line %d of the key has a mistake", n+1)
		}
		key = append(key, b[:paperBytes]...)
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	if len(key) < keystore.KeySize {
		return nil, fmt.Errorf("the key has %d lines, and only %d were given", paperLines,
			len(key)/paperBytes)
	}
	return key, nil
}

func exportCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "export FILE",
		Short: "Print a local key for paper; anybody who has it can read everything under it",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			path := strings.TrimPrefix(args[0], local.Scheme)
			s, err := local.OpenFile(path) // checks the file
			if err != nil {
				return err
			}
			key, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			defer clear(key)
			fmt.Printf("# %s\n", s.URI())
			for _, l := range paperKey(key) {
				fmt.Println(l)
			}
			return nil
		},
	}
}

func importCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "import FILE",
		Short: "Make a key file from the lines that export has printed, read from stdin",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			key, err := readPaperKey(os.Stdin)
			if err != nil {
				return err
			}
			defer clear(key)
			s, err := local.ImportFile(strings.TrimPrefix(args[0], local.Scheme), key)
			if errors.Is(err, os.ErrExist) {
				return fmt.Errorf("%s is there already, and no key is written over another", args[0])
			}
			if err != nil {
				return err
			}
			fmt.Printf("%s is in %s.\n", s.URI(), args[0])
			return nil
		},
	}
}
