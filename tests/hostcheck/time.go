package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"
)

// measure prints how fast files of 4 KiB are made, and read when no cache has them, and a large one is
// written and read.
func measure(dir string, d time.Duration) error {
	dir, err := os.MkdirTemp(dir, "time")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	small, made := make([]byte, 4096), 0
	begun := time.Now()
	for ; time.Since(begun) < d; made++ {
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(made)), small, 0o644); err != nil {
			return err
		}
	}
	fmt.Printf("create %.0f ", float64(made)/time.Since(begun).Seconds())
	if err := dropCaches(); err != nil {
		return err
	}
	begun = time.Now()
	n := 0
	for ; n < made && time.Since(begun) < d; n++ {
		if _, err := os.ReadFile(filepath.Join(dir, strconv.Itoa(n))); err != nil {
			return err
		}
	}
	fmt.Printf("read %.0f ", float64(n)/time.Since(begun).Seconds())
	file, err := os.Create(filepath.Join(dir, "large"))
	if err != nil {
		return err
	}
	defer file.Close()
	chunk, size := make([]byte, 1<<20), 0
	begun = time.Now()
	for ; time.Since(begun) < d && size < 256; size++ {
		if _, err := file.Write(chunk); err != nil {
			return err
		}
	}
	if err := file.Sync(); err != nil {
		return err
	}
	fmt.Printf("write-MiB %.1f ", float64(size)/time.Since(begun).Seconds())
	if err := dropCaches(); err != nil {
		return err
	}
	begun = time.Now()
	read := 0
	for ; read < size && time.Since(begun) < d; read++ {
		if _, err := file.ReadAt(chunk, int64(read)<<20); err != nil {
			return err
		}
	}
	fmt.Printf("read-MiB %.1f\n", float64(read)/time.Since(begun).Seconds())
	return nil
}

// dropCaches makes the kernel forget what it has read.
func dropCaches() error {
	syscall.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// turns adds to a counter under a lock, as others do, and prints how often that was, how often another host
// had added since the last time, and how long an addition took: median and longest.
func turns(dir string, d time.Duration) error {
	file, err := (&part{dir: dir}).openCounter()
	if err != nil {
		return err
	}
	defer file.Close()
	var took []time.Duration
	last, handovers := uint64(0), 0
	for end := time.Now().Add(d); time.Now().Before(end); {
		begun, was := time.Now(), last
		if err := locked(file, func() error { return add(file, &last) }); err != nil {
			return err
		}
		took = append(took, time.Since(begun))
		if last != was+1 {
			handovers++
		}
	}
	if len(took) == 0 {
		return errors.New("no time for an addition")
	}
	slices.Sort(took)
	const unit = 10 * time.Microsecond
	fmt.Printf("%d additions, %d handovers, median %v, longest %v\n", len(took), handovers,
		took[len(took)/2].Round(unit), took[len(took)-1].Round(unit))
	return nil
}
