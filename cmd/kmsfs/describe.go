//go:build linux && !portable

package main

import (
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
)

// describe returns attributes for the log of what a report of a fault needs to know: versions, the volume,
// the systems around it, and the options that are not the default. There is no secret in it: of keys only
// their kinds.
func describe(f *mountFlags, u *volume.Unlocked, cipherDir, mountPoint string) []any {
	c := u.Config
	var kinds []string
	for _, r := range c.Recipients {
		kind, _, _ := strings.Cut(r.URI, ":")
		kinds = append(kinds, kind)
	}
	out := []any{"version", version, "go", runtime.Version(), "arch", runtime.GOARCH, "processors", runtime.GOMAXPROCS(0),
		"kernel", kernelRelease(), "uid", os.Geteuid(),
		"volume", c.Volume.String(), "format", blockcrypt.Version, "generation", c.Generation, "names", c.Names,
		"header", c.Header, "recipients", strings.Join(kinds, ","), "directories_with_keys", len(c.Directories),
		"ciphertext", cipherDir, "mountpoint", mountPoint}
	if m, err := holds(cipherDir); err == nil && m != nil {
		out = append(out, "backing", m.fstype, "backing_options", m.options)
	}
	var r unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) == nil {
		out = append(out, "descriptors", r.Cur)
	}
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &r) == nil {
		out = append(out, "locked_memory", r.Cur)
	}
	return append(out, f.changed...)
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// holds returns the mount that a directory lies on, nil if it is not seen.
func holds(dir string) (*mountInfo, error) {
	ms, err := mounts()
	var found *mountInfo
	for i, m := range ms {
		if in := m.dir == "/" || dir == m.dir || strings.HasPrefix(dir, m.dir+"/"); in &&
			(found == nil || len(m.dir) >= len(found.dir)) {
			found = &ms[i]
		}
	}
	return found, err
}
