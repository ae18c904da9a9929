// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// release is a kernel as a Debian suite has it.
type release struct {
	series string
	suite  string
	arch   string
	cpus   int
}

// name is what KERNEL calls it.
func (r release) name() string {
	if r.arch == "amd64" {
		return r.series
	}
	return r.series + "-" + r.arch
}

// releases lists the supported kernels, oldest first. The programs are the same for
// every processor, so one kernel is enough for another one. The tests hardly use more than
// one CPU, and with one the emulator does not meet breakpoints of code that another CPU is
// patching. But since 7.0 tasks are preempted inside of programs, and all copies of one
// may be, which emulated programs are slow enough for where there is no other CPU.
func releases() []release {
	return []release{
		{"5.10", "bullseye", "amd64", 1},
		{"6.1", "bookworm", "amd64", 1},
		{"6.12", "trixie", "amd64", 1},
		{"7.2", "sid", "amd64", 2},
		{"6.12", "trixie", "arm64", 1},
	}
}

// neededModules lists the drivers that are not built in and that tests use.
func neededModules() []string {
	return []string{"overlay"}
}

// image is a kernel that can be booted: a directory with vmlinuz, modules and a shell,
// whose name is what uname -r says.
type image struct {
	dir string
}

func (i image) version() string { return filepath.Base(i.dir) }
func (i image) vmlinuz() string { return filepath.Join(i.dir, "vmlinuz") }
func (i image) busybox() string { return filepath.Join(i.dir, "busybox") }

func (i image) module(name string) string { return filepath.Join(i.dir, name+".ko") }

const (
	keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	// keep is how long a kernel is booted before a newer one is asked for.
	keep = 30 * 24 * time.Hour
)

// fetch returns the suite's newest kernel for cloud machines: the smallest one that
// Debian builds, with what a virtual machine needs built in. It is kept in the cache,
// one for each series; apt checks what it downloads against Debian's signatures.
// Without the network an old one is as good, which logf hears about.
func fetch(ctx context.Context, cache string, r release, logf func(string, ...any)) (image, error) {
	dir := filepath.Join(cache, r.name())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return image{}, err
	}
	unlock, err := lock(dir)
	if err != nil {
		return image{}, err
	}
	defer unlock()
	old, complete := cached(dir)
	if complete {
		if info, err := os.Stat(old.dir); err == nil && time.Since(info.ModTime()) < keep {
			return old, nil
		}
	}
	fresh, err := download(ctx, dir, r)
	switch {
	case err == nil:
		return fresh, nil
	case complete:
		logf("the old kernel %s has to do: %v", old.version(), err)
		return old, nil
	default:
		return image{}, fmt.Errorf("fetch the kernel of Debian %s: %w", r.suite, err)
	}
}

// lock keeps two test runs from filling the same directory.
func lock(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
	}
	return func() { f.Close() }, nil
}

// cached finds the kernel in a directory and whether it has everything.
func cached(dir string) (i image, complete bool) {
	found, _ := filepath.Glob(filepath.Join(dir, "*", "vmlinuz")) // the pattern is good
	if len(found) == 0 {
		return image{}, false
	}
	i = image{filepath.Dir(found[0])}
	files := []string{i.busybox()}
	for _, name := range neededModules() {
		files = append(files, i.module(name))
	}
	missing := slices.ContainsFunc(files, func(path string) bool {
		_, err := os.Stat(path)
		return err != nil
	})
	return i, !missing
}

// download replaces what is in dir with the newest kernel of a suite.
func download(ctx context.Context, dir string, r release) (image, error) {
	work, err := os.MkdirTemp("", "edr-vmtest-")
	if err != nil {
		return image{}, err
	}
	defer os.RemoveAll(work) // with the package lists, which are larger than the kernel
	a, err := newAPT(ctx, work, r)
	if err != nil {
		return image{}, err
	}
	packages, err := a.kernelPackages(ctx)
	if err != nil {
		return image{}, err
	}
	if _, err := a.run(ctx, "apt-get", append([]string{"download", "busybox-static"}, packages...)...); err != nil {
		return image{}, err
	}
	archives, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil {
		return image{}, err
	}
	for _, archive := range archives {
		if _, err := a.run(ctx, "dpkg-deb", "-x", archive, work); err != nil {
			return image{}, err
		}
	}
	old, err := filepath.Glob(filepath.Join(dir, "*"))
	for _, path := range old {
		err = errors.Join(err, os.RemoveAll(path))
	}
	if err != nil {
		return image{}, err
	}
	return take(ctx, work, dir)
}

