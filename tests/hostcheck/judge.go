package main

// The judges of the workloads.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// judgeCounter demands that each value was given out once, and that the file has the last one.
func judgeCounter(dir string, acks [][]string) error {
	seen := map[string]bool{}
	for _, host := range acks {
		for _, x := range host {
			if seen[x] {
				return fmt.Errorf("the value %s came twice", x)
			}
			seen[x] = true
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "counter"))
	if err != nil || len(b) < 5008 {
		return fmt.Errorf("%d bytes, %w", len(b), err)
	}
	// A host that died may have added one that nobody acknowledged.
	if x := binary.BigEndian.Uint64(b[5000:]); x < uint64(len(seen)) || x > uint64(len(seen)+len(acks)) {
		return fmt.Errorf("the counter is %d after %d acknowledged additions", x, len(seen))
	}
	fmt.Println(len(seen), "additions")
	return nil
}

// judgeList demands that each line that was acknowledged is there, once, in its host's order.
func judgeList(dir string, acks [][]string) error {
	return judgeLines(filepath.Join(dir, "list"), acks)
}

func judgeLines(name string, acks [][]string) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	at := map[string]int{}
	for i, line := range strings.Split(strings.TrimSuffix(string(b), "\n"), "\n") {
		if _, twice := at[line]; twice {
			return fmt.Errorf("the line %q stands twice", line)
		}
		at[line] = i
	}
	n := 0
	for _, host := range acks {
		last := -1
		for _, line := range host {
			i, ok := at[line]
			if !ok {
				return fmt.Errorf("the acknowledged line %q is lost", line)
			}
			if i < last {
				return fmt.Errorf("the line %q stands before an earlier one", line)
			}
			last = i
			n++
		}
	}
	if len(at) > n+len(acks) {
		return fmt.Errorf("%d lines, of which %d were acknowledged", len(at), n)
	}
	fmt.Println(n, "lines")
	return nil
}

func judgeAppend(dir string, acks [][]string) error {
	return judgeLines(filepath.Join(dir, "log"), acks)
}

// judgePages demands that each record is whole, and not older than the last one that was synced.
func judgePages(dir string, acks [][]string) error {
	b, err := os.ReadFile(filepath.Join(dir, "pages"))
	if err != nil {
		return err
	}
	for at := range len(b) / pageBytes {
		if err := whole(b[at*pageBytes:(at+1)*pageBytes], at); err != nil {
			return err
		}
	}
	n := 0
	for _, host := range acks {
		for _, x := range host {
			s, v, _ := strings.Cut(x, "=")
			at, err := strconv.Atoi(s)
			i, ierr := strconv.Atoi(v)
			if err = errors.Join(err, ierr); err != nil {
				return err
			}
			n++
			if got := int(binary.BigEndian.Uint32(b[at*pageBytes+4:])); got < i {
				return fmt.Errorf("the record %d is of round %d, though %d was synced", at, got, i)
			}
		}
	}
	fmt.Println(n, "syncs")
	return nil
}

func judgeRegister(dir string, acks [][]string) error {
	for id, host := range acks {
		if len(host) == 0 {
			return fmt.Errorf("host %d has written nothing", id)
		}
	}
	names, err := filepath.Glob(filepath.Join(dir, "register.*"))
	if err != nil {
		return err
	}
	last := slices.Sorted(maps.Keys(lastOf(acks)))
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if len(b) < 8 || !slices.ContainsFunc(last, func(x uint64) bool { return binary.BigEndian.Uint64(b) >= x }) {
			return fmt.Errorf("%s has %d bytes, and not the last number that was written", name, len(b))
		}
	}
	fmt.Println(len(names), "registers")
	return nil
}

func judgeNames(dir string, acks [][]string) error {
	n := 0
	err := filepath.WalkDir(dir, func(name string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		n++
		_, err = os.ReadFile(name)
		return err
	})
	fmt.Println(n, "files")
	return err
}

// judgeReplaced demands that each change has a number of its own, and the file, if it is there, the last one.
func judgeReplaced(dir string, acks [][]string) error {
	n, last := 0, uint64(0)
	seen := map[string]bool{}
	for _, host := range acks {
		for _, x := range host {
			if seen[x] {
				return fmt.Errorf("the change %s came twice", x)
			}
			seen[x] = true
			i, err := strconv.ParseUint(x, 10, 64)
			if err != nil {
				return err
			}
			n, last = n+1, max(last, i)
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "name"))
	if err != nil && !os.IsNotExist(err) || err == nil && string(b) != strconv.FormatUint(last, 10) {
		return fmt.Errorf("the file has %q after change %d, %w", b, last, err)
	}
	if uint64(n) != last {
		return fmt.Errorf("%d changes, and the last has the number %d", n, last)
	}
	fmt.Println(n, "changes of a name")
	return nil
}

func judgeCut(dir string, acks [][]string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cut"))
	fmt.Println(len(b), "bytes")
	return err
}
