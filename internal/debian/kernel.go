// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Modules lists the drivers that tests use, each after those that it needs. Which of them
// are built in, or part of another, differs between kernels.
func Modules() []string {
	return []string{
		"virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk",
		"overlay", "loop",
	}
}

// Kernel is a kernel that can be booted: a directory with vmlinuz, modules and a shell,
// whose name is what uname -r says.
type Kernel struct {
	Dir string
}

// Version is what uname -r says.
func (k Kernel) Version() string { return filepath.Base(k.Dir) }

// Image is the file to boot.
func (k Kernel) Image() string { return filepath.Join(k.Dir, "vmlinuz") }

// Busybox is a shell with all tools, linked statically.
func (k Kernel) Busybox() string { return filepath.Join(k.Dir, "busybox") }

// Module is the file of one of Modules. It is empty where there is none to load.
func (k Kernel) Module(name string) string { return filepath.Join(k.Dir, name+".ko") }

// Kernel returns the suite's newest kernel for cloud machines: the smallest one that
// Debian builds, with most of what a virtual machine needs built in. The cache keeps one
// for each name. Without the network an old one is as good.
func (c Cache) Kernel(ctx context.Context, name, suite, arch string) (Kernel, error) {
	dir := filepath.Join(c.Dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Kernel{}, err
	}
	l, err := lock(dir, unix.LOCK_EX)
	if err != nil {
		return Kernel{}, err
	}
	defer l.unlock()
	old, complete := cached(dir)
	if complete && young(old.Dir) {
		return old, nil
	}
	var fresh Kernel
	err = c.fetch(ctx, complete, func() (err error) {
		fresh, err = download(ctx, dir, suite, arch)
		return err
	})
	switch {
	case err == nil:
		return fresh, nil
	case complete:
		c.Logf("the old kernel %s has to do: %v", old.Version(), err)
		return old, nil
	default:
		return Kernel{}, fmt.Errorf("fetch the kernel of Debian %s: %w", suite, err)
	}
}

// cached finds the kernel in a directory and whether it has everything.
func cached(dir string) (k Kernel, complete bool) {
	found, _ := filepath.Glob(filepath.Join(dir, "*", "vmlinuz")) // the pattern is good
	if len(found) == 0 {
		return Kernel{}, false
	}
	k = Kernel{filepath.Dir(found[0])}
	files := []string{k.Busybox()}
	for _, name := range Modules() {
		files = append(files, k.Module(name))
	}
	missing := slices.ContainsFunc(files, func(path string) bool {
		_, err := os.Stat(path)
		return err != nil
	})
	return k, !missing
}

// download replaces what is in dir with the newest kernel of a suite.
func download(ctx context.Context, dir, suite, arch string) (Kernel, error) {
	work, err := os.MkdirTemp("", "edr-vmtest-")
	if err != nil {
		return Kernel{}, err
	}
	defer os.RemoveAll(work) // with the package lists, which are larger than the kernel
	a, err := newAPT(ctx, work, suite, arch)
	if err != nil {
		return Kernel{}, err
	}
	packages, err := a.kernelPackages(ctx)
	if err != nil {
		return Kernel{}, err
	}
	if _, err := a.run(ctx, "apt-get", append([]string{"download", "busybox-static"}, packages...)...); err != nil {
		return Kernel{}, err
	}
	archives, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil {
		return Kernel{}, err
	}
	for _, archive := range archives {
		if _, err := a.run(ctx, "dpkg-deb", "-x", archive, work); err != nil {
			return Kernel{}, err
		}
	}
	old, err := filepath.Glob(filepath.Join(dir, "*"))
	for _, path := range old {
		err = errors.Join(err, os.RemoveAll(path))
	}
	if err != nil {
		return Kernel{}, err
	}
	return take(ctx, work, dir)
}

// take copies what a boot needs from unpacked packages, vmlinuz last: a directory
// without it is no kernel.
func take(ctx context.Context, unpacked, dir string) (Kernel, error) {
	// The kernel is boot/vmlinuz-VERSION or usr/lib/modules/VERSION/vmlinuz.
	vmlinuz, err := find(unpacked, regexp.MustCompile(`/vmlinuz(-[^/]*)?$`))
	if err != nil {
		return Kernel{}, err
	}
	modules, err := find(unpacked, regexp.MustCompile(`/lib/modules/[^/]*/kernel$`))
	if err != nil {
		return Kernel{}, err
	}
	kernel := Kernel{filepath.Join(dir, filepath.Base(filepath.Dir(modules)))}
	if err := os.Mkdir(kernel.Dir, 0o755); err != nil {
		return Kernel{}, err
	}
	busybox, err := find(unpacked, regexp.MustCompile(`/bin/busybox$`))
	if err == nil {
		err = copyFile(kernel.Busybox(), busybox)
	}
	if err != nil {
		return Kernel{}, err
	}
	for _, name := range Modules() {
		data, err := module(ctx, modules, name)
		if err := errors.Join(err, os.WriteFile(kernel.Module(name), data, 0o644)); err != nil {
			return Kernel{}, fmt.Errorf("module %s: %w", name, err)
		}
	}
	return kernel, copyFile(kernel.Image(), vmlinuz)
}

// module finds a driver, if there is one, and unpacks it, which the shell in the virtual
// machine cannot.
func module(ctx context.Context, dir, name string) ([]byte, error) {
	from, err := find(dir, regexp.MustCompile(`/`+name+`\.ko(\.xz)?$`))
	if errors.Is(err, errNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if strings.HasSuffix(from, ".xz") {
		return exec.CommandContext(ctx, "xz", "-dc", from).Output()
	}
	return os.ReadFile(from)
}

func copyFile(to, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o644)
}

var errNotFound = errors.New("nothing in the packages is called so")

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
		err = fmt.Errorf("%s: %w", pattern, errNotFound)
	}
	return found, err
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
