package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
)

// inventoryFlags are those of kmsfs inventory.
type inventoryFlags struct {
	keyFlags
	also   []string
	needs  string
	asJSON bool
}

func inventoryCommand() *cobra.Command {
	var f inventoryFlags
	c := &cobra.Command{
		Use:   "inventory [--also DIR]... [--needs KEY] CIPHERDIR",
		Short: "Count files and bytes by the keys that open them; needs no key",
		Long: `Count the files and bytes of a volume, and of copies of it, by the keys that open them.
The headers are read as they are: nothing is authenticated, and no key is needed.

--needs KEY answers whether the key can be deleted: the command fails if a file has no other
one. Also a key that no file needs should be disabled for as long as backups are kept, while
CloudTrail is watched for DisabledException, before its deletion is scheduled.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return f.run(contextOf(c), args[0]) },
	}
	fl := c.Flags()
	fl.StringArrayVar(&f.also, "also", nil, "count this `DIR` too, such as a backup (repeatable)")
	fl.StringVar(&f.needs, "needs", "", "fail if a file can be opened by no other than this `KEY`")
	fl.BoolVar(&f.asJSON, "json", false, "print JSON")
	f.addAWS(c)
	return c
}

// inventory is the output of kmsfs inventory. Bytes are those of ciphertext.
type inventory struct {
	Trees      []string         `json:"trees"`
	Files      int64            `json:"files"`
	Bytes      int64            `json:"bytes"`
	Empty      int64            `json:"empty"`      // have no key
	Unfinished int64            `json:"unfinished"` // being written, or copied meanwhile
	Unreadable []string         `json:"unreadable"` // the first of them
	Unread     int64            `json:"unreadable_files"`
	Keys       []inventoriedKey `json:"keys"`
}

type inventoriedKey struct {
	URI   string `json:"uri"`
	Files int64  `json:"files"`
	Bytes int64  `json:"bytes"`
	Only  int64  `json:"only"` // files that have no other
}

func (f *inventoryFlags) run(ctx context.Context, dir string) error {
	out := inventory{Trees: append([]string{dir}, f.also...), Unreadable: []string{}, Keys: []inventoriedKey{}}
	byURI := map[string]*inventoriedKey{}
	var line progressLine
	for _, tree := range out.Trees {
		err := volume.Inventory(ctx, tree, func(e volume.Inventoried) {
			out.add(tree, e, byURI)
			if out.Files%1000 == 0 {
				line.show("%d files", out.Files)
			}
		})
		if err != nil {
			return fmt.Errorf("%s: %w", tree, err)
		}
	}
	line.clear()
	for _, k := range byURI {
		out.Keys = append(out.Keys, *k)
	}
	slices.SortFunc(out.Keys, func(a, b inventoriedKey) int { return int(b.Files - a.Files) })
	if err := f.show(&out); err != nil {
		return err
	}
	return f.verdict(ctx, &out)
}

func (i *inventory) add(tree string, e volume.Inventoried, byURI map[string]*inventoriedKey) {
	i.Files++
	i.Bytes += e.Length
	switch {
	case e.Err != nil:
		if i.Unread++; len(i.Unreadable) < mostErrors {
			i.Unreadable = append(i.Unreadable, fmt.Sprintf("%s/%s: %v", tree, e.Path, e.Err))
		}
		return
	case e.Header == nil:
		i.Empty++
		return
	}
	if e.Header.State.Flags&(blockcrypt.Dirty|blockcrypt.Cut) != 0 {
		i.Unfinished++
	}
	for _, r := range e.Header.Recipients {
		k := byURI[r.URI]
		if k == nil {
			k = &inventoriedKey{URI: r.URI}
			byURI[r.URI] = k
		}
		k.Files++
		k.Bytes += e.Length
		if len(e.Header.Recipients) == 1 {
			k.Only++
		}
	}
}

func (f *inventoryFlags) show(out *inventory) error {
	if f.asJSON {
		return printJSON(out)
	}
	fmt.Printf("%d files, %d bytes of ciphertext; %d empty, %d unfinished, %d cannot be read\n", out.Files, out.Bytes, out.Empty, out.Unfinished, out.Unread)
	for _, k := range out.Keys {
		fmt.Printf("%12d files  %16d bytes  %12d with no other key  %s\n", k.Files, k.Bytes, k.Only, k.URI)
	}
	for _, x := range out.Unreadable {
		say("%s", x)
	}
	return nil
}

// verdict answers --needs.
func (f *inventoryFlags) verdict(ctx context.Context, out *inventory) error {
	if f.needs == "" {
		return nil
	}
	var list []string
	for _, k := range out.Keys {
		list = append(list, k.URI)
	}
	uri, err := f.uriOf(ctx, f.needs, list)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(out.Keys, func(k inventoriedKey) bool { return k.URI == uri })
	switch {
	case i >= 0 && out.Keys[i].Only > 0:
		return hint(fmt.Errorf("%d files can be opened by no other key than %s", out.Keys[i].Only, uri), "kmsfs recipients add, and kmsfs rewrap --missing, give them another one")
	case out.Unread > 0:
		return coded{fmt.Errorf("%d files could not be read: they may need it", out.Unread), exitUnchecked}
	case i >= 0:
		say("%d files name %s; each has another key", out.Keys[i].Files, uri)
	default:
		say("no file names %s", uri)
	}
	return nil
}
