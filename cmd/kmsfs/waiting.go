//go:build linux && !portable

package main

import (
	"context"
	"fmt"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
	"kmsfs/keystore"
)

const (
	firstRetry = 5 * time.Second // after a key service has not answered
	lastRetry  = time.Minute
	tellEvery  = 10 // tries, after which the log is told again that there is no answer
)

// openOrWait is open. With --bg, where the key service cannot be reached, as at boot before there is a
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
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	stay := s.f.usesKMS && s.f.kms().NeedsDirectory(ctx)
	if rerr := ready(s.out, s.says(fmt.Sprintf("The key service cannot be reached; %s is mounted when it can.", s.mountPoint)), stay); rerr != nil {
		return rerr
	}
	pause := firstRetry
	for try := 0; ; try++ {
		if try%tellEvery == 0 {
			s.log.Warn("waiting for the key service", "error", err, "mountpoint", s.mountPoint)
		}
		notifySystemd("STATUS=waiting for the key service: "+err.Error(), s.log)
		select {
		case <-ctx.Done():
			return fmt.Errorf("ended before it was mounted: %w", err)
		case <-time.After(pause):
		}
		if err = s.open(ctx); !unreached(err) {
			return err
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
