//go:build linux && !portable

package volume

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

const (
	beatEvery  = 2 * time.Second // a host proves that it lives
	proofBeats = 3               // so many beats a proof holds, 6 s: T of FORMAT.md, section 6, shorter than the lease of any backing
	lookEvery  = 5               // beats between two looks for hosts that died
)

// peers are the hosts that have a shared volume mounted, this one among them. It is unused, with d nil,
// in a volume that is not shared, and in one that is only read.
type peers struct {
	v *Volume
	hostEvents
	d     *disk.Disk    // without the guard
	beat  time.Duration // beatEvery, but in tests
	name  string        // of this host's file
	fd    int           // of it, which holds its lock
	probe int           // of it, too, by which the lock is looked for

	ownLife
	config atomic.Uint64 // generation of the kmsfs.json that this host uses

	hosts  layout.Hosts
	selfMu sync.Mutex // guards self, and the writes of this host's file
	self   layout.HostFile

	looking sync.Mutex           // held while other hosts' files are looked at, which can take long
	mu      sync.Mutex           // guards the fields below; no syscall waits under it
	dead    map[string]*deadHost // by the names of their files
	stop    chan struct{}
	done    sync.WaitGroup
}

// ownLife is what is known of whether this host is alive.
type ownLife struct {
	proven   atomic.Int64  // since when, on CLOCK_BOOTTIME in nanoseconds, this host is known to be alive
	clock    atomic.Int64  // of the filesystem at the last proof, in nanoseconds of Unix time
	late     atomic.Uint64 // how often a proof came too late: leases of before are lost
	fenced   atomic.Bool   // another host repairs what this one has left: for good
	refusals atomic.Int32  // of the last writes
}

// hostEvents are what peers tells the volume, and asks of it.
type hostEvents struct {
	died   func(sessions []uint64) // tells of a host that died, whose files can be repaired
	lapsed func()                  // tells that this host could not prove in time that it lives
	moved  func() uint64           // returns how often this host moved a directory
	met    func() (config uint64)  // is called with each proof, and returns the generation of kmsfs.json that this host uses
}

// deadHost is one whose lock is gone, and whose file this host has locked.
type deadHost struct {
	fd       int
	sessions []uint64
	fenced   time.Time // since then it cannot write
	timed    bool      // that time is waited for
	bad      bool      // its sessions are among those that ended badly
}

// errDark is the answer while this host cannot prove that it lives.
var errDark = fmt.Errorf("this host did not reach the volume's filesystem for more than %v, so that others may take its files over: %w",
	proofBeats*beatEvery, unix.EIO)

// errFenced is the answer after another host took this one for dead.
var errFenced = fmt.Errorf("this host was taken for dead, and its locks are gone: others repair its files; unmount and mount the volume again: %w", unix.EIO)

// holds returns how long a proof holds.
func (p *peers) holds() time.Duration { return proofBeats * p.beat }

// on reports whether the volume is shared, and mounted for writing.
func (p *peers) on() bool { return p.d != nil }

func bootTime() int64 {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &t)
	return t.Nano()
}

// begin makes this host one of those that have the volume mounted, with these sessions.
func (p *peers) begin(v *Volume, sessions []uint64) (err error) {
	p.v, p.d = v, &disk.Disk{Hooks: v.disk.Hooks}
	defer func() {
		if err != nil {
			p.d = nil // there is nothing to end
		}
	}()
	p.beat = cmp.Or(v.o.beat, beatEvery)
	p.stop, p.dead = make(chan struct{}), map[string]*deadHost{}
	if p.hosts, err = layout.OpenHosts(p.d, v.rootD); err != nil {
		return err
	}
	p.self = layout.ThisHost()
	p.self.Sessions, p.self.Config = v.vk.SealMarker(sessions), v.cfg.Generation
	begun := bootTime()
	if p.name, p.fd, err = p.hosts.Add(p.self); err != nil {
		p.d.Close(p.hosts.Dir)
		return fmt.Errorf("make this host known in %s: %w", layout.HostsName, err)
	}
	if p.probe, err = p.hosts.Open(p.name); err != nil {
		p.hosts.Remove(p.name) // if it fails, others take it for a host that died
		p.d.Close(p.fd)
		p.d.Close(p.hosts.Dir)
		return err
	}
	p.config.Store(v.cfg.Generation)
	p.proven.Store(begun)
	v.disk.Guard = p.alive
	return nil
}

