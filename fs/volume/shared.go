//go:build linux && !portable

package volume

// Shared reports whether other hosts may write to the volume at the same time.
func (b *base) Shared() bool { return b.cfg.Shared }
