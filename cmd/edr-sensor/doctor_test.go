// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/sensor"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// goodHost is a host on which every check passes.
func goodHost() fstest.MapFS {
	return fstest.MapFS{
		"sys/kernel/btf/vmlinux":                {},
		"sys/kernel/security/lsm":               {Data: []byte("lockdown,capability,bpf\n")},
		"sys/kernel/security/lockdown":          {Data: []byte("none [integrity] confidentiality\n")},
		"proc/sys/kernel/perf_event_paranoid":   {Data: []byte("2\n")},
		"proc/sys/kernel/io_uring_disabled":     {Data: []byte("0\n")},
		"sys/fs/cgroup/cgroup.controllers":      {},
		"proc/self/status":                      {Data: []byte("Name:\tx\nCapEff:\t000001ffffffffff\n")},
		"proc/self/unrelated/but/here/for/size": {},
	}
}

func examined(t *testing.T, change func(*doctor, fstest.MapFS, *config.Config)) map[string]finding {
	t.Helper()
	host := goodHost()
	c := config.Default()
	c.Buffer.Dir = filepath.Join(t.TempDir(), "state", "buffer")
	c.Buffer.Cap = 16 * config.MiB
	d := &doctor{
		host: sensor.Preflight{
			Root: host, Release: "6.1.0-28-amd64",
			Enter: func() error { return unix.EFAULT }, Create: func() error { return nil }, Peek: func() error { return nil },
		},
		hooks: func() ([]sensor.Coverage, error) {
			return []sensor.Coverage{{Event: "process.exec", Required: true, Hook: "tp_btf/sched_process_exec"}, {Event: "net.close", Hook: "raw_tp/inet_sock_set_state", Errs: []string{"load x: EPERM"}}}, nil
		},
		redis: func(context.Context, config.Transport) []finding {
			return []finding{{"redis.reachable", pass, "r", ""}}
		},
		answers: func(context.Context, string) error { return nil },
	}
	d.explain = func() (config.Config, error) { return c, nil }
	if change != nil {
		change(d, host, &c)
	}
	d.examine(t.Context())
	byID := map[string]finding{}
	for _, f := range d.findings {
		if _, twice := byID[f.ID]; twice {
			t.Errorf("%s twice", f.ID)
		}
		if f.Verdict != pass && f.Found == "" {
			t.Errorf("%s says nothing", f.ID)
		}
		byID[f.ID] = f
	}
	return byID
}

func TestDoctorOfAGoodHost(t *testing.T) {
	found := examined(t, nil)
	var ids []string
	for _, id := range sorted(found) {
		ids = append(ids, id)
		if found[id].Verdict != pass || found[id].Remedy != "" {
			t.Errorf("%+v", found[id])
		}
	}
	// Scripts and documents refer to these.
	want := []string{
		"config.files", "config.permissions", "config.valid", "hooks.net.close", "hooks.process.exec", "kernel.bpf", "kernel.btf", "kernel.cgroup", "kernel.io_uring",
		"kernel.lockdown", "kernel.lsm", "kernel.perf_event_paranoid", "kernel.release", "privileges.capabilities", "redis.reachable", "sensor.running", "state.place", "state.space", "state.writable",
	}
	if d := cmp.Diff(want, ids); d != "" {
		t.Errorf("checks (-want +got):\n%s", d)
	}
}

// set makes a file of the host say something else.
func set(path, content string) func(*doctor, fstest.MapFS, *config.Config) {
	return func(_ *doctor, h fstest.MapFS, _ *config.Config) { h[path] = &fstest.MapFile{Data: []byte(content)} }
}

// hooked has creations of files be seen by a hook.
func hooked(hook string) func() ([]sensor.Coverage, error) {
	return func() ([]sensor.Coverage, error) { return []sensor.Coverage{{Event: "file.create", Hook: hook}}, nil }
}

