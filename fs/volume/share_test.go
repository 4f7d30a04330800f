//go:build linux && !portable

package volume

import (
	"slices"
	"strings"
	"testing"

	"kmsfs/fs/volume/internal/disk"
)

// What a host alone can tell of a filesystem that is not fit for a shared volume.
func TestUnfitForHosts(t *testing.T) {
	for _, c := range []struct {
		m   disk.Mount
		why string
	}{
		{disk.Mount{Source: "server:/x", Options: []string{"rw", "vers=4.2", "local_lock=none"}}, ""},
		{disk.Mount{Source: "server:/x", Options: []string{"rw", "vers=3", "nolock", "local_lock=all"}}, "with the option nolock"},
		{disk.Mount{Source: "server:/x", Options: []string{"vers=3", "local_lock=posix"}}, "with the option local_lock=posix"},
		{disk.Mount{Type: "cifs", Source: "//server/x", Options: []string{"vers=3.1.1"}}, "closes another descriptor of it"},
		{disk.Mount{Source: `mfs\04310.0.0.1:9421`, Options: []string{"rw"}}, "another has shortened a file"},
		{disk.Mount{}, ""},
	} {
		got := unfitForHosts(c.m)
		if (got == nil) != (c.why == "") || got != nil && !strings.HasSuffix(got.Error(), c.why) {
			t.Errorf("%v: %v", c.m, got)
		}
	}
	// A directory's own mount is found.
	d := &disk.Disk{}
	root, err := d.OpenRoot("/proc")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close(root)
	if m, err := d.MountOf(root); err != nil || m.Type != "proc" || m.Source != "proc" || !slices.Contains(m.Options, "rw") {
		t.Errorf("the mount of /proc: %v, %v", m, err)
	}
}
