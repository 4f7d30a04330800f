//go:build linux && !portable

package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

// A PeerCheck is a property that a filesystem must have between two hosts.
type PeerCheck struct {
	What string // "locks", "add under a lock", "close to open", "sizes", "names"
	Err  error  // why it lacks it; nil if it has it
	Note string // a figure, for people
}

// PeerName is the directory in which two hosts meet, in a ciphertext directory or an empty one.
const PeerName = blockcrypt.Reserved + "peer"

// ProbePeer tests with another host, which calls it for the same directory at about the same time, whether
// the filesystem has what a shared volume needs. It waits until ctx ends for the other one. here is true
// if both ran on this host, so that nothing between hosts was tested.
func ProbePeer(ctx context.Context, dir string) (checks []PeerCheck, here bool, err error) {
	d := &disk.Disk{Fresh: true}
	root, err := layout.OpenRoot(d, dir)
	if err != nil {
		return nil, false, err
	}
	defer d.Close(root)
	if err := disk.Ignore(d.Mkdir(root, PeerName, 0o777), unix.EEXIST); err != nil {
		return nil, false, err
	}
	p := &probe{d: d, id: blockcrypt.NewID().String()}
	if p.dir, err = d.Open(root, PeerName, unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		return nil, false, err
	}
	defer func() {
		p.clean()
		d.Close(p.dir)
		d.Unlink(root, PeerName, unix.AT_REMOVEDIR) // the last one removes it
	}()
	if err := p.meet(ctx); err != nil {
		return nil, false, err
	}
	for _, c := range []struct {
		what string
		f    func(context.Context) (string, error)
	}{{"locks", p.locks}, {"add under a lock", p.adds}, {"close to open", p.closeToOpen}, {"sizes", p.sizes}, {"names", p.names}} {
		note, err := c.f(ctx)
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			return checks, p.here, fmt.Errorf("the other host does not go on: %w", err)
		}
		checks = append(checks, PeerCheck{c.what, err, note})
		if err := p.next(ctx); err != nil {
			return checks, p.here, fmt.Errorf("the other host does not go on: %w", err)
		}
	}
	return checks, p.here, p.part(ctx)
}

// part returns when the other host needs this one's files no more.
func (p *probe) part(ctx context.Context) error {
	if err := p.say("bye"); err != nil {
		return err
	}
	for {
		theirs, bye := false, false
		err := p.scan(func(name string) {
			theirs = theirs || strings.HasPrefix(name, p.other+".")
			bye = bye || name == p.other+".bye"
		})
		if err != nil || bye || !theirs {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(probeNap):
		}
	}
}

// probe is one host's part of ProbePeer. The hosts go on check by check, and step by step in each: a host
// says by a file of its own how far it is.
type probe struct {
	d     *disk.Disk
	dir   int
	id    string
	other string
	first bool // this host's ID is the smaller one
	here  bool
	check int // from 0
	steps int // in this check
}

// errOther ends a check that failed on the other host.
var errOther = errors.New("it failed on the other host, which says why")

const (
	probeAdds   = 100
	probeRounds = 20
	probeNap    = 2 * time.Millisecond
	closedAfter = 1500 * time.Millisecond // by a client that delays it
)

// say makes a file whose name says something.
func (p *probe) say(what string) error {
	fd, err := p.d.Open(p.dir, p.id+"."+what, unix.O_WRONLY|unix.O_CREAT|disk.FileFlags, 0o666)
	if err != nil {
		return err
	}
	err = p.d.Fsync(fd)
	p.d.Close(fd)
	return err
}

// hear waits until a name is there that want accepts.
func (p *probe) hear(ctx context.Context, want func(name string) bool) error {
	for {
		found := false
		if err := p.scan(func(name string) { found = found || want(name) }); err != nil || found {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(probeNap):
		}
	}
}

