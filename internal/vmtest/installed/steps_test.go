// SPDX-License-Identifier: Apache-2.0

package installed

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/logging"
)

// started wants the service to run as the unit says: as its user, with four capabilities
// and no way to more. Its figures go to the log.
func (m *machine) started(version string) {
	m.t.Helper()
	m.equal("is-enabled", m.says("systemctl is-enabled "+unit), "enabled")
	m.equal("is-active", m.says("systemctl is-active "+unit), "active")
	m.equal("user", m.run("getent passwd edr-sensor | cut -d: -f6-7"), "/var/lib/edr-sensor:/usr/sbin/nologin")
	m.contain("version", m.run("edr-sensor version"), version)
	state := m.read("/proc/" + m.pid() + "/status")
	// CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE, CAP_PERFMON and CAP_BPF
	const capabilities = "000000c000080004"
	m.contain("the process", state, "CapEff:\t"+capabilities, "CapPrm:\t"+capabilities, "CapBnd:\t"+capabilities, "NoNewPrivs:\t1", "Seccomp:\t2", "Uid:\t"+m.run("id -u edr-sensor")+"\t")
	m.equal("mode of the state directory", m.run("stat -c '%U %a' /var/lib/edr-sensor"), "edr-sensor 700")
	m.t.Logf("start-up took %s", m.startup())
}

// startup is how long the unit took from its process to READY=1.
func (m *machine) startup() time.Duration {
	m.t.Helper()
	at := func(property string) time.Duration {
		n, err := strconv.ParseInt(m.show(property), 10, 64)
		if err != nil {
			m.t.Fatal(err)
		}
		return time.Duration(n) * time.Microsecond
	}
	return (at("ActiveEnterTimestampMonotonic") - at("ExecMainStartTimestampMonotonic")).Round(time.Millisecond)
}

// figures logs what the unit takes, and how exposed systemd thinks it is.
func (m *machine) figures() {
	m.t.Helper()
	exposure := m.run("systemd-analyze security --no-pager " + unit + " | grep -o 'exposure level.*: [0-9.]*'")
	score, err := strconv.ParseFloat(exposure[strings.LastIndex(exposure, " ")+1:], 64)
	if err != nil || score > 2.5 {
		m.t.Errorf("exposure %q (%v), want at most 2.5", exposure, err)
	}
	mib := func(path, pattern string) string {
		found := regexp.MustCompile(`(?m)` + pattern).FindStringSubmatch(m.says("cat " + path))
		if found == nil {
			return "?"
		}
		n, err := strconv.ParseFloat(found[1], 64)
		if err != nil {
			m.t.Fatal(err)
		}
		if strings.HasSuffix(found[0], "kB") {
			n *= 1024
		}
		return fmt.Sprintf("%.1f MiB", n/(1<<20))
	}
	group := "/sys/fs/cgroup" + m.show("ControlGroup")
	process := "/proc/" + m.pid() + "/status"
	m.t.Logf("systemd %s, Linux %s: exposure %.1f, start-up %s, memory of the unit %s (peak %s; anonymous %s, files %s, kernel %s), resident %s (peak %s, anonymous %s), CPU %s, descriptors kept %s",
		strings.Fields(m.run("systemctl --version"))[1], m.run("uname -r"), score, m.startup(),
		mib(group+"/memory.current", `^(\d+)`), mib(group+"/memory.peak", `^(\d+)`),
		mib(group+"/memory.stat", `^anon (\d+)`), mib(group+"/memory.stat", `^file (\d+)`), mib(group+"/memory.stat", `^kernel (\d+)`),
		mib(process, `^VmRSS:\s*(\d+) kB`), mib(process, `^VmHWM:\s*(\d+) kB`), mib(process, `^RssAnon:\s*(\d+) kB`),
		regexp.MustCompile(`usage_usec \d+`).FindString(m.says("cat "+group+"/cpu.stat")), m.show("NFileDescriptorStore"))
}

// delivers connects the sensor to a Redis.
func (m *machine) delivers() {
	m.t.Helper()
	m.serve()
	m.run("edr-sensor check && systemctl restart edr-sensor")
	m.marker()
	m.delivered()
}

