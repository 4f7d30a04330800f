//go:build linux && !portable

package main

import (
	"os/exec"
	"testing"
	"time"
)

// A process that was killed and is not gone is told from one that lives.
func TestIsKilled(t *testing.T) {
	c := exec.Command("sleep", "60")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Wait()
	if isKilled(c.Process.Pid) {
		t.Error("it lives")
	}
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for until := time.Now().Add(10 * time.Second); !isKilled(c.Process.Pid); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("it is taken to live")
		}
	}
}
