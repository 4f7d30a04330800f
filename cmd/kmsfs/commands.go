//go:build linux && !portable

package main

import "github.com/spf13/cobra"

// linuxCommands are those that mount volumes, make them and change them.
func linuxCommands() []*cobra.Command {
	return append(controlCommands(), initCommand(), mountCommand(), umountCommand(), keyCommand(),
		recipientsCommand(), rewrapCommand(), rekeyCommand(), pathCommand(), reheaderCommand(),
		setKeyCommand(), inventoryCommand(), passwdCommand(), policyCommand(), doctorCommand(),
		topCommand(), importTreeCommand(), hostsCommand(), shareCommand())
}
