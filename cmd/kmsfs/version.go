package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"kmsfs/blockcrypt"
)

// version is set by the Makefile.
var version = "devel"

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run: func(*cobra.Command, []string) {
			fmt.Printf("kmsfs %s, format %d, %s %s/%s\n", version, blockcrypt.Version,
				runtime.Version(), runtime.GOOS, runtime.GOARCH)
		},
	}
}
