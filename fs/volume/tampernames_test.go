//go:build linux && !portable

package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/fs/volume"
)

func (m *tamperer) names() {
	v := m.victim()
	path, elsewhere := v.path("d/f"), v.path("e")
	v.seal()
	rename := func(what, to string) {
		m.t.Helper()
		v.do("rename", os.Rename(path, to))
		m.one(what, v.outcome("d/f"))
		v.do("rename", os.Rename(to, path))
	}
	dir, base := filepath.Split(path)
	for i := range 3 {
		b := []byte(base)
		b[i*10] = 'A' + (b[i*10]-'A'+1)%26
		rename("a character", filepath.Join(dir, string(b)))
	}
	rename("shorter", filepath.Join(dir, base[:len(base)-2]))
	rename("longer", filepath.Join(dir, base+"AA"))
	rename("readable", filepath.Join(dir, "f"))
	// In another directory it is not shown there either.
	to := filepath.Join(elsewhere, base)
	v.do("rename", os.Rename(path, to))
	v.content["e/f2"] = nil
	if got := v.outcome("e/f"); got != "not noticed" {
		m.t.Errorf("its neighbours there: %s", got)
	}
	m.one("moved to another directory", func() string {
		u, err := v.unlockWith(v.record)
		v.do("unlock", err)
		v.log = &logBuffer{}
		v.v, err = u.Open(volume.Options{Logger: v.log.logger()})
		v.do("open", err)
		defer func() { v.v.Crash(); v.v = nil }()
		if names := v.list("e"); len(names) != 1 || !strings.Contains(v.log.String(), "not shown") {
			return fmt.Sprint("it is shown: ", names)
		}
		return "it is not shown; the log says so"
	}())
}

// other returns another string of the length, of digits.
func other(s string) string {
	if now := strings.Repeat("0", len(s)); now != s {
		return now
	}
	return strings.Repeat("1", len(s))
}

func (m *tamperer) longNames() {
	v := m.victim()
	long := "d/" + strings.Repeat("n", 240)
	v.content[long] = noise(100)
	v.write(long, v.content[long])
	path := v.path(long)
	name := strings.Replace(path, "kmsfs.long.", "kmsfs.name.", 1)
	v.seal()
	target, err := os.Readlink(name)
	v.do("readlink", err)
	listed := func() string {
		return v.with(func() string {
			if slices.Contains(v.list("d"), filepath.Base(long)) ||
				!strings.Contains(v.log.String(), "not shown") {
				return "it is listed"
			}
			return "it is not listed; the log says so"
		})
	}
	for what, now := range map[string]string{"a character": other(target[:1]) + target[1:],
		"cut": target[:100], "longer": target + "AAAA", "nothing of ours": "hello"} {
		v.do("remove", os.Remove(name))
		v.do("symlink", os.Symlink(now, name))
		m.one(what, listed())
	}
	v.do("remove", os.Remove(name))
	m.one("lost", listed())
	v.do("symlink", os.Symlink(target, name))
	v.do("rename", os.Rename(path, path[:len(path)-2]+other(path[len(path)-2:])))
	m.one("another hash", listed())
}

func (m *tamperer) dirIDs() {
	v := m.victim()
	d := v.path("d")
	v.seal()
	id, err := os.Readlink(d + "/kmsfs.dir")
	v.do("readlink", err)
	again := func() {
		os.Remove(d + "/kmsfs.dir")
		v.do("symlink", os.Symlink(id, d+"/kmsfs.dir"))
		all, _ := filepath.Glob(d + "/kmsfs.dir.*")
		for _, p := range all {
			v.do("remove", os.Remove(p))
		}
		v.do("write", os.WriteFile(d+"/kmsfs.dir."+id, nil, 0o644))
	}
	for what, f := range map[string]func(){
		"a digit of the symlink": func() {
			os.Remove(d + "/kmsfs.dir")
			os.Symlink(other(id[:1])+
				id[1:], d+"/kmsfs.dir")
		},
		"a malformed symlink": func() {
			os.Remove(d + "/kmsfs.dir")
			os.Symlink("/etc/passwd",
				d+"/kmsfs.dir")
		},
		"a digit of the file": func() {
			os.Rename(d+"/kmsfs.dir."+id,
				d+"/kmsfs.dir."+strings.Repeat("1", 32))
		},
		"two files and no symlink": func() {
			os.Remove(d + "/kmsfs.dir")
			os.WriteFile(d+"/kmsfs.dir."+strings.Repeat("1", 32), nil, 0o644)
		},
		"both lost": func() { os.Remove(d + "/kmsfs.dir"); os.Remove(d + "/kmsfs.dir." + id) },
	} {
		f()
		m.one(what, v.outcome("d/f"))
		again()
	}
}

