//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon" // tells systemd when the mount can be used
	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/awskms"
)

// poolBase is how many data keys a volume holds ready in the long run.
const poolBase = 8

// session is a mount in the process that serves it, from its first look at the volume to its end.
type session struct {
	f                     *mountFlags
	cipherDir, mountPoint string

	volume  string         // its ID
	out     io.WriteCloser // the log
	logPath string         // "" for stderr
	log     *slog.Logger
	metrics net.Listener // nil: none
	v       *volume.Volume
	server  *fs.Server
	control *control
	mark    *mountMark    // nil if it could not be made
	ended   chan struct{} // closed when it was unmounted

	describe []any // what a report of a fault needs to know
}

// gcPercent is GOGC of a daemon. Requests leave little garbage and little lives, so that with Go's
// 100 the collector takes 8 % of the processor for copying a source tree; with 200 it takes 4 %.
const gcPercent = 200

// serve opens the volume, mounts it, and returns after it was unmounted.
func (f *mountFlags) serve(ctx context.Context, cipherDir, mountPoint string) error {
	ignorePipe()
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	unix.Umask(0)
	f.aws.Meter = &keystore.Meter{}
	s := &session{f: f, cipherDir: cipherDir, mountPoint: mountPoint, ended: make(chan struct{})}
	defer s.closeFiles()
	if err := s.openOrWait(ctx); err != nil {
		return err
	}
	if err := s.mount(); err != nil {
		return errors.Join(err, s.v.Close())
	}
	if s.metrics != nil {
		defer s.control.serveMetrics(s.metrics)()
	}
	s.wait(ctx)
	return s.end()
}

// open opens the log and the volume, and writes the trust record.
func (s *session) open(ctx context.Context) error {
	f := s.f
	u, err := f.unlock(ctx, s.cipherDir)
	if err != nil {
		return err
	}
	defer u.Close()
	if f.usesKMS && awskms.TemporaryEnvironment() {
		say("warning: the AWS credentials in the environment are temporary, and nobody renews them; use a profile or a role, or kmsfs reload in time")
	}
	if err := s.openLog(u.Config.Volume); err != nil {
		return err
	}
	if f.metricsAddr != "" && s.metrics == nil {
		if s.metrics, err = listenMetrics(f.metricsAddr); err != nil {
			return err
		}
	}
	grace := f.grace
	if grace == 0 {
		grace = -1 // none
	}
	s.describe = describe(f, u, s.cipherDir, s.mountPoint)
	s.v, err = openFree(u, s.cipherDir, volume.Options{ReadOnly: f.readOnly, KernelTimes: !f.readOnly && !u.Config.Shared,
		Logger: s.log, Pool: poolBase, MaxAge: f.maxAge, Grace: grace, FileLease: f.lease == "file",
		NoPrefetch: f.audit == "strict", Stores: func(ctx context.Context, r blockcrypt.Recipient) (keystore.Store, error) {
			return f.open(ctx, r, u.Record)
		}})
	if err != nil {
		return err
	}
	// Now that the volume is ours: a mount that is refused changes no trust.
	if f.unvouched {
		s.log.Warn("no trust record vouches for this volume, and none is written")
	} else if err := f.remember(u.Record, s.cipherDir); err != nil {
		return errors.Join(err, s.v.Close())
	}
	return nil
}

// openLog opens the log, unless it is open.
func (s *session) openLog(id blockcrypt.ID) (err error) {
	if s.out == nil {
		s.volume = id.String()
		if s.out, s.logPath, err = s.f.logger(id); err == nil {
			s.log = slog.New(s.logHandler(s.f.logFormat))
		}
	}
	return err
}

// says adds where the log is, if it is not here.
func (s *session) says(text string) string {
	if s.logPath == "" {
		return text
	}
	return fmt.Sprintf("%s The log is %s.", text, s.logPath)
}

// mount mounts the volume, and begins to serve its control socket.
func (s *session) mount() (err error) {
	f := s.f
	s.server, err = fs.Mount(s.v, s.mountPoint, fs.MountOptions{Source: s.cipherDir,
		AllowOther: f.allowOther, Options: f.pass, Logger: s.log})
	if err != nil {
		return mountFailed(err)
	}
	s.control = &control{v: s.v, server: s.server, meter: f.aws.Meter, reload: f.kms().Reload,
		keys: &f.keyFlags, log: s.log}
	mi, err := mountAt(s.mountPoint)
	if err == nil {
		s.mark, err = markMounted(mi.dev)
	}
	if err != nil {
		s.log.Warn("umount cannot wait for this mount", "error", err)
	}
	if mi != nil {
		err = s.control.start(mi.dev)
	}
	if err != nil {
		s.log.Warn("kmsfs stats, lock and reload cannot reach this mount", "error", err)
	}
	return nil
}

// wait goes to the background, and returns when the volume was unmounted.
func (s *session) wait(ctx context.Context) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP) // before anybody is told that it is mounted
	go s.unmountOnSignal(signals)
	stay := s.f.usesKMS && s.f.kms().NeedsDirectory(ctx)
	if stay {
		s.log.Info("the AWS configuration has relative paths, so the daemon stays in the directory in which it was started")
	}
	s.log.Info("mounted", s.describe...) // before the command returns: who then looks into the log finds it
	if err := ready(s.out, s.says(fmt.Sprintf("Mounted at %s.", s.mountPoint)), stay); err != nil {
		s.log.Error("going to the background failed", "error", err)
	}
	if s.f.idle > 0 {
		go s.unmountWhenIdle(s.f.idle)
	}
	notifySystemd(systemd.SdNotifyReady, s.log)
	if every, err := systemd.SdWatchdogEnabled(false); err == nil && every > 0 {
		go s.feedWatchdog(every)
	}
	s.server.Wait()
	close(s.ended)
	notifySystemd(systemd.SdNotifyStopping, s.log)
}

