package tests

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"kmsfs/keystore/keystoretest"
)

// shownCommand is a command in a page, with the output that the page shows.
type shownCommand struct {
	line   int
	run    string
	output []string
}

// commandsOf returns the commands of each section of a page: lines that begin with "    $ ".
func commandsOf(t *testing.T, page string) (sections []string, commands map[string][]shownCommand) {
	f, err := os.Open(page)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	commands = map[string][]shownCommand{}
	section, in := "", bufio.NewScanner(f)
	for n := 1; in.Scan(); n++ {
		line := in.Text()
		code, indented := strings.CutPrefix(line, "    ")
		command, isCommand := strings.CutPrefix(code, "$ ")
		cs := commands[section]
		switch {
		case strings.HasPrefix(line, "#"):
			section = strings.TrimLeft(line, "# ")
		case indented && isCommand:
			if len(cs) == 0 {
				sections = append(sections, section)
			}
			commands[section] = append(cs, shownCommand{line: n, run: command})
		case indented && len(cs) > 0 && cs[len(cs)-1].line+len(cs[len(cs)-1].output)+1 == n:
			c := &cs[len(cs)-1]
			c.output = append(c.output, code)
		}
	}
	return sections, commands
}

// manual says how the commands of a section are run.
type manual struct {
	setup   string            // before them, in an empty directory
	replace map[string]string // placeholders, by what the shell makes of them
	not     string            // why they are not run
	more    bool              // the commands print more than the page shows
	fails   bool              // the page shows what goes wrong
}

const (
	manualVolume = `mkdir cipher plain; kmsfs init --key alias/files cipher; kmsfs mount cipher plain
		mkdir -p plain/projects/one plain/letters plain/tenant; echo text >plain/letter; echo text >plain/letters/a.odt`
	manualCopy = manualVolume + `; kmsfs umount plain; cp -a cipher copy`
	manualAWS  = `; aws() { command aws --endpoint-url "$AWS_ENDPOINT_URL_KMS" "$@"; }`
	manualFile = `file() { kmsfs ls --cipher cipher letter | sed 's,.*\t,cipher/,'; }; `
)

