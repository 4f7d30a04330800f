//go:build linux && !portable

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

func hostsCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "hosts MOUNTPOINT|CIPHERDIR",
		Short: "Show which hosts have a shared volume mounted",
		Long: `Show which hosts have a shared volume mounted for writing: their names, processes, since
when, and whether they live. A host that is dead has left files that the others repair; its line goes when
they have looked at all.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return showHosts(args[0], asJSON) },
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func showHosts(dir string, asJSON bool) error {
	dir, err := realDir(dir)
	if err != nil {
		return err
	}
	if m, err := mountAt(dir); err == nil && m != nil && m.fstype == "fuse.kmsfs" {
		dir = m.source
	}
	l, err := volume.Find(dir)
	if err != nil {
		return err
	}
	l.Close()
	if !l.Config.Shared {
		return hint(fmt.Errorf("%s is not a shared volume", dir), "kmsfs share makes it one")
	}
	hosts, err := volume.Hosts(dir)
	if err != nil {
		return err
	}
	if asJSON {
		if hosts == nil {
			hosts = []volume.Host{}
		}
		return printJSON(hosts)
	}
	if len(hosts) == 0 {
		fmt.Println("No host has the volume mounted for writing.")
		return nil
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "HOST\tPROCESS\tSINCE\tSTATE")
	for _, h := range hosts {
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", h.Host, h.PID, h.Since.Local().Format(time.DateTime), h.State)
	}
	return w.Flush()
}

func shareCommand() *cobra.Command {
	var f keyFlags
	var end bool
	c := &cobra.Command{
		Use:   "share [--end] CIPHERDIR",
		Short: "Let several hosts mount a volume for writing, or end that",
		Long: `Let several hosts mount a volume for writing at the same time, or end that with --end. Nobody
may have the volume mounted meanwhile. Versions of kmsfs that do not know shared volumes refuse one.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return share(contextOf(c), &f, args[0], !end) },
	}
	f.add(c, openVolumeUsage)
	c.Flags().BoolVar(&end, "end", false, "let only one host mount it for writing again")
	return c
}

func share(ctx context.Context, k *keyFlags, dir string, on bool) error {
	dir, err := realDir(dir)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	if on {
		if err := checkShared(dir); err != nil {
			return err
		}
	}
	m := unlockFlags{keyFlags: *k}
	u, err := m.unlock(ctx, dir)
	if err != nil {
		return err
	}
	defer u.Close()
	v, err := u.Open(volume.Options{Logger: slog.New(slog.NewTextHandler(io.Discard, nil)), NoPrefetch: true,
		Alone: true})
	if errors.Is(err, volume.ErrLocked) || errors.Is(err, volume.ErrOtherHosts) {
		err = hint(err, "unmount it on all hosts first: kmsfs hosts %s", dir)
	}
	if err != nil {
		return err
	}
	rec, err := v.Recipients().Share(ctx, on)
	if err = errors.Join(err, v.Close()); err != nil {
		return err
	}
	if err := updateRecord(rec, dir, "", ""); err != nil {
		return err
	}
	if !on {
		return volume.Unshared(dir)
	}
	return nil
}

// checkShared refuses a directory whose filesystem keeps locks on this host, and says what this host
// alone cannot see.
func checkShared(dir string) error {
	local, err := volume.CheckShared(dir)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if local {
		say("note: the filesystem of %s is this host's own, unless it is a cluster's: all other hosts must reach it the same way, and not by way of an export", dir)
	} else {
		say("note: try the filesystem with two hosts before you use the volume: kmsfs doctor --peer %s on both", dir)
	}
	return nil
}
