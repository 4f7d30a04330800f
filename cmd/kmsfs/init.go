//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/local"
)

type initFlags struct {
	keyFlags
	plainNames bool
	shared     bool
	branches   time.Duration
	trails     uint
}

const initKeyUsage = "wrap every file's data key under this `KEY` (repeatable); default: a new local key"

func initCommand() *cobra.Command {
	var f initFlags
	c := &cobra.Command{
		Use:   "init [--key KEY]... CIPHERDIR",
		Short: "Make a volume in an empty directory",
		Args:  cobra.ExactArgs(1),
		RunE:  func(c *cobra.Command, args []string) error { return f.run(c.Context(), args[0]) },
	}
	f.add(c, initKeyUsage)
	trailsFlag(c, &f.trails)
	c.Flags().DurationVar(&f.branches, "branch-keys", 0,
		"wrap the files of this `TIME`, such as 24h, under one key of KMS: one call for up to 65,536 new files")
	c.Flags().BoolVar(&f.plainNames, "plain-names", false, "leave names as they are")
	c.Flags().BoolVar(&f.shared, "shared", false, "let several hosts mount the volume for writing at the same time")
	return c
}

// run makes the volume, and writes its trust record.
func (f *initFlags) run(ctx context.Context, dir string) error {
	if ctx == nil {
		ctx = context.Background()
	}
	if f.branches != 0 && (f.branches < blockcrypt.MinBranch*time.Second ||
		f.branches > blockcrypt.MaxBranch*time.Second) {
		return usageError{errors.New("--branch-keys must be 1m to 720h"), "kmsfs init"}
	}
	// Everything that can be wrong is looked at before anything is made.
	if empty, err := volume.IsEmpty(dir); err != nil {
		return err
	} else if !empty {
		return fmt.Errorf("%s: %w", dir, volume.ErrNotEmpty)
	}
	notes, err := volume.CheckBacking(dir, f.plainNames)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	for _, note := range notes {
		say("note: %s", note)
	}
	if f.shared {
		if err := checkShared(dir); err != nil {
			return err
		}
	}
	if _, err := stateDir(); err != nil {
		return err
	}
	id := blockcrypt.NewID()
	if len(f.keys) == 0 {
		kd, err := keyDir()
		if err != nil {
			return err
		}
		f.keys = []string{local.Scheme + filepath.Join(kd, id.String()+".key")}
	}
	ms, err := f.create(ctx)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(ms, func(m made) bool { return !keystore.OnlySeals(m.store) }) {
		return usageError{errors.New("an age recipient is for recovery: name another --key too, by which the volume is mounted"), "kmsfs init"}
	}
	rec, err := volume.Init(ctx, dir, stores(ms), id,
		volume.InitOptions{PlainNames: f.plainNames, Shared: f.shared, Branches: f.branches})
	if err != nil {
		unmake(ms)
		return err
	}
	for _, m := range ms {
		if m.path != "" {
			rec.SetLocal(m.store.URI(), m.path)
		}
	}
	if err := writeRecord(rec, dir); err != nil {
		return err
	}
	fmt.Printf("Volume %s made in %s.\n", id, dir)
	if e := estimate(ms, f.trails, f.branches); e != "" {
		fmt.Println(e)
	}
	for _, m := range ms {
		fmt.Printf("Key: %s\n", m.store.URI())
		if m.path != "" {
			verb := "is in"
			if m.created {
				verb = "was made:"
			}
			fmt.Printf("The key file %s %s. Back it up, apart from the volume: without it the volume cannot be opened.\n", verb, m.path)
		}
	}
	fmt.Println("Back up the directory with a tool that copies symlinks (rsync -a, tar, restic; rclone needs --links): symlinks and names of more than 160 bytes are lost without.")
	return nil
}
