//go:build !linux || portable

package main

import "github.com/spf13/cobra"

// linuxCommands are none: volumes are mounted, made and changed on Linux.
func linuxCommands() []*cobra.Command { return nil }
