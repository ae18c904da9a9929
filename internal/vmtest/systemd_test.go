// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/debian"
)

// installed is a Debian with systemd, and what the packages go through there.
type installed struct {
	name string
	release
	seconds int    // of CPU that it takes, about
	format  string // deb or rpm
	test    string // of the package of this name
}

// installedHosts returns those that lead the packages through their lives: Debian's releases,
// with their kernels and systemd as the first process.
func installedHosts(t *testing.T) (hosts []host) {
	t.Helper()
	bullseye, bookworm, trixie := releases()[0], releases()[1], releases()[2]
	all := []installed{
		{"bookworm", bookworm, 405, "deb", "TestDeb"},
		{"bookworm-rpm", bookworm, 280, "rpm", "TestRPM"},
		{"bullseye", bullseye, 155, "deb", "TestDelivers"},
		{"trixie", trixie, 205, "deb", "TestDelivers"},
	}
	dir := t.TempDir()
	packages := sync.OnceValue(func() error { return twoVersions(dir) })
	for _, i := range choose(t, "RELEASE", "KERNEL", all, func(i installed) string { return i.name }) {
		hosts = append(hosts, host{i.name, i.seconds, func(t *testing.T, b *builder) { i.run(t, b, dir, packages) }})
	}
	return hosts
}

// run boots the machine with the packages in dir.
func (i installed) run(t *testing.T, b *builder, dir string, packages func() error) {
	m, kernel := requireVM(t, i.release)
	for _, tool := range []string{"mmdebstrap", "mke2fs", "redis-server", "ldd"} {
		if _, err := exec.LookPath(tool); err != nil {
			require(t, fmt.Errorf("missing %s (make deps installs it on Debian)", tool))
		}
	}
	cache, err := debian.UserCache(t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	root, release, err := cache.Root(t.Context(), i.suite)
	require(t, err)
	disk := filepath.Join(t.TempDir(), "disk")
	out, err := exec.CommandContext(t.Context(), "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", root, disk, "1500M").CombinedOutput()
	release()
	if err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	if err := packages(); err != nil {
		t.Fatalf("build the packages: %v", err)
	}
	s := suite{dir: "internal/vmtest/installed"}
	initrd := filepath.Join(t.TempDir(), "initramfs")
	if err := i.initramfs(initrd, kernel, filepath.Join(b.build(t, m, []suite{s}), path.Base(testBinary("", s))), dir); err != nil {
		t.Fatal(err)
	}
	m.args = append(slices.Clip(m.args), "-drive", "file="+disk+",format=raw,if=virtio,snapshot=on", "-action", "reboot=reset")
	start := time.Now()
	said, console, spent, err := bootAgain(t, m, kernel, initrd, securityModules)
	replay(t, said, console, err, func(*result) {})
	t.Logf("over after %s, with %s of CPU", time.Since(start).Round(100*time.Millisecond), spent.Round(100*time.Millisecond))
}

// Versions of the packages, as internal/vmtest/installed knows them. The newer one has
// another default configuration.
const olderVersion, newerVersion = "9.0.0", "9.1.0"

// twoVersions builds both packages of this tree twice.
func twoVersions(dir string) error {
	script := `
set -euo pipefail
mkdir "$1/tree"
git ls-files -z --cached --others --exclude-standard | tar --null -T - --ignore-failed-read -cf - | tar -xf - -C "$1/tree"
export SOURCE_DATE_EPOCH=1700000000
VERSION=` + olderVersion + ` DIST="$1/older" packaging/scripts/packages.sh amd64
cd "$1/tree"
sed -i '1s/.*/# Configuration of edr-sensor, as it is by now./' packaging/config/edr-sensor.yaml
VERSION=` + newerVersion + ` DIST="$1/newer" packaging/scripts/packages.sh amd64
`
	cmd := exec.Command("bash", "-c", script, "build", dir)
	cmd.Dir = module
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// initramfs writes what the machine starts with: drivers for its disk, and what is put
// onto that, which is the packages and the test that runs there as a service.
func (i installed) initramfs(name string, kernel debian.Kernel, test, packages string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	a := newArchive(f)
	a.file("init", "testdata/disk.sh", 0o755)
	a.file("bin/busybox", kernel.Busybox(), 0o755)
	for n, name := range debian.Modules() { // in order
		if info, err := os.Stat(kernel.Module(name)); err == nil && info.Size() > 0 {
			a.file(fmt.Sprintf("modules/%d-%s.ko", n, name), kernel.Module(name), 0o644)
		}
	}
	a.file("payload/tests/run.test", test, 0o755)
	for _, version := range []string{"older", "newer"} {
		found, err := filepath.Glob(filepath.Join(packages, version, "*."+i.format))
		if err == nil && len(found) != 1 {
			err = fmt.Errorf("%d of %s/*.%s, want one", len(found), version, i.format)
		}
		if err != nil {
			return err
		}
		a.file("payload/tests/"+version+"."+i.format, found[0], 0o644)
	}
	a.file("payload/tests/run.sh", "testdata/installed.sh", 0o755)
	a.bytes("payload/etc/systemd/system/vmtest.service", fmt.Appendf(nil, `[Unit]
Description=Tests of the installed package
[Service]
ExecStart=/tests/run.sh %s '%s'
Environment=HOME=/root EDR_INSTALLED=1
OOMScoreAdjust=-900
`, i.name, i.test), 0o644)
	a.link("payload/etc/systemd/system/multi-user.target.wants/vmtest.service", "/etc/systemd/system/vmtest.service")
	a.link("payload/etc/systemd/system/default.target", "/lib/systemd/system/multi-user.target")
	a.bytes("payload/etc/machine-id", []byte("0123456789abcdef0123456789abcdef\n"), 0o444)
	a.bytes("payload/etc/hostname", []byte("vm\n"), 0o644)
	for _, unit := range []string{ // what a test does not need, or must not meet
		"getty@tty1.service", "serial-getty@ttyS0.service", "console-getty.service", "redis-server.service",
		"systemd-timesyncd.service", "systemd-udevd.service", "systemd-udev-trigger.service", "systemd-resolved.service",
		"systemd-logind.service", "ldconfig.service", "systemd-journal-catalog-update.service", "systemd-hwdb-update.service",
		"apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "fstrim.timer", "dpkg-db-backup.timer", "logrotate.timer",
	} {
		a.link("payload/etc/systemd/system/"+unit, "/dev/null")
	}
	if i.suite == "bullseye" { // its Redis is too old
		if err := carry(a, "redis-server"); err != nil {
			return err
		}
	}
	return errors.Join(a.close(), f.Close())
}

// carry takes a program of this host along, with all its libraries and its loader.
func carry(a *archive, name string) error {
	program, err := exec.LookPath(name)
	if err != nil {
		return err
	}
	out, err := exec.Command("ldd", program).Output()
	if err != nil {
		return fmt.Errorf("ldd %s: %w", program, err)
	}
	var loader string
	for _, m := range regexp.MustCompile(`(/\S+) \(0x`).FindAllStringSubmatch(string(out), -1) {
		to := path.Join("/opt", name, path.Base(m[1]))
		if strings.HasPrefix(path.Base(to), "ld-linux") {
			loader = to
		}
		a.file("payload"+to, m[1], 0o755)
	}
	to := path.Join("/opt", name, name)
	a.file("payload"+to, program, 0o755)
	a.bytes("payload/usr/local/bin/"+name, fmt.Appendf(nil, "#!/bin/sh\nexec %s --library-path %s %s \"$@\"\n", loader, path.Dir(to), to), 0o755)
	return nil
}
