// SPDX-License-Identifier: Apache-2.0

// Package packaging holds no code: its tests hold the packages to what they promise.
package packaging

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

var update = flag.Bool("update", false, "write the lists of files in testdata")

// The versions that the tests build, and the date that both carry.
const (
	oldVersion = "1.2.2"
	newVersion = "1.2.3~rc.1+5.gabcdef012345"
	epoch      = "1750000000"
)

// require skips the test without what it needs; with EDR_REQUIRE_ALL=1 it fails.
func require(t *testing.T, ok bool, missing string) {
	t.Helper()
	switch {
	case ok:
	case os.Getenv("EDR_REQUIRE_ALL") == "1":
		t.Fatalf("EDR_REQUIRE_ALL: %s", missing)
	default:
		t.Skip(missing)
	}
}

func requireTools(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		_, err := exec.LookPath(tool)
		require(t, err == nil, "no "+tool+" (run: make deps)")
	}
}

// built are the packages of one run of the tests.
type built struct {
	current string // this tree, as newVersion, both architectures
	again   string // a copy of it, elsewhere and in another environment, amd64
	old     string // that copy with another default configuration, as oldVersion, amd64
	err     error
}

var buildAll = sync.OnceValue(func() (b built) {
	dir, err := os.MkdirTemp("", "edr-sensor-packages")
	if err != nil {
		return built{err: err}
	}
	tree := filepath.Join(dir, "a", "checkout of another name")
	script := `
set -euo pipefail
umask 077
mkdir -p "$2"
git ls-files -z --cached --others --exclude-standard | tar --null -T - --ignore-failed-read -cf - | tar -xf - -C "$2"
export SOURCE_DATE_EPOCH=` + epoch + `
VERSION=` + newVersion + ` DIST="$1/current" packaging/scripts/packages.sh
cd "$2"
TZ=Asia/Tokyo LC_ALL=C.UTF-8 USER=somebody VERSION=` + newVersion + ` DIST="$1/again" packaging/scripts/packages.sh amd64
sed -i '1s/.*/# Configuration of edr-sensor, as it was once./' packaging/config/edr-sensor.yaml
VERSION=` + oldVersion + ` DIST="$1/old" packaging/scripts/packages.sh amd64
`
	cmd := exec.Command("bash", "-c", script, "build", dir, tree)
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		b.err = fmt.Errorf("%w\n%s", err, out)
	}
	b.current, b.again, b.old = filepath.Join(dir, "current"), filepath.Join(dir, "again"), filepath.Join(dir, "old")
	return b
})

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if !testing.Short() {
		if b := buildAll(); b.current != "" {
			_ = os.RemoveAll(filepath.Dir(b.current))
		}
	}
	os.Exit(code)
}

func packages(t *testing.T) built {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: building the packages takes a minute")
	}
	requireTools(t, "git", "dpkg-deb", "rpm")
	b := buildAll()
	if b.err != nil {
		t.Fatalf("build the packages: %v", b.err)
	}
	return b
}

// find returns the one file in dir that matches.
func find(t *testing.T, dir, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s in %s: %d files, want one (%v)", pattern, dir, len(found), err)
	}
	return found[0]
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stderr = &stderr
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return string(out)
}

