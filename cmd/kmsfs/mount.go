//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	// tells systemd when the mount can be used
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"kmsfs/fs"
	"kmsfs/fs/volume"
)

type mountFlags struct {
	unlockFlags
	create      bool
	plainNames  bool
	foreground  bool
	allowOther  bool
	options     []string
	maxAge      time.Duration
	grace       time.Duration
	lease       string
	audit       string
	metricsAddr string
	idle        time.Duration
	logFormat   string
	wait        bool // where the key service does not answer

	changed []any // names and values of options that are not the default, for the log

	again bool     // remount
	pass  []string // options for the kernel
}

func mountCommand() *cobra.Command {
	var f mountFlags
	c := &cobra.Command{
		Use:   "mount [--key KEY]... CIPHERDIR MOUNTPOINT",
		Short: "Mount a volume",
		Long: `Mount a volume. The command returns when the volume can be used, and goes on in
the background until kmsfs umount.

A key is used only if --key names it, if the trust record of the volume does, or if the
kmsfs.json that such a key authenticates does. init writes a trust record, and so does a mount
with --key.`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			if err := f.parseOptions(c.Flags()); err != nil {
				return err
			}
			c.Flags().Visit(func(fl *pflag.Flag) {
				if !slices.Contains(secretFlags, fl.Name) {
					f.changed = append(f.changed, "option_"+fl.Name, fl.Value.String())
				}
			})
			return f.start(contextOf(c), args[0], args[1])
		},
	}
	f.add(c, "open the volume with this `KEY` (repeatable); also where a moved key file is")
	f.addIdentities(c)
	fl := c.Flags()
	fl.BoolVar(&f.create, "create", false, "make the volume first if the directory is empty")
	fl.BoolVar(&f.plainNames, "plain-names", false, "with --create: leave names as they are")
	fl.BoolVarP(&f.foreground, "foreground", "f", false, "stay in the foreground and log to stderr")
	fl.BoolVar(&f.readOnly, "read-only", false, "change nothing, repair nothing")
	fl.BoolVar(&f.allowOther, "allow-other", false, "let other users in; the kernel checks permissions")
	fl.BoolVar(&f.acceptOlder, "accept-older", false,
		"accept a kmsfs.json that is older than the last one seen: a restored backup")
	fl.DurationVar(&f.maxAge, "key-max-age", 5*time.Minute,
		"after a key was revoked, its files can be read for this `DURATION` at most")
	fl.DurationVar(&f.grace, "key-grace", time.Hour,
		"while a key service cannot be reached, files whose keys are known can be read for this `DURATION`")
	fl.StringVar(&f.lease, "key-lease", "key",
		"what proves that a file may still be read: its KMS `key` (key), or its own data key (file), for policies on single files")
	fl.StringVar(&f.audit, "audit", "",
		"strict: no key is unwrapped before its file is opened, so that CloudTrail shows just what was")
	fl.StringVar(&f.logFormat, "log-format", "", "`FORMAT` of the log: text or json; default: text, and fields where stderr is the journal")
	fl.BoolVar(&f.wait, "bg", false, "if the key service does not answer, return and go on trying in the background")
	fl.DurationVar(&f.idle, "idle", 0, "unmount when nothing was asked for this `DURATION`, and nothing is open")
	fl.StringVar(&f.metricsAddr, "metrics-addr", "",
		"serve /metrics and /healthz at this `HOST:PORT` of loopback")
	fl.Float64Var(&f.aws.RPS, "kms-rps", 2000,
		"calls a second to KMS at most: the quota is shared with the account's other services")
	// As mount(8) calls its helper.
	for _, h := range []string{"n", "v", "s"} {
		fl.BoolP("mount-"+h, h, false, "accepted for mount(8)")
		fl.MarkHidden("mount-" + h)
	}
	fl.StringP("types", "t", "", "accepted for mount(8)")
	fl.MarkHidden("types")
	fl.StringArrayVarP(&f.options, "options", "o", nil,
		"mount `OPTIONS`, comma-separated: ro, allow_other, key=KEY, passphrase_file=FILE, exec, noexec, suid, dev, …")
	return c
}

// minMaxAge bounds --key-max-age: a proof takes a call.
const minMaxAge = time.Second

// readyEnv names the descriptor on which the background process says that the mount can be used.
const readyEnv = "KMSFS_READY_FD"

