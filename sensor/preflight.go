// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// Refusal is why the sensor cannot run here: a fact about the host or this process,
// not a fault of the sensor. Nothing but the remedy helps, so starting again does not.
type Refusal struct {
	Check  string // what was looked at, by the name that edr-sensor doctor has for it
	Cause  string // names the object
	Remedy string
}

func (r *Refusal) Error() string { return r.Cause + ": " + r.Remedy }

// Lack is a capability that this process does not have, and what the sensor then
// does not see.
type Lack struct{ Capability, Cost string }

// Preflight looks at what decides whether this process may load the sensor's programs.
// The causes of a refusal are told apart by looking, because the kernel has one error
// for most of them.
type Preflight struct {
	Root    fs.FS // the root directory
	Release string
	// Enter makes the bpf system call with a bad pointer, which the kernel answers with
	// EFAULT once the call has reached it. Create makes the smallest map. Peek loads a
	// program that reads kernel memory, which is EINVAL where that is forbidden.
	Enter, Create, Peek func() error
}

// NewPreflight looks at this host and this process.
func NewPreflight() Preflight {
	var u unix.Utsname
	_ = unix.Uname(&u) // fails for bad pointers only
	return Preflight{Root: os.DirFS("/"), Release: unix.ByteSliceToString(u.Release[:]), Enter: enterBPF, Create: createMap, Peek: peekKernel}
}

// The files that are looked at, below the root.
const (
	btfFile      = "sys/kernel/btf/vmlinux"
	lsmFile      = "sys/kernel/security/lsm"
	lockdownFile = "sys/kernel/security/lockdown"
	statusFile   = "proc/self/status"
)

// The checks that a refusal can be about.
const (
	CheckRelease      = "kernel.release"
	CheckBTF          = "kernel.btf"
	CheckLockdown     = "kernel.lockdown"
	CheckBPF          = "kernel.bpf"
	CheckMemlock      = "kernel.memlock"
	CheckCapabilities = "privileges.capabilities"
	CheckHooks        = "hooks"
)

// Refusals returns what keeps the sensor from running, most fundamental first; none
// when it can at least start.
func (p Preflight) Refusals() []*Refusal {
	var list []*Refusal
	refuse := func(check, cause, remedy string) {
		list = append(list, &Refusal{Check: check, Cause: cause, Remedy: remedy})
	}
	if p.before(5, 10) {
		refuse(CheckRelease, "Linux "+p.Release+" is older than the sensor's programs can run on", "boot 5.10 or newer")
	}
	if _, err := fs.Stat(p.Root, btfFile); err != nil {
		refuse(CheckBTF, "this kernel does not describe its types (/"+btfFile+" is missing), so no program can be fitted to it",
			"boot one built with CONFIG_DEBUG_INFO_BTF, and give a container the host's /sys")
	}
	if p.Lockdown() == "confidentiality" {
		refuse(CheckLockdown, "lockdown=confidentiality forbids programs to read kernel memory", "boot with lockdown=integrity, or none")
	}
	self := p.self()
	switch missing := self.missing(); {
	case p.read(statusFile) == "":
		refuse(CheckCapabilities, "/"+statusFile+" cannot be read, so nothing can be said of this process or any other", "mount proc on /proc")
		return list
	case len(missing) > 0:
		refuse(CheckCapabilities, "loading programs into the kernel needs the capabilities CAP_BPF and CAP_PERFMON, and this process lacks "+strings.Join(missing, " and "),
			"run it as root, or with AmbientCapabilities= in its systemd unit")
		return list // bpf is refused for this reason
	case self.nested:
		refuse(CheckCapabilities, "the capabilities of this process count in its own user namespace only, and loading programs needs those of the host",
			"run it outside of rootless containers, and without PrivateUsers= in its systemd unit")
		return list
	}
	switch err := p.Enter(); {
	case errors.Is(err, unix.EFAULT):
	case self.filtered:
		refuse(CheckBPF, fmt.Sprintf("a seccomp filter refuses the bpf system call (%v)", err),
			"allow it: SystemCallFilter=bpf in a systemd unit, bpf in a container's seccomp profile")
		return list
	default:
		refuse(CheckBPF, fmt.Sprintf("this kernel refuses the bpf system call (%v)", err), "boot one built with CONFIG_BPF_SYSCALL")
		return list
	}
	if err := p.Create(); err != nil {
		return append(list, p.mapRefused("the smallest map", err))
	}
	if p.Lockdown() == "" && errors.Is(p.Peek(), unix.EINVAL) {
		refuse(CheckLockdown, "the kernel forbids programs to read its memory, as lockdown=confidentiality does (/"+lockdownFile+" is not there to say so)",
			"boot with lockdown=integrity, or none")
	}
	return list
}

