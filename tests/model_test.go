package tests

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// treeModel does the same random things in two directories, one of a mount and
// one of the filesystem below it, and wants the same answers.
type treeModel struct {
	r       *rand.Rand
	roots   [2]string
	names   []string
	history []string
	xattrs  bool
}

// Every operation that programs know, from several goroutines, against a real
// directory.
func TestTreeModel(t *testing.T) {
	m := newVolume(t)
	ref := filepath.Join(m.base, "ref")
	ops := 2500
	if fromEnv, err := fmt.Sscan(os.Getenv("KMSFS_TREE_OPS"), &ops); err == nil && fromEnv == 1 {
		t.Log(ops, "operations")
	}
	var names []string
	for i := range 5 {
		names = append(names, fmt.Sprint("n", i), fmt.Sprint(strings.Repeat("long", 55), i))
	}
	for i := range 3 {
		names = append(names, fmt.Sprint("n0/s", i), fmt.Sprint("n1/", strings.Repeat("s", 200), i),
			fmt.Sprint("n1/s1/u", i))
	}
	xattrs := unix.Setxattr(m.base, "user.x", nil, 0) == nil
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			x := &treeModel{r: rand.New(rand.NewPCG(uint64(g), 9)), names: names, xattrs: xattrs,
				roots: [2]string{m.path(fmt.Sprint("g", g)), filepath.Join(ref, fmt.Sprint("g", g))}}
			for _, d := range x.roots {
				if err := os.MkdirAll(d, 0o755); err != nil {
					t.Error(err)
					return
				}
			}
			for i := range ops {
				if err := x.step(); err != nil {
					t.Errorf("operation %d: %v; before: %s", i, err, strings.Join(x.history, "; "))
					return
				}
			}
		})
	}
	wg.Wait()
	for range 2 {
		m.run(`diff -r --no-dereference "$M" "$B/ref"
			attrs() { (cd "$1" && getfattr -hRm user -d . 2>/dev/null | sort); }
			files() { (cd "$1" && find . -type f -printf '%P %m %n %s\n' | sort); }
			times() { (cd "$M" && find . -type f -printf '%P %T@\n' | sort); }
			test -e "$B/times" || times >"$B/times"; times | diff "$B/times" -
			diff <(files "$M") <(files "$B/ref"); diff <(attrs "$M") <(attrs "$B/ref")`)
		m.remount()
	}
}

func (x *treeModel) name() string { return x.names[x.r.IntN(len(x.names))] }