// scan calls f for each name that is there now.
func (p *probe) scan(f func(name string)) error {
	var st unix.Stat_t
	if err := p.d.FstatFresh(p.dir, &st); err != nil {
		return err
	}
	fd, err := p.d.Open(p.dir, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer p.d.Close(fd)
	return p.d.Scan(fd, func(e disk.Dirent) error {
		f(e.Name)
		return nil
	})
}

// meet finds the other host: one that answers. Another that was killed may have left its files.
func (p *probe) meet(ctx context.Context) error {
	boot, _, _ := strings.Cut(layout.ThisHost().Boot, " ")
	if err := p.say("here." + boot); err != nil {
		return err
	}
	theirs := map[string]string{} // the hosts that were answered, and their boots
	err := p.hear(ctx, func(name string) bool {
		id, what, _ := strings.Cut(name, ".")
		if boot, ok := strings.CutPrefix(what, "here."); ok && id != p.id && theirs[id] == "" {
			if p.say("met."+id) == nil {
				theirs[id] = boot
			}
		}
		if what == "met."+p.id {
			p.other = id
		}
		return p.other != "" && theirs[p.other] != ""
	})
	if err != nil {
		return fmt.Errorf("no other host has called kmsfs doctor --peer for this directory: %w", err)
	}
	p.first, p.here = p.id < p.other, theirs[p.other] == boot
	return nil
}

// step returns when both hosts have called it as often in this check, or the other one has ended the check.
func (p *probe) step(ctx context.Context) error {
	p.steps++
	step := fmt.Sprintf("%d.%d", p.check, p.steps)
	if err := p.say(step); err != nil {
		return err
	}
	theirs, end := p.other+"."+step, fmt.Sprintf("%s.%d.end", p.other, p.check)
	here := false
	err := p.hear(ctx, func(name string) bool {
		here = here || name == theirs
		return here || name == end
	})
	if err == nil && !here { // a scan beside the other's work can miss what came before the end
		err = p.scan(func(name string) { here = here || name == theirs })
	}
	if err == nil && !here {
		err = errOther
	}
	return err
}

// next returns when both hosts have ended this check.
func (p *probe) next(ctx context.Context) error {
	end := fmt.Sprintf("%d.end", p.check)
	p.check, p.steps = p.check+1, 0
	if err := p.say(end); err != nil {
		return err
	}
	return p.hear(ctx, func(name string) bool { return name == p.other+"."+end })
}

// file opens a file that both hosts use.
func (p *probe) file(name string) (int, error) {
	flags := unix.O_RDWR | disk.FileFlags
	fd, err := p.d.Open(p.dir, name, flags|unix.O_CREAT, 0o666)
	if err == unix.EEXIST { // on MooseFS, when the other host made it at the same time
		fd, err = p.d.Open(p.dir, name, flags, 0)
	}
	return fd, err
}

// again opens a file once more, and closes it: a second later SMB gives back the locks of this host.
func (p *probe) again(name string) error {
	fd, err := p.file(name)
	if err != nil {
		return err
	}
	err = p.d.Close(fd)
	time.Sleep(closedAfter)
	return err
}

// locks tests whether a lock of one host is in the way of the other, and goes.
func (p *probe) locks(ctx context.Context) (string, error) {
	fd, err := p.file("lock")
	if err != nil {
		return "", err
	}
	defer p.d.Close(fd)
	for _, l := range []disk.Lock{{Kind: disk.Alone, At: layout.LeaseByte, N: 1},
		{Kind: disk.Alone, At: layout.ProgramBytes + 100, N: 1000}} {
		if p.first {
			if err := errors.Join(p.d.OFDLock(fd, l), p.again("lock")); err != nil {
				return "", err
			}
		}
		if err := p.step(ctx); err != nil {
			return "", err
		}
		var held error
		if !p.first {
			if held = p.d.OFDLock(fd, l); held == nil {
				return "", errors.New("a lock of one host is not seen by the other, or goes when its host closes another descriptor of the file")
			}
			if !disk.LockBusy(held) {
				return "", held
			}
		}
		if err := p.step(ctx); err != nil {
			return "", err
		}
		l.Kind = disk.None
		if p.first {
			if err := p.d.OFDLock(fd, l); err != nil {
				return "", err
			}
		}
		if err := p.step(ctx); err != nil {
			return "", err
		}
		if l.Kind = disk.Alone; !p.first {
			if err := p.d.OFDLock(fd, l); err != nil {
				return "", fmt.Errorf("a lock that one host gave back is not to be had by the other: %w", err)
			}
		}
	}
	return "", nil
}

// adds tests whether both hosts read under a lock what the other wrote.
func (p *probe) adds(ctx context.Context) (string, error) {
	fd, err := p.file("counter")
	if err != nil {
		return "", err
	}
	defer p.d.Close(fd)
	l := disk.Lock{Kind: disk.Alone, At: layout.LeaseByte, N: 1}
	begun := time.Now()
	var b [8]byte
	for range probeAdds {
		if err := p.lock(ctx, fd, l); err != nil {
			return "", err
		}
		p.d.ForgetPages(fd, 0, 0)
		if _, err := p.d.Pread(fd, b[:], 0); err != nil {
			return "", err
		}
		binary.BigEndian.PutUint64(b[:], binary.BigEndian.Uint64(b[:])+1)
		if err := errors.Join(p.d.Pwrite(fd, b[:], 0), p.d.Datasync(fd)); err != nil {
			return "", err
		}
		if err := p.d.OFDLock(fd, disk.Lock{Kind: disk.None, At: l.At, N: 1}); err != nil {
			return "", err
		}
	}
	took := time.Since(begun) / probeAdds
	if err := p.step(ctx); err != nil {
		return "", err
	}
	p.d.ForgetPages(fd, 0, 0)
	if err := p.lock(ctx, fd, l); err != nil {
		return "", err
	}
	_, err = p.d.Pread(fd, b[:], 0)
	if n := binary.BigEndian.Uint64(b[:]); err == nil && n != 2*probeAdds {
		err = fmt.Errorf("two hosts added 1 under a lock %d times, and the sum is %d", 2*probeAdds, n)
	}
	return fmt.Sprintf("%v each", took.Round(10*time.Microsecond)), err
}

// lock waits for a lock.
func (p *probe) lock(ctx context.Context, fd int, l disk.Lock) error {
	for {
		err := p.d.OFDLock(fd, l)
		if !disk.LockBusy(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(probeNap):
		}
	}
}

// closeToOpen tests whether an open reads what the other host wrote and closed.
func (p *probe) closeToOpen(ctx context.Context) (string, error) {
	stale := 0
	for round := range probeRounds {
		want := slices.Repeat([]byte{byte('a' + round)}, 100*(round+1))
		if p.first {
			fd, err := p.file("closed")
			if err != nil {
				return "", err
			}
			err = errors.Join(p.d.Truncate(fd, 0), p.d.Pwrite(fd, want, 0), p.d.Fsync(fd), p.d.Close(fd))
			if err != nil {
				return "", err
			}
		}
		if err := p.step(ctx); err != nil {
			return "", err
		}
		if !p.first {
			fd, err := p.d.Open(p.dir, "closed", unix.O_RDONLY|disk.FileFlags, 0)
			if err != nil {
				return "", err
			}
			var st unix.Stat_t
			err = p.d.FstatFresh(fd, &st)
			p.d.ForgetPages(fd, 0, 0)
			got := make([]byte, len(want)+1)
			n, rerr := p.d.Pread(fd, got, 0)
			p.d.Close(fd)
			if err = errors.Join(err, rerr); err != nil {
				return "", err
			}
			if !slices.Equal(got[:n], want) {
				stale++
			}
		}
		if err := p.step(ctx); err != nil {
			return "", err
		}
	}
	if stale > 0 {
		return "", fmt.Errorf("%d of %d times an open read what was there before the other host had closed the file", stale, probeRounds)
	}
	return "", nil
}

// sizes tests whether a host that has written a file, and has it open, reads under a lock how long the other
// has made it.
func (p *probe) sizes(ctx context.Context) (string, error) {
	fd, err := p.file("length")
	if err != nil {
		return "", err
	}
	defer p.d.Close(fd)
	l := disk.Lock{Kind: disk.Alone, At: layout.LeaseByte, N: 1}
	locked := func(f func() error) error {
		if err := p.lock(ctx, fd, l); err != nil {
			return err
		}
		return errors.Join(f(), p.d.OFDLock(fd, disk.Lock{Kind: disk.None, At: l.At, N: 1}))
	}
	wrong := 0
	for round := range probeRounds { // each one shortens what the other wrote
		size := int64(1000 * (probeRounds - round))
		if (round%2 == 0) == p.first {
			err := locked(func() error {
				return errors.Join(p.d.Truncate(fd, size), p.d.Pwrite(fd, []byte{1}, size-1), p.d.Fsync(fd))
			})
			if err != nil {
				return "", err
			}
		}
		if err := p.step(ctx); err != nil {
			return "", err
		}
		err := locked(func() error {
			var st unix.Stat_t
			err := p.d.FstatFresh(fd, &st)
			if st.Size != size {
				wrong++
			}
			return err
		})
		if err != nil {
			return "", err
		}
		if err := p.step(ctx); err != nil {
			return "", err
		}
	}
	if wrong > 0 {
		return "", fmt.Errorf("%d of %d times a file that one host had shortened had its former length on the other, which has it open", wrong, probeRounds)
	}
	return "", nil
}

// names tests whether a name that one host makes or removes is seen by the other at once.
func (p *probe) names(ctx context.Context) (string, error) {
	wrong := 0
	for round := range probeRounds {
		if made := round%2 == 0; p.first {
			var err error
			if made {
				err = p.d.Mknod(p.dir, "name", unix.S_IFREG|0o644, 0)
			} else {
				err = p.d.Unlink(p.dir, "name", 0)
			}
			if err != nil {
				return "", err
			}
		}
		if err := p.step(ctx); err != nil {
			return "", err
		}
		var dir, st unix.Stat_t
		if err := p.d.FstatFresh(p.dir, &dir); err != nil {
			return "", err
		}
		if err := p.d.Stat(p.dir, "name", &st); (err == nil) != (round%2 == 0) {
			wrong++
		}
		if err := p.step(ctx); err != nil {
			return "", err
		}
	}
	if wrong > 0 {
		return "", fmt.Errorf("%d of %d times a name that one host made or removed was not seen so by the other", wrong, probeRounds)
	}
	return "", nil
}

// clean removes this host's files, those that both used, and those of hosts that are gone.
func (p *probe) clean() {
	p.d.Scan(p.dir, func(e disk.Dirent) error {
		if p.other == "" && !strings.HasPrefix(e.Name, p.id+".") {
			return nil
		}
		if !strings.HasPrefix(e.Name, p.other+".") {
			p.d.Unlink(p.dir, e.Name, 0)
		}
		return nil
	})
}