// manualSections are all sections with commands.
var manualSections = map[string]manual{
	"README.md/Five minutes with a local key": {},
	"README.md/Five minutes with AWS KMS": {setup: `mkdir cipher plain; echo text >letter
		aws() { command aws --endpoint-url "$AWS_ENDPOINT_URL_KMS" "$@" | tee made; }`,
		replace: map[string]string{"KEYID": `$(sed -n 's/.*"KeyId": "\(.*\)".*/\1/p' made)`}, more: true},
	"docs/hosts.md/Make one": {setup: "mkdir cipher plain", more: true},
	"docs/backups.md/After a rewrap or a rekey": {setup: manualVolume + `
		kmsfs recipients add cipher alias/next; kmsfs rewrap --from alias/files --to alias/next cipher
		kmsfs recipients remove cipher alias/files; kmsfs rewrap cipher; cp -a cipher copy`,
		replace: map[string]string{"COPY": "copy", "OLDKEY": "alias/files"}, more: true},
	"docs/backups.md/Check a copy": {setup: manualCopy, replace: map[string]string{"COPY": "copy"}, more: true},
	"docs/backups.md/Restore":      {setup: manualCopy, replace: map[string]string{"COPY": "copy"}, more: true},
	"docs/backups.md/One file": {setup: manualVolume + "; kmsfs umount plain;" + manualFile,
		replace: map[string]string{"FILE": "$(file)"}, more: true},
	"docs/containers.md/Build an image": {not: "TestContainers builds it"},
	"docs/keys.md/Recipients":           {setup: manualVolume, more: true},
	"docs/keys.md/Keys for directories": {setup: manualVolume,
		replace: map[string]string{"arn:aws:kms:eu-west-1:222233334444:key/…": "alias/next"}, more: true},
	"docs/keys.md/Recovery without AWS": {setup: manualVolume + ";" + manualFile + `
		mount() { umount plain; }; kmsfs() { case $1 in mount) command kmsfs umount plain;; esac; command kmsfs "$@"
			case $1 in mount) cat plain/letter; command kmsfs umount plain;; esac; }`,
		replace: map[string]string{"age1qx…": `$(sed -n 's/.*public key: //p' key.txt)`, "FILE": "$(file)",
			"OLDKEY": "alias/files"}, more: true},
	"docs/keys.md/A local key on paper": {setup: `mkdir cipher; kmsfs init cipher`,
		replace: map[string]string{"~/.config/kmsfs/6f92….key": `"$XDG_CONFIG_HOME"/kmsfs/*.key`}, more: true},
	"docs/keys.md/May a key be deleted?": {setup: manualVolume + `; cp -a cipher backup; kmsfs recipients add cipher alias/next
		kmsfs rewrap cipher; kmsfs recipients remove cipher alias/files; kmsfs rewrap cipher; rm -r backup; cp -a cipher backup`,
		replace: map[string]string{"/backup/cipher": "backup"}, more: true},
	"docs/keys.md/Grants":                     {not: "the server of the tests has no grants"},
	"docs/keys.md/Which files were read":      {setup: manualVolume, more: true},
	"docs/keys.md/Branch keys":                {setup: "mkdir cipher", more: true},
	"docs/errors.md/Exit code 1: failed":      {setup: manualCopy, fails: true},
	"docs/errors.md/Exit code 2: wrong usage": {setup: manualCopy, fails: true},
	"docs/errors.md/Exit code 3: damaged or altered": {setup: manualVolume + "; kmsfs umount plain;" + manualFile + `
		printf X | dd of="$(file)" bs=1 seek=1045 conv=notrunc status=none; kmsfs mount cipher plain`,
		replace: map[string]string{"FILE": "$(file)"}, fails: true},
	"docs/errors.md/Exit code 4: the key is refused":             {setup: manualCopy + manualAWS + "; aws kms disable-key --key-id alias/files", fails: true},
	"docs/errors.md/Exit code 5: no AWS credentials":             {setup: manualCopy, fails: true},
	"docs/errors.md/Exit code 6: the key service did not answer": {setup: manualCopy, fails: true},
	"docs/errors.md/Exit code 7: busy":                           {setup: manualVolume + "; mkdir other", fails: true},
	"docs/errors.md/Exit code 8: incomplete": {setup: manualVolume + "; kmsfs umount plain; kmsfs mount cipher plain;" + manualFile + `
		exec 9>>plain/letter; head -c 20000 /dev/zero >&9; true >>plain/letter; cp -a cipher copy`,
		replace: map[string]string{"COPY": `$(file | sed s,cipher,copy,)`}, fails: true},
	"docs/errors.md/Exit code 9: repaired": {setup: manualVolume + `; rm -r plain/projects plain/tenant; kmsfs umount plain
		rm cipher/$(kmsfs ls --cipher cipher letters/a.odt | sed 's,.*\t\(.*\)/.*,\1,')/kmsfs.dir`, fails: true},
	"docs/errors.md/Exit code 10: not everything was checked": {setup: manualVolume + manualAWS + `
		kmsfs setkey plain/tenant alias/next; echo text >plain/tenant/file; kmsfs umount plain; aws kms disable-key --key-id alias/next`, fails: true},
	"docs/errors.md/Key has been revoked (EKEYREVOKED)": {setup: manualVolume + `; kmsfs umount plain; kmsfs mount cipher plain` + manualAWS, fails: true},
	"docs/errors.md/Key has expired (EKEYEXPIRED)":      {setup: manualVolume, fails: true},
	"docs/operations.md/Which ciphertext file is it?": {setup: manualVolume, replace: map[string]string{
		"/srv/cipher/dRQARpe52IESW9oyGSzXdsC3vXa9FGuNCdwkrKX8LJw": "$(kmsfs path plain/letter)"}},
}

