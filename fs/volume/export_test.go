//go:build linux && !portable

package volume

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

var errCrashed = errors.New("the daemon is dead")

// Crash ends the volume as SIGKILL does: nothing more is written.
func (v *Volume) Crash() {
	close(v.quit)
	v.bg.Wait()
	v.settler.stop()
	v.disk.Hook = func(disk.Call) error { return errCrashed }
	v.peers.crash()
	v.lists.close()
	for _, f := range v.nodes.files() {
		f.mu.Lock()
		unix.Close(f.FD)
		f.closed = true
		f.mu.Unlock()
	}
	v.dirFDs.closeAll()
	v.nodes.closeRemoved()
	v.unlockWriter()
	unix.Close(v.rootD)
}

// SealWithin sets how long a disk may take before keys are wiped.
func (v *Volume) SealWithin(d time.Duration) { v.access.writeWithin = d }

// Settle settles all closed files now.
func (v *Volume) Settle() { v.settler.settle(v.settler.due(0)) }

// NextSession begins a new session now.
func (v *Volume) NextSession() error { return v.nextSession() }

// WaitingForKeys returns how many calls wait for a file's key.
func (v *Volume) WaitingForKeys() (n int) {
	for _, x := range v.nodes.all() {
		x.openMu.Lock()
		if x.half != nil {
			n += x.half.waiting
		}
		x.openMu.Unlock()
	}
	return n
}

// CipherName returns the ciphertext name of an entry of dir.
func (v *Volume) CipherName(dir *Node, name string) string {
	e, err := dir.encode(name, false)
	if err != nil {
		return ""
	}
	return e.cname
}

// A Call is a syscall on the ciphertext tree.
type Call = disk.Call

// ErrSkip is what a hook returns for a call that is not to be made, and to succeed.
var ErrSkip = disk.ErrSkip

// Hooked are options with a function that sees each syscall on the tree that changes something, and
// can fail it, or skip it by [ErrSkip].
func (o Options) Hooked(f func(Call) error) Options {
	o.hooks.Hook = f
	return o
}

// Beats are options of a host of a shared volume that proves this often that it lives.
func (o Options) Beats(d time.Duration) Options {
	o.beat = d
	return o
}

// Look looks for hosts that died now.
func (v *Volume) Look() { v.peers.look() }

// Done are options with a function that is told of each call after it was made.
func (o Options) Done(f func(Call, error)) Options {
	o.hooks.Done = f
	return o
}

// Seeing are options with a function that is told of the name of each call, but for close.
func (o Options) Seeing(f func(op string)) Options {
	o.hooks.Seen = f
	return o
}

// Done is [Options.Done].
func (o InitOptions) Done(f func(Call, error)) InitOptions {
	o.hooks.Done = f
	return o
}

// Torn are options under which pages can tear, on a filesystem in memory too.
func (o Options) Torn() Options {
	o.torn = true
	return o
}

// FDLimit are options with another limit of descriptors than the process's.
func (o Options) FDLimit(n uint64) Options {
	o.fdLimit = n
	return o
}

// Descriptors returns how many are open.
func (v *Volume) Descriptors() int64 { return v.disk.Descriptors() }

// Age makes every open file one of which something may be confirmed, as time does.
func (v *Volume) Age() {
	for _, f := range v.nodes.files() {
		f.mu.Lock()
		f.Confirm()
		f.mu.Unlock()
	}
}

// HasKeys reports whether the file's keys are in memory.
func (h *Handle) HasKeys() bool {
	h.f.mu.RLock()
	defer h.f.mu.RUnlock()
	return h.f.Keys != nil
}

// State returns flags, floor and size of an open file's state.
func (h *Handle) State() (flags uint32, floor, size int64) {
	h.f.mu.RLock()
	defer h.f.mu.RUnlock()
	if h.f.Header == nil {
		return 0, 0, 0
	}
	s := h.f.Header.State
	return s.Flags, s.Floor, s.Size
}

// KnownNodes returns how many nodes the volume holds.
func (v *Volume) KnownNodes() int {
	return len(v.nodes.all())
}

// CheckBackingWith is [CheckBacking] with a hook.
func CheckBackingWith(dir string, hook func(disk.Call) error) ([]string, error) {
	d := &disk.Disk{}
	root, err := layout.OpenRoot(d, dir)
	if err != nil {
		return nil, err
	}
	defer d.Close(root)
	d.Hook = func(c disk.Call) error {
		if c.Op == "unlinkat" {
			return nil
		}
		return hook(c)
	}
	return layout.CheckBackingIn(d, root, false)
}

// GranularityOf returns the granularity of a disk that keeps a time like this one.
func GranularityOf(t time.Time) uint32 { return layout.GranularityOf(t.UnixNano() % 1e9) }

// DirFDs returns how many descriptors of directories are open.
func (v *Volume) DirFDs() int {
	v.dirFDs.mu.Lock()
	defer v.dirFDs.mu.Unlock()
	return v.dirFDs.list.Len()
}

// Closing reports whether Close was called.
func (v *Volume) Closing() bool { return v.ending() != nil }

// GiveUp gives up every descriptor that can be, as if there were none left.
func (v *Volume) GiveUp() {
	v.descriptors.settleOpen()
	v.descriptors.giveUpIdle()
	v.descriptors.giveUpIdle()
}

// Park gives up the descriptor of an open file, if that is possible.
func (v *Volume) Park(h *Handle) bool { return h.f.park(true) }

// Cleaned is what the walk does when it has been everywhere.
func (v *Volume) Cleaned() error { return v.cleaned(v.sessions.badOnes()) }

// crash ends the host as SIGKILL does: its locks fall.
func (p *peers) crash() {
	if !p.on() {
		return
	}
	close(p.stop)
	p.done.Wait()
	for _, x := range p.dead {
		unix.Close(x.fd)
	}
	unix.Close(p.probe)
	unix.Close(p.fd)
	unix.Close(p.hosts.Dir)
}

// LoseLocks gives all locks of this host back behind its back, as a filesystem does that has not heard of
// it for a while.
func (v *Volume) LoseLocks() {
	d := &disk.Disk{}
	for _, f := range v.nodes.files() {
		f.mu.Lock()
		d.OFDLock(f.FD, leaseLock(disk.None))
		f.mu.Unlock()
	}
	d.OFDLock(v.peers.fd, disk.Lock{Kind: disk.None, At: layout.LockByte, N: 1})
}
