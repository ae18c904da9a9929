// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// collectHost gathers what a kernel allows and how it is set up.
func collectHost(b *bundle) {
	read := func(path string) string {
		text, err := os.ReadFile(path)
		if err != nil {
			return err.Error()
		}
		return strings.TrimSpace(string(text))
	}
	var name unix.Utsname
	_ = unix.Uname(&name) // no buffer of ours can be bad
	facts := map[string]any{
		"release": unix.ByteSliceToString(name.Release[:]), "build": unix.ByteSliceToString(name.Version[:]), "machine": unix.ByteSliceToString(name.Machine[:]),
		"security_modules": read("/sys/kernel/security/lsm"), "lockdown": read("/sys/kernel/security/lockdown"),
		"cpus_online": read("/sys/devices/system/cpu/online"), "uptime": read("/proc/uptime"), "load": read("/proc/loadavg"),
		"pressure_cpu": read("/proc/pressure/cpu"), "pressure_io": read("/proc/pressure/io"), "pressure_memory": read("/proc/pressure/memory"),
		"cgroup_controllers": read("/sys/fs/cgroup/cgroup.controllers"), "boot_options": bootOptions(read("/proc/cmdline")),
		"user": os.Geteuid(),
	}
	if st, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		facts["btf"] = err.Error()
	} else {
		facts["btf"] = st.Size()
	}
	for path, keys := range map[string][]string{"/etc/os-release": {"PRETTY_NAME", "ID", "VERSION_ID"}, "/proc/meminfo": {"MemTotal", "MemAvailable", "SwapTotal"}} {
		for line := range strings.Lines(read(path)) {
			if key, value, ok := strings.Cut(strings.TrimSpace(line), map[bool]string{true: "=", false: ":"}[path == "/etc/os-release"]); ok && slices.Contains(keys, key) {
				facts[strings.ToLower(key)] = strings.Trim(value, `" `)
			}
		}
	}
	settings := map[string]string{}
	for _, key := range []string{
		"kernel/unprivileged_bpf_disabled", "kernel/perf_event_paranoid", "kernel/kptr_restrict", "kernel/io_uring_disabled", "kernel/bpf_stats_enabled",
		"kernel/ftrace_enabled", "kernel/pid_max", "net/core/bpf_jit_enable", "net/core/bpf_jit_harden", "net/core/bpf_jit_limit", "vm/overcommit_memory",
	} {
		settings[strings.ReplaceAll(key, "/", ".")] = read("/proc/sys/" + key)
	}
	facts["sysctl"] = settings
	b.addJSON("host.json", "the kernel and its settings", facts, nil)
}

// bootOptions are those that say what a sensor may see. Others may be secrets.
func bootOptions(cmdline string) (out []string) {
	for word := range strings.FieldsSeq(cmdline) {
		name, _, _ := strings.Cut(word, "=")
		switch name {
		case "lsm", "security", "lockdown", "apparmor", "selinux", "audit", "cgroup_no_v1", "systemd.unified_cgroup_hierarchy", "mitigations", "nosmp", "maxcpus", "isolcpus", "mem":
			out = append(out, word)
		}
	}
	return out
}

// peer is the process that listens on the socket, 0 if there is none.
func (c *control) peer(ctx context.Context) (pid int) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.socket)
	if err != nil {
		return 0
	}
	defer conn.Close()
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// collectProcess tells what the sensor's process uses, and what it holds of the kernel.
func collectProcess(b *bundle, pid int) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	// Its variables are not in the report: what is secret in them must not be, either.
	if environ, err := os.ReadFile(filepath.Join(dir, "environ")); err == nil {
		b.redact.environment(strings.Split(string(environ), "\x00"))
	} else {
		b.omit("what the sensor's variables hold", "they cannot be read, so that only what looks like a secret is taken out: %v", err)
	}
	var out bytes.Buffer
	section := func(path string) string {
		text, err := os.ReadFile(path)
		if err != nil {
			text = []byte(err.Error() + "\n")
		}
		fmt.Fprintf(&out, "== %s\n%s\n", path, bytes.TrimSpace(text))
		return string(text)
	}
	for _, name := range []string{"status", "limits", "stat", "schedstat", "io", "smaps_rollup", "oom_score_adj"} {
		section(filepath.Join(dir, name))
	}
	for line := range strings.Lines(section(filepath.Join(dir, "cgroup"))) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			for _, name := range []string{"memory.current", "memory.peak", "memory.max", "memory.high", "memory.events", "cpu.max", "cpu.stat", "pids.current", "pids.max"} {
				section(filepath.Join("/sys/fs/cgroup", path, name))
			}
		}
	}
	b.add("process.txt", "what the sensor's process uses, and its limits", out.Bytes(), nil)

	var held bytes.Buffer
	descriptors, err := os.ReadDir(filepath.Join(dir, "fd"))
	for _, fd := range descriptors {
		kind, e := os.Readlink(filepath.Join(dir, "fd", fd.Name()))
		if e != nil || !strings.Contains(kind, "bpf") {
			continue
		}
		fmt.Fprintf(&held, "== %s\n", kind)
		info, e := os.ReadFile(filepath.Join(dir, "fdinfo", fd.Name()))
		if e != nil {
			info = []byte(e.Error())
		}
		for line := range strings.Lines(string(info)) {
			switch key, _, _ := strings.Cut(line, ":"); key {
			case "pos", "flags", "mnt_id", "ino": // of every descriptor
			default:
				held.WriteString(line)
			}
		}
	}
	b.add("bpf.txt", "the programs, maps and links that the sensor holds", held.Bytes(), err)
}
