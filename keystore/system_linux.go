package keystore

import (
	"time"

	"golang.org/x/sys/unix" // memory that is locked, and in no core dump; the clock of boot time
)

// mapPages returns pages of at least n bytes that are in no core dump, nil if the kernel gives none, and
// whether they are locked in memory.
func mapPages(n int) (mem []byte, locked bool) {
	page := unix.Getpagesize()
	mem, err := unix.Mmap(-1, 0, (n+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, false
	}
	locked = unix.Mlock(mem) == nil
	unix.Madvise(mem, unix.MADV_DONTDUMP)
	return mem, locked
}

func unmapPages(mem []byte) { unix.Munmap(mem) }

// bootTime is CLOCK_BOOTTIME, which goes on while the machine sleeps.
func bootTime() time.Duration {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &t)
	return time.Duration(t.Nano())
}
