// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"fmt"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const (
	allCapabilities = 1<<41 - 1
	fourOfThem      = 1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON | 1<<unix.CAP_SYS_PTRACE | 1<<unix.CAP_DAC_READ_SEARCH
)

// status is what /proc/self/status says.
func status(capabilities uint64, seccomp int) *fstest.MapFile {
	return &fstest.MapFile{Data: fmt.Appendf(nil, "Name:\tx\nCapEff:\t%016x\nSeccomp:\t%d\nSeccomp_filters:\t%d\n", capabilities, seccomp, seccomp)}
}

// welcome is a host that refuses nothing.
func welcome() (Preflight, fstest.MapFS) {
	root := fstest.MapFS{
		btfFile:             {},
		lsmFile:             {Data: []byte("lockdown,capability,bpf\n")},
		lockdownFile:        {Data: []byte("[none] integrity confidentiality\n")},
		statusFile:          status(allCapabilities, 0),
		"proc/self/uid_map": {Data: []byte("         0          0 4294967295\n")},
		"proc/self/limits":  {Data: []byte("Limit  Soft Limit  Hard Limit  Units\nMax locked memory         65536                65536                bytes     \n")},
	}
	return Preflight{
		Root: root, Release: "6.1.0-56-cloud-amd64",
		Enter: func() error { return unix.EFAULT }, Create: func() error { return nil }, Peek: func() error { return nil },
	}, root
}

