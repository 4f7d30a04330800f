// Command hostcheck works on a directory that several hosts have mounted, one process on each, and
// judges what it reads. It is in the manner of Jepsen: the workloads are counters and lists under locks,
// registers without, records that are appended, pages that two hosts write, names that two hosts make
// and remove.
//
//	hostcheck run WORKLOAD DIR ID SECONDS     one host's part; its acknowledgements go to standard output
//	hostcheck judge WORKLOAD DIR FILE...      after all parts have ended: their outputs, and the files in DIR
//	hostcheck time DIR SECONDS                how fast one host works in DIR: operations or MiB a second
//	hostcheck turns DIR SECONDS               how long one host waits for its turn to add under a lock
//
// It has no dependency, so that a static program runs on a host that has nothing else.
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := command(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "hostcheck:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("usage: run WORKLOAD DIR ID SECONDS, judge WORKLOAD DIR FILE, time DIR SECONDS, or turns DIR SECONDS")

// part is what one host does.
type part struct {
	dir string
	id  int
	end time.Time
	out *bufio.Writer
}

// workload is a kind of work with its judge. A judge gets the acknowledgements of all parts.
type workload struct {
	run   func(*part) error
	judge func(dir string, acks [][]string) error
}

var workloads = map[string]workload{
	"counter":  {(*part).counter, judgeCounter},
	"reopened": {(*part).reopened, judgeCounter},
	"list":     {(*part).list, judgeList},
	"append":   {(*part).appends, judgeAppend},
	"pages":    {(*part).pages, judgePages},
	"register": {(*part).register, judgeRegister},
	"names":    {(*part).names, judgeNames},
	"replaced": {(*part).replaced, judgeReplaced},
	"cut":      {(*part).cut, judgeCut},
}

func command(args []string) error {
	if len(args) < 3 {
		return errUsage
	}
	if f := map[string]func(string, time.Duration) error{"time": measure, "turns": turns}[args[0]]; f != nil {
		seconds, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return f(args[1], time.Duration(seconds)*time.Second)
	}
	w, ok := workloads[args[1]]
	if !ok {
		return fmt.Errorf("no workload %q", args[1])
	}
	switch {
	case args[0] == "run" && len(args) == 5:
		id, err := strconv.Atoi(args[3])
		seconds, serr := strconv.Atoi(args[4])
		if err = errors.Join(err, serr); err != nil {
			return err
		}
		p := &part{args[2], id, time.Now().Add(time.Duration(seconds) * time.Second), bufio.NewWriter(os.Stdout)}
		return errors.Join(w.run(p), p.out.Flush())
	case args[0] == "judge" && len(args) > 3:
		var acks [][]string
		for _, name := range args[3:] {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			acks = append(acks, strings.Fields(string(b)))
		}
		return w.judge(args[2], acks)
	}
	return errUsage
}

func (p *part) running() bool { return time.Now().Before(p.end) }

func (p *part) path(name string) string { return filepath.Join(p.dir, name) }

// ack says that something is done for good.
func (p *part) ack(x any) {
	fmt.Fprintln(p.out, x)
	p.out.Flush()
}

// lock locks the whole file by fcntl(2).
func lock(file *os.File) error {
	l := syscall.Flock_t{Type: syscall.F_WRLCK}
	for {
		err := syscall.FcntlFlock(file.Fd(), syscall.F_SETLKW, &l)
		if err == nil {
			return nil
		}
		if err != syscall.EINTR {
			return fmt.Errorf("lock: %w", err)
		}
	}
}

// locked calls f while the whole file is locked.
func locked(file *os.File, f func() error) error {
	if err := lock(file); err != nil {
		return err
	}
	err := f()
	l := syscall.Flock_t{Type: syscall.F_UNLCK}
	if uerr := syscall.FcntlFlock(file.Fd(), syscall.F_SETLK, &l); uerr != nil {
		return errors.Join(err, fmt.Errorf("unlock: %w", uerr))
	}
	return err
}

// counter adds 1 to a number under a lock, and reads it.
func (p *part) counter() error {
	file, err := p.openCounter()
	if err != nil {
		return err
	}
	defer file.Close()
	last := uint64(0)
	for p.running() {
		if err := locked(file, func() error { return add(file, &last) }); err != nil {
			return err
		}
		p.ack(last)
	}
	return nil
}

// reopened is counter where each addition opens the file, and its close gives the lock back.
func (p *part) reopened() error {
	last := uint64(0)
	for p.running() {
		file, err := p.openCounter()
		if err != nil {
			return err
		}
		if err = lock(file); err == nil {
			err = add(file, &last)
		}
		if err = errors.Join(err, file.Close()); err != nil {
			return err
		}
		p.ack(last)
	}
	return nil
}

func (p *part) openCounter() (*os.File, error) {
	return os.OpenFile(p.path("counter"), os.O_RDWR|os.O_CREATE, 0o644)
}

// add adds 1 to the counter in a file, which was never less than last.
func add(file *os.File, last *uint64) error {
	var b [8]byte
	if n, err := file.ReadAt(b[:], 5000); err != nil && !(err == io.EOF && n == 0) {
		return err
	}
	x := binary.BigEndian.Uint64(b[:])
	if x < *last {
		return fmt.Errorf("read %d after %d", x, *last)
	}
	*last = x + 1
	binary.BigEndian.PutUint64(b[:], *last)
	_, err := file.WriteAt(b[:], 5000)
	return err
}

// list appends lines under a lock, and demands that what it has seen before is still there.
func (p *part) list() error {
	file, err := os.OpenFile(p.path("list"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	var seen []byte
	for i := 0; p.running(); i++ {
		line := fmt.Sprintf("%d.%d.%s\n", p.id, i, strings.Repeat("x", rand.IntN(100)))
		err := locked(file, func() error {
			st, err := file.Stat()
			if err != nil {
				return err
			}
			b := make([]byte, st.Size())
			if n, err := file.ReadAt(b, 0); err != nil {
				return fmt.Errorf("%d of %d bytes: %w", n, len(b), err)
			}
			if !bytes.HasPrefix(b, seen) {
				return fmt.Errorf("the list of %d bytes does not begin with the %d seen before", len(b), len(seen))
			}
			_, err = file.WriteAt([]byte(line), int64(len(b)))
			seen = append(b, line...)
			return err
		})
		if err != nil {
			return err
		}
		p.ack(strings.TrimSpace(line))
	}
	return nil
}

// appends appends records by O_APPEND without locks.
func (p *part) appends() error {
	file, err := os.OpenFile(p.path("log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	for i := 0; p.running(); i++ {
		line := fmt.Sprintf("%d.%d.%s\n", p.id, i, strings.Repeat("y", rand.IntN(3000)))
		if _, err := file.WriteString(line); err != nil {
			return err
		}
		if i%4 == 0 {
			if err := file.Sync(); err != nil {
				return err
			}
		}
		if i%16 == 15 {
			time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
		}
		p.ack(strings.TrimSpace(line))
	}
	return file.Sync()
}

// record is bytes of which each is told by the number and the host.
func record(host, n, at int) []byte {
	b := make([]byte, pageBytes)
	binary.BigEndian.PutUint32(b, uint32(host))
	binary.BigEndian.PutUint32(b[4:], uint32(n))
	binary.BigEndian.PutUint32(b[8:], uint32(at))
	r := rand.New(rand.NewPCG(uint64(host), uint64(n)))
	for i := 16; i < len(b); i++ {
		b[i] = byte(r.Uint32())
	}
	binary.BigEndian.PutUint32(b[12:], crc32.ChecksumIEEE(b[16:]))
	return b
}

func whole(b []byte, at int) error {
	if bytes.Equal(b, make([]byte, len(b))) {
		return nil
	}
	if binary.BigEndian.Uint32(b[12:]) != crc32.ChecksumIEEE(b[16:]) {
		return fmt.Errorf("the record %d is mixed of several", at)
	}
	if got := int(binary.BigEndian.Uint32(b[8:])); got != at {
		return fmt.Errorf("the record %d is that of %d", at, got)
	}
	return nil
}

const (
	pageCount = 8
	pageBytes = 512 // of a record: parts of blocks
)

// pages writes records that share pages with those of other hosts, each host its own ones, and reads all.
func (p *part) pages() error {
	file, err := os.OpenFile(p.path("pages"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer func() { file.Close() }()
	const records = pageCount * 4096 / pageBytes
	b := make([]byte, records*pageBytes)
	for i := 0; p.running(); i++ {
		at := rand.IntN(records)/4*4 + p.id%4
		if _, err := file.WriteAt(record(p.id, i, at), int64(at*pageBytes)); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		if i%8 == 0 {
			if err := file.Sync(); err != nil {
				return fmt.Errorf("sync: %w", err)
			}
			p.ack(fmt.Sprint(at, "=", i))
		}
		if i%16 == 0 { // a new open reads what others have synced
			file.Close()
			if file, err = os.OpenFile(p.path("pages"), os.O_RDWR, 0); err != nil {
				return fmt.Errorf("open: %w", err)
			}
		}
		n, err := file.ReadAt(b, 0)
		if err != nil && err != io.EOF {
			return fmt.Errorf("read: %w", err)
		}
		for r := p.id % 4; r < n/pageBytes; r += 4 { // its own, which nobody else writes
			if err := whole(b[r*pageBytes:(r+1)*pageBytes], r); err != nil {
				return err
			}
		}
	}
	return file.Sync()
}

// register writes a file as a whole, by way of close, and reads that of the other host by a new open:
// its numbers never go back.
func (p *part) register() error {
	last := map[string]uint64{}
	for i := uint64(1); p.running(); i++ {
		text := bytes.Repeat(binary.BigEndian.AppendUint64(nil, i), 1+rand.IntN(1500))
		if err := os.WriteFile(p.path(fmt.Sprint("register.", p.id)), text, 0o644); err != nil {
			return err
		}
		p.ack(i)
		names, err := filepath.Glob(p.path("register.*"))
		if err != nil {
			return err
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				return fmt.Errorf("read: %w", err)
			}
			if len(b) < 8 { // it is being written
				continue
			}
			x := binary.BigEndian.Uint64(b)
			if x < last[name] {
				return fmt.Errorf("%s is %d after %d", name, x, last[name])
			}
			last[name] = x
		}
	}
	return nil
}

func lastOf(acks [][]string) map[uint64]bool {
	out := map[uint64]bool{}
	for _, host := range acks {
		x, _ := strconv.ParseUint(host[len(host)-1], 10, 64)
		out[x] = true
	}
	return out
}

// names makes and removes files and directories, among them long names and the only entry of a
// directory, beside another host that does so with the same names.
func (p *part) names() error {
	long := strings.Repeat("n", 200)
	for i := 0; p.running(); i++ {
		dir := p.path(fmt.Sprint("dir", rand.IntN(3)))
		mine := filepath.Join(dir, fmt.Sprint("mine.", p.id))
		switch rand.IntN(6) {
		case 0:
			if err := allowed(os.Mkdir(dir, 0o755), syscall.EEXIST, syscall.ESTALE); err != nil {
				return err
			}
		case 1:
			if err := allowed(os.Remove(dir), syscall.ENOENT, syscall.ENOTEMPTY, syscall.ESTALE); err != nil {
				return err
			}
		case 2:
			name := filepath.Join(dir, long)
			err := os.WriteFile(name, []byte("long"), 0o644)
			if err = allowed(err, syscall.ENOENT, syscall.ESTALE); err != nil { // removed while it was open
				return err
			}
		case 3:
			if err := allowed(os.Remove(filepath.Join(dir, long)), syscall.ENOENT, syscall.ESTALE); err != nil {
				return err
			}
		case 4: // one host wins
			file, err := os.OpenFile(p.path("excl"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
			if err = allowed(err, syscall.EEXIST); err != nil {
				return err
			}
			if file != nil {
				file.Close()
				if err := os.Remove(p.path("excl")); err != nil {
					return fmt.Errorf("what O_EXCL made was taken by another: %w", err)
				}
			}
		case 5:
			err := os.WriteFile(mine, []byte(strconv.Itoa(i)), 0o644)
			if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ESTALE) { // there is no such directory, or no more
				continue
			}
			if err != nil {
				return err
			}
			b, err := os.ReadFile(mine) // nobody else removes it, and it keeps its directory
			if err != nil || string(b) != strconv.Itoa(i) {
				return fmt.Errorf("%s has %q, %w", mine, b, err)
			}
			if rand.IntN(2) == 0 {
				if err := os.Remove(mine); err != nil {
					return err
				}
			}
			p.ack(i)
		}
	}
	return nil
}

// replaced changes, under a lock, which file has a name, and demands that an open finds the one that has it,
// whatever was known of the name before. The former file often goes on to live under another name.
func (p *part) replaced() error {
	turn, err := os.OpenFile(p.path("turn"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer turn.Close()
	var held *os.File // the file that had the name some time before
	defer func() { held.Close() }()
	name, kept, next := p.path("name"), p.path(fmt.Sprint("kept.", p.id)), p.path(fmt.Sprint("next.", p.id))
	for p.running() {
		for range rand.IntN(4) {
			os.Stat(name)
		}
		var state [9]byte // how often the name was changed, and whether it is there
		err := locked(turn, func() error {
			if n, err := turn.ReadAt(state[:], 0); err != nil && !(err == io.EOF && n == 0) {
				return err
			}
			times, there := binary.BigEndian.Uint64(state[:]), state[8] == 1
			if rand.IntN(2) == 0 {
				os.Stat(name)
			}
			b, err := os.ReadFile(name)
			if there && (err != nil || string(b) != strconv.FormatUint(times, 10)) || !there && !os.IsNotExist(err) {
				return fmt.Errorf("after change %d, the name is there: %v; it has %q, %w", times, there, b, err)
			}
			if there && rand.IntN(2) == 0 {
				held.Close()
				if held, err = os.Open(name); err != nil {
					return err
				}
			}
			times++
			text := strconv.AppendUint(nil, times, 10)
			switch rand.IntN(3) {
			case 0:
				if there && rand.IntN(2) == 0 {
					if err := os.Remove(kept); err != nil && !os.IsNotExist(err) {
						return err
					}
					if err := os.Link(name, kept); err != nil {
						return err
					}
				}
				if err := os.WriteFile(next, text, 0o644); err != nil {
					return err
				}
				there, err = true, os.Rename(next, name)
			case 1:
				if err = nil; there {
					there, err = false, os.Rename(name, kept)
				}
			case 2:
				there, err = true, os.WriteFile(name, text, 0o644)
			}
			if err != nil {
				return err
			}
			if state[8] = 0; there {
				state[8] = 1
			}
			binary.BigEndian.PutUint64(state[:], times)
			_, err = turn.WriteAt(state[:], 0)
			return err
		})
		if err != nil {
			return err
		}
		p.ack(binary.BigEndian.Uint64(state[:]))
	}
	return nil
}

// allowed returns an error unless it is one of those, or none.
func allowed(err error, those ...error) error {
	for _, x := range those {
		if errors.Is(err, x) {
			return nil
		}
	}
	return err
}

// cut writes a file and empties it, beside a host that does so with the same one: it always opens, and
// each byte that is read is of one of the hosts, or zero.
func (p *part) cut() error {
	for i := 0; p.running(); i++ {
		file, err := os.OpenFile(p.path("cut"), os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return fmt.Errorf("open: %w", err)
		}
		n := int64(1 + rand.IntN(20000))
		switch rand.IntN(3) {
		case 0:
			err = file.Truncate(0)
		case 1:
			err = file.Truncate(n)
		case 2:
			_, err = file.WriteAt(bytes.Repeat([]byte{byte('a' + p.id)}, 5000), n)
		}
		if err != nil {
			return fmt.Errorf("change: %w", err)
		}
		b := make([]byte, 30000)
		m, err := file.ReadAt(b, 0)
		if err != nil && err != io.EOF {
			return fmt.Errorf("read: %w", err)
		}
		for _, x := range b[:m] {
			if x != 0 && (x < 'a' || x > 'h') {
				return fmt.Errorf("a byte %d that nobody wrote", x)
			}
		}
		if err := file.Close(); err != nil {
			return fmt.Errorf("close: %w", err)
		}
		p.ack(i)
	}
	return nil
}