var manualValues = []struct {
	what *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`[0-9a-f]{4}…[0-9a-f]{4}|[0-9a-f]{16,}`), "HEX"},
	{regexp.MustCompile(`/srv/`), "~/"},
	{regexp.MustCompile(`([A-Z2-7]{4}-){3}[A-Z2-7]{4}`), "CODE"},
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`), "KEY"},
	{regexp.MustCompile(`request [-0-9a-z]+`), "request ID"},
	{regexp.MustCompile(`process \d+ on host "[^"]*"`), "process on host"},
	{regexp.MustCompile(`since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d`), "since TIME"},
	{regexp.MustCompile(`[-_A-Za-z0-9]{43}\b`), "NAME"},
}

// Each command of the manual is run, in the order of its section, and prints what the page shows.
func TestManual(t *testing.T) {
	needFUSE(t)
	needTool(t, "aws", "age-keygen", "getfattr")
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, page := range append(pages, "../README.md") {
		sections, commands := commandsOf(t, page)
		for _, s := range sections {
			name := strings.TrimPrefix(page, "../") + "/" + s
			m, known := manualSections[name]
			if seen++; !known {
				t.Errorf("the commands of %q are not run", name)
			}
			if known && m.not == "" {
				t.Run(name, func(t *testing.T) { m.try(t, commands[s]) })
			}
		}
	}
	if seen != len(manualSections) {
		t.Errorf("%d sections have commands, and %d are known", seen, len(manualSections))
	}
}

// try runs the commands of a section.
func (m manual) try(t *testing.T, commands []shownCommand) {
	srv := keystoretest.NewServer(t)
	for _, alias := range []string{"alias/next", "alias/new", "alias/files"} {
		if m.replace["KEYID"] == "" || alias != "alias/files" { // else it is made by a command
			srv.AddKey(alias)
		}
	}
	work := t.TempDir()
	if err := os.Mkdir(filepath.Join(work, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(binary, filepath.Join(work, "bin", "kmsfs")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if isMount(filepath.Join(work, "plain")) {
			exec.Command("umount", filepath.Join(work, "plain")).Run()
		}
	})
	script := "set -eu -o pipefail\n{ :; " + m.setup + "\n} >&2\n"
	if m.fails {
		script += "set +e; exec 2>&1\n"
	}
	for i, c := range commands {
		run := c.run
		for from, to := range m.replace {
			run = strings.ReplaceAll(run, from, to)
		}
		script += fmt.Sprintf("status=$?; echo; echo @@%d; (exit $status)\n%s\n", i, run)
	}
	if m.fails {
		script += "exit 0\n"
	}
	c := exec.Command("bash", "-c", script)
	c.Dir = work
	c.Env = append(os.Environ(), "PATH="+filepath.Join(work, "bin")+":"+os.Getenv("PATH"),
		"XDG_STATE_HOME="+work+"/.local/state", "XDG_CONFIG_HOME="+work+"/.config", "XDG_RUNTIME_DIR="+work+"/run")
	for k, v := range keystoretest.Env(srv.URL) {
		c.Env = append(c.Env, k+"="+v)
	}
	var errs strings.Builder
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%v\n%s\n%s\n%s", err, script, out, errs.String())
	}
	plain := func(s string) string {
		s = strings.ReplaceAll(s, work, "~")
		for _, v := range manualValues {
			s = v.what.ReplaceAllString(s, v.with)
		}
		return strings.TrimSpace(s)
	}
	_, rest, _ := strings.Cut(string(out), "\n@@0\n")
	for i, c := range commands {
		var got string
		got, rest, _ = strings.Cut(rest, fmt.Sprintf("\n@@%d\n", i+1))
		want := plain(strings.Join(c.output, "\n"))
		if got = plain(got); got != want && !(m.more && want == "") {
			t.Errorf("line %d: %s\nprints\n%s\nand the page shows\n%s", c.line, c.run, got, want)
		}
	}
}
