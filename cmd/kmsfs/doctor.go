//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore"
	"kmsfs/keystore/awskms"
)

// doctor looks whether a machine, and a volume, are ready for a mount.
type doctor struct {
	keyFlags
	asJSON bool
	peer   bool
	within time.Duration
	lines  []checkup
}

// checkup is one thing that was looked at.
type checkup struct {
	What   string `json:"what"`
	State  string `json:"state"` // "ok", "note", or "fail"
	Detail string `json:"detail"`
	Advice string `json:"advice,omitempty"`
}

func doctorCommand() *cobra.Command {
	var d doctor
	c := &cobra.Command{
		Use:   "doctor [CIPHERDIR]",
		Short: "Look whether this machine, and a volume, are ready for a mount",
		Long: `Look whether this machine, and a volume, are ready for a mount: FUSE, limits, directories,
the ciphertext's filesystem and its speed, credentials and where they came from, and the rights
at KMS. Each line says ok, or what to do. Nothing is changed, but for a directory that is made in
CIPHERDIR for a moment.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if d.peer && len(args) == 0 {
				return usageError{errors.New("--peer needs CIPHERDIR, or an empty directory beside it"), "kmsfs doctor"}
			}
			if d.peer {
				d.withPeer(contextOf(c), args[0])
				return d.show()
			}
			d.machine()
			if len(args) > 0 {
				d.volume(contextOf(c), args[0])
			}
			return d.show()
		},
	}
	d.add(c, openVolumeUsage)
	c.Flags().BoolVar(&d.asJSON, "json", false, "print JSON")
	c.Flags().BoolVar(&d.peer, "peer", false, "test with another host, which calls this for the same directory at the same time, whether its filesystem is fit for a shared volume")
	c.Flags().DurationVar(&d.within, "within", 5*time.Minute, "with --peer, wait this `TIME` for the other host")
	return c
}

func (d *doctor) line(state, what, advice, format string, args ...any) {
	d.lines = append(d.lines, checkup{what, state, fmt.Sprintf(format, args...), advice})
}

func (d *doctor) ok(what, format string, args ...any) { d.line("ok", what, "", format, args...) }

// failed notes an error, with the hint that it would have at a mount.
func (d *doctor) failed(what string, err error) { d.line("fail", what, hintOf(err), "%v", err) }

// show prints what was found, a line each, and what to do about it.
func (d *doctor) show() error {
	fails := 0
	for _, l := range d.lines {
		if l.State == "fail" {
			fails++
		}
	}
	if d.asJSON {
		if err := printJSON(d.lines); err != nil {
			return err
		}
	} else {
		for _, l := range d.lines {
			fmt.Printf("%-4s  %-22s %s\n", l.State, l.What, l.Detail)
			if l.Advice != "" {
				fmt.Printf("      %-22s → %s\n", "", l.Advice)
			}
		}
	}
	if fails > 0 {
		return quiet(exitFailed)
	}
	return nil
}

// withPeer tests the filesystem of a directory with another host.
func (d *doctor) withPeer(ctx context.Context, dir string) {
	if _, err := volume.CheckShared(dir); err != nil {
		d.failed("locks", err)
		return
	}
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, d.within)
	defer cancel()
	say("Waiting for kmsfs doctor --peer on another host, for the same directory.")
	checks, here, err := volume.ProbePeer(ctx, dir)
	for _, c := range checks {
		switch {
		case c.Err != nil:
			d.line("fail", c.What, peerAdvice(dir), "%v", c.Err)
		case c.Note != "":
			d.ok(c.What, "hold between the hosts, %s", c.Note)
		default:
			d.ok(c.What, "hold between the hosts")
		}
	}
	if err != nil {
		d.failed("peer", err)
	} else if here {
		d.line("note", "peer", "call it on two hosts", "both ran on this host, so that nothing between hosts was tested")
	}
}

// peerAdvice says how a filesystem is mounted so that it is fit for a shared volume.
func peerAdvice(dir string) string {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return ""
	}
	switch st.Type {
	case unix.NFS_SUPER_MAGIC:
		return "mount it with vers=4.1 or later, and without nolock and local_lock"
	case unix.FUSE_SUPER_MAGIC:
		return "GlusterFS: gluster volume set VOLUME client.strict-locks on, and performance.{quick-read,io-cache,read-ahead,write-behind,open-behind,stat-prefetch,readdir-ahead,nl-cache} off; " +
			"mount with direct-io-mode=enable,attribute-timeout=0,entry-timeout=0"
	}
	return "see docs/hosts.md"
}

// machine looks at what every mount needs.
func (d *doctor) machine() {
	if fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		d.line("fail", "FUSE",
			"modprobe fuse; in a container, pass the device: --device /dev/fuse --cap-add SYS_ADMIN", "/dev/fuse: %v", err)
	} else {
		unix.Close(fd)
		d.ok("FUSE", "/dev/fuse can be opened")
	}
	if os.Geteuid() != 0 {
		if path, err := exec.LookPath("fusermount3"); err != nil {
			d.line("fail", "fusermount3", "install fuse3",
				"users other than root need it, and it was not found")
		} else {
			d.ok("fusermount3", "%s", path)
		}
		conf, _ := os.ReadFile("/etc/fuse.conf")
		if !slices.Contains(strings.Fields(string(conf)), "user_allow_other") {
			d.line("note", "--allow-other",
				"to let other users in, put user_allow_other into /etc/fuse.conf",
				"only root can use it here")
		}
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		d.ok("kernel", "Linux %s", unix.ByteSliceToString(u.Release[:]))
	}
	d.clock()
	d.limit("memory that is locked", unix.RLIMIT_MEMLOCK, 1<<20,
		"ulimit -l 1024, or LimitMEMLOCK=, or keys can be swapped out")
	d.limit("open files", unix.RLIMIT_NOFILE, 4096,
		"ulimit -n 65536, or LimitNOFILE=, for programs with many files open")
	if dir, err := stateDir(); err != nil {
		d.failed("trust records", err)
	} else {
		d.ok("trust records", "%s", dir)
	}
	if path, err := socketPath("0:0"); err != nil {
		d.failed("control sockets", err)
	} else {
		d.ok("control sockets", "%s", filepath.Dir(path))
	}
}

// limit notes a resource limit that is lower than a mount wants.
func (d *doctor) limit(what string, resource int, wanted uint64, advice string) {
	var r unix.Rlimit
	if err := unix.Getrlimit(resource, &r); err != nil {
		d.failed(what, err)
	} else if os.Geteuid() == 0 && resource == unix.RLIMIT_MEMLOCK {
		d.ok(what, "root's is not limited")
	} else if r.Cur < wanted {
		d.line("note", what, advice, "limited to %d", r.Cur)
	} else if r.Cur == unix.RLIM_INFINITY {
		d.ok(what, "not limited")
	} else {
		d.ok(what, "limited to %d", r.Cur)
	}
}

// volume looks at a ciphertext directory: its filesystem, its writer, its keys.
func (d *doctor) volume(ctx context.Context, dir string) {
	dir, err := realDir(dir)
	if err != nil {
		d.failed("volume", err)
		return
	}
	l, err := volume.Find(dir)
	if err != nil {
		d.failed("volume", err)
		d.backing(dir, false)
		return
	}
	defer l.Close()
	d.ok("volume", "%s, names %s, %d recipients", l.Config.Volume, l.Config.Names, len(l.Config.Recipients))
	d.backing(dir, l.Config.Names == "plain")
	switch err := l.Tree().Writer(); {
	case errors.Is(err, volume.ErrLocked):
		d.line("note", "writer", "kmsfs umount, if another mount is to write", "%v", err)
	case err != nil:
		d.failed("writer", err)
	default:
		d.ok("writer", "the volume is not mounted for writing")
	}
	rec, err := readRecord(l.Config.Volume)
	switch {
	case err != nil:
		d.failed("trust record", err)
	case rec == nil && len(d.keys) == 0:
		d.line("note", "trust record",
			"mount once with --key; and give --key to this command to look at the key",
			"there is none for this volume: no key is trusted here")
		return
	case rec != nil:
		d.ok("trust record", "names %d recipients, generation %d", len(rec.Recipients), rec.Generation)
	}
	d.keysOf(ctx, dir, l, rec)
}

// keysOf opens the volume as a mount does, and asks for the rights of a writer.
func (d *doctor) keysOf(ctx context.Context, dir string, l *volume.Found, rec *volume.Record) {
	trusted, err := d.trusted(ctx, l.Config.Recipients, rec)
	if err == nil && len(trusted) == 0 {
		err = untrusted(l.Config.Recipients, dir, rec)
	}
	if err != nil {
		d.failed("keys", err)
		return
	}
	if d.usesKMS {
		if source, arn, err := d.kms().Identity(ctx); err != nil {
			d.failed("AWS credentials", err)
		} else {
			d.ok("AWS credentials", "%s, from %s", arn, source)
		}
	}
	opens := keystore.Binding{Use: keystore.ForVolume, Volume: l.Config.Volume}
	for _, s := range trusted {
		var ws []blockcrypt.Recipient
		for _, r := range l.Config.Recipients {
			if keystore.Serves(s, r.URI) {
				ws = append(ws, r)
			}
		}
		begun := time.Now()
		key, err := keystore.UnwrapFirst(ctx, []keystore.Store{s}, opens, ws)
		clear(key)
		if err != nil {
			d.failed("to read", err)
		} else {
			d.ok("to read", "%s opens the volume, in %v", s.URI(),
				time.Since(begun).Round(100*time.Microsecond))
		}
		if k, ok := s.(*awskms.Store); ok {
			d.writes(ctx, k, l.Config)
		}
	}
	d.directories(ctx, l.Config, rec)
}

// directories looks whether the keys of directories open their files.
func (d *doctor) directories(ctx context.Context, c *blockcrypt.Config, rec *volume.Record) {
	for _, id := range c.DirectoryIDs() {
		b := keystore.Binding{Use: keystore.ForDirectory, Volume: c.Volume, ID: id}
		for _, r := range c.Directories[id].Recipients {
			s, err := d.open(ctx, r, rec)
			if err == nil && keystore.OnlySeals(s) {
				d.ok("directory keys", "%s is wrapped for, in %s", r.URI, id)
				continue
			}
			var key []byte
			if err == nil {
				key, err = s.Unwrap(ctx, b, r)
				clear(key)
			}
			if err != nil {
				d.line("note", "directory keys", hintOf(err), "%v: the files of the directory %s cannot be used", err, id)
			} else {
				d.ok("directory keys", "%s opens the files of %s", r.URI, id)
			}
		}
	}
}

// writes looks whether new files can be wrapped for a KMS key: the first one makes the data keys, or
// each makes branch keys.
func (d *doctor) writes(ctx context.Context, k *awskms.Store, c *blockcrypt.Config) {
	first := slices.IndexFunc(c.Recipients,
		func(r blockcrypt.Recipient) bool { return strings.HasPrefix(r.URI, awskms.Scheme) })
	b := keystore.Binding{Use: keystore.ForFile, Volume: c.Volume}
	var err error
	switch {
	case c.Branch != nil:
		b.Use = keystore.ForBranch
		err = k.MayGenerate(ctx, b)
	case first >= 0 && keystore.Serves(k, c.Recipients[first].URI):
		err = k.MayGenerate(ctx, b)
	default:
		err = k.MayWrap(ctx, b)
	}
	if err != nil {
		d.line("note", "to write", hintOf(err), "%v", err)
	} else {
		d.ok("to write", "new files can be wrapped for %s", k.URI())
	}
}

// backing looks at the filesystem of the ciphertext, in a directory of its own.
func (d *doctor) backing(dir string, plainNames bool) {
	tmp, err := os.MkdirTemp(dir, "kmsfs.doctor-")
	if err != nil {
		d.line("note", "ciphertext directory",
			"mount with --read-only, or as a user who may write there", "%v", err)
		return
	}
	defer os.RemoveAll(tmp)
	notes, err := volume.CheckBacking(tmp, plainNames)
	if err != nil {
		d.failed("ciphertext directory", fmt.Errorf("its filesystem %w", err))
	} else {
		d.ok("ciphertext directory", "its filesystem has what a volume needs")
	}
	for _, n := range notes {
		d.line("note", "ciphertext directory", "", "%s", n)
	}
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) == nil {
		free := float64(st.Bavail) / float64(max(st.Blocks, 1))
		state, advice := "ok", ""
		if free < 0.05 {
			state, advice = "note", "free some space"
		}
		d.line(state, "space", advice, "%.0f %% free", 100*free)
	}
	d.pageWrites(tmp)
	if took, err := syncTakes(tmp); err != nil {
		d.failed("speed", err)
	} else {
		d.ok("speed", "a write with fsync takes %v, the median of %d",
			took.Round(10*time.Microsecond), syncProbes)
	}
}

// clock looks whether somebody sets the clock.
func (d *doctor) clock() {
	var t unix.Timex
	if state, err := unix.Adjtimex(&t); err != nil {
		d.line("note", "clock", "", "the kernel does not say whether it is synchronized: %v", err)
	} else if state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0 {
		d.line("note", "clock", "run chrony or systemd-timesyncd: AWS refuses requests whose time is off by five minutes, until kmsfs has learned by how much",
			"nobody synchronizes it")
	} else {
		d.ok("clock", "synchronized")
	}
}

// pageWrites tells how the disk writes pages: that changes what an overwriting write waits for.
func (d *doctor) pageWrites(dir string) {
	f, err := os.CreateTemp(dir, "writes")
	if err != nil {
		return // the next line says so
	}
	defer f.Close()
	var x unix.Statx_t
	if unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_TYPE|unix.STATX_WRITE_ATOMIC, &x) != nil {
		return
	}
	if x.Mask&unix.STATX_WRITE_ATOMIC != 0 && x.Atomic_write_unit_max >= 4096 {
		d.ok("page writes", "the disk writes up to %d bytes as a whole", x.Atomic_write_unit_max)
	} else {
		d.ok("page writes", "the disk does not promise to write a page as a whole; kmsfs does not need that")
	}
	stable, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/queue/stable_writes", x.Dev_major, x.Dev_minor))
	if err != nil {
		stable, err = os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/../queue/stable_writes", x.Dev_major, x.Dev_minor))
	}
	if err == nil && strings.TrimSpace(string(stable)) == "1" {
		d.ok("stable pages", "the disk needs them: the kernel itself waits before a page is overwritten that is being written")
	}
}

const syncProbes = 9

// syncTakes returns how long a small write with fsync takes.
func syncTakes(dir string) (time.Duration, error) {
	f, err := os.Create(filepath.Join(dir, "speed"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var took []time.Duration
	for range syncProbes {
		begun := time.Now()
		if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
		took = append(took, time.Since(begun))
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}
