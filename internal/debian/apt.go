// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Keyring is the file of Debian's keys, which has to be there.
const Keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// apt is Debian's package manager with a configuration of its own, which knows one
// suite, no installed package, and leaves the machine's alone. It needs no privilege.
type apt struct {
	dir  string
	arch string
}

func newAPT(ctx context.Context, dir, suite, arch string) (apt, error) {
	a := apt{dir, arch}
	sources, err := sourcesFor(ctx, suite)
	if err != nil {
		return apt{}, err
	}
	for _, d := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return apt{}, err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "sources.list"), []byte(sources), 0o644); err != nil {
		return apt{}, err
	}
	if _, err := a.run(ctx, "apt-get", "update", "-o", "APT::Update::Error-Mode=any"); err != nil {
		return apt{}, err
	}
	return a, nil
}

// sourcesFor asks the machine's apt which mirrors it uses and has them serve
// another suite.
func sourcesFor(ctx context.Context, suite string) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets",
		"--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages", "Origin: Debian").Output()
	if err != nil {
		return "", fmt.Errorf("ask apt for its mirrors: %w", err)
	}
	return sourcesList(string(out), suite)
}

// sourcesList makes a sources.list from lines of a label and a mirror.
func sourcesList(targets, suite string) (string, error) {
	mirrors := map[string]string{}
	for line := range strings.Lines(targets) {
		if label, mirror, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			mirrors[label] = mirror
		}
	}
	if mirrors["Debian"] == "" {
		return "", errors.New("apt has no lists of a Debian mirror (run apt-get update)")
	}
	list := fmt.Sprintf("deb [signed-by=%s] %s %s main\n", Keyring, mirrors["Debian"], suite)
	if mirror := mirrors["Debian-Security"]; mirror != "" && suite != "sid" { // where fixes come first
		list += fmt.Sprintf("deb [signed-by=%s] %s %s-security main\n", Keyring, mirror, suite)
	}
	return list, nil
}

// run runs a package tool in the working directory and returns what it says.
func (a apt) run(ctx context.Context, name string, args ...string) (string, error) {
	if name != "dpkg-deb" {
		for option, value := range map[string]string{
			"Dir::Etc::SourceList": filepath.Join(a.dir, "sources.list"), "Dir::Etc::SourceParts": "/dev/null",
			"Dir::State::Lists": filepath.Join(a.dir, "lists"), "Dir::State::Status": "/dev/null", "Dir::Cache": filepath.Join(a.dir, "cache"),
			"APT::Architecture": a.arch, "APT::Architectures": a.arch,
			"APT::Sandbox::User": "root", // its own user may not see the cache in a home directory
			"Acquire::Languages": "none", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
		} {
			args = append(args, "-o", option+"="+value)
		}
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = a.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var out, says bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &says
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, args[0], err, bytes.TrimSpace(says.Bytes()))
	}
	return out.String(), nil
}
