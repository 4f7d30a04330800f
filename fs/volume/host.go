//go:build linux && !portable

package volume

import (
	"runtime"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
)

// host is what the ciphertext file of f needs of the volume.
type host struct{ f *file }

func (h host) Session() uint64 { return h.f.v.sessions.now.Load() }

// NewFile uses up the data key that the file has taken.
func (h host) NewFile() (*blockcrypt.Header, *blockcrypt.FileKeys, error) {
	f, k := h.f, h.f.next
	hdr, keys, err := blockcrypt.NewFile(f.v.sizes().New, f.v.vk,
		blockcrypt.FileIDs{File: k.ID, Dir: f.n.parentID()}, k.Key, k.Wrapped)
	if err != nil {
		return nil, nil, err
	}
	k.domain.ring.Learn(k.DataKey)
	f.domain.Store(k.domain)
	k.Wipe()
	f.next = nil
	return hdr, keys, nil
}

func (h host) TakeSpace(n int64, take func() error) error {
	v := h.f.v
	v.sessions.wrote.Store(true)
	v.space.takes(n)
	err := h.asOwner(take)
	v.space.took(err)
	return err
}

// asOwner calls take, which takes space for the file, with the rights of its owner,
// if the daemon is root's and little space is left: the reserve of the
// filesystem is root's own.
func (h host) asOwner(take func() error) error {
	v := h.f.v
	if !v.space.tight.Load() || !v.super {
		return take()
	}
	var st unix.Stat_t
	if err := v.disk.Fstat(h.f.FD, &st); err != nil {
		return err
	}
	if st.Uid == 0 {
		return take()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setfsuid(int(st.Uid)); err != nil {
		return err
	}
	defer unix.Setfsuid(0)
	return take()
}

func (h host) Failed(op string, err error) error { return h.f.failed(op, err) }

func (h host) Broke(bySync bool) {
	v, n := h.f.v, h.f.n
	var st unix.Stat_t
	if v.Shared() && v.disk.FstatFresh(h.f.FD, &st) == unix.ESTALE { // another host has removed it
		v.nodes.vanished(n)
		return
	}
	if bySync {
		v.doubts.begin(n)
	}
	if !v.nodes.removed(n) {
		v.doubts.leave(n)
	}
}
