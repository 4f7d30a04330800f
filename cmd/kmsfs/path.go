//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"kmsfs/fs/volume"
)

func pathCommand() *cobra.Command {
	var f keyFlags
	c := &cobra.Command{
		Use:   "path PATH...",
		Short: "Print the ciphertext path of a file on a mount, or the plaintext path of a ciphertext file",
		Long: `Print the ciphertext path of a file or directory on a mount, or the plaintext path, below the
volume, of one in a ciphertext directory. The volume may be mounted; if it is not, a key is needed.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			for _, p := range args {
				out, err := otherPath(contextOf(c), &f, p)
				if err != nil {
					return err
				}
				fmt.Println(out)
			}
			return nil
		},
	}
	f.add(c, openVolumeUsage)
	f.addIdentities(c)
	return c
}

// otherPath returns the ciphertext path of a plaintext path, or the other way round.
func otherPath(ctx context.Context, k *keyFlags, p string) (out string, err error) {
	dir, q, err := volumeOfPath(p)
	if err != nil {
		return "", err
	}
	d, err := daemonFor(dir)
	if err != nil {
		return "", err
	}
	if d != nil {
		if err := d.ask(ctx, http.MethodPost, "path", q, func(n news) { out = n.Path }); err != nil {
			return "", err
		}
		if !q.Cipher {
			out = filepath.Join(dir, out)
		}
		return out, nil
	}
	m := unlockFlags{keyFlags: *k, readOnly: true, acceptOlder: true}
	u, err := m.unlock(ctx, dir)
	if err != nil {
		return "", err
	}
	defer u.Close()
	*k = m.keyFlags
	if q.Path == "." {
		return ".", nil
	}
	if out, err = u.Names().Path(q.Path); err != nil {
		return "", fmt.Errorf("%s: its name does not decode: %w", p, err)
	}
	return out, nil
}

// daemonFor returns a daemon that has a volume mounted, nil if none is seen: the one that writes, else
// one that reads.
func daemonFor(dir string) (*mountDaemon, error) {
	if locked := volume.Writer(dir); errors.Is(locked, volume.ErrLocked) {
		if a, err := writerOf(dir, locked); err == nil {
			return a.(*mountDaemon), nil
		}
	}
	ms, err := mounts()
	if err != nil {
		return nil, err
	}
	for _, m := range ms {
		if m.fstype == "fuse.kmsfs" && m.source == dir && strings.HasPrefix(m.options+",", "ro,") {
			return &mountDaemon{m.dev}, nil
		}
	}
	return nil, nil
}