// mapRefused tells why the kernel did not make a map, when all of the above is in order.
func (p Preflight) mapRefused(what string, err error) *Refusal {
	if errno := unix.Errno(0); errors.As(err, &errno) {
		err = errno // without what the library suspects
	}
	soft, _ := p.memlock()
	switch {
	case errors.Is(err, unix.EPERM) && p.before(5, 11) && soft != "unlimited":
		return &Refusal{
			CheckMemlock, fmt.Sprintf("%s is more than the %s bytes that this process may lock, which count before Linux 5.11", what, soft),
			"set LimitMEMLOCK=infinity in the systemd unit (ulimit -l unlimited), or give it CAP_SYS_RESOURCE",
		}
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		return &Refusal{
			CheckBPF, fmt.Sprintf("the policy of a security module (%s) refuses to make a BPF map (%v)", orUnknown(p.read(lsmFile)), err),
			"allow this program to use bpf in that policy",
		}
	default:
		return &Refusal{
			CheckBPF, fmt.Sprintf("the kernel does not make %s (%v)", what, err),
			"give the service's control group more memory, or choose smaller rings",
		}
	}
}

// Lacking returns the capabilities that the sensor can do without, at a cost.
func (p Preflight) Lacking() []Lack {
	self := p.self()
	var list []Lack
	lack := func(capability string, bit int, cost string) {
		if self.capabilities&(1<<bit) == 0 {
			list = append(list, Lack{capability, cost})
		}
	}
	lack("CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE, "programs in containers, and programs that were deleted, are not hashed")
	lack("CAP_DAC_READ_SEARCH", unix.CAP_DAC_READ_SEARCH, "programs that not everybody may read are not hashed")
	if _, hard := p.memlock(); p.before(5, 11) && hard != "unlimited" {
		lack("CAP_SYS_RESOURCE", unix.CAP_SYS_RESOURCE, "maps and rings must fit into the locked memory limit of "+hard+" bytes (LimitMEMLOCK=infinity does as well)")
	}
	return list
}

// Lockdown is the kernel's lockdown mode, empty where it has none or does not say.
func (p Preflight) Lockdown() string {
	_, mode, _ := strings.Cut(p.read(lockdownFile), "[")
	mode, _, _ = strings.Cut(mode, "]")
	return mode
}

// SecurityModules lists the active ones; nil where the kernel does not say.
func (p Preflight) SecurityModules() []string {
	list := p.read(lsmFile)
	if list == "" {
		return nil
	}
	return strings.Split(list, ",")
}

// before reports whether the kernel is older than a version; not when its own cannot be
// read.
func (p Preflight) before(major, minor int) bool {
	var a, b int
	n, _ := fmt.Sscanf(p.Release, "%d.%d", &a, &b)
	return n == 2 && (a < major || a == major && b < minor)
}

func (p Preflight) read(path string) string {
	b, err := fs.ReadFile(p.Root, path)
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(b))
}

// self is what this process is allowed.
type self struct {
	capabilities uint64 // effective
	filtered     bool   // by seccomp
	nested       bool   // in a user namespace that is not the first
}

func (p Preflight) self() self {
	// The first user namespace maps every id to itself.
	f := strings.Fields(p.read("proc/self/uid_map"))
	s := self{nested: len(f) > 0 && !slices.Equal(f, []string{"0", "0", "4294967295"})}
	for line := range strings.Lines(p.read(statusFile)) {
		switch key, value, _ := strings.Cut(strings.TrimSpace(line), ":\t"); key {
		case "CapEff":
			s.capabilities, _ = strconv.ParseUint(value, 16, 64)
		case "Seccomp":
			s.filtered = value != "0"
		}
	}
	return s
}

// missing lists what loading programs needs.
func (s self) missing() (names []string) {
	for _, c := range []struct {
		name string
		bit  int
	}{{"CAP_BPF", unix.CAP_BPF}, {"CAP_PERFMON", unix.CAP_PERFMON}} {
		if s.capabilities&(1<<c.bit|1<<unix.CAP_SYS_ADMIN) == 0 {
			names = append(names, c.name)
		}
	}
	return names
}

// memlock is how much memory the process may lock, and how far it may raise that, in
// bytes or "unlimited".
func (p Preflight) memlock() (soft, hard string) {
	for line := range strings.Lines(p.read("proc/self/limits")) {
		if values, ok := strings.CutPrefix(line, "Max locked memory"); ok {
			if f := strings.Fields(values); len(f) >= 2 {
				return f[0], f[1]
			}
		}
	}
	return "unlimited", "unlimited"
}

func orUnknown(s string) string {
	if s == "" {
		return "which ones are active is not visible"
	}
	return s
}

// enterBPF reports how the kernel answers a bpf call that it cannot read.
func enterBPF() error {
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_CREATE, 0, 8)
	return errno
}

// peekKernel loads a program that reads kernel memory, which every kernel since 5.5 takes
// when it is not locked down.
func peekKernel() error {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.RawTracepoint, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R10),
		asm.Add.Imm(asm.R1, -8),
		asm.Mov.Imm(asm.R2, 8),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnProbeReadKernel.Call(),
		asm.Mov.Imm(asm.R0, 0),
		asm.Return(),
	}})
	if err != nil {
		return err
	}
	return program.Close()
}

// createMap makes a map of one byte and drops it.
func createMap() error {
	m, err := makeMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 1, MaxEntries: 1})
	if err != nil {
		return err
	}
	return m.Close()
}