// tells looks at all places where the sensor says how it is.
func (m *machine) tells(version string) {
	m.t.Helper()
	m.equal("version of the status", m.awaitMode(agent.Online).Version, version)
	m.await("a transport that is connected", func() string { // the mode stays through a short outage
		if s := m.status(); s.Transport.State != "connected" {
			return s.Transport.State
		}
		return ""
	})
	for _, path := range []string{"/healthz", "/readyz"} {
		m.await(path, func() string { // a machine short of CPU has it shed for a while
			if code, body := m.get(path); code != 200 {
				return fmt.Sprintf("%d %s", code, body)
			}
			return ""
		})
	}
	code, body := m.get("/metrics")
	m.equal("/metrics", strconv.Itoa(code), "200")
	m.contain("/metrics", body, `agent_build_info{`, `version="`+version+`"`)
	if !regexp.MustCompile(`(?m)^transport_delivered_records_total\{.*\} [1-9]`).MatchString(body) {
		m.t.Errorf("/metrics has nothing delivered:\n%s", strings.Join(regexp.MustCompile(`(?m)^transport_.*`).FindAllString(body, -1), "\n"))
	}
	for _, command := range []string{"edr-sensor status", "systemctl status --no-pager edr-sensor"} {
		m.await(command, func() string {
			if said := m.says(command); !strings.Contains(said, "online") {
				return said
			}
			return ""
		})
	}
}

// journal wants priorities and context in the journal, of an outage of Redis that it makes.
func (m *machine) journal() {
	m.t.Helper()
	id := m.status().AgentID
	m.run("edr-sensor case open --case-id C-17 --subtree 1 && edr-sensor case close C-17")
	m.run("systemctl stop vm-redis")
	m.await("NOT_DELIVERING in the journal", func() string {
		if m.status().Mode == agent.Buffering && len(m.entries("MESSAGE_ID="+logging.MessageID("NOT_DELIVERING"))) > 0 {
			return ""
		}
		return m.says("edr-sensor status | head -5")
	})
	m.marker()
	m.startRedis()
	m.delivered()
	for _, want := range []struct{ code, priority string }{
		{"START", "6"}, {"MODE", "6"}, {"NOT_DELIVERING", "4"}, {"DELIVERING", "6"}, {"CASE_OPENED", "6"},
	} {
		// DELIVERING is said when Redis has answered, and has what it is about by then.
		m.await(fmt.Sprintf("an entry with code %s, priority %s, agent %s and component", want.code, want.priority, id), func() string {
			list := m.entries("MESSAGE_ID=" + logging.MessageID(want.code))
			if !slices.ContainsFunc(list, func(e map[string]any) bool {
				return e["AGENT_ID"] == id && e["PRIORITY"] == want.priority && e["CODE"] == want.code && e["COMPONENT"] != nil && e["SYSLOG_IDENTIFIER"] == "edr-sensor"
			}) {
				return fmt.Sprint(list)
			}
			return ""
		})
	}
	if list := m.entries("CASE_ID=C-17"); len(list) == 0 {
		m.t.Error("no entry with CASE_ID=C-17")
	}
	for _, e := range m.entries() {
		if e["UNBOUND"] != nil {
			m.t.Errorf("an entry without context: %v", e)
		}
		if e["SYSLOG_IDENTIFIER"] == "edr-sensor" && e["_TRANSPORT"] == "journal" && e["AGENT_ID"] == nil {
			m.t.Errorf("an entry of no agent: %v", e)
		}
	}
}

// killed has the sensor killed while programs run, and wants nothing missed.
func (m *machine) killed() {
	m.t.Helper()
	pid, before := m.pid(), m.seen.decisions("TAKEN_OVER")
	restarts, err := strconv.Atoi(m.show("NRestarts"))
	if err != nil {
		m.t.Fatal(err)
	}
	m.through(func() {
		m.run("kill -9 " + pid)
		m.awaitAnother(pid)
	})
	m.equal("restarts", m.show("NRestarts"), strconv.Itoa(restarts+1))
	m.decided("TAKEN_OVER", before)
}

