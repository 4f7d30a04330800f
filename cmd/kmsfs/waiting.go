//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/local"
)

const (
	firstRetry = 5 * time.Second // after a key service has not answered
	lastRetry  = time.Minute
	tellEvery  = 10 // tries, after which the log is told again that there is no answer
)

// openOrWait is open. With --bg, if the key service cannot be reached, as at boot before there is a
// network, it tells so and tries again until it can.
func (s *session) openOrWait(ctx context.Context) error {
	err := s.open(ctx)
	if !s.f.wait || !unreached(err) {
		return err
	}
	l, ferr := volume.Find(s.cipherDir)
	if ferr != nil {
		return ferr
	}
	id := l.Config.Volume
	l.Close()
	if ferr := s.openLog(id); ferr != nil {
		return ferr
	}
	if err := absolutePaths(&s.f.keyFlags); err != nil { // before the directory changes
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	again := make(chan os.Signal, 1)
	signal.Notify(again, unix.SIGHUP)
	defer signal.Stop(again)
	tell := func() {
		s.log.Warn("waiting for the key service", "error", err, "mountpoint", s.mountPoint, "process", os.Getpid())
	}
	tell() // before the command returns: who then looks into the log finds the reason
	stay := s.f.usesKMS && s.f.kms().NeedsDirectory(ctx)
	if rerr := ready(s.out, s.says(fmt.Sprintf("The key service cannot be reached; %s is mounted when it can, by process %d.", s.mountPoint, os.Getpid())), stay); rerr != nil {
		return rerr
	}
	pause := firstRetry
	for try := 1; ; try++ {
		notifySystemd("STATUS=waiting for the key service: "+err.Error(), s.log)
		select {
		case <-ctx.Done():
			return fmt.Errorf("ended before it was mounted: %w", err)
		case <-again:
		case <-time.After(pause):
		}
		if err = s.open(ctx); err == nil {
			// Meanwhile another volume, or this one, may have been mounted there.
			if _, _, err = s.f.places(s.cipherDir, s.mountPoint); err != nil {
				return errors.Join(err, s.v.Close())
			}
			return nil
		} else if !unreached(err) {
			return err
		}
		if try%tellEvery == 0 {
			tell()
		}
		pause = min(2*pause, lastRetry)
	}
}

// unreached reports whether an error can go by itself: when there is a network, or the machine has its
// role.
func unreached(err error) bool {
	k := keystore.KindOf(err)
	return k == keystore.Outage || k == keystore.Credentials
}

// absolutePaths makes the paths absolute that flags name.
func absolutePaths(k *keyFlags) error {
	var errs []error
	abs := func(p string) string {
		a, err := filepath.Abs(p)
		errs = append(errs, err)
		return a
	}
	for i, key := range k.keys {
		if p, ok := strings.CutPrefix(key, local.Scheme); ok && p != "" {
			k.keys[i] = local.Scheme + abs(p)
		}
	}
	for i, p := range k.identityFiles {
		k.identityFiles[i] = abs(p)
	}
	if k.passphraseFile != "" {
		k.passphraseFile = abs(k.passphraseFile)
	}
	return errors.Join(errs...)
}
