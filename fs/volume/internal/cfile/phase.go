//go:build linux && !portable

package cfile

import "fmt"

// Phase says how far the file on the disk is from the form in which it rests, and so what has to
// come before the next change.
type Phase int

// The phases. All but Empty and Broken are about a file that has a header.
const (
	Unread  Phase = iota // its state was not looked at yet
	Partial              // unfinished, in a tree that is only read: the blocks that open are shown
	Empty                // it has no bytes, and no header
	Fresh                // nothing of it is confirmed
	Settled              // its state is clean
	Dirty                // its state is dirty, which need not be durable yet
	Growing              // a dirty state and a length at whole pages are durable
	Cutting              // its state says cut: it ends at its floor
	Broken               // after an error, memory may say what the disk does not have
)

func (p Phase) String() string {
	return [...]string{"unread", "partial", "empty", "fresh", "settled", "dirty", "growing",
		"cutting", "broken"}[p]
}

// transitions are all ways from one phase to another, each with the sentence of FORMAT.md,
// section 4, that it implements.
var transitions = []struct {
	from, to Phase
	rule     string
}{
	{Unread, Partial,
		"a dirty file whose session is not in the marker was copied while it was being written: kmsfs cat gives what opens"},
	{Unread, Empty, "a first page of zeros is an empty file"},
	{Unread, Fresh, "fresh: nothing in the file is confirmed; this mount has closed it, and remembers"},
	{Unread, Settled, "a clean file has the exact length of its size, or that rounded up to a page"},
	{Unread, Dirty, "repair, of a file that is dirty, cut, or has floor < size"},
	{Unread, Broken, "a sync that failed is not made good by a later one"},

	{Empty, Fresh, "header and block 0 go together"},
	{Empty, Broken, "the part of a first run that was written cannot be cut off again"},
	{Fresh, Empty, "truncation to nothing, or the first run could not be written"},
	{Fresh, Settled,
		"close, and the first fsync, write a clean state with floor 0; confirmed by fsync, or older than 30 s"},
	{Fresh, Dirty, "older than 30 s: it is fresh no longer"},
	{Fresh, Broken, "a sync that failed is not made good by a later one"},

	{Settled, Empty, "truncation to nothing"},
	{Settled, Dirty,
		"dirty and sparse are durable before the length or the map changes: the state is written"},
	{Settled, Cutting, "truncation: dirty and a lower floor; with cut where a page is sealed again"},
	{Settled, Broken, "a sync that failed is not made good by a later one"},
	{Dirty, Empty, "truncation to nothing, or a repair that finds nothing"},
	{Dirty, Settled, "settling: sync; clean, floor = size; the exact length"},
	{Dirty, Growing, "tail rule: a dirty state, the length at whole pages, then one fdatasync"},
	{Dirty, Cutting, "truncation: dirty and a lower floor; with cut where a page is sealed again"},
	{Dirty, Broken, "a sync that failed is not made good by a later one"},
	{Growing, Empty, "truncation to nothing"},
	{Growing, Settled, "settling: sync; clean, floor = size; the exact length"},
	{Growing, Dirty, "sparse is durable before the map changes: the state is written again"},
	{Growing, Cutting, "truncation: dirty and a lower floor; with cut where a page is sealed again"},
	{Growing, Broken, "a sync that failed is not made good by a later one"},
	{Cutting, Empty, "truncation to nothing"},
	{Cutting, Settled, "cut goes in a state written after a settling sync"},
	{Cutting, Growing, "cut goes in a state written after an fsync, or a sync before the file grows again"},
	{Cutting, Dirty, "cut goes in a state written after a sync, the length not yet at whole pages"},
	{Cutting, Broken, "a sync that failed is not made good by a later one"},

	{Broken, Empty, "truncation to nothing"},
}

// allowed has the transitions as a table of bits: allowed[from]&(1<<to).
var allowed = func() (t [Broken + 1]uint) {
	for _, x := range transitions {
		t[x.from] |= 1 << x.to
	}
	return t
}()

// enter goes to another phase. A way that the table does not have is a fault of the program: the
// file counts as broken, so that it is repaired before it is used again.
func (p *pages) enter(to Phase) {
	if p.phase == to {
		return
	}
	if allowed[p.phase]&(1<<to) == 0 {
		p.host.Failed("keeping order", fmt.Errorf("internal error: from %s to %s", p.phase, to))
		to = Broken
	}
	p.phase = to
	if to == Broken {
		p.host.Broke(false)
	}
}