// end closes the volume, and tells a waiting umount how that went.
func (s *session) end() error {
	s.control.stop()
	err := s.v.Close()
	if err != nil {
		s.log.Error("closing the volume failed", "error", err)
	}
	s.mark.ended(err)
	return err
}

func (s *session) closeFiles() {
	if s.metrics != nil {
		s.metrics.Close()
	}
	if s.out != nil {
		s.out.Close()
	}
}

// servesOn is after how long a daemon that still answers is taken to have its mount in a namespace that
// is not seen here: it is not waited for.
const servesOn = time.Second

// endsWithin is how long a mount waits for the daemon of one that was just unmounted.
const endsWithin = 30 * time.Second

// openFree opens the volume. Where it is not mounted any more, and its daemon is
// still writing what it must (umount(8) does not always wait for it), that is
// waited for.
func openFree(u *volume.Unlocked, cipherDir string, o volume.Options) (*volume.Volume, error) {
	begun := time.Now()
	for ; ; time.Sleep(20 * time.Millisecond) {
		v, err := u.Open(o)
		locked, ok := errors.AsType[*volume.LockedError](err)
		// A daemon whose mount is in no namespace of ours may serve another one; or it has unmounted by
		// itself, as an idle one does, and ends at any moment.
		elsewhere := time.Since(begun) > servesOn && ok && servedBy(locked.PID)
		if !ok || locked.Elsewhere() || isMounted(cipherDir) || elsewhere ||
			time.Since(begun) > endsWithin {
			return v, err
		}
	}
}

// mountFailed says what to do. fusermount3 tells only in words what went wrong.
func mountFailed(err error) error {
	h, text := "see dmesg", err.Error()
	switch device := strings.Contains(text, "/dev/fuse"); {
	case device && strings.Contains(text, "ermission denied"):
		h = "/dev/fuse must have the mode 0666, which is usual, and a container the device: --device /dev/fuse"
	case device:
		h = "load the kernel module (modprobe fuse); a container needs --device /dev/fuse"
	case strings.Contains(text, "peration not permitted"):
		h = "a container needs --cap-add SYS_ADMIN"
	case os.Geteuid() != 0:
		h = "fuse3 must be installed; allow_other needs user_allow_other in /etc/fuse.conf"
	}
	return hint(fmt.Errorf("mounting failed: %w", err), "%s", h)
}

// unmountOnSignal unmounts at SIGINT and SIGTERM, as soon as nothing is in use; SIGHUP
// reloads.
func (s *session) unmountOnSignal(c <-chan os.Signal) {
	for sig := range c {
		if sig == unix.SIGHUP {
			go s.control.reloadNow(context.Background()) // what fails is in the log
			continue
		}
		err := s.server.Unmount()
		for told := false; errors.Is(err, unix.EBUSY); told = true {
			if !told {
				s.log.Warn("the mount is busy; it is unmounted when it is not", "mountpoint",
					s.mountPoint, "busy", (&mountInfo{dir: s.mountPoint}).users())
			}
			time.Sleep(200 * time.Millisecond)
			err = s.server.Unmount()
		}
		if err != nil {
			s.log.Error("unmounting failed; the next signal tries again", "error", err)
		}
	}
}

// unmountWhenIdle unmounts when no request has come for this time, by a clock that goes on while the
// machine sleeps. A mount that is busy then is asked again after the same time.
func (s *session) unmountWhenIdle(idle time.Duration) {
	t := time.NewTicker(min(max(idle/10, 10*time.Millisecond), time.Minute))
	defer t.Stop()
	last, since := s.server.Asked(), bootTime()
	for {
		select {
		case <-s.ended:
			return
		case <-t.C:
		}
		now := bootTime()
		if n := s.server.Asked(); n != last {
			last, since = n, now
		}
		if now-since < idle {
			continue
		}
		err := s.server.Unmount()
		if err == nil {
			s.log.Info("unmounted, since nothing was asked for", "idle", idle)
			return
		}
		if !errors.Is(err, unix.EBUSY) {
			s.log.Error("unmounting an idle mount failed", "error", err)
		}
		last, since = s.server.Asked(), now
	}
}

// feedWatchdog tells systemd that the daemon lives, as long as it answers requests: systemd restarts it
// if it has not heard that for the time that WatchdogSec says.
func (s *session) feedWatchdog(every time.Duration) {
	for {
		var st unix.Statfs_t
		unix.Statfs(s.mountPoint, &st) // an error is an answer too
		notifySystemd(systemd.SdNotifyWatchdog, s.log)
		select {
		case <-s.ended:
			return
		case <-time.After(every / 2):
		}
	}
}

// notifySystemd tells systemd how far a service of Type=notify is; nothing elsewhere.
func notifySystemd(state string, logger *slog.Logger) {
	if _, err := systemd.SdNotify(false, state); err != nil {
		logger.Warn("systemd cannot be told", "error", err)
	}
}

// logger returns where the log goes: stderr, or a bounded file under the state
// directory.
func (f *mountFlags) logger(id blockcrypt.ID) (io.WriteCloser, string, error) {
	if f.foreground {
		return newPipeLog(os.Stderr), "", nil
	}
	dir, err := stateDir()
	if err != nil {
		return nil, "", err
	}
	path := filepath.Join(dir, id.String()+".log")
	l, err := openLog(path)
	return l, path, err
}