// take copies what a boot needs from unpacked packages, vmlinuz last: a directory
// without it is no kernel.
func take(ctx context.Context, unpacked, dir string) (image, error) {
	// The kernel is boot/vmlinuz-VERSION or usr/lib/modules/VERSION/vmlinuz.
	vmlinuz, err := find(unpacked, regexp.MustCompile(`/vmlinuz(-[^/]*)?$`))
	if err != nil {
		return image{}, err
	}
	modules, err := find(unpacked, regexp.MustCompile(`/lib/modules/[^/]*/kernel$`))
	if err != nil {
		return image{}, err
	}
	kernel := image{filepath.Join(dir, filepath.Base(filepath.Dir(modules)))}
	if err := os.Mkdir(kernel.dir, 0o755); err != nil {
		return image{}, err
	}
	busybox, err := find(unpacked, regexp.MustCompile(`/bin/busybox$`))
	if err == nil {
		err = copyFile(kernel.busybox(), busybox)
	}
	if err != nil {
		return image{}, err
	}
	for _, name := range neededModules() {
		from, err := find(modules, regexp.MustCompile(`/`+name+`\.ko(\.xz)?$`))
		if err != nil {
			return image{}, err
		}
		data, err := os.ReadFile(from)
		if strings.HasSuffix(from, ".xz") { // the shell in the virtual machine cannot
			data, err = exec.CommandContext(ctx, "xz", "-dc", from).Output()
		}
		if err := errors.Join(err, os.WriteFile(kernel.module(name), data, 0o644)); err != nil {
			return image{}, fmt.Errorf("module %s: %w", name, err)
		}
	}
	return kernel, copyFile(kernel.vmlinuz(), vmlinuz)
}

func copyFile(to, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o644)
}

// find returns the first path below a directory that matches.
func find(dir string, pattern *regexp.Regexp) (found string, err error) {
	err = filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err == nil && pattern.MatchString(path) {
			found = path
			return filepath.SkipAll
		}
		return err
	})
	if err == nil && found == "" {
		err = fmt.Errorf("nothing in the packages is called %s", pattern)
	}
	return found, err
}

// apt is Debian's package manager with a configuration of its own, which knows one
// suite, no installed package, and leaves the machine's alone. It needs no privilege.
type apt struct {
	dir  string
	arch string
}

func newAPT(ctx context.Context, dir string, r release) (apt, error) {
	a := apt{dir, r.arch}
	sources, err := sourcesFor(ctx, r.suite)
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
	list := fmt.Sprintf("deb [signed-by=%s] %s %s main\n", keyring, mirrors["Debian"], suite)
	if mirror := mirrors["Debian-Security"]; mirror != "" && suite != "sid" { // where fixes come first
		list += fmt.Sprintf("deb [signed-by=%s] %s %s-security main\n", keyring, mirror, suite)
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

// kernelPackages follows the package that always depends on the newest kernel. In some
// suites that kernel is more than one package.
func (a apt) kernelPackages(ctx context.Context) ([]string, error) {
	packages := []string{"linux-image-cloud-" + a.arch}
	for i := 0; i < len(packages); i++ {
		text, err := a.run(ctx, "apt-cache", "show", "--no-all-versions", packages[i])
		if err != nil {
			return nil, err
		}
		for _, name := range kernelDependencies(text) {
			if !slices.Contains(packages, name) {
				packages = append(packages, name)
			}
		}
	}
	if len(packages) == 1 {
		return nil, fmt.Errorf("%s depends on no kernel", packages[0])
	}
	return packages[1:], nil
}

// kernelDependencies finds the packages of the kernel itself in what apt-cache shows.
func kernelDependencies(text string) []string {
	name := regexp.MustCompile(`\blinux-(?:image|binary|modules)-[0-9][^\s,|]*-cloud-[a-z0-9]+\b`)
	var names []string
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "Depends: ") || strings.HasPrefix(line, "Pre-Depends: ") {
			names = append(names, name.FindAllString(line, -1)...)
		}
	}
	return names
}
