//go:build linux && !portable

package check

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/fs/volume/internal/cfile"
	"kmsfs/fs/volume/internal/disk"
	"kmsfs/fs/volume/internal/layout"
)

// Repair mends the findings of a check as far as it can: a finding with one right
// answer by itself; a damaged file's readable rest is kept as a copy beside it
// where ask says so. It never destroys the only copy of anything. Files of a
// session that did not end well are repaired by opening the volume.
func Repair(ctx context.Context, v *volume.Volume, findings []Finding, ask func(Finding) bool) []Repaired {
	var out []Repaired
	mend := &repairer{v.Tree(), v}
	kept := map[string]bool{}
	for _, f := range findings {
		if ctx.Err() != nil {
			break
		}
		r := Repaired{Finding: f}
		switch {
		case f.What == FoundLeftover, f.What == FoundOrphan:
			r.Done, r.Err = mend.removeLeftover(f.Path)
		case f.What == FoundLinks:
			r.Done, r.Err = "accepted as a copy without symlinks", mend.Disk.Symlink(layout.LinksTarget, mend.Root, layout.LinksName)
		case f.What == FoundDirID:
			r.Done, r.Err = mend.mendDirID(f.Path)
		case f.What == string(blockcrypt.BadBlock), f.What == string(blockcrypt.BadSize), f.What == FoundCopied:
			if kept[f.Path] || !ask(f) {
				continue
			}
			kept[f.Path] = true
			r.Done, r.Err = mend.keepRest(ctx, f.Path)
		default:
			continue
		}
		out = append(out, r)
	}
	return out
}

// repairer mends what a check has found.
type repairer struct {
	volume.Tree
	v *volume.Volume
}

func (r *repairer) below(cpath string, flags int) (int, error) {
	return r.Disk.OpenBelow(r.Root, cpath, flags)
}

func (r *repairer) removeLeftover(cpath string) (string, error) {
	dir, name := path.Split(cpath)
	fd, err := r.below(path.Clean(dir), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return "", err
	}
	defer r.Disk.Close(fd)
	var st unix.Stat_t
	if entry, ok := layout.EntryOf(name); ok && r.Disk.Stat(fd, entry, &st) == nil {
		return "", errors.New("its entry is there by now")
	}
	if err := disk.Ignore(r.Disk.Unlink(fd, name, 0), unix.ENOENT); err != nil {
		return "", err
	}
	return "removed", r.Disk.Fsync(fd)
}

// mendDirID finds a directory's ID: in one of its two places, or in the headers of
// the files in it; the names tell which is right.
func (r *repairer) mendDirID(cpath string) (string, error) {
	fd, err := r.below(cpath, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return "", err
	}
	defer r.Disk.Close(fd)
	var entries []disk.Dirent
	if err := r.Disk.Scan(fd,
		func(e disk.Dirent) error { entries = append(entries, e); return nil }); err != nil {
		return "", err
	}
	x := layout.DirIDOf(r.Disk, fd, entries)
	candidates := x.IDs
	var encoded []string // names, which the right one decodes
	for _, e := range entries {
		if _, ok := layout.EntryOf(e.Name); ok {
			name, err := r.Disk.Readlink(fd, e.Name)
			if err != nil && err != unix.EINVAL { // EINVAL: no symlink, so it tells nothing
				return "", err
			}
			if err == nil {
				encoded = append(encoded, name)
			}
		}
		if layout.IsOwn(e.Name) {
			continue
		}
		encoded = append(encoded, e.Name)
		if hdr, err := r.headerOf(fd, e.Name); err == nil && !slices.Contains(candidates, hdr.Dir) {
			candidates = append(candidates, hdr.Dir)
		}
	}
	for _, id := range candidates {
		unnamed := len(encoded) == 0 && len(candidates) == 1 // no name could contradict
		if !unnamed && !slices.ContainsFunc(encoded, func(name string) bool {
			_, err := r.Keys.DecodeName(id, name)
			return err == nil
		}) {
			continue
		}
		for _, p := range x.Places {
			if p != layout.DirLink+"."+id.String() {
				if err := r.Disk.Unlink(fd, p, 0); err != nil {
					return "", err
				}
			}
		}
		if err := layout.MendDirID(r.Disk, fd, id); err != nil {
			return "", err
		}
		return "its ID was found again", r.Disk.Fsync(fd)
	}
	return "", errors.New("none of the IDs that can be found decodes the names in it")
}

