package transfer

import (
	"crypto/sha256"
	"encoding/hex"
	"path"
	"slices"
	"strings"
)

// Temporary is the name under which a file is made beside its place: the same the next time, which
// takes it away.
func Temporary(at string) string {
	h := sha256.Sum256([]byte(path.Base(at)))
	return path.Join(path.Dir(at), partPrefix+hex.EncodeToString(h[:8]))
}

const partPrefix = ".kmsfs-part-"

// IsLate reports whether a file is copied after all others, since its name can be the temporary one of
// another: a copy that was interrupted may have been copied itself.
func IsLate(at string) bool { return strings.HasPrefix(path.Base(at), partPrefix) }

// Apart returns the paths that do not lie in others.
func Apart(paths []string) (out []string) {
	for _, p := range paths {
		p = strings.TrimPrefix(path.Clean("./"+p), "/")
		in := func(q string) bool { return q == "." || p == q || strings.HasPrefix(p, q+"/") }
		if !slices.ContainsFunc(out, in) {
			out = slices.DeleteFunc(out, func(q string) bool { return p == "." || strings.HasPrefix(q, p+"/") })
			out = append(out, p)
		}
	}
	return out
}