// start mounts: in this process with --foreground or as the background one, else it starts that and
// waits until the mount can be used.
func (f *mountFlags) start(ctx context.Context, cipherDir, mountPoint string) error {
	if f.again {
		return f.remount(mountPoint)
	}
	if f.foreground {
		if err := foreground(); err != nil {
			return err
		}
	} else if os.Getenv(readyEnv) == "" {
		return background()
	}
	cipherDir, mountPoint, err := f.places(cipherDir, mountPoint)
	if err != nil {
		return err
	}
	if f.create {
		if empty, err := volume.IsEmpty(cipherDir); err != nil {
			return err
		} else if empty {
			in := initFlags{keyFlags: f.keyFlags, plainNames: f.plainNames}
			if err := in.run(ctx, cipherDir); err != nil {
				return err
			}
		}
	}
	return f.serve(ctx, cipherDir, mountPoint)
}

// Options of fstab that are about something else, or the default.
var ignoredOptions = []string{"defaults", "auto", "noauto", "user", "users", "nouser", "nofail",
	"_netdev", "async", "relatime", "nodiratime", "iversion",
	"default_permissions"}

// secretFlags name keys, files of secrets and tokens; those of options are seen as flags.
var secretFlags = []string{"key", "passphrase-file", "identity", "grant-token", "options"}

// What mount(8) finds in /proc/mounts and gives back with remount.
var kernelOptions = []string{"user_id", "group_id", "max_read", "blksize", "rootmode", "subtype", "fsname"}

// Options of fstab that are flags of the command: "key_max_age=1m" is --key-max-age 1m.
var flagOptions = []string{"ro", "allow_other", "key", "passphrase_file", "identity", "aws_profile",
	"aws_region", "aws_endpoint", "aws_role_arn", "grant_token",
	"key_max_age", "key_grace", "key_lease", "audit", "kms_rps", "metrics_addr", "idle", "bg", "log_format"}

// Options that go to the kernel as they are.
var passedOptions = []string{"rw", "exec", "noexec", "suid", "nosuid", "dev", "nodev", "atime",
	"noatime", "strictatime", "lazytime", "sync", "dirsync"}

// setFlag sets the flag that an option of fstab stands for.
func setFlag(fl *pflag.FlagSet, option, value string) error {
	name := strings.ReplaceAll(option, "_", "-")
	if option == "ro" {
		name = "read-only"
	}
	if value == "" {
		value = fl.Lookup(name).NoOptDefVal // of a flag without a value
	}
	if err := fl.Set(name, value); err != nil {
		return usageError{fmt.Errorf("the mount option %s: %w", option, err), "kmsfs mount"}
	}
	return nil
}

// parseOptions turns the options of fstab into flags, and checks those.
func (f *mountFlags) parseOptions(fl *pflag.FlagSet) error {
	for _, o := range strings.Split(strings.Join(f.options, ","), ",") {
		name, value, _ := strings.Cut(o, "=")
		switch {
		case o == "" || slices.Contains(ignoredOptions, o) ||
			slices.Contains(kernelOptions, name) || strings.HasPrefix(o, "x-"):
		case o == "remount":
			f.again = true
		case slices.Contains(flagOptions, name):
			if err := setFlag(fl, name, value); err != nil {
				return err
			}
		case o == "allow_suid", o == "allow_dev": // mount(8) drops suid and dev: they are its defaults
			f.pass = append(f.pass, strings.TrimPrefix(o, "allow_"))
		case slices.Contains(passedOptions, o):
			f.pass = append(f.pass, o)
		default:
			return usageError{fmt.Errorf("the mount option %q is not known", o), "kmsfs mount"}
		}
	}
	if f.metricsAddr != "" {
		if err := checkMetricsAddr(f.metricsAddr); err != nil {
			return err
		}
	}
	switch {
	case len(f.identityFiles) > 0 && !f.readOnly:
		return usageError{errors.New("--identity is for recovery, so it goes with --read-only; kmsfs recipients add --identity gives the volume a key to write with"), "kmsfs mount"}
	case f.lease != "key" && f.lease != "file":
		return usageError{fmt.Errorf(`--key-lease %q: want "key" or "file"`, f.lease), "kmsfs mount"}
	case f.audit != "" && f.audit != "strict":
		return usageError{fmt.Errorf(`--audit %q: the only value is "strict"`, f.audit), "kmsfs mount"}
	case f.logFormat != "" && f.logFormat != "text" && f.logFormat != "json":
		return usageError{fmt.Errorf(`--log-format %q: want "text" or "json"`, f.logFormat), "kmsfs mount"}
	case f.maxAge < minMaxAge || f.grace < 0 || f.idle < 0 || f.aws.RPS < 1:
		return usageError{fmt.Errorf("--key-max-age must be at least %v, --key-grace and --idle not negative, --kms-rps at least 1", minMaxAge), "kmsfs mount"}
	}
	return nil
}