// start looks for hosts that died, and proves from now on that this one lives.
func (p *peers) start() {
	if p.on() {
		p.look()
		p.done.Go(p.run)
		p.done.Go(p.watch)
	}
}

// end makes the host one of the past. With left, it leaves its file, for others to repair what it could
// not bring into order.
func (p *peers) end(left bool) (err error) {
	if !p.on() {
		return nil
	}
	close(p.stop)
	p.done.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !left && !p.fenced.Load() {
		err = p.hosts.Remove(p.name)
	}
	for _, x := range p.dead {
		p.d.Close(x.fd)
	}
	p.d.OFDLock(p.fd, disk.Lock{Kind: disk.None, At: layout.LockByte, N: 1})
	p.d.Close(p.probe)
	p.d.Close(p.fd)
	p.d.Close(p.hosts.Dir)
	return err
}

// alive returns nil while this host is known to be alive, so that no other takes its files over. It is
// asked before each call that changes something.
func (p *peers) alive() error {
	err := p.now()
	// A proof may be under way: the filesystem answers again.
	for end := time.Now().Add(p.holds()); err == errDark && time.Now().Before(end); err = p.now() {
		time.Sleep(p.beat / 40)
	}
	return err
}

// waited is leases, after alive.
func (p *peers) waited() (late uint64, err error) {
	err = p.alive()
	return p.late.Load(), err
}

// now is alive without waiting.
func (p *peers) now() error {
	switch {
	case p.fenced.Load():
		return errFenced
	case bootTime()-p.proven.Load() > int64(p.holds()):
		return errDark
	}
	return nil
}

// leases returns how often a proof came too late so far, and the error if one is too late now.
func (p *peers) leases() (late uint64, err error) { return p.late.Load(), p.now() }

// run proves again and again that this host lives. It waits for nothing of another host: NFS lets an open
// wait for one that is dead.
func (p *peers) run() {
	p.each(func(int) {
		if err := p.prove(); err != nil {
			p.v.report("hosts", "this host could not prove that it lives", err)
		}
	})
}

// watch looks for hosts that died, and for changes of kmsfs.json by others.
func (p *peers) watch() {
	p.each(func(beats int) {
		p.config.Store(p.met())
		if beats%lookEvery == 0 {
			p.look()
		}
	})
}

// each calls f at each beat.
func (p *peers) each(f func(beats int)) {
	t := time.NewTicker(p.beat)
	defer t.Stop()
	for beats := 1; ; beats++ {
		select {
		case <-p.stop:
			return
		case <-t.C:
		}
		f(beats)
	}
}

// prove proves that this host lives: it has its lock, and nobody has fenced it.
func (p *peers) prove() error {
	if p.fenced.Load() {
		return errFenced
	}
	begun := bootTime()
	err := p.write(func(self *layout.HostFile) {
		self.Beat++
		self.Config, self.Moves = p.config.Load(), p.moved()
	})
	lost, lerr := p.lost(err)
	switch {
	case lost:
		p.fenced.Store(true)
		return errFenced
	case err != nil:
		return err
	case lerr != nil:
		return lerr
	}
	switch now := bootTime(); {
	case now-begun > int64(p.holds()): // it took so long that it says nothing any more
		return p.prove()
	case now-p.proven.Load() > int64(p.holds()):
		p.late.Add(1)
		p.lapsed()
		p.v.log.Warn("this host did not reach the volume's filesystem for a while; its files are looked at again")
	}
	p.proven.Store(begun)
	return nil
}

// write changes what this host says of itself, durably.
func (p *peers) write(change func(*layout.HostFile)) error {
	p.selfMu.Lock()
	defer p.selfMu.Unlock()
	change(&p.self)
	return p.hosts.Write(p.fd, p.self)
}

