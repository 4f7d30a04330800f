//go:build linux && !portable

package cfile

import (
	"time"

	"kmsfs/blockcrypt"
)

// durability says how much of a file is where.
type durability struct {
	confirmed int64     // this many bytes may be confirmed; 0: the file is fresh
	durable   int64     // so many are
	born      time.Time // when its first byte was written
	changes   uint64    // of the content
	cuts      uint64    // of them, truncations
	synced    int64     // how many changes a sync has covered; -1 if that is not known
	rested    int64     // how many changes ComeToRest has covered
	wrote     int64     // calls that wrote to the ciphertext file
	covered   int64     // how many of them a sync of the file has covered; -1 if that is not known
}

// Changes counts the changes of the content so far.
func (d *durability) Changes() uint64 { return d.changes }

// Synced reports whether a sync has covered all changes of the content.
func (d *durability) Synced() bool { return d.synced == int64(d.changes) }

// Past is remembered of a file that was closed, for when it is opened again.
type Past struct {
	file blockcrypt.ID
	born time.Time // zero: something may be confirmed
	key  contentKey
}

// Past returns what is to be remembered when the file is closed.
func (p *pages) Past() Past {
	x := Past{key: p.key}
	if p.Header != nil {
		x.file = p.Header.File
		if p.phase == Fresh {
			x.born = p.born
		}
	}
	return x
}

// AllDurable reports whether the whole content is known to be on the disk.
func (p *pages) AllDurable() bool { return p.Synced() && p.durable >= p.Size }

// Unconfirmed reports whether the state says that more was written than is known to be on the
// disk: only in a session that the marker names is that no damage.
func (p *pages) Unconfirmed() bool {
	s := p.Header.State
	return s.Flags&(blockcrypt.Dirty|blockcrypt.Cut) != 0 || s.Floor < s.Size
}