// remount is mount -o remount: ro, rw, exec, suid and the like. What else a mount was
// given stays.
func (f *mountFlags) remount(mountPoint string) error {
	m, err := mountAt(mountPoint)
	if err != nil {
		return err
	}
	if f.readOnly {
		f.pass = append(f.pass, "ro")
	} else if readOnly, err := m.readOnly(); err != nil {
		return err
	} else if readOnly {
		return hint(fmt.Errorf("%s was mounted read-only", m.dir),
			"kmsfs umount %s, and mount it again", m.dir)
	}
	return fs.Remount(m.dir, f.pass)
}

// places checks both directories, and takes a dead mount away.
func (f *mountFlags) places(cipherDir, mountPoint string) (c, m string, err error) {
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return "", "", hint(errors.New("/dev/fuse is missing: this kernel or container has no FUSE"), "modprobe fuse; in a container, pass the device: --device /dev/fuse --cap-add SYS_ADMIN")
	}
	if c, err = realDir(cipherDir); err != nil {
		return "", "", err
	}
	if dead, err := mountAt(mountPoint); err == nil && dead.isDead() {
		if err := dead.cleanDead(); err != nil {
			return "", "", fmt.Errorf("%s has a dead mount that cannot be cleaned up: %w", mountPoint, err)
		}
		say("cleaned up a dead mount at %s", mountPoint)
	}
	if m, err = realDir(mountPoint); err != nil {
		return "", "", fmt.Errorf("mountpoint: %w", err)
	}
	if m == c || strings.HasPrefix(m, c+"/") {
		return "", "", hint(fmt.Errorf("the mountpoint %s lies inside the ciphertext directory %s",
			m, c), "name a mountpoint elsewhere")
	}
	if strings.HasPrefix(c, m+"/") {
		return "", "", hint(fmt.Errorf("the ciphertext directory %s lies below the mountpoint %s, which would hide it", c, m), "name a mountpoint elsewhere")
	}
	if mi, err := findMount(m); err != nil {
		return "", "", err
	} else if mi != nil {
		do := "kmsfs umount " + m
		if mi.fstype != "fuse.kmsfs" { // as the volumes of containers are
			do = "name a directory in it"
		}
		return "", "", coded{hint(fmt.Errorf("the mountpoint %s is in use: %s is mounted there", m,
			mi.source), "%s", do), exitBusy}
	}
	if entries, err := os.ReadDir(m); err != nil {
		return "", "", err
	} else if len(entries) > 0 {
		return "", "", hint(fmt.Errorf("the mountpoint %s is not empty; the mount would hide what is in it", m), "name an empty directory")
	}
	return c, m, nil
}

// realDir returns the absolute path of a directory without symlinks.
func realDir(dir string) (string, error) {
	st, err := os.Stat(dir)
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("the directory %s does not exist", dir)
	}
	if err != nil {
		return "", err
	}
	if !st.IsDir() {
		return "", fmt.Errorf("%s is not a directory", dir)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(dir)
}

// remember writes the trust record, if it says something new.
func (f *mountFlags) remember(rec *volume.Record, cipherDir string) error {
	if old, err := readRecord(rec.Volume); err == nil && old != nil && sameRecord(old, rec) {
		return nil
	}
	unlock, err := lockState()
	if err != nil {
		return err
	}
	defer unlock()
	return writeRecord(rec, cipherDir)
}

func sameRecord(a, b *volume.Record) bool {
	return a.Generation == b.Generation && a.Local == b.Local && maps.Equal(a.Locals, b.Locals) &&
		slices.Equal(a.Recipients, b.Recipients)
}

// bootTime is CLOCK_BOOTTIME.
func bootTime() time.Duration {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &t)
	return time.Duration(t.Nano())
}