// lost reports whether this host was taken for dead, or its lock taken away; written is the error of its
// last write.
func (p *peers) lost(written error) (bool, error) {
	fenced, changed, err := p.hosts.FencedName(p.name)
	if fenced || err != nil {
		return fenced, err
	}
	p.clock.Store(changed.Nano())
	if written != nil { // of a descriptor whose lock was lost, some filesystems take nothing
		late := bootTime()-p.proven.Load() > int64(p.holds())
		refused := errors.Is(written, unix.EIO) || errors.Is(written, unix.EBADF) || errors.Is(written, unix.EBADFD)
		return late && refused && p.refusals.Add(1) > proofBeats, nil
	}
	p.refusals.Store(0)
	in, err := p.d.OFDLocked(p.probe, disk.Lock{Kind: disk.Alone, At: layout.LockByte, N: 1})
	return err == nil && in.Kind == disk.None, err
}

// setSessions makes durable that these are this host's sessions.
func (p *peers) setSessions(sessions []uint64) error {
	return p.write(func(self *layout.HostFile) { self.Sessions = p.v.vk.SealMarker(sessions) })
}

// look looks for hosts that died, and takes what they have left for something to be repaired.
func (p *peers) look() {
	p.looking.Lock()
	defer p.looking.Unlock()
	names, err := p.hosts.Names()
	if err != nil {
		p.v.report("hosts", "the hosts that have the volume mounted cannot be listed", err)
		return
	}
	for _, name := range names {
		if name == p.name || p.knows(name) {
			continue
		}
		x, err := p.find(name)
		if err != nil {
			p.v.report("hosts", "the file of another host cannot be used", err)
		}
		if x != nil {
			p.mu.Lock()
			p.dead[name] = x
			p.mu.Unlock()
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for name := range p.dead {
		if !slices.Contains(names, name) { // another host has brought its files into order
			p.forget(name)
		}
	}
	p.take()
}

// knows reports whether a host is known to be dead.
func (p *peers) knows(name string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dead[name] != nil
}

// find returns a host if it is dead, locked and fenced; nil if it lives.
func (p *peers) find(name string) (x *deadHost, err error) {
	fd, err := p.hosts.Open(name)
	if err != nil {
		return nil, disk.Ignore(err, unix.ENOENT)
	}
	defer func() {
		if x == nil {
			p.d.Close(fd)
		}
	}()
	if _, _, _, err := p.hosts.Read(fd, p.v.vk); p.hosts.Unwritten(err) {
		return nil, p.hosts.RemoveUnwritten(name, fd)
	}
	err = p.d.OFDLock(fd, disk.Lock{Kind: disk.Shared, At: layout.LockByte, N: 1})
	if disk.LockBusy(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	host, sessions, fenced, err := p.hosts.Read(fd, p.v.vk) // its owner can write it no more
	if err != nil {
		return nil, err
	}
	if !fenced {
		if err := p.hosts.Fence(fd); err != nil {
			return nil, err
		}
	}
	x = &deadHost{fd: fd, sessions: sessions, fenced: time.Now()}
	if host.Ended() {
		x.fenced = x.fenced.Add(-p.holds())
	}
	p.v.log.Warn("a host did not unmount the volume well; files that it was writing are repaired",
		"host", host.Host, "pid", host.PID, "since", host.Since)
	return x, nil
}

// take begins to repair the files of dead hosts whose last proof holds no more. mu is held.
func (p *peers) take() {
	for _, x := range p.dead {
		wait := p.holds() - time.Since(x.fenced)
		switch {
		case x.bad, wait > 0 && x.timed:
		case wait > 0:
			x.timed = true
			p.done.Go(func() {
				select {
				case <-p.stop:
				case <-time.After(wait + time.Millisecond):
					p.mu.Lock()
					defer p.mu.Unlock()
					x.timed = false
					p.take()
				}
			})
		default:
			x.bad = true
			p.died(x.sessions)
		}
	}
}

// moves returns what all other hosts say of how often they moved directories. It changes when one of them
// begins or ends, too.
func (p *peers) moves() (map[string]uint64, error) {
	if !p.on() {
		return nil, nil
	}
	names, err := p.hosts.Names()
	if err != nil {
		return nil, err
	}
	out := map[string]uint64{}
	for _, name := range names {
		if name == p.name || p.knows(name) {
			continue
		}
		if x, ok := hostNow(p.hosts, name); ok {
			out[name] = x.Moves
		}
	}
	return out, nil
}

// beaten returns when each host has proven that it lives since this call, so that its moves are known.
func (p *peers) beaten(ctx context.Context) error {
	if !p.on() {
		return nil
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(p.holds()):
		return nil
	}
}

// forget lets go of a dead host. mu is held.
func (p *peers) forget(name string) {
	p.d.Close(p.dead[name].fd)
	delete(p.dead, name)
}

// cleaned removes the files of dead hosts, all of whose files are in order.
func (p *peers) cleaned(bad map[uint64]bool) error {
	p.looking.Lock()
	defer p.looking.Unlock()
	p.mu.Lock()
	var names []string
	for name, x := range p.dead {
		if x.bad && !slices.ContainsFunc(x.sessions, func(s uint64) bool { return !bad[s] }) {
			names = append(names, name)
		}
	}
	p.mu.Unlock()
	for _, name := range names {
		if err := p.hosts.Remove(name); err != nil {
			return err
		}
		p.mu.Lock()
		p.forget(name)
		p.mu.Unlock()
	}
	return nil
}

// await returns when it is known whether a session is of a host that died: true once its files can be
// repaired, or were, false if it is of a host that lives, or unknown.
func (p *peers) await(ctx context.Context, session uint64) (bool, error) {
	if !p.on() {
		return false, nil
	}
	p.look()
	for met := false; ; {
		p.mu.Lock()
		var of *deadHost
		for _, x := range p.dead {
			if slices.Contains(x.sessions, session) || session == 0 && (of == nil || !x.bad) { // 0: of any
				of = x
			}
		}
		p.take()
		ready := of != nil && of.bad
		p.mu.Unlock()
		if met = met || of != nil; of == nil || ready {
			return met, nil
		}
		select {
		case <-ctx.Done():
			return false, unix.EINTR
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ErrOtherHosts says that other hosts have the volume mounted, or left files to be repaired.
var ErrOtherHosts = errors.New("other hosts have the volume mounted, or did not unmount it well")

// settled returns when all hosts use the kmsfs.json of this generation: before a recipient may go that
// they could make files for, and no other.
func (p *peers) settled(ctx context.Context, generation uint64) error {
	if !p.on() {
		return nil
	}
	for end := time.Now().Add(4 * p.holds()); ; {
		p.look()
		behind, err := p.behind(generation)
		if err != nil || behind == "" {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("the host %s does not use the present recipients yet (see its log), or did not unmount well", behind)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(p.beat / 2):
		}
	}
}

// behind names a host that may use an older kmsfs.json; "" if none does.
func (p *peers) behind(generation uint64) (string, error) {
	names, err := p.hosts.Names()
	if err != nil {
		return "", err
	}
	for _, name := range names {
		if name == p.name {
			continue
		}
		if x, ok := hostNow(p.hosts, name); ok && x.Config < generation {
			return cmp.Or(x.Host, name), nil
		}
	}
	return "", nil
}

// alone calls f while no other host has the volume mounted, or can mount it.
func (p *peers) alone(f func() error) error {
	if !p.on() {
		return f()
	}
	l := disk.Lock{Kind: disk.Alone, At: layout.LockByte, N: 1}
	if err := p.v.disk.OFDLock(p.v.lockFD, l); disk.LockBusy(err) {
		return ErrOtherHosts
	} else if err != nil {
		return err
	}
	if !p.v.o.Alone {
		defer func() {
			l.Kind = disk.Shared
			p.v.disk.OFDLock(p.v.lockFD, l)
		}()
	}
	// A host whose lock was lost may go on to write for a while; its file tells of it.
	p.look()
	if names, err := p.hosts.Names(); err != nil || len(names) > 1 {
		return cmp.Or(err, ErrOtherHosts)
	}
	return f()
}
