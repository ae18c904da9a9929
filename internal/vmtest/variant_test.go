// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"cmp"
	"slices"
	"testing"
)

// variant is a host that is not like the others: a kernel with other security modules,
// and suites with other privileges.
type variant struct {
	kernel  string // a release
	name    string
	seconds int    // of CPU that its tests take, about
	lsm     string // security modules, those of the other boots without it
	suites  []suite
}

// withoutBPF has LSM programs load, attach and never run.
const withoutBPF = "lockdown,capability,landlock,yama,apparmor"

// Privileges of a systemd unit, as the tests of the sensor take them.
const (
	fourCapabilities = "CAP_BPF CAP_PERFMON CAP_SYS_PTRACE CAP_DAC_READ_SEARCH"
	// Locked memory counts before 5.11.
	fiveCapabilities = fourCapabilities + " CAP_SYS_RESOURCE"
)

// asUser is the sensor's suite, run as uid 1000 under Debian's own setting: perf events,
// and with them kprobes, are for CAP_SYS_ADMIN. No event may be missing for that.
func asUser(capabilities, hooks string) suite {
	return suite{
		dir: "sensor", name: "sensor-as-uid-1000", run: "Root",
		// Kprobes are refused, as is asking for run statistics, and the rest of these has
		// nothing to do with privileges and takes long.
		skip: costTests + "|EveryProgram|StuckStage|CarryOn|AdoptRefuses|AdoptWhileMending|LostForGood|Copies|DeepLifts|" +
			"Files(Excluded|Suppressed)|FilterChangesLive|Heartbeat|Counters|Waiter|^TestRootEveryWay$/(fentry|kprobe|raw)",

		before: "echo 3 >/proc/sys/kernel/perf_event_paranoid",
		env:    "EDR_CAPABILITIES='" + capabilities + "' EDR_HOOKS=" + hooks,
	}
}

// built is the tests of the built edr-sensor.
func built(name, before, run string) suite {
	return suite{dir: command, name: name, before: before, run: run, env: "EDR_BINARY=/bin/edr-sensor"}
}

// variants returns the hosts that are variants of one with such a kernel.
func variants(of []release) (hosts []host) {
	allowed := func(name, before string) suite {
		return suite{dir: "sensor", name: name, run: "TestRootAllowedHooks", before: before, env: "EDR_HOOKS=fentry/"}
	}
	for _, v := range []variant{
		{kernel: "5.10", name: "user without bpf in lsm=", seconds: 85, lsm: withoutBPF, suites: []suite{ // as Debian boots it
			asUser(fiveCapabilities, "fentry/"),
			built("binary", "", "TestRefused/locked_memory|TestRunAsUser"),
		}},
		{kernel: "6.1", name: "user", seconds: 85, suites: []suite{asUser(fourCapabilities, "lsm/,fentry/"), built("binary", "", "TestRunAsUser")}},
		{kernel: "6.12", name: "without bpf in lsm=", seconds: 20, lsm: withoutBPF, suites: []suite{
			allowed("told", ""),
			allowed("self-test", "umount /sys/kernel/security"), // so that nobody tells
			built("refused", "mount -t securityfs securityfs /sys/kernel/security", "TestRefused"),
			built("locked-down", "echo confidentiality >/sys/kernel/security/lockdown", "TestRefused/lockdown"),
		}},
	} {
		if i := slices.IndexFunc(of, func(r release) bool { return r.name() == v.kernel }); i >= 0 {
			hosts = append(hosts, host{v.kernel + " " + v.name, v.seconds, func(t *testing.T, b *builder) {
				b.boot(t, of[i], cmp.Or(v.lsm, securityModules), v.suites)
			}})
		}
	}
	return hosts
}
