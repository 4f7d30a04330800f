package main

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc" // manual pages from the commands' own help
)

// generateCommand is for those who make packages: it is not among the commands that help lists.
func generateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "generate DIR",
		Short: "Write manual pages and shell completions to a directory",
		Long: `Write the manual pages of all commands to DIR/man1, and the completions for bash, zsh and fish to
DIR/completions. The date of the pages is SOURCE_DATE_EPOCH, if that is set.`,
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE:   func(c *cobra.Command, args []string) error { return generate(c.Root(), args[0]) },
	}
}

func generate(root *cobra.Command, dir string) error {
	man, completions := filepath.Join(dir, "man1"), filepath.Join(dir, "completions")
	for _, d := range []string{man, completions} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := root.GenBashCompletionFileV2(filepath.Join(completions, "kmsfs.bash"), true); err != nil {
		return err
	}
	if err := root.GenZshCompletionFile(filepath.Join(completions, "_kmsfs")); err != nil {
		return err
	}
	if err := root.GenFishCompletionFile(filepath.Join(completions, "kmsfs.fish"), true); err != nil {
		return err
	}
	markTables(root)
	root.DisableAutoGenTag = true
	return doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "kmsfs " + version, Manual: "kmsfs"}, man)
}

// markTables makes the indented lines of the long help what they are in Markdown, too, from which the
// pages are made: lines that keep their form.
func markTables(c *cobra.Command) {
	var out []string
	for line := range strings.SplitSeq(c.Long, "\n") {
		if strings.HasPrefix(line, " ") {
			if n := len(out); n > 0 && out[n-1] != "" && !strings.HasPrefix(out[n-1], " ") {
				out = append(out, "")
			}
			line = "    " + line
		}
		out = append(out, line)
	}
	c.Long = strings.Join(out, "\n")
	for _, sub := range c.Commands() {
		markTables(sub)
	}
}
