//go:build linux && !portable

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kmsfs/blockcrypt"
	"kmsfs/fs/volume"
	"kmsfs/keystore/awskms"
)

// inventoryFlags are those of kmsfs inventory.
type inventoryFlags struct {
	keyFlags
	also   []string
	needs  []string
	list   string
	prove  bool
	asJSON bool
}

func inventoryCommand() *cobra.Command {
	var f inventoryFlags
	c := &cobra.Command{
		Use:   "inventory [--also DIR]... [--needs KEY] [--prove] [--list FILE] CIPHERDIR",
		Short: "Count files and bytes by the keys that open them; needs no key",
		Long: `Count the files and bytes of a volume, and of copies of it, by the keys that open them.
The headers are read as they are: nothing is authenticated, and no key is needed.

--needs KEY answers whether the key can be deleted: the command fails if a file has no other
one. Given several times, it answers whether all of these keys can be deleted. Also a key that no file needs should be disabled for as long as backups are kept, while
CloudTrail is watched for DisabledException, before its deletion is scheduled.

--prove asks KMS for each wrapped key whether it still unwraps it, by ReEncrypt for the same
key: that needs the right to rewrap, not the right to read. Of files under a branch key it is
the branch key that is proven. Wrapped keys of a local key are unwrapped with its key file. Only
keys are asked that --key names; without --key those of the trust record. Wrapped keys of an age
recipient or a passphrase are counted, and not asked about.

--list FILE writes the IDs of all files, as CloudTrail has them, with their paths, as CSV. It
opens the volume, for the names.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return f.run(contextOf(c), args[0]) },
	}
	fl := c.Flags()
	fl.StringArrayVar(&f.also, "also", nil, "count this `DIR` too, such as a backup (repeatable)")
	fl.StringArrayVar(&f.needs, "needs", nil,
		"fail if a file can be opened by no other than this `KEY`, or these (repeatable)")
	fl.BoolVar(&f.prove, "prove", false, "ask KMS whether each wrapped key is still good")
	fl.StringVar(&f.list, "list", "", "write file IDs and paths as CSV to this `FILE`")
	fl.BoolVar(&f.asJSON, "json", false, "print JSON")
	f.add(c, openVolumeUsage)
	fl.Float64Var(&f.aws.RPS, "kms-rps", 2000, "calls a second to KMS at most")
	return c
}

// inventory is the output of kmsfs inventory. Bytes are those of ciphertext.
type inventory struct {
	Trees      []string         `json:"trees"`
	Volumes    []volumeOf       `json:"volumes"` // the trees that have a kmsfs.json
	Files      int64            `json:"files"`
	Bytes      int64            `json:"bytes"`
	Empty      int64            `json:"empty"`      // have no key
	Unfinished int64            `json:"unfinished"` // being written, or copied meanwhile
	Unreadable []string         `json:"unreadable"` // the first of them
	Unread     int64            `json:"unreadable_files"`
	Keys       []inventoriedKey `json:"keys"`
	Failed     []failedFile     `json:"failed,omitempty"` // wrapped keys that --prove did not prove

	sets map[string]int64 // files by their keys, sorted and joined
}

// volumeOf is a tree that is a volume, with the keys that its new files get.
type volumeOf struct {
	Tree       string   `json:"tree"`
	Recipients []string `json:"recipients"`

	Directories []string `json:"directories,omitempty"` // those of new files in directories with keys of their own
}

type inventoriedKey struct {
	URI   string `json:"uri"`
	Files int64  `json:"files"`
	Bytes int64  `json:"bytes"`
	Only  int64  `json:"only"` // files that have no other

	// Oldest is the earliest time at which a file was changed last: its key was wrapped then or before.
	Oldest time.Time `json:"oldest_change"`
	*proof
}

// run takes the inventory, prints it, and then says what was not proven, or which keys are needed.
func (f *inventoryFlags) run(ctx context.Context, dir string) error {
	out, proven, err := f.take(ctx, dir)
	if err != nil {
		return err
	}
	if err := f.show(out); err != nil {
		return err
	}
	if len(f.needs) == 0 || proven != nil {
		return proven
	}
	list := []string{}
	for _, k := range out.Keys {
		list = append(list, k.URI)
	}
	for _, v := range out.Volumes {
		list = append(list, v.Recipients...)
		list = append(list, v.Directories...)
	}
	slices.Sort(list)
	list = slices.Compact(list)
	var uris []string
	for _, key := range f.needs {
		uri, err := f.uriOf(ctx, key, list)
		if err != nil {
			return err
		}
		uris = append(uris, uri)
	}
	return out.needs(uris)
}

// take counts the files, proves their keys and lists them, as far as the flags say. proven says
// which keys were not.
func (f *inventoryFlags) take(ctx context.Context, dir string) (out *inventory, proven, err error) {
	var p *prover
	var l *fileList
	if f.list != "" {
		if l, err = f.newList(ctx, dir); err != nil {
			return nil, nil, err
		}
		defer func() { err = errors.Join(err, l.close(err == nil)) }()
	}
	if f.prove {
		if p, err = f.newProver(ctx); err != nil {
			return nil, nil, err
		}
	}
	each := func(tree string, e volume.Inventoried) error {
		if e.Header == nil {
			return nil
		}
		if l != nil && tree == dir {
			if err := l.add(e); err != nil {
				return err
			}
		}
		if p != nil {
			return p.add(ctx, path.Join(tree, e.Path), e.Header)
		}
		return nil
	}
	out, err = takeInventory(ctx, append([]string{dir}, f.also...), each)
	if p == nil {
		return out, nil, err
	}
	p.done()
	if err == nil {
		for i, k := range out.Keys {
			out.Keys[i].proof = p.byURI[k.URI]
		}
		out.Failed = p.failed
	}
	return out, p.verdict(), errors.Join(err, ctx.Err())
}

// takeInventory counts the files of these trees, and calls each for all of them, one at a time.
func takeInventory(ctx context.Context, trees []string,
	each func(tree string, e volume.Inventoried) error) (*inventory, error) {
	out := &inventory{Trees: trees, Volumes: []volumeOf{}, Unreadable: []string{}, Keys: []inventoriedKey{},
		sets: map[string]int64{}}
	byURI := map[string]*inventoriedKey{}
	var line progressLine
	for _, tree := range out.Trees {
		if err := out.addVolume(tree); err != nil {
			return nil, fmt.Errorf("%s: %w", tree, err)
		}
		ctx, stop := context.WithCancelCause(ctx)
		err := volume.Inventory(ctx, tree, func(e volume.Inventoried) {
			out.add(tree, e, byURI)
			if err := each(tree, e); err != nil {
				stop(err)
			}
			if out.Files%1000 == 0 {
				line.show("%d files", out.Files)
			}
		})
		if cause := context.Cause(ctx); cause != nil { // of each, or the user's
			err = cause
		}
		stop(nil)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", tree, err)
		}
	}
	line.clear()
	for _, k := range byURI {
		out.Keys = append(out.Keys, *k)
	}
	slices.SortFunc(out.Keys, func(a, b inventoriedKey) int {
		return cmp.Or(cmp.Compare(b.Files, a.Files), strings.Compare(a.URI, b.URI))
	})
	return out, nil
}

// addVolume notes the recipients of a tree that is a volume, and not a part of one.
func (i *inventory) addVolume(tree string) error {
	l, err := volume.Find(tree)
	if errors.Is(err, volume.ErrNotVolume) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.Close()
	v := volumeOf{Tree: tree}
	for _, r := range l.Config.Recipients {
		v.Recipients = append(v.Recipients, r.URI)
	}
	for _, id := range l.Config.DirectoryIDs() {
		for _, r := range l.Config.Directories[id].Recipients {
			v.Directories = append(v.Directories, r.URI)
		}
	}
	i.Volumes = append(i.Volumes, v)
	return nil
}

// add counts a file for each of its keys.
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
	uris := make([]string, 0, len(e.Header.Recipients))
	for _, r := range e.Header.Recipients {
		uris = append(uris, r.URI)
	}
	slices.Sort(uris)
	i.sets[strings.Join(uris, " ")]++ // no URI has a space
	for _, r := range e.Header.Recipients {
		k := byURI[r.URI]
		if k == nil {
			k = &inventoriedKey{URI: r.URI, Oldest: e.Change}
			byURI[r.URI] = k
		}
		if e.Change.Before(k.Oldest) {
			k.Oldest = e.Change
		}
		k.Files++
		k.Bytes += e.Length
		if len(e.Header.Recipients) == 1 {
			k.Only++
		}
	}
}

// show prints the inventory, as JSON or for people.
func (f *inventoryFlags) show(out *inventory) error {
	if f.asJSON {
		return printJSON(out)
	}
	fmt.Printf("%d files, %d bytes of ciphertext; %d empty, %d unfinished, %d cannot be read\n",
		out.Files, out.Bytes, out.Empty, out.Unfinished, out.Unread)
	for _, k := range out.Keys {
		fmt.Printf("%12d files  %16d bytes  %12d with no other key  unchanged since %s  %s\n", k.Files, k.Bytes, k.Only,
			k.Oldest.Format(time.DateOnly), k.URI)
		if p := k.proof; p != nil {
			fmt.Printf("%12d proven %12d refused %12d unproven %12d not asked\n", p.Proven, p.Refused, p.Unproven, p.Unasked)
		}
	}
	for _, x := range out.Failed {
		say("%s: %s", x.Path, x.Error)
	}
	for _, x := range out.Unreadable {
		say("%s", x)
	}
	return nil
}

// needs returns why keys cannot be deleted, all of them, as far as these trees tell; nil if they can.
func (i *inventory) needs(uris []string) error {
	goes := func(u string) bool {
		return slices.ContainsFunc(uris, func(uri string) bool { return sameKey(u, uri) })
	}
	stays := func(u string) bool { return !goes(u) }
	var files, only int64
	for set, n := range i.sets {
		of := strings.Fields(set)
		if slices.ContainsFunc(of, goes) {
			files += n
			if !slices.ContainsFunc(of, stays) {
				only += n
			}
		}
	}
	names := strings.Join(uris, " and ")
	for _, v := range i.Volumes {
		if at := slices.IndexFunc(v.Recipients, goes); at >= 0 {
			others := ""
			if only > 0 {
				others = fmt.Sprintf(", and %d files have no other key", only)
			}
			return hint(fmt.Errorf("new files of the volume in %s get %s%s", v.Tree, v.Recipients[at], others),
				"kmsfs recipients remove %s %s", shellWord(v.Tree), shellWord(v.Recipients[at]))
		}
		if at := slices.IndexFunc(v.Directories, goes); at >= 0 {
			return hint(fmt.Errorf("new files of a directory in %s get %s", v.Tree, v.Directories[at]),
				"kmsfs setkey gives it another key: kmsfs info %s names it", shellWord(v.Tree))
		}
	}
	switch {
	case only > 0:
		return hint(fmt.Errorf("%d files can be opened by no other key than %s", only, names),
			"kmsfs recipients add, and kmsfs rewrap --missing, give them another one")
	case i.Unread > 0:
		return coded{fmt.Errorf("%d files could not be read: they may need it", i.Unread), exitUnchecked}
	case files > 0:
		say("%d files name %s; each has another key", files, names)
	default:
		say("no file names %s", names)
	}
	return nil
}

// sameKey reports whether two URIs are of one key, or of replicas of it.
func sameKey(a, b string) bool { return a == b || awskms.SameKey(a, b) }