func (m *tamperer) targets() {
	v := m.victim()
	_, _, err := v.v.Symlink(ctx, v.must("d"), "link", "where it leads", volume.Caller{})
	v.do("symlink", err)
	path := v.path("d/link")
	v.seal()
	target, err := os.Readlink(path)
	v.do("readlink", err)
	for what, now := range map[string]string{"a character": other(target[:1]) + target[1:],
		"the last": target[:len(target)-2] + other(target[len(target)-2:]), "cut": target[:20],
		"readable": "/etc/passwd"} {
		if now == target {
			continue
		}
		v.do("remove", os.Remove(path))
		v.do("symlink", os.Symlink(now, path))
		m.one(what, v.with(func() string {
			if got, err := v.v.Readlink(v.must("d/link")); err != nil {
				return shown(err) + " at readlink"
			} else {
				return "it leads to " + got
			}
		}))
	}
}

// with opens the volume for f.
func (v *victim) with(f func() string) string {
	u, err := v.unlockWith(v.record)
	if err != nil {
		return "mount refuses"
	}
	v.log = &logBuffer{}
	if v.v, err = u.Open(volume.Options{Logger: v.log.logger()}); err != nil {
		u.Close()
		v.v = nil
		return "mount refuses"
	}
	defer func() { v.v.Crash(); v.v = nil }()
	return f()
}

func (m *tamperer) attrValues() {
	v := m.victim()
	n := v.must("d/f")
	if err := n.Setxattr("user.a", []byte("a value"), 0, false); errors.Is(err, unix.EOPNOTSUPP) {
		m.t.Skip("the backing filesystem has no extended attributes")
	}
	v.do("setxattr", n.Setxattr("user.b", []byte("another"), 0, false))
	path := v.path("d/f")
	v.seal()
	buf := make([]byte, 1000)
	k, err := unix.Listxattr(path, buf)
	v.do("listxattr", err)
	var names []string
	for x := range strings.SplitSeq(string(buf[:k]), "\x00") {
		if strings.HasPrefix(x, "user.") {
			names = append(names, x)
		}
	}
	get := func() string {
		return v.with(func() string {
			for _, a := range []string{"user.a", "user.b"} {
				if got, err := v.must("d/f").Getxattr(a); err != nil {
					return shown(err) + " when it is read"
				} else if string(got) != map[string]string{"user.a": "a value", "user.b": "another"}[a] {
					return "OTHER BYTES"
				}
			}
			return "not noticed"
		})
	}
	var vals [2][]byte
	for i, x := range names {
		k, err := unix.Getxattr(path, x, buf)
		v.do("getxattr", err)
		vals[i] = bytes.Clone(buf[:k])
	}
	set := func(what string, i int, b []byte) {
		v.do("setxattr", unix.Setxattr(path, names[i], b, 0))
		m.one(what, get())
		v.do("setxattr", unix.Setxattr(path, names[i], vals[i], 0))
	}
	for _, at := range []int{0, 16, len(vals[0]) - 1} {
		b := bytes.Clone(vals[0])
		b[at] ^= 1
		set("a bit", 0, b)
	}
	set("cut", 0, vals[0][:20])
	set("empty", 0, nil)
	set("under another name", 0, vals[1])
}