// watchdog stops the sensor as a deadlock would.
func (m *machine) watchdog() {
	m.t.Helper()
	// Long enough for a slow machine to feed it, short enough to be waited for.
	m.write("/etc/systemd/system/edr-sensor.service.d/watchdog.conf", "[Service]\nWatchdogSec=30s\nTimeoutAbortSec=2s\n")
	m.run("systemctl daemon-reload && systemctl restart edr-sensor")
	pid := m.pid()
	m.run("kill -STOP " + pid)
	m.awaitAnother(pid)
	m.logged("journalctl --no-pager -u edr-sensor | grep -i watchdog", "Watchdog timeout")
	m.remove("/etc/systemd/system/edr-sensor.service.d")
	pid = m.pid()
	m.run("systemctl daemon-reload && systemctl restart edr-sensor")
	m.awaitAnother(pid)
	m.marker()
	m.delivered()
}

const wrong = confd + "90-wrong.yaml"

// refuses wants a wrong configuration to end the service, once and with the right code.
func (m *machine) refuses() {
	m.t.Helper()
	m.write(wrong, "buffer:\n  capp: 1GiB\n")
	if out, err := m.try("systemctl restart edr-sensor"); err == nil {
		m.t.Errorf("started with a wrong configuration: %s", out)
	}
	m.await("the unit to have failed", func() string {
		// What waits for its next start is "activating", and comes to "failed" never.
		if got := m.run("systemctl show -p ActiveState,SubState,ExecMainStatus,NRestarts " + unit); !strings.Contains(got, "ActiveState=failed") || !strings.Contains(got, "SubState=failed") {
			return got
		}
		return ""
	})
	m.equal("exit code", m.show("ExecMainStatus"), "78")
	m.equal("restarts", m.show("NRestarts"), "0")
	m.logged("journalctl --no-pager -o cat -u edr-sensor -n 30", "90-wrong.yaml:2:3", "did you mean buffer.cap?")
	m.remove(wrong)
	stopped := m.seen.decisions("BLIND_STOPPED")
	m.run("systemctl start edr-sensor")
	m.marker()
	m.delivered()
	m.decided("BLIND_STOPPED", stopped) // what nobody saw is named
}

// reloads wants a wrong configuration to change nothing, and a good one to be followed.
func (m *machine) reloads() {
	m.t.Helper()
	pid, reloaded, rejected := m.pid(), m.seen.decisions("CONFIG_RELOADED"), m.seen.decisions("CONFIG_REJECTED")
	m.write(wrong, "log: {level: debug}\nbuffer:\n  capp: 1GiB\n")
	if out, err := m.try("systemctl reload edr-sensor"); err == nil {
		m.t.Errorf("reloaded a wrong configuration: %s", out)
	}
	m.running(pid)
	m.logged("journalctl --no-pager -o cat -u edr-sensor -n 30", "90-wrong.yaml:3:3", "did you mean buffer.cap?")
	m.marker()
	m.delivered()
	m.decided("CONFIG_REJECTED", rejected)

	m.write(wrong, "log: {level: debug}\n")
	m.run("systemctl reload edr-sensor")
	m.running(pid)
	m.contain("edr-sensor log", m.run("edr-sensor log"), "debug")
	m.decided("CONFIG_RELOADED", reloaded)
	m.remove(wrong)
	m.run("systemctl reload edr-sensor")
	m.running(pid)
	// systemd gives each command of a service its sandbox, mounted over the sensor's files.
	m.equal("alarms about mounts", m.says("journalctl --no-pager -o cat -u edr-sensor | grep 'TAMPERING.*file[.][a-z_]*mount'"), "")
	m.marker()
	m.delivered()
}

// edited is what an administrator changes in the configuration itself.
const edited = "\n    max_size: 63MiB\n"

func (m *machine) edit() {
	m.t.Helper()
	m.run("sed -i 's/^    #max_size: .*/    max_size: 63MiB/' " + config)
	m.contain(config, m.read(config), edited)
}

