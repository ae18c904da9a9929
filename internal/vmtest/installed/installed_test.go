// SPDX-License-Identifier: Apache-2.0

package installed

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/link"
)

// TestDelivers installs the deb, and wants the sensor to deliver and to stop in order.
func TestDelivers(t *testing.T) {
	m := newMachine(t)
	m.step("install", func() {
		m.run("dpkg -i older.deb </dev/null")
		m.started(olderVersion)
	})
	m.step("deliver", m.delivers)
	m.step("tell", func() { m.tells(olderVersion) })
	m.step("journal", m.journal)
	m.step("kill", m.killed)
	m.step("reload", m.reloads)
	m.step("figures", m.figures)
	m.step("stop", m.stops)
	m.step("start", func() {
		stopped := m.seen.decisions("BLIND_STOPPED")
		m.run("systemctl start edr-sensor")
		m.marker()
		m.delivered()
		m.decided("BLIND_STOPPED", stopped)
	})
	m.step("before the reboot", m.reboots)
}

// TestRebooted is what follows when TestDelivers has had the machine rebooted.
func TestRebooted(t *testing.T) {
	m := newMachine(t)
	m.step("after the reboot", m.rebooted)
}

// TestDeb leads the deb through its whole life.
func TestDeb(t *testing.T) {
	m := newMachine(t)
	const upgrade = "dpkg --force-confdef --force-confold -i newer.deb </dev/null"
	const downgrade = "dpkg --force-confdef --force-confold -i older.deb </dev/null"
	before, programs := files(t), attached(t)
	m.step("install", func() {
		m.run("dpkg -i older.deb </dev/null")
		m.started(olderVersion)
		m.equal("dpkg --verify", m.run("dpkg --verify edr-sensor"), "")
	})
	m.step("deliver", m.delivers)
	m.step("tell", func() { m.tells(olderVersion) })
	m.step("journal", m.journal)
	m.step("kill", m.killed)
	m.step("watchdog", m.watchdog)
	m.step("wrong configuration", m.refuses)
	m.step("reload", m.reloads)
	m.step("upgrade with an edited configuration", func() {
		m.edit()
		m.changes(upgrade, newerVersion)
		if !m.exists(config + ".dpkg-dist") {
			m.t.Error("the new configuration is not beside the edited one")
		}
	})
	m.step("figures", m.figures)
	m.step("upgrade that the configuration hinders", func() {
		pid := m.pid()
		m.write(wrong, "buffer:\n  capp: 1GiB\n")
		m.contain("dpkg", m.run("dpkg -i newer.deb </dev/null"), "90-wrong.yaml:2:3", "not restarted")
		m.running(pid)
		m.remove(wrong)
	})
	m.step("disabled and masked", func() { m.respects(downgrade, upgrade) })
	m.step("remove", func() {
		m.run("dpkg --remove edr-sensor")
		m.equal("is-active", m.says("systemctl is-active "+unit), "inactive")
		for path, want := range map[string]bool{
			"/usr/bin/edr-sensor": false, "/lib/systemd/system/" + unit: false, "/run/edr-sensor": false,
			config: true, confd + "redis.yaml": true, "/etc/edr-sensor/redis-password": true, "/var/lib/edr-sensor/buffer": true, "/var/lib/edr-sensor/agent_id": true,
		} {
			if m.exists(path) != want {
				m.t.Errorf("after the removal %s is there: %v", path, !want)
			}
		}
		m.detached(programs)
	})
	m.step("install again", func() { // goes on as the same agent
		m.run(upgrade)
		m.marker()
		m.delivered()
	})
	m.step("purge", func() {
		m.run("dpkg --purge edr-sensor")
		m.detached(programs)
		m.run("getent passwd edr-sensor") // stays, as Debian wants it
		if left := m.left(before); len(left) > 0 {
			m.t.Errorf("purged, and still there:\n%s", strings.Join(left, "\n"))
		}
		m.equal("what systemd knows", m.says("systemctl list-units --all --no-legend 'edr-sensor*'"), "")
	})
}

