//go:build !linux

package keystore

import "time"

// mapPages returns nil: keys are in Go's memory.
func mapPages(int) (mem []byte, locked bool) { return nil, false }

func unmapPages([]byte) {}

var begun = time.Now()

// bootTime is the time since the program began: volumes are not mounted here, and so no lease has to
// know how long the machine slept.
func bootTime() time.Duration { return time.Since(begun) }