func (r *repairer) headerOf(dir int, name string) (*blockcrypt.Header, error) {
	fd, err := r.Disk.Open(dir, name, unix.O_RDONLY|disk.FileFlags, 0)
	if err != nil {
		return nil, err
	}
	defer r.Disk.Close(fd)
	sizes, err := r.Sizes()
	if err != nil {
		return nil, err
	}
	hdr, _, err := layout.ReadHeader(r.Disk, fd, sizes.Most(), false)
	if err == nil {
		err = layout.CheckHeader(hdr, sizes, r.Config.Volume, r.Keys)
	}
	return hdr, err
}

// RestSuffix is appended to the name of a damaged file for the copy of all that can
// be read of it.
const RestSuffix = ".readable-rest"

// keepRest copies the blocks of a file that open to a new file beside it, at
// their own places: the bytes between read as zeros.
func (r *repairer) keepRest(ctx context.Context, cpath string) (done string, err error) {
	dirPath, cname := path.Split(cpath)
	dir, err := r.v.Locate(dirPath)
	if err != nil {
		return "", err
	}
	defer r.v.Forget(dir.ID(), 1)
	name, err := dir.PlainName(cname)
	if err != nil {
		return "", fmt.Errorf("its name cannot be read, so the copy has none: %w", err)
	}
	fd, err := r.below(cpath, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer r.Disk.Close(fd)
	var st unix.Stat_t
	if err := r.Disk.Fstat(fd, &st); err != nil {
		return "", err
	}
	d, base := path.Split(cpath)
	dfd, err := r.below(path.Clean(d), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return "", err
	}
	defer r.Disk.Close(dfd)
	hdr, err := r.headerOf(dfd, base)
	if err != nil {
		return "", err
	}
	keys, err := r.Unlock(ctx, hdr)
	if err != nil {
		return "", err
	}
	name = name[:min(len(name), 255-len(RestSuffix))] + RestSuffix
	_, _, h, err := r.v.Create(ctx, dir, name, volume.NewFile{Excl: true, Write: true,
		NewNode: volume.NewNode{Mode: st.Mode & 0o7777, Caller: volume.Caller{UID: st.Uid, GID: st.Gid}}})
	if err != nil {
		return "", fmt.Errorf("the copy beside it: %w", err)
	}
	kept, err := r.copyBlocks(ctx, h, damagedFile{fd, st.Size, hdr.Geometry, keys})
	if err == nil {
		err = h.Fsync()
	}
	if err = errors.Join(err, h.Release()); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d bytes that can be read were kept in %q beside it", kept, name), nil
}

// damagedFile is a ciphertext file of which what opens is kept.
type damagedFile struct {
	fd     int
	length int64
	geo    blockcrypt.Geometry
	keys   *blockcrypt.FileKeys
}

// copyBlocks writes the blocks that open to h, and returns how many bytes of plaintext they are.
func (r *repairer) copyBlocks(ctx context.Context, h *volume.Handle, x damagedFile) (kept int64, err error) {
	var page [blockcrypt.PageSize]byte
	text := make([]byte, 0, blockcrypt.BlockSize)
	for k := int64(0); k <= x.geo.Last(x.length); k++ {
		n, err := r.Disk.Pread(x.fd, page[:], x.geo.PageOff(k))
		if err != nil {
			continue // the disk cannot read it
		}
		if n == len(page) && blockcrypt.IsHole(page[:]) {
			at, err := r.Disk.Seek(x.fd, x.geo.PageOff(k), unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) { // no data follows
				break
			}
			if err == nil {
				k = max(k, x.geo.BlockAt(at)-1)
			}
			continue
		}
		out, err := x.keys.Open(text, k, cfile.PageOf(page[:n], 0, x.geo.Lead(k)), x.geo.Capacity(k))
		if err != nil {
			continue
		}
		if _, err := h.Write(ctx, out, x.geo.Start(k)); err != nil {
			return kept, err
		}
		kept += int64(len(out))
	}
	return kept, nil
}