// TestRPM does so with the rpm and rpm's own tools, as far as the two differ.
func TestRPM(t *testing.T) {
	m := newMachine(t)
	const upgrade, downgrade = "rpm -U --nodeps newer.rpm", "rpm -U --nodeps --oldpackage older.rpm"
	// What rpm, sysusers and systemctl say of what they do. The first is of Debian's rpm,
	// which is not how Debian installs.
	usual := regexp.MustCompile(`^(rpm: |warning: ` + config + ` (created|saved) as |Creating (group|user) 'edr-sensor' |Removed .*edr-sensor\.service)`)
	// quiet wants nothing else but what is meant.
	quiet := func(said string, meant ...string) {
		m.t.Helper()
		m.contain("rpm", said, meant...)
		for line := range strings.Lines(said) {
			if !usual.MatchString(line) && !slices.ContainsFunc(meant, func(s string) bool { return strings.Contains(line, s) }) {
				m.t.Errorf("rpm says: %s", line)
			}
		}
	}
	const preset = "/etc/systemd/system-preset/99-default-disable.preset"
	m.write(preset, "disable *\n") // as on Fedora; Debian enables everything
	before, programs := files(t), attached(t)
	m.step("install", func() {
		quiet(m.run("rpm -i --nodeps older.rpm"), "installed, not started", "systemctl enable --now edr-sensor")
		m.equal("is-enabled", m.says("systemctl is-enabled "+unit), "disabled")
		m.equal("is-active", m.says("systemctl is-active "+unit), "inactive")
		m.run("systemctl enable --now edr-sensor")
		m.started(olderVersion)
		m.equal("rpm -V", m.run("rpm -V --nodeps edr-sensor"), "")
	})
	m.step("deliver", m.delivers)
	m.step("tell", func() { m.tells(olderVersion) })
	m.step("upgrade with an edited configuration", func() {
		m.edit()
		quiet(m.changes(upgrade, newerVersion))
		m.contain("the configuration beside the edited one", m.read(config+".rpmnew"), "as it is by now")
		m.equal("rpm -V", m.says("rpm -V --nodeps edr-sensor"), "S.5....T.  c "+config)
	})
	m.step("downgrade", func() { quiet(m.changes(downgrade, olderVersion)) })
	m.step("upgrade that the configuration hinders", func() {
		pid := m.pid()
		m.write(wrong, "buffer:\n  capp: 1GiB\n")
		m.contain("rpm", m.run(upgrade), "90-wrong.yaml:2:3", "not restarted")
		m.running(pid)
		m.remove(wrong)
	})
	m.step("disabled and masked", func() { quiet(m.respects(downgrade, upgrade)) })
	var id string
	m.step("erase", func() {
		id = m.status().AgentID
		quiet(m.run("rpm -e edr-sensor"))
		m.equal("is-active", m.says("systemctl is-active "+unit), "inactive")
		m.equal("what systemd knows", m.says("systemctl list-units --all --no-legend 'edr-sensor*'"), "")
		m.detached(programs)
		m.contain("the configuration that is kept", m.read(config+".rpmsave"), edited)
		m.run("getent passwd edr-sensor") // stays, as what it owns does
		// The directories in /usr/share are other packages' where rpm is at home.
		kept := regexp.MustCompile(`^(/etc/edr-sensor(/conf\.d(/redis\.yaml)?|/redis-password|/edr-sensor\.yaml\.rpm(save|new))?|/var/lib/edr-sensor(/.*)?|/usr/share/(licenses|fish(/vendor_completions\.d)?|man/man[15]|zsh/site-functions))$`)
		for _, path := range m.left(before) {
			if !kept.MatchString(path) {
				m.t.Errorf("erased, and still there: %s", path)
			}
		}
	})
	m.step("install again", func() { // goes on as the same agent, and this preset starts it
		m.remove(preset)
		stopped := m.seen.decisions("BLIND_STOPPED")
		quiet(m.run("rpm -i --nodeps newer.rpm"))
		m.started(newerVersion)
		m.equal("agent", m.status().AgentID, id)
		m.marker()
		m.delivered()
		m.decided("BLIND_STOPPED", stopped)
	})
}

// attached counts the BPF links on the machine.
func attached(t *testing.T) (n int) {
	t.Helper()
	it := new(link.Iterator)
	defer it.Close()
	for it.Next() {
		n++
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

// detached wants no more BPF links than that.
func (m *machine) detached(want int) {
	m.t.Helper()
	m.await("kernel programs to be detached", func() string {
		if n := attached(m.t); n != want {
			return fmt.Sprintf("%d are attached, before the installation %d were", n, want)
		}
		return ""
	})
}

// files lists what is on the disk and in /run.
func files(t *testing.T) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	for _, top := range []string{"/etc", "/usr", "/lib", "/var", "/run", "/root", "/opt", "/tmp", "/dev/shm"} {
		err := filepath.WalkDir(top, func(path string, _ fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			all[path] = true
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// left lists what is there and was not before, without what the system and the package
// managers write about everything.
func (m *machine) left(before map[string]bool) (list []string) {
	m.t.Helper()
	others := regexp.MustCompile(`^(/run/(systemd|log|udev|user|lock|dbus|utmp|credentials|mount)|/var/(log|cache|tmp|lib/(systemd|private|vm-redis|dpkg/(status|info/format|available|lock|triggers)|rpm))|/var/lib/dpkg/(status|diversions|statoverride)-old|/etc/(passwd|group|shadow|gshadow|subuid|subgid)-|/tmp/systemd-private|/root/\.rpmdb)`)
	for path := range files(m.t) {
		if !before[path] && !others.MatchString(path) || strings.Contains(path, "deb-systemd-helper") && strings.Contains(path, "edr-sensor") {
			list = append(list, path)
		}
	}
	return list
}