func TestDoctorFindings(t *testing.T) {
	for _, c := range []struct {
		name    string
		change  func(*doctor, fstest.MapFS, *config.Config)
		id      string
		verdict verdict
		text    string // part of what was found or of the remedy
	}{
		{"old kernel", func(d *doctor, _ fstest.MapFS, _ *config.Config) { d.host.Release = "5.9.1" }, "kernel.release", fail, "5.10 or newer"},
		{"no BTF", func(_ *doctor, h fstest.MapFS, _ *config.Config) { delete(h, "sys/kernel/btf/vmlinux") }, "kernel.btf", fail, "CONFIG_DEBUG_INFO_BTF"},
		{"locked down", set("sys/kernel/security/lockdown", "none integrity [confidentiality]"), "kernel.lockdown", fail, "lockdown=integrity"},
		{"bpf refused", func(d *doctor, _ fstest.MapFS, _ *config.Config) {
			d.host.Create = func() error { return unix.EPERM }
		}, "kernel.bpf", fail, "lockdown,capability,bpf"},
		{"memory refused", func(d *doctor, h fstest.MapFS, _ *config.Config) {
			d.host.Release, d.host.Create = "5.10.0", func() error { return unix.EPERM }
			h["proc/self/limits"] = &fstest.MapFile{Data: []byte("Max locked memory 65536 65536 bytes\n")}
		}, "kernel.memlock", fail, "65536 bytes"},
		{"memory of the rings refused", func(d *doctor, _ fstest.MapFS, _ *config.Config) {
			d.hooks = func() ([]sensor.Coverage, error) {
				return nil, fmt.Errorf("create: %w", &sensor.Refusal{Check: sensor.CheckMemlock, Cause: "too large", Remedy: "LimitMEMLOCK"})
			}
		}, "kernel.memlock", fail, "LimitMEMLOCK"},
		{"cgroup v1", func(_ *doctor, h fstest.MapFS, _ *config.Config) { delete(h, "sys/fs/cgroup/cgroup.controllers") }, "kernel.cgroup", warn, "version 2"},
		{"no privileges", set("proc/self/status", "CapEff:\t0000000000000000\n"), "privileges.capabilities", fail, "lacks CAP_BPF and CAP_PERFMON"},
		{"hooks not tried without", set("proc/self/status", "CapEff:\t0000000000000000\n"), "hooks", warn, "not tried"},
		{
			"few privileges", set("proc/self/status", fmt.Sprintf("CapEff:\t%016x\n", 1<<38|1<<39)), "privileges.capabilities", warn,
			"AmbientCapabilities=CAP_SYS_PTRACE CAP_DAC_READ_SEARCH",
		},
		{"LSM not active, fentry in its place", func(d *doctor, h fstest.MapFS, _ *config.Config) {
			set("sys/kernel/security/lsm", "lockdown,yama\n")(d, h, nil)
			d.hooks = hooked("fentry/security_path_mknod")
		}, "kernel.lsm", pass, "fentry sees the same"},
		{"LSM not active, kprobes in its place", func(d *doctor, h fstest.MapFS, _ *config.Config) {
			set("sys/kernel/security/lsm", "lockdown,yama\n")(d, h, nil)
			d.hooks = hooked("kprobe/security_path_mknod")
		}, "kernel.lsm", warn, "boot with lsm=lockdown,yama,bpf"},
		{"LSM not active, nothing tried", func(d *doctor, h fstest.MapFS, _ *config.Config) {
			set("sys/kernel/security/lsm", "lockdown,yama\n")(d, h, nil)
			d.hooks = hooked("")
		}, "kernel.lsm", pass, "bpf is not among them"},
		{"LSM not visible", func(_ *doctor, h fstest.MapFS, _ *config.Config) { delete(h, "sys/kernel/security/lsm") }, "kernel.lsm", pass, "securityfs is not mounted"},
		{"paranoid, and nothing needs kprobes", set("proc/sys/kernel/perf_event_paranoid", "3"), "kernel.perf_event_paranoid", pass, "no event needs one"},
		{"paranoid, and kprobes are the best", func(d *doctor, h fstest.MapFS, _ *config.Config) {
			set("proc/sys/kernel/perf_event_paranoid", "4\n")(d, h, nil)
			d.hooks = hooked("raw_tp/sys_exit")
		}, "kernel.perf_event_paranoid", warn, "sysctl kernel.perf_event_paranoid=2"},
		{"io_uring unseen", func(d *doctor, _ fstest.MapFS, _ *config.Config) { d.hooks = hooked("raw_tp/sys_exit") }, "kernel.io_uring", warn, "io_uring_disabled=2"},
		{"io_uring off", func(d *doctor, h fstest.MapFS, _ *config.Config) {
			set("proc/sys/kernel/io_uring_disabled", "2\n")(d, h, nil)
			d.hooks = hooked("raw_tp/sys_exit")
		}, "kernel.io_uring", pass, "is 2"},
		{"files by system calls", func(d *doctor, _ fstest.MapFS, _ *config.Config) {
			d.hooks = func() ([]sensor.Coverage, error) {
				return []sensor.Coverage{{Event: "file.create", Hook: "raw_tp/sys_exit", Errs: []string{"load lsm_path_mknod: EPERM"}}}, nil
			}
		}, "hooks.file.create", warn, "fentry"},
		{"required hook missing", func(d *doctor, _ fstest.MapFS, _ *config.Config) {
			d.hooks = func() ([]sensor.Coverage, error) {
				return []sensor.Coverage{{Event: "process.exec", Required: true, Errs: []string{"load a: EPERM", "load b: EPERM"}}}, nil
			}
		}, "hooks.process.exec", fail, "load a: EPERM; load b: EPERM"},
		{"optional hook missing", func(d *doctor, _ fstest.MapFS, _ *config.Config) {
			d.hooks = func() ([]sensor.Coverage, error) {
				return []sensor.Coverage{{Event: "net.close", Errs: []string{"x"}}}, nil
			}
		}, "hooks.net.close", warn, "runs without"},
		{"maps refused", func(d *doctor, _ fstest.MapFS, _ *config.Config) {
			d.hooks = func() ([]sensor.Coverage, error) { return nil, errors.New("create map: EPERM") }
		}, "hooks", fail, "create map"},
		{"wrong configuration", func(d *doctor, _ fstest.MapFS, _ *config.Config) {
			d.explain = func() (config.Config, error) { return config.Load("/nonexistent.yaml", nil) }
		}, "config.valid", fail, "1 problem; the first: /nonexistent.yaml: no such file"},
		{"missing password", func(_ *doctor, _ fstest.MapFS, c *config.Config) { c.Transport.PasswordFile = "/nonexistent" }, "config.files", fail, "/nonexistent: no such file"},
		{"a place in memory", func(_ *doctor, _ fstest.MapFS, c *config.Config) { c.Buffer.Dir = "/dev/shm/buffer" }, "state.place", fail, "set buffer.dir to a directory on a local disk"},
		{"no room", func(_ *doctor, _ fstest.MapFS, c *config.Config) { c.Buffer.Cap = 1 << 60 }, "state.space", fail, "lower buffer.cap"},
		{"no sensor", func(d *doctor, _ fstest.MapFS, _ *config.Config) {
			d.answers = func(context.Context, string) error { return errors.New("no sensor answers") }
		}, "sensor.running", warn, "systemctl start"},
		{"open secrets", func(_ *doctor, _ fstest.MapFS, c *config.Config) {
			path := filepath.Join(filepath.Dir(filepath.Dir(c.Buffer.Dir)), "pw")
			if err := os.WriteFile(path, []byte("x\n"), 0o600); err != nil {
				panic(err)
			}
			if err := os.Chmod(path, 0o644); err != nil {
				panic(err)
			}
			c.Transport.PasswordFile = path
		}, "config.permissions", warn, "chmod"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, ok := examined(t, c.change)[c.id]
			if !ok || f.Verdict != c.verdict || !strings.Contains(f.Found+" | "+f.Remedy, c.text) {
				t.Errorf("%s: %+v, want %s with %q", c.id, f, c.verdict, c.text)
			}
		})
	}
}

