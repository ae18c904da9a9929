// SPDX-License-Identifier: Apache-2.0

package packaging

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// chroot is this host's file system seen through an overlay, in a mount namespace
// of its own, as a container or an image that is being built: no init runs in it,
// /run is empty. What is written stays in memory, in upper, and goes with it.
type chroot struct {
	pid   string
	root  string // of the chroot, in the namespace
	upper string // of the overlay, in the namespace: what was written
}

func newChroot(t *testing.T) chroot {
	t.Helper()
	require(t, runtime.GOARCH == "amd64", "the packages that are installed are for amd64")
	require(t, os.Geteuid() == 0, "installing into a chroot needs root")
	requireTools(t, "unshare", "nsenter", "chroot")
	dir := t.TempDir()
	// It ends when its standard input does, which is at the latest with this process.
	holder := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-ec", `
		mount -t tmpfs -o mode=755 scratch "$1"
		mkdir "$1/upper" "$1/work" "$1/root"
		mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
		mount -t proc proc "$1/root/proc"
		mount -t tmpfs -o mode=755 run "$1/root/run"
		mount -t tmpfs -o mode=1777 tmp "$1/root/tmp"
		mount -t tmpfs -o mode=755 dev "$1/root/dev"
		for d in null zero random urandom; do
			touch "$1/root/dev/$d"
			mount --bind "/dev/$d" "$1/root/dev/$d"
		done
		ln -s /proc/self/fd/0 "$1/root/dev/stdin"
		rm -f "$1/root/usr/sbin/policy-rc.d"
		echo ready
		exec cat`, "sh", dir)
	var stderr bytes.Buffer
	holder.Stderr = &stderr
	stdin, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = holder.Wait()
	})
	ready := make([]byte, len("ready\n"))
	_, err = io.ReadFull(stdout, ready)
	if err != nil {
		_ = stdin.Close()
		_ = holder.Wait() // has written all that it says
		require(t, false, "this host lets root mount no overlay in a namespace of its own: "+stderr.String())
	}
	return chroot{pid: fmt.Sprint(holder.Process.Pid), root: dir + "/root", upper: dir + "/upper"}
}

// try runs a shell script in the chroot.
func (c chroot) try(script string, args ...string) (string, error) {
	cmd := exec.Command("nsenter", append([]string{
		"--target", c.pid, "--mount", "--", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive",
		"chroot", c.root, "sh", "-c", script, "sh",
	}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (c chroot) run(t *testing.T, script string, args ...string) string {
	t.Helper()
	out, err := c.try(script, args...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

// add copies a package of the host into the chroot's /tmp.
func (c chroot) add(t *testing.T, file, as string) {
	t.Helper()
	in, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	cmd := exec.Command("nsenter", "--target", c.pid, "--mount", "--", "cp", "/dev/stdin", c.root+"/tmp/"+as)
	cmd.Stdin = in
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("copy %s: %v\n%s", file, err, out)
	}
}

// left are the files and directories, apart from those that expect describes, that
// were written and are still there.
func (c chroot) left(t *testing.T, expect string) []string {
	t.Helper()
	known := regexp.MustCompile("^(" + expect + ")$")
	var out []string
	// The holder shares no memory with us, but its root can be read through /proc.
	top := "/proc/" + c.pid + "/root" + c.upper
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, top)
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case info.Mode()&fs.ModeCharDevice != 0: // a whiteout: it is not there
		case d.IsDir() && !strings.Contains(name, "edr-sensor"): // was there, and something in it was written
		case known.MatchString(name):
		default:
			out = append(out, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// exists reports whether the chroot has the path, without following it.
func (c chroot) exists(t *testing.T, path string) bool {
	t.Helper()
	out := c.run(t, `if [ -e "$1" ] || [ -L "$1" ]; then echo yes; fi`, path)
	return out == "yes\n"
}

func (c chroot) want(t *testing.T, path string, want bool) {
	t.Helper()
	if got := c.exists(t, path); got != want {
		t.Errorf("%s exists: %t, want %t", path, got, want)
	}
}

const (
	config  = "/etc/edr-sensor/edr-sensor.yaml"
	enabled = "/etc/systemd/system/multi-user.target.wants/edr-sensor.service"
	masked  = "/etc/systemd/system/edr-sensor.service"
)

// system is what a package manager and the user database write of their own.
const system = `/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?|/etc/\.pwd\.lock|/var/(log|cache)/.*|/var/lib/(dpkg|rpm|systemd/deb-systemd-helper-enabled)(/.*)?|/root/\.rpmdb(/.*)?`

func (c chroot) wantUser(t *testing.T) {
	t.Helper()
	user := strings.Split(strings.TrimSpace(c.run(t, "getent passwd edr-sensor")), ":")
	if len(user) != 7 || user[2] == "0" || user[5] != "/var/lib/edr-sensor" || user[6] != "/usr/sbin/nologin" {
		t.Errorf("user: %q", user)
	}
}

// TestInstallDeb leads the deb through its life in a container: no init, and what
// the administrator did stays.
func TestInstallDeb(t *testing.T) {
	b := packages(t)
	requireTools(t, "dpkg", "deb-systemd-helper")
	c := newChroot(t)
	c.add(t, find(t, b.old, "*.deb"), "old.deb")
	c.add(t, find(t, b.current, "*_amd64.deb"), "new.deb")

	c.run(t, "dpkg -i /tmp/old.deb </dev/null")
	c.wantUser(t)
	c.want(t, enabled, true)
	c.want(t, "/var/lib/edr-sensor", false) // systemd makes it, for the user
	if got := c.run(t, "stat -c '%U:%G %a' /etc/edr-sensor "+config); got != "root:root 755\nroot:root 640\n" {
		t.Errorf("configuration: %s", got)
	}
	if out := c.run(t, "edr-sensor check"); !strings.HasPrefix(out, "the configuration is good ("+config+")") {
		t.Errorf("check of the configuration as installed: %s", out)
	}

	// What the README says connects it to Redis, but for the running service.
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(readme), "Connect it to Redis")
	_, after, _ = strings.Cut(after, "```sh\n")
	lines, _, _ := strings.Cut(after, "```")
	if !strings.Contains(lines, "redis-password") {
		t.Fatalf("the README's lines about Redis: %q", lines)
	}
	out := c.run(t, `set -e; sudo() { case "$1 $2" in "systemctl restart" | "edr-sensor status") ;; *) "$@" ;; esac; }
`+lines+`stat -c '%U:%G %a' /etc/edr-sensor/redis-password`)
	if !strings.Contains(out, "to redis.example.com:6379") || !strings.HasSuffix(out, "root:root 600\n") {
		t.Errorf("what the README says gives: %s", out)
	}

	// Edited by the administrator, and new in the package: his stays, at both upgrades.
	c.run(t, `printf 'http:\n  listen: 127.0.0.1:9999\n' >>`+config+`; systemctl disable edr-sensor; mkdir -p /var/lib/edr-sensor/buffer; touch /var/lib/edr-sensor/buffer/x`)
	c.run(t, "dpkg -i --force-confdef --force-confold /tmp/new.deb </dev/null")
	if out := c.run(t, "edr-sensor version"); !strings.Contains(out, newVersion) {
		t.Errorf("after the upgrade: %s", out)
	}
	if out := c.run(t, "cat "+config); !strings.Contains(out, "127.0.0.1:9999") {
		t.Error("the administrator's configuration is gone")
	}
	c.want(t, enabled, false)
	c.run(t, "systemctl mask edr-sensor && dpkg -i --force-confold /tmp/old.deb </dev/null && dpkg -i --force-confold /tmp/new.deb </dev/null")
	if got := c.run(t, "readlink "+masked); got != "/dev/null\n" {
		t.Errorf("masked, and after an upgrade: %s", got)
	}
	c.run(t, "systemctl unmask edr-sensor")

	// What is wrong with the configuration is said, and hinders nothing.
	c.run(t, "printf 'buffer:\n  capp: 1GiB\n' >/etc/edr-sensor/conf.d/10-wrong.yaml")
	out = c.run(t, "dpkg -i --force-confold /tmp/new.deb </dev/null")
	if !strings.Contains(out, "10-wrong.yaml:2:3") || !strings.Contains(out, "did you mean buffer.cap?") || !strings.Contains(out, "would refuse this configuration") {
		t.Errorf("a wrong configuration, and the package says:\n%s", out)
	}

	c.run(t, "dpkg --remove edr-sensor")
	c.want(t, "/usr/bin/edr-sensor", false)
	c.want(t, config, true)
	c.want(t, "/var/lib/edr-sensor/buffer/x", true)
	if out, _ := c.try("dpkg --verify edr-sensor"); strings.Contains(out, "missing") {
		t.Errorf("dpkg --verify after the removal: %s", out)
	}

	// Back again: still disabled.
	c.run(t, "rm /etc/edr-sensor/conf.d/10-wrong.yaml && dpkg -i --force-confold /tmp/new.deb </dev/null")
	c.want(t, enabled, false)

	c.run(t, "dpkg --purge edr-sensor")
	if left := c.left(t, system); len(left) > 0 {
		t.Errorf("purged, and still there: %s", strings.Join(left, " "))
	}
	if out := c.run(t, "ls /var/lib/systemd/deb-systemd-helper-enabled 2>/dev/null || true"); strings.Contains(out, "edr-sensor") {
		t.Errorf("purged, and deb-systemd-helper still knows: %s", out)
	}
	if !slices.Contains(c.left(t, "nothing"), "/etc/passwd") {
		t.Error("the list of what is left does not have what was written: it shows nothing")
	}
}