func TestRefusals(t *testing.T) {
	refuse := func(err error) func() error { return func() error { return err } }
	const run = "run it as root, or with AmbientCapabilities= in its systemd unit"
	for _, tt := range []struct {
		name   string
		change func(*Preflight, fstest.MapFS)
		want   []string // check, and its sentence
	}{
		{"nothing", func(*Preflight, fstest.MapFS) {}, nil},
		{"four capabilities in a systemd sandbox", func(_ *Preflight, root fstest.MapFS) { root[statusFile] = status(fourOfThem, 2) }, nil},
		{"CAP_SYS_ADMIN contains the others", func(_ *Preflight, root fstest.MapFS) { root[statusFile] = status(1<<unix.CAP_SYS_ADMIN, 0) }, nil},
		{"5.10", func(p *Preflight, _ fstest.MapFS) { p.Release = "5.10.0-46-cloud-amd64" }, nil},
		{"release unknown", func(p *Preflight, _ fstest.MapFS) { p.Release = "" }, nil},
		{"5.9", func(p *Preflight, _ fstest.MapFS) { p.Release = "5.9.16" }, []string{
			"kernel.release: Linux 5.9.16 is older than the sensor's programs can run on: boot 5.10 or newer",
		}},
		{"4.19", func(p *Preflight, _ fstest.MapFS) { p.Release = "4.19.0-27-amd64" }, []string{
			"kernel.release: Linux 4.19.0-27-amd64 is older than the sensor's programs can run on: boot 5.10 or newer",
		}},
		{"no BTF", func(_ *Preflight, root fstest.MapFS) { delete(root, btfFile) }, []string{
			"kernel.btf: this kernel does not describe its types (/sys/kernel/btf/vmlinux is missing), so no program can be fitted to it: " +
				"boot one built with CONFIG_DEBUG_INFO_BTF, and give a container the host's /sys",
		}},
		{"integrity", func(_ *Preflight, root fstest.MapFS) {
			root[lockdownFile] = &fstest.MapFile{Data: []byte("none [integrity] confidentiality\n")}
		}, nil},
		{"confidentiality", func(_ *Preflight, root fstest.MapFS) {
			root[lockdownFile] = &fstest.MapFile{Data: []byte("none integrity [confidentiality]\n")}
		}, []string{
			"kernel.lockdown: lockdown=confidentiality forbids programs to read kernel memory: boot with lockdown=integrity, or none",
		}},
		{"lockdown that is not visible", func(p *Preflight, root fstest.MapFS) {
			delete(root, lockdownFile)
			p.Peek = refuse(fmt.Errorf("load program: %w", unix.EINVAL))
		}, []string{
			"kernel.lockdown: the kernel forbids programs to read its memory, as lockdown=confidentiality does (/sys/kernel/security/lockdown is not there to say so): " +
				"boot with lockdown=integrity, or none",
		}},
		{"nobody knows", func(p *Preflight, root fstest.MapFS) {
			delete(root, lockdownFile)
			p.Peek = refuse(unix.EPERM)
		}, nil},
		{"no capabilities", func(p *Preflight, root fstest.MapFS) {
			root[statusFile], p.Enter = status(0, 0), refuse(unix.EPERM)
		}, []string{
			"privileges.capabilities: loading programs into the kernel needs the capabilities CAP_BPF and CAP_PERFMON, and this process lacks CAP_BPF and CAP_PERFMON: " + run,
		}},
		{"no proc", func(_ *Preflight, root fstest.MapFS) { delete(root, statusFile) }, []string{
			"privileges.capabilities: /proc/self/status cannot be read, so nothing can be said of this process or any other: mount proc on /proc",
		}},
		{"no CAP_PERFMON", func(_ *Preflight, root fstest.MapFS) { root[statusFile] = status(1<<unix.CAP_BPF, 0) }, []string{
			"privileges.capabilities: loading programs into the kernel needs the capabilities CAP_BPF and CAP_PERFMON, and this process lacks CAP_PERFMON: " + run,
		}},
		{"user namespace", func(_ *Preflight, root fstest.MapFS) {
			root["proc/self/uid_map"] = &fstest.MapFile{Data: []byte("         0       1000          1\n")}
		}, []string{
			"privileges.capabilities: the capabilities of this process count in its own user namespace only, and loading programs needs those of the host: " +
				"run it outside of rootless containers, and without PrivateUsers= in its systemd unit",
		}},
		{"seccomp", func(p *Preflight, root fstest.MapFS) {
			root[statusFile], p.Enter = status(fourOfThem, 2), refuse(unix.EPERM)
		}, []string{
			"kernel.bpf: a seccomp filter refuses the bpf system call (operation not permitted): " +
				"allow it: SystemCallFilter=bpf in a systemd unit, bpf in a container's seccomp profile",
		}},
		{"no such call", func(p *Preflight, _ fstest.MapFS) { p.Enter = refuse(unix.ENOSYS) }, []string{
			"kernel.bpf: this kernel refuses the bpf system call (function not implemented): boot one built with CONFIG_BPF_SYSCALL",
		}},
		{"policy", func(p *Preflight, _ fstest.MapFS) { p.Create = refuse(unix.EACCES) }, []string{
			"kernel.bpf: the policy of a security module (lockdown,capability,bpf) refuses to make a BPF map (permission denied): allow this program to use bpf in that policy",
		}},
		{"policy nobody sees", func(p *Preflight, root fstest.MapFS) {
			p.Create = refuse(unix.EPERM)
			delete(root, lsmFile)
		}, []string{
			"kernel.bpf: the policy of a security module (which ones are active is not visible) refuses to make a BPF map (operation not permitted): " +
				"allow this program to use bpf in that policy",
		}},
		{"locked memory", func(p *Preflight, _ fstest.MapFS) { p.Release, p.Create = "5.10.0", refuse(unix.EPERM) }, []string{
			"kernel.memlock: the smallest map is more than the 65536 bytes that this process may lock, which count before Linux 5.11: " +
				"set LimitMEMLOCK=infinity in the systemd unit (ulimit -l unlimited), or give it CAP_SYS_RESOURCE",
		}},
		{"memory", func(p *Preflight, _ fstest.MapFS) { p.Create = refuse(unix.ENOMEM) }, []string{
			"kernel.bpf: the kernel does not make the smallest map (cannot allocate memory): give the service's control group more memory, or choose smaller rings",
		}},
		{"several", func(p *Preflight, root fstest.MapFS) {
			p.Release = "5.4.0"
			delete(root, btfFile)
			root[statusFile] = status(0, 0)
		}, []string{
			"kernel.release: Linux 5.4.0 is older than the sensor's programs can run on: boot 5.10 or newer",
			"kernel.btf: this kernel does not describe its types (/sys/kernel/btf/vmlinux is missing), so no program can be fitted to it: " +
				"boot one built with CONFIG_DEBUG_INFO_BTF, and give a container the host's /sys",
			"privileges.capabilities: loading programs into the kernel needs the capabilities CAP_BPF and CAP_PERFMON, and this process lacks CAP_BPF and CAP_PERFMON: " + run,
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, root := welcome()
			tt.change(&p, root)
			var got []string
			for _, r := range p.Refusals() {
				got = append(got, r.Check+": "+r.Error())
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestLacking(t *testing.T) {
	for _, tt := range []struct {
		name         string
		release      string
		capabilities uint64
		limit        string
		want         string
	}{
		{"all", "6.1.0", allCapabilities, "65536", ""},
		{"four", "6.1.0", fourOfThem, "65536", ""},
		{"two", "6.1.0", 1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON, "65536", "CAP_SYS_PTRACE CAP_DAC_READ_SEARCH"},
		{"four, 5.10", "5.10.0", fourOfThem, "65536", "CAP_SYS_RESOURCE"},
		{"four, 5.10, no limit", "5.10.0", fourOfThem, "unlimited", ""},
		{"five, 5.10", "5.10.0", fourOfThem | 1<<unix.CAP_SYS_RESOURCE, "65536", ""},
	} {
		p, root := welcome()
		p.Release = tt.release
		root[statusFile] = status(tt.capabilities, 0)
		root["proc/self/limits"] = &fstest.MapFile{Data: []byte("Max locked memory  " + tt.limit + "  " + tt.limit + "  bytes\n")}
		var got []string
		for _, l := range p.Lacking() {
			if l.Cost == "" {
				t.Errorf("%s: %s costs nothing", tt.name, l.Capability)
			}
			got = append(got, l.Capability)
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s: lacks %v, want %s", tt.name, got, tt.want)
		}
	}
}

// What the looking itself finds on a host that runs all the other tests.
func TestRootPreflight(t *testing.T) {
	require(t, "root")
	require(t, "btf")
	p := NewPreflight()
	for _, r := range p.Refusals() {
		t.Error(r)
	}
	// Asked only where securityfs does not tell.
	if err := p.Peek(); err != nil {
		t.Errorf("read kernel memory: %v", err)
	}
}