func TestJudgements(t *testing.T) {
	for _, c := range []struct {
		got  finding
		want verdict
	}{
		{judgePolicy("noeviction", "0"), pass},
		{judgePolicy("volatile-lru", "100"), pass}, // streams have no expiry
		{judgePolicy("allkeys-lru", "100"), fail},
		{judgePolicy("allkeys-random", "0"), warn},
		{judgePolicy("", ""), warn},
		{judgeVersion("6.2.7"), fail},
		{judgeVersion("7.0.15"), pass},
		{judgeVersion(""), pass},
		{judgePersistence("0"), warn},
		{judgePersistence("1"), pass},
	} {
		if c.got.Verdict != c.want || c.want != pass && c.got.Remedy == "" {
			t.Errorf("%+v, want %s", c.got, c.want)
		}
	}
}

func TestExamineRedis(t *testing.T) {
	verdicts := func(findings []finding) map[string]verdict {
		m := map[string]verdict{}
		for _, f := range findings {
			m[f.ID] = f.Verdict
		}
		return m
	}
	c := config.Default().Transport
	if d := cmp.Diff(map[string]verdict{"redis.reachable": warn}, verdicts(examineRedis(t.Context(), c))); d != "" {
		t.Errorf("without address (-want +got):\n%s", d)
	}
	c.Address = "unix:///nonexistent/r.sock"
	if d := cmp.Diff(map[string]verdict{"redis.reachable": fail}, verdicts(examineRedis(t.Context(), c))); d != "" {
		t.Errorf("away (-want +got):\n%s", d)
	}
	server := redistest.Start(t, redistest.Options{AOF: "everysec", Config: map[string]string{"maxmemory": "64mb", "maxmemory-policy": "allkeys-lru", "requirepass": "p"}, Password: "p"})
	c.Address = server.Addr()
	if d := cmp.Diff(map[string]verdict{"redis.reachable": pass, "redis.auth": fail}, verdicts(examineRedis(t.Context(), c))); d != "" {
		t.Errorf("without password (-want +got):\n%s", d)
	}
	c.PasswordFile = filepath.Join(t.TempDir(), "pw")
	if err := os.WriteFile(c.PasswordFile, []byte("p\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := map[string]verdict{"redis.reachable": pass, "redis.auth": pass, "redis.version": pass, "redis.maxmemory_policy": fail, "redis.persistence": pass}
	if d := cmp.Diff(want, verdicts(examineRedis(t.Context(), c))); d != "" {
		t.Errorf("with password (-want +got):\n%s", d)
	}
}

func TestDoctorCommand(t *testing.T) {
	dir := t.TempDir()
	path := configFor(t, "agent: {state_dir: "+dir+"}\ncontrol: {socket: "+dir+"/none.sock}\nbuffer: {cap: 16MiB}\ntransport: {address: \"unix:///nonexistent/r.sock\"}\n")
	code, out, errs := run(t, "doctor", "--json", "--config", path)
	var answer struct {
		Version string    `json:"version"`
		Checks  []finding `json:"checks"`
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil || answer.Version == "" || len(answer.Checks) < 10 || errs != "" {
		t.Fatalf("%v: %s%s", err, out, errs)
	}
	if code != exitFailure { // Redis cannot be reached
		t.Errorf("exit code %d", code)
	}
	code, out, _ = run(t, "doctor", "--config", path)
	if code != exitFailure || !strings.Contains(out, "FAIL  redis.reachable") || !strings.Contains(out, " failed\n") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
}

func TestDoctorReportSaysARemedyOnce(t *testing.T) {
	d := doctor{findings: []finding{
		{"a.a", warn, "first", "mend it"},
		{"a.b", warn, "second", "mend it"},
		{"a.c", pass, "third", ""},
		{"a.d", fail, "fourth", "mend it"},
	}}
	const want = `WARN  a.a                         first
WARN  a.b                         second
                                  → mend it
PASS  a.c                         third
FAIL  a.d                         fourth
                                  → mend it
1 passed, 2 warnings, 1 failed
`
	if diff := cmp.Diff(want, d.report(false)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