func (x *treeModel) step() error {
	a, b := x.name(), x.name()
	off, n := x.r.Int64N(60000), 1+x.r.Int64N(20000)
	if x.r.IntN(4) == 0 {
		off = []int64{0, 3040, 4096, 7104, 1 << 20}[x.r.IntN(5)]
	}
	data := noise(int(n))
	mode := os.FileMode(0o600 | x.r.IntN(0o100))
	flag := []uint{0, 0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[x.r.IntN(4)]
	const keep = unix.FALLOC_FL_KEEP_SIZE
	space := []uint32{0, keep, unix.FALLOC_FL_PUNCH_HOLE | keep}[x.r.IntN(3)]
	when := unix.Timespec{Sec: x.r.Int64N(1 << 31), Nsec: x.r.Int64N(1e9)}
	ops := []struct {
		name string
		do   func(root string) ([]byte, error)
	}{
		{"create", func(root string) ([]byte, error) { return nil, os.WriteFile(root+a, data, mode) }},
		{"write", func(root string) ([]byte, error) {
			return on(root+a, os.O_RDWR,
				func(f *os.File) ([]byte, error) { _, err := f.WriteAt(data, off); return nil, err })
		}},
		{"append", func(root string) ([]byte, error) {
			return on(root+a, os.O_WRONLY|os.O_APPEND,
				func(f *os.File) ([]byte, error) { _, err := f.Write(data); return nil, err })
		}},
		{"read", func(root string) ([]byte, error) { return os.ReadFile(root + a) }},
		{"truncate", func(root string) ([]byte, error) { return nil, os.Truncate(root+a, off) }},
		{"fsync", func(root string) ([]byte, error) {
			return on(root+a, os.O_RDONLY, func(f *os.File) ([]byte, error) { return nil, f.Sync() })
		}},
		{"fallocate", func(root string) ([]byte, error) {
			return on(root+a, os.O_RDWR, func(f *os.File) ([]byte, error) {
				return nil, unix.Fallocate(int(f.Fd()), space, off, n)
			})
		}},
		{"map", func(root string) ([]byte, error) {
			return on(root+a, os.O_RDWR, func(f *os.File) ([]byte, error) { return mapped(f, data) })
		}},
		{"copy", func(root string) ([]byte, error) {
			return on(root+a, os.O_RDONLY, func(in *os.File) ([]byte, error) {
				return on(root+b, os.O_RDWR|os.O_CREATE, func(out *os.File) ([]byte, error) {
					from, to := int64(0), off
					k, err := unix.CopyFileRange(int(in.Fd()), &from, int(out.Fd()), &to, int(n), 0)
					return fmt.Append(nil, k), err
				})
			})
		}},
		{"nameless", func(root string) ([]byte, error) {
			return on(root, unix.O_TMPFILE|os.O_RDWR, func(f *os.File) ([]byte, error) {
				_, err := f.Write(data)
				return nil, errors.Join(err,
					unix.Linkat(unix.AT_FDCWD, fmt.Sprint("/proc/self/fd/", f.Fd()), unix.AT_FDCWD,
						root+b, unix.AT_SYMLINK_FOLLOW))
			})
		}},
		{"mkdir", func(root string) ([]byte, error) { return nil, unix.Mkdir(root+a, 0o755) }},
		{"rmdir", func(root string) ([]byte, error) { return nil, unix.Rmdir(root + a) }},
		{"unlink", func(root string) ([]byte, error) { return nil, unix.Unlink(root + a) }},
		{"link", func(root string) ([]byte, error) {
			return nil, unix.Linkat(unix.AT_FDCWD, root+a, unix.AT_FDCWD, root+b, 0)
		}},
		{"symlink", func(root string) ([]byte, error) { return nil, unix.Symlink(b, root+a) }},
		{"readlink", func(root string) ([]byte, error) {
			s, err := os.Readlink(root + a)
			return []byte(s), err
		}},
		{"rename", func(root string) ([]byte, error) {
			return nil, unix.Renameat2(unix.AT_FDCWD, root+a, unix.AT_FDCWD, root+b, flag)
		}},
		{"chmod",
			func(root string) ([]byte, error) {
				return nil, unix.Fchmodat(unix.AT_FDCWD, root+a,
					uint32(mode), 0)
			}},
		{"utimens", func(root string) ([]byte, error) {
			return nil, unix.UtimesNanoAt(unix.AT_FDCWD, root+a,
				[]unix.Timespec{{Nsec: unix.UTIME_OMIT}, when}, unix.AT_SYMLINK_NOFOLLOW)
		}},
		{"list", func(root string) ([]byte, error) {
			es, err := os.ReadDir(root + a)
			return fmt.Append(nil, es), err
		}},
		{"stat", func(root string) ([]byte, error) {
			var st unix.Stat_t
			err := unix.Lstat(root+a, &st)
			if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				st.Size, st.Nlink = 0, 0
			}
			return fmt.Append(nil, st.Mode, st.Size, st.Nlink, st.Uid), err
		}},
		{"setxattr", func(root string) ([]byte, error) {
			if !x.xattrs {
				return nil, nil
			}
			return nil, unix.Setxattr(root+a, "user."+b[:2], data[:min(len(data), 50)], 0)
		}},
		{"getxattr", func(root string) ([]byte, error) {
			buf := make([]byte, 100)
			k, err := unix.Getxattr(root+a, "user."+b[:2], buf)
			return buf[:max(k, 0)], err
		}},
		{"removexattr",
			func(root string) ([]byte, error) { return nil, unix.Removexattr(root+a, "user."+b[:2]) }},
	}
	op := ops[x.r.IntN(len(ops))]
	x.history = append(x.history, fmt.Sprintf("%s %.12s %.12s %d+%d flag %d", op.name, a, b, off, n, flag))
	x.history = x.history[max(0, len(x.history)-40):]
	var out [2][]byte
	var errs [2]error
	for i, root := range x.roots {
		out[i], errs[i] = op.do(root + "/")
	}
	if errno(errs[0]) != errno(errs[1]) {
		return fmt.Errorf("%s: %v, but %v there", op.name, errs[0], errs[1])
	}
	if !bytes.Equal(out[0], out[1]) && errs[0] == nil {
		return fmt.Errorf("%s: %d bytes, %.60q, but %d there, %.60q", op.name, len(out[0]), out[0],
			len(out[1]), out[1])
	}
	return nil
}

// mapped writes data through a shared map of the file.
func mapped(f *os.File, data []byte) ([]byte, error) {
	st, err := f.Stat()
	if err != nil || st.Size() == 0 {
		return nil, err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	sum := bytes.Clone(m)
	copy(m[len(m)/2:], data)
	return sum, unix.Munmap(m)
}