// TestDebScriptsGoOn where the host refuses something to them, with the shell that dpkg
// runs them with.
func TestDebScriptsGoOn(t *testing.T) {
	c := newChroot(t)
	c.add(t, "deb/preinst", "preinst")
	c.add(t, "deb/postrm", "postrm")
	got := c.run(t, "mkdir -p /var/lib/edr-sensor /etc/edr-sensor && mount -t tmpfs state /var/lib/edr-sensor && touch /var/lib/edr-sensor/x /etc/edr-sensor/x && DPKG_MAINTSCRIPT_PACKAGE=edr-sensor sh /tmp/postrm purge && ls -A /var/lib/edr-sensor")
	if want := "rm: cannot remove '/var/lib/edr-sensor': Device or resource busy\nedr-sensor: purged, but for what is said above\n"; got != want {
		t.Errorf("a purge with a mount point: %q, want %q", got, want)
	}
	c.want(t, "/etc/edr-sensor", false)

	if got := c.run(t, "mkdir -p /run/systemd/system && mount -o remount,ro /run && sh /tmp/preinst install"); !strings.Contains(got, "Read-only file system") {
		t.Errorf("an installation with a /run that nobody can write: %q", got)
	}
}

// TestInstallRpm does so with the rpm, and rpm's own tools.
func TestInstallRpm(t *testing.T) {
	b := packages(t)
	c := newChroot(t)
	c.add(t, find(t, b.old, "*.rpm"), "old.rpm")
	c.add(t, find(t, b.current, "*.x86_64.rpm"), "new.rpm")
	// Debian's rpm database knows nothing of what is installed by dpkg.
	rpm := func(args string) string {
		t.Helper()
		out := c.run(t, "rpm --nodeps "+args)
		if strings.Contains(out, "scriptlet failed") {
			t.Errorf("rpm %s: %s", args, out)
		}
		return out
	}

	rpm("-i /tmp/old.rpm")
	c.wantUser(t)
	c.run(t, "rpm -V --nodeps edr-sensor")
	preset := strings.TrimSpace(c.run(t, "systemctl is-enabled edr-sensor 2>/dev/null || true"))
	if preset != "enabled" && preset != "disabled" {
		t.Errorf("after the installation the unit is %q, want what the preset says", preset)
	}

	c.run(t, `printf 'http:\n  listen: 127.0.0.1:9999\n' >>`+config+`; systemctl disable edr-sensor; mkdir -p /var/lib/edr-sensor; touch /var/lib/edr-sensor/x`)
	rpm("-U /tmp/new.rpm")
	if out := c.run(t, "cat "+config); !strings.Contains(out, "127.0.0.1:9999") {
		t.Error("the administrator's configuration is gone")
	}
	c.want(t, config+".rpmnew", true)
	c.want(t, enabled, false)
	c.run(t, "systemctl mask edr-sensor")
	rpm("-U --oldpackage /tmp/old.rpm")
	if got := c.run(t, "readlink "+masked); got != "/dev/null\n" {
		t.Errorf("masked, and after a downgrade: %s", got)
	}
	c.run(t, "systemctl unmask edr-sensor && systemctl enable edr-sensor")

	c.run(t, "printf 'buffer:\n  capp: 1GiB\n' >/etc/edr-sensor/conf.d/10-wrong.yaml")
	if out := rpm("-U /tmp/new.rpm"); !strings.Contains(out, "10-wrong.yaml:2:3") {
		t.Errorf("a wrong configuration, and the package says:\n%s", out)
	}
	c.want(t, enabled, true)

	rpm("-e edr-sensor")
	c.want(t, enabled, false)
	c.want(t, config+".rpmsave", true)
	c.want(t, "/var/lib/edr-sensor/x", true)
	kept := `/etc/edr-sensor(/conf\.d(/10-wrong\.yaml)?|/edr-sensor\.yaml\.rpm(save|new))?|/var/lib/edr-sensor(/x)?`
	if left := c.left(t, system+"|"+kept); len(left) > 0 {
		t.Errorf("erased, and still there: %s", strings.Join(left, " "))
	}
}

// TestInstallWithoutSystemd: an image without systemd gets the user nevertheless.
func TestInstallWithoutSystemd(t *testing.T) {
	b := packages(t)
	c := newChroot(t)
	c.add(t, find(t, b.current, "*_amd64.deb"), "new.deb")
	c.add(t, find(t, b.current, "*.x86_64.rpm"), "new.rpm")
	c.run(t, "rm -f /usr/bin/systemctl /usr/bin/systemd-sysusers /bin/systemctl /bin/systemd-sysusers")
	c.run(t, "dpkg -i /tmp/new.deb </dev/null")
	c.wantUser(t)
	c.run(t, "dpkg --purge edr-sensor && userdel edr-sensor")
	for _, do := range []string{"-i /tmp/new.rpm", "-e edr-sensor"} {
		// Debian's rpm says that it is not Debian's way; a scriptlet must say nothing.
		if out := c.run(t, "rpm --nodeps "+do+" 2>&1 | grep -v '^rpm: ' || true"); out != "" {
			t.Errorf("rpm %s says: %s", do, out)
		}
		c.wantUser(t) // which an rpm leaves, too
	}
}
