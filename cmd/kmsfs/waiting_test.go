//go:build linux && !portable

package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// A mount that goes on in the background finds the files that were named from where it was called.
func TestAbsolute(t *testing.T) {
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	k := keyFlags{keys: []string{"local:a/key", "local:/b", "alias/c", "passphrase"}, identityFiles: []string{"id"}, passphraseFile: "../p"}
	if err := absolutePaths(&k); err != nil {
		t.Fatal(err)
	}
	if want := []string{"local:" + here + "/a/key", "local:/b", "alias/c", "passphrase"}; !slices.Equal(k.keys, want) {
		t.Errorf("%q", k.keys)
	}
	if k.identityFiles[0] != here+"/id" || k.passphraseFile != filepath.Join(filepath.Dir(here), "p") {
		t.Errorf("%q, %q", k.identityFiles, k.passphraseFile)
	}
}
