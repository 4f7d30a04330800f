//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
)

// rekeyFlags are those of kmsfs rekey.
type rekeyFlags struct {
	keyFlags
	asJSON bool
}

// rekeyRequest is what a daemon is asked to give new data keys.
type rekeyRequest struct {
	Path   string `json:"path"`   // below the volume
	Cipher bool   `json:"cipher"` // Path is one of ciphertext
	AtOnce int    `json:"at_once"`
}

// rekeyAtOnce is how many files are encrypted again at the same time.
const rekeyAtOnce = 4

func rekeyCommand() *cobra.Command {
	var f rekeyFlags
	c := &cobra.Command{
		Use:   "rekey PATH...",
		Short: "Give files new data keys, by encrypting their content again",
		Long: `Give files new data keys, by encrypting their content again: for content whose key may have
leaked, or to move it under a new branch key. PATH is a file or a directory on a mount, or of a
ciphertext directory that is not mounted.

A new ciphertext file takes the place of the old one when it is whole, so a crash leaves the one or
the other, and the command can be interrupted and called again. Mode, owner, times and extended
attributes stay, but for the inode number. It needs the space of four files. Files that programs
have open, or that have several names, keep their keys and are named. Backups have the old ones.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return f.run(contextOf(c), args) },
	}
	f.add(c, openVolumeUsage)
	f.addIdentities(c)
	f.addUnverified(c)
	c.Flags().BoolVar(&f.asJSON, "json", false, "print the result as JSON")
	c.Flags().Float64Var(&f.aws.RPS, "kms-rps", 2000,
		"calls a second to KMS at most, if the volume is not mounted")
	return c
}

// rekeyResult is the output of kmsfs rekey.
type rekeyResult struct {
	volume.Rekeyed
	Errors []failedFile `json:"errors"` // the first of them
}

func (f *rekeyFlags) run(ctx context.Context, paths []string) error {
	out := rekeyResult{Errors: []failedFile{}}
	var line progressLine
	for _, p := range paths {
		dir, q, err := volumeOfPath(p)
		if err != nil {
			return err
		}
		var now volume.Rekeyed
		sum := func() volume.Rekeyed {
			return volume.Rekeyed{Files: out.Files + now.Files, Changed: out.Changed + now.Changed,
				Failed: out.Failed + now.Failed}
		}
		err = f.administer(ctx, dir, func(a administrator) error {
			return a.rekey(ctx, q, func(n news) {
				if n.Rekeyed != nil {
					now = *n.Rekeyed
					line.show("%d files, %d changed", sum().Files, sum().Changed)
				}
				if n.Failed != nil && len(out.Errors) < mostErrors {
					out.Errors = append(out.Errors, *n.Failed)
				}
			})
		})
		out.Rekeyed = sum()
		if err != nil {
			line.clear()
			return errors.Join(f.show(&out), err)
		}
	}
	line.clear()
	err := f.show(&out)
	if err == nil && out.Failed > 0 {
		err = hint(fmt.Errorf("%d files have their old data keys", out.Failed),
			"see why above, and call the command again")
	}
	return err
}

func (f *rekeyFlags) show(out *rekeyResult) error {
	if f.asJSON {
		return printJSON(out)
	}
	for _, x := range out.Errors {
		say("%s: %s", x.Path, x.Error)
	}
	fmt.Printf("%d files: %d have new data keys, %d are empty and have none, %d failed.\n", out.Files,
		out.Changed, out.Files-out.Changed-out.Failed, out.Failed)
	return nil
}

// volumeOfPath finds the ciphertext directory of a path: that of the mount on which it lies, or the
// one in which it lies.
func volumeOfPath(p string) (dir string, q rekeyRequest, err error) {
	if dir, err = filepath.Abs(p); err != nil {
		return "", q, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return "", q, err
	}
	q.AtOnce = rekeyAtOnce
	ms, err := mounts()
	if err != nil {
		return "", q, err
	}
	var on *mountInfo // the innermost mount, and of those at one place the last
	for i, m := range ms {
		if strings.HasPrefix(dir+"/", strings.TrimSuffix(m.dir, "/")+"/") &&
			(on == nil || len(m.dir) >= len(on.dir)) {
			on = &ms[i]
		}
	}
	if on != nil && on.fstype == "fuse.kmsfs" {
		q.Path = filepath.Join(on.root, strings.TrimPrefix(dir, on.dir))
		return on.source, q, nil
	}
	q.Cipher = true
	for at := dir; ; at = filepath.Dir(at) {
		if st, err := os.Lstat(filepath.Join(at, blockcrypt.ConfigName)); err == nil && st.Mode().IsRegular() {
			q.Path, err = filepath.Rel(at, dir)
			return at, q, err
		}
		if at == filepath.Dir(at) {
			return "", q, fmt.Errorf("%s lies on no mount of kmsfs, and in no volume", p)
		}
	}
}

// rekeyVolume gives files new data keys, in the process that has the volume open.
func rekeyVolume(ctx context.Context, v *volume.Volume, q rekeyRequest, tell func(news)) error {
	n, forget, err := nodeOf(ctx, v, q)
	if err != nil {
		return err
	}
	defer forget()
	done, err := v.Rekey(ctx, n, rekeyOptions(q.AtOnce, tell))
	tell(news{Rekeyed: &done})
	return err
}

// rekeyOptions report progress and failures by tell.
func rekeyOptions(atOnce int, tell func(news)) volume.RekeyOptions {
	last := time.Time{}
	return volume.RekeyOptions{
		AtOnce: atOnce,
		Progress: func(d volume.Rekeyed) {
			if time.Since(last) > 200*time.Millisecond {
				last = time.Now()
				tell(news{Rekeyed: &d})
			}
		},
		Failed: func(at string, err error) { tell(news{Failed: &failedFile{at, err.Error()}}) },
	}
}

// nodeOf finds the node of a request; forget takes its lookups back.
func nodeOf(ctx context.Context, v *volume.Volume, q rekeyRequest) (n *volume.Node, forget func(), err error) {
	var nodes []*volume.Node
	forget = func() {
		for _, n := range nodes {
			v.Forget(n.ID(), 1)
		}
	}
	n = v.Root()
	if q.Cipher {
		if n, err = v.Locate(q.Path); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", q.Path, err)
		}
		nodes = append(nodes, n)
		return n, forget, nil
	}
	for part := range strings.SplitSeq(q.Path, "/") {
		if part == "." || part == "" {
			continue
		}
		c, _, _, err := v.Lookup(ctx, n, part)
		if err != nil {
			forget()
			return nil, nil, fmt.Errorf("%s: %w", q.Path, err)
		}
		nodes, n = append(nodes, c), c
	}
	return n, forget, nil
}