// changes runs an upgrade or downgrade while programs run, and wants the edited
// configuration to stay, another process, and nothing missed.
func (m *machine) changes(command, version string) (said string) {
	m.t.Helper()
	pid, before := m.pid(), m.seen.decisions("TAKEN_OVER")
	m.through(func() {
		start := time.Now()
		said = m.run(command)
		m.t.Logf("%s took %s", command, time.Since(start).Round(100*time.Millisecond))
		m.awaitAnother(pid)
	})
	m.contain("version", m.run("edr-sensor version"), version)
	m.equal("version that runs", m.status().Version, version)
	m.contain(config, m.read(config), edited)
	m.decided("TAKEN_OVER", before)
	m.equal("is-enabled", m.says("systemctl is-enabled "+unit), "enabled")
	return said
}

// respects wants an upgrade to leave alone what the administrator disabled and masked,
// and returns what it says.
func (m *machine) respects(there, back string) (said string) {
	m.t.Helper()
	m.run("systemctl disable --now edr-sensor")
	said = m.run(there)
	m.equal("disabled, and after an upgrade", m.says("systemctl is-enabled "+unit), "disabled")
	m.equal("stopped, and after an upgrade", m.says("systemctl is-active "+unit), "inactive")
	m.run("systemctl mask edr-sensor")
	said = strings.TrimSpace(said + "\n" + m.run(back))
	m.contain("masked, and after an upgrade", m.says("systemctl is-enabled "+unit), "masked")
	m.equal("masked, and after an upgrade", m.says("systemctl is-active "+unit), "inactive")
	m.run("systemctl unmask edr-sensor && systemctl enable --now edr-sensor")
	m.marker()
	m.delivered()
	return said
}

// stops wants an orderly end, and the events that were missed to be named.
func (m *machine) stops() {
	m.t.Helper()
	m.marker()
	start := time.Now()
	m.run("systemctl stop edr-sensor")
	m.t.Logf("the stop took %s", time.Since(start).Round(100*time.Millisecond))
	m.equal("state", m.show("ActiveState"), "inactive")
	m.equal("result", m.show("Result"), "success")
	m.equal("exit code", m.show("ExecMainStatus"), "0")
	m.equal("descriptors kept", m.show("NFileDescriptorStore"), "0")
	// What a machine short of CPU does not send within seconds, it sends at its next start.
	if said := m.says("journalctl --no-pager -o cat -u edr-sensor -n 20"); !strings.Contains(said, "records stay in the buffer for the next start") {
		m.delivered()
	}
}

// reboot is what a test leaves to the one that runs after a reboot. That it is there asks
// testdata/installed.sh for one.
const reboot = "reboot"

type beforeReboot struct {
	Agent, Epoch string
	Markers      int
	Acked        uint64
}

func (m *machine) reboots() {
	m.t.Helper()
	s := m.status()
	state, err := json.Marshal(beforeReboot{Agent: s.AgentID, Epoch: s.Buffer.Epoch, Markers: m.next, Acked: s.Transport.Acked})
	if err != nil {
		m.t.Fatal(err)
	}
	m.write(reboot, string(state))
}

// rebooted wants the sensor up by itself, as the same agent with the same buffer, with all
// from before delivered once and the time in between named.
func (m *machine) rebooted() {
	m.t.Helper()
	var before beforeReboot
	if err := json.Unmarshal([]byte(m.read(reboot)), &before); err != nil {
		m.t.Fatal(err)
	}
	m.await("the unit to be active", func() string {
		if state := m.show("ActiveState"); state != "active" {
			return state
		}
		return ""
	})
	m.connect()
	m.next = before.Markers
	m.marker()
	m.delivered()
	m.decided("BLIND_REBOOT", 0)
	s := m.status()
	m.equal("agent", s.AgentID, before.Agent)
	m.equal("epoch", s.Buffer.Epoch, before.Epoch)
	if s.Transport.Acked <= before.Acked {
		m.t.Errorf("%d records acknowledged, before the reboot %d", s.Transport.Acked, before.Acked)
	}
	m.t.Logf("start-up at boot took %s", m.startup())
}