func TestVersion(t *testing.T) {
	requireTools(t, "git", "dpkg", "rpm")
	script, err := filepath.Abs("scripts/version.sh")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	do := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CEILING_DIRECTORIES="+filepath.Dir(dir),
			"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	git := func(args ...string) { do("git", args...) }
	commit := func() { git("commit", "-q", "--allow-empty", "-m", "x") }
	write := func(text string) {
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	head := func() string { return "g" + do("git", "rev-parse", "--short=12", "HEAD") }

	// In the order in which the versions have to sort.
	steps := []struct {
		name string
		do   func()
		want func() string
	}{
		{"without git", func() {}, func() string { return "0.0.0~unknown" }},
		{"before a tag", func() { git("init", "-q"); write("1"); git("add", "file"); commit() }, func() string { return "0.0.0+1." + head() }},
		{"changed", func() { write("2") }, func() string { return "0.0.0+1." + head() + ".dirty" }},
		{"a candidate", func() { git("checkout", "-q", "file"); git("tag", "v1.0.0-rc.1") }, func() string { return "1.0.0~rc.1" }},
		{"after a candidate", commit, func() string { return "1.0.0~rc.1+1." + head() }},
		{"another candidate", func() { git("tag", "v1.0.0-rc-2/x") }, func() string { return "1.0.0~rc.2.x" }},
		{"a release", func() { commit(); git("tag", "-am", "x", "v1.0.0") }, func() string { return "1.0.0" }},
		{"a release, changed", func() { write("3") }, func() string { return "1.0.0+dirty" }},
		{"after a release", func() { git("checkout", "-q", "file"); git("tag", "other"); commit(); commit() }, func() string { return "1.0.0+2." + head() }},
		{"ten commits later", func() {
			for range 8 {
				commit()
			}
		}, func() string { return "1.0.0+10." + head() }},
		{"the next release", func() { commit(); git("tag", "v1.0.1") }, func() string { return "1.0.1" }},
	}
	previous := ""
	for _, s := range steps {
		s.do()
		got := do(script)
		if want := s.want(); got != want {
			t.Errorf("%s: %s, want %s", s.name, got, want)
		}
		output(t, "dpkg", "--validate-version", got+"-1")
		if previous != "" && s.name != "a release, changed" { // which no package upgrades from
			output(t, "dpkg", "--compare-versions", previous+"-1", "lt", got+"-1")
			if order := strings.TrimSpace(output(t, "rpm", "--eval", fmt.Sprintf("%%{lua:print(rpm.vercmp(%q, %q))}", previous, got))); order != "-1" {
				t.Errorf("%s: rpm sorts %s and %s as %s", s.name, previous, got, order)
			}
		}
		if s.name != "a release, changed" {
			previous = got
		}
	}
}

func TestReproducible(t *testing.T) {
	b := packages(t)
	entries, err := os.ReadDir(b.again)
	if err != nil || len(entries) != 3 {
		t.Fatalf("%d files in the second build, want a deb, an rpm and a bill of materials (%v)", len(entries), err)
	}
	for _, e := range entries {
		first, err := os.ReadFile(filepath.Join(b.current, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		second, err := os.ReadFile(filepath.Join(b.again, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(first, second) {
			t.Errorf("%s: two builds differ: %x and %x", e.Name(), sha256.Sum256(first), sha256.Sum256(second))
		}
	}
}

// listing says what a package installs: mode, owner, path; and for an rpm what kind.
func listing(t *testing.T, file string) string {
	t.Helper()
	var lines []string
	if strings.HasSuffix(file, ".deb") {
		for line := range strings.Lines(output(t, "sh", "-c", `dpkg-deb --fsys-tarfile "$1" | tar --numeric-owner -tvf -`, "sh", file)) {
			f := strings.Fields(line) // mode, owner, size, date, time, path
			lines = append(lines, fmt.Sprintf("%s %s %s", f[0], f[1], f[5]))
		}
	} else {
		for line := range strings.Lines(output(t, "rpm", "-qp", "--qf", `[%{FILEMODES:perms} %{FILEUSERNAME}/%{FILEGROUPNAME} %{FILENAMES} %{FILEFLAGS:fflags}\n]`, file)) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return strings.Join(lines, "\n") + "\n"
}

func TestFiles(t *testing.T) {
	b := packages(t)
	for _, format := range []struct {
		name   string
		arches []string
	}{{"deb", []string{"*_amd64.deb", "*_arm64.deb"}}, {"rpm", []string{"*.x86_64.rpm", "*.aarch64.rpm"}}} {
		golden := filepath.Join("testdata", format.name+".golden")
		for _, pattern := range format.arches {
			got := listing(t, find(t, b.current, pattern))
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("%s (-want +got; -update writes it):\n%s", pattern, diff)
			}
			// What is listed one by one in nfpm.yaml must not be forgotten there.
			for _, source := range []string{"../docs/*.md", "systemd/dropins/*.conf", "prometheus/*.yaml", "grafana/*.json", "redis/*"} {
				files, err := filepath.Glob(source)
				if err != nil || len(files) == 0 {
					t.Fatalf("%s: nothing found (%v)", source, err)
				}
				for _, f := range files {
					if !strings.Contains(got, "/"+filepath.Base(f)) {
						t.Errorf("%s: %s is not in it: add it to nfpm.yaml", pattern, f)
					}
				}
			}
		}
	}
}

// unpacked extracts a package.
func unpacked(t *testing.T, file string) string {
	t.Helper()
	dir := t.TempDir()
	if strings.HasSuffix(file, ".deb") {
		output(t, "dpkg-deb", "-x", file, dir)
		return dir
	}
	requireTools(t, "rpm2cpio", "cpio")
	// nfpm writes absolute names, which cpio as root would take at their word.
	output(t, "sh", "-c", `rpm2cpio "$1" | cpio -idm --quiet --no-absolute-filenames -D "$2"`, "sh", file, dir)
	return dir
}

func TestBinary(t *testing.T) {
	b := packages(t)
	for pattern, machine := range map[string]elf.Machine{
		"*_amd64.deb": elf.EM_X86_64, "*.x86_64.rpm": elf.EM_X86_64,
		"*_arm64.deb": elf.EM_AARCH64, "*.aarch64.rpm": elf.EM_AARCH64,
	} {
		t.Run(pattern, func(t *testing.T) {
			path := filepath.Join(unpacked(t, find(t, b.current, pattern)), "usr/bin/edr-sensor")
			f, err := elf.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if f.Machine != machine {
				t.Errorf("made for %s, want %s", f.Machine, machine)
			}
			if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC }) {
				t.Error("is linked dynamically")
			}
			if machine == elf.EM_X86_64 {
				if out := output(t, path, "version"); !strings.HasPrefix(out, "edr-sensor "+newVersion+" ") {
					t.Errorf("says of itself: %s", out)
				}
			}
		})
	}
}

// schemas is the module that carries the schemas of CycloneDX, with its checksum.
const (
	schemas    = "github.com/CycloneDX/cyclonedx-go@v0.12.0"
	schemasSum = "h1:/7Jum36UA6V043tQZ/fE3jf+Nf9gn/qxUFfd7QReMy8="
)

func TestBillOfMaterials(t *testing.T) {
	b := packages(t)
	var out []byte
	err := errors.New("not asked")
	for n := 0; err != nil && n < 3; n++ {
		<-time.After(time.Duration(n) * 5 * time.Second)
		out, err = exec.Command("go", "mod", "download", "-json", schemas).Output()
	}
	require(t, err == nil, fmt.Sprintf("the module proxy does not give %s: %v: %s", schemas, err, out))
	var at struct{ Dir, Sum string }
	if err := json.Unmarshal(out, &at); err != nil || at.Sum != schemasSum {
		t.Fatalf("%s: sum %q, want %q (%v)", schemas, at.Sum, schemasSum, err)
	}
	c := jsonschema.NewCompiler()
	for file, id := range map[string]string{
		"bom-1.6.schema.json": "http://cyclonedx.org/schema/bom-1.6.schema.json", "spdx.schema.json": "http://cyclonedx.org/schema/spdx.schema.json",
		"jsf-0.82.schemax.json": "http://cyclonedx.org/schema/jsf-0.82.schema.json",
	} {
		f, err := os.Open(filepath.Join(at.Dir, "schema", file))
		if err != nil {
			t.Fatal(err)
		}
		doc, err := jsonschema.UnmarshalJSON(f)
		if err == nil {
			err = c.AddResource(id, doc)
		}
		if f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	schema, err := c.Compile("http://cyclonedx.org/schema/bom-1.6.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		raw, err := os.ReadFile(find(t, b.current, "*_"+arch+".cdx.json"))
		if err != nil {
			t.Fatal(err)
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		if err := schema.Validate(doc); err != nil {
			t.Errorf("%s: %v", arch, err)
		}
		doc.(map[string]any)["components"].([]any)[0].(map[string]any)["type"] = "none"
		if schema.Validate(doc) == nil {
			t.Error("the schema takes a component of no known type: it checks nothing")
		}

		var bom struct {
			Metadata struct {
				Component struct {
					Version string
					Hashes  []struct{ Content string }
				}
			}
			Components []struct{ Name, Version string }
		}
		if err := json.Unmarshal(raw, &bom); err != nil {
			t.Fatal(err)
		}
		binary := filepath.Join(unpacked(t, find(t, b.current, "*_"+arch+".deb")), "usr/bin/edr-sensor")
		content, err := os.ReadFile(binary)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(content)
		if top := bom.Metadata.Component; top.Version != newVersion || len(top.Hashes) != 1 || top.Hashes[0].Content != hex.EncodeToString(sum[:]) {
			t.Errorf("%s: is about %+v, not about the binary in the package (%x)", arch, top, sum)
		}
		info, err := buildinfo.ReadFile(binary)
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]string{"stdlib": strings.TrimPrefix(info.GoVersion, "go")}
		for _, d := range info.Deps {
			want[d.Path] = d.Version
		}
		got := map[string]string{}
		for _, c := range bom.Components {
			got[c.Name] = c.Version
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: components (-linked +listed):\n%s", arch, diff)
		}
		licenses, err := os.ReadFile(filepath.Join(filepath.Dir(binary), "../share/doc/edr-sensor/third-party-licenses.txt"))
		if err != nil {
			t.Fatal(err)
		}
		for name, version := range want {
			if !bytes.Contains(licenses, []byte(name+" "+version+"\n")) {
				t.Errorf("%s: no licence of %s", arch, name)
			}
		}
	}
}

// TestLint holds the packages against Debian's and Fedora's rules. What they are
// excused from stands with its reason in deb/lintian-overrides and rpm/rpmlint.toml.
func TestLint(t *testing.T) {
	b := packages(t)
	requireTools(t, "lintian", "rpmlint")
	// lintian takes ten seconds for each, and the other one has the same files.
	out, err := exec.Command("lintian", "--allow-root", "--no-tag-display-limit", "--fail-on=error,warning", find(t, b.current, "*_amd64.deb")).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("unused-override")) {
		t.Errorf("lintian: %v\n%s", err, out)
	}

	// rpmlint unpacks with cpio, and nfpm writes absolute names: as root it would
	// install the package on this host.
	real, err := exec.LookPath("cpio")
	require(t, err == nil, "no cpio (run: make deps)")
	bin := t.TempDir()
	tamed := "#!/bin/sh\nexec " + real + " --no-absolute-filenames \"$@\"\n"
	if err := os.WriteFile(filepath.Join(bin, "cpio"), []byte(tamed), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"*.x86_64.rpm", "*.aarch64.rpm"} {
		cmd := exec.Command("rpmlint", "--strict", "--config", "rpm/rpmlint.toml", find(t, b.current, pattern))
		cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte(" 0 errors, 0 warnings")) {
			t.Errorf("rpmlint: %v\n%s", err, out)
		}
	}
}

// TestManual has the manual pages typeset, and the completions read by their shells.
func TestManual(t *testing.T) {
	b := packages(t)
	requireTools(t, "man", "bash", "zsh", "fish")
	share := filepath.Join(unpacked(t, find(t, b.current, "*_amd64.deb")), "usr/share")
	for page, want := range map[string][]string{
		"man1/edr-sensor.1.gz":      {"edr-sensor " + newVersion, "case open --case-id ID", "--config", "/etc/edr-sensor/edr-sensor.yaml"},
		"man5/edr-sensor.yaml.5.gz": {"edr-sensor " + newVersion, "  #priority_ring: 16MiB", "# [reload] debug, info, warn or error"},
	} {
		cmd := exec.Command("man", "--warnings=w", "-E", "UTF-8", "-l", filepath.Join(share, "man", page))
		cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "MANWIDTH=120")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil || stderr.Len() > 0 {
			t.Errorf("man %s: %v\n%s", page, err, stderr.Bytes())
		}
		for _, w := range want {
			if !strings.Contains(stdout.String(), w) {
				t.Errorf("%s does not have %q:\n%s", page, w, stdout.Bytes())
			}
		}
	}
	output(t, "bash", "-n", filepath.Join(share, "bash-completion/completions/edr-sensor"))
	output(t, "zsh", "-n", filepath.Join(share, "zsh/vendor-completions/_edr-sensor"))
	output(t, "fish", "-n", filepath.Join(share, "fish/vendor_completions.d/edr-sensor.fish"))
}
