// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// hook is one place in the kernel where events are seen.
type hook struct {
	kinds    []event.Kind
	required bool        // the sensor makes no sense without
	chain    []candidate // that see the same, best first
	// arguments are names that parameters of the kernel's functions must have, in a
	// row; what stands before the first of them differs between kernels.
	arguments []string
	// syscalls are the kinds that system calls tell where the whole chain is refused.
	syscalls []event.Kind
	// constant is what the programs of later hooks are told by, if this one is attached.
	constant string
	// copies is how many of a tracepoint's program are attached, if more than one.
	copies int
	copy   int // the one to load, from 0
}

// candidate is functions of bpf/sensor.bpf.c that do a hook's work together. A
// question mark stands before what is left out on kernels that have no such function.
type candidate []string

// acceptsSeen is a constant of bpf/net.bpf.h.
const acceptsSeen = "accepts_seen"

// hooks returns every hook in the order of attaching. Fork and exit come first:
// they keep the process tree of the scope, which the others ask.
func hooks(files bool, copies int) []hook {
	list := []hook{
		{kinds: kinds(event.Fork), required: true, chain: tracepoint("sched_process_fork"), copies: copies},
		{kinds: kinds(event.Exit), required: true, chain: tracepoint("sched_process_exit"), copies: copies},
		{kinds: kinds(event.Exec), required: true, chain: tracepoint("sched_process_exec"), copies: copies},
		{kinds: kinds(event.TCPAccept), chain: security("sock_graft"), constant: acceptsSeen},
		{
			kinds: kinds(event.TCPConnect, event.TCPConnectFailed, event.TCPListen, event.TCPClose),
			chain: tracepoint("inet_sock_set_state"), copies: copies,
		},
		{kinds: kinds(event.Task), chain: []candidate{{"on_task"}}},
		{kinds: kinds(event.Signal), chain: tracepoint("signal_generate"), copies: copies},
		{kinds: kinds(event.Ptrace), chain: security("ptrace_access_check"), syscalls: kinds(event.Ptrace)},
	}
	if files {
		list = append(list, fileHooks()...)
	}
	if copies > 1 { // tasks are preempted inside of programs
		for _, h := range list {
			slices.SortStableFunc(h.chain, func(a, b candidate) int { return trampoline(a) - trampoline(b) })
		}
	}
	return list
}

// trampoline is 1 for a candidate that the kernel leaves out for a task while another one
// is preempted inside of it, like those on tracepoints since 7.0. LSM programs have no
// such guard, and those on kprobes are not preempted.
func trampoline(c candidate) int {
	if strings.HasPrefix(c[0], "fentry_") {
		return 1
	}
	return 0
}

// fileHooks are those for changes of the file system.
func fileHooks() []hook {
	dentry := []string{"dentry"}
	return []hook{
		{kinds: kinds(event.FileModify), syscalls: kinds(event.FileOpenWrite), chain: []candidate{
			{"lsm_file_open", "lsm_file_release"},
			{"lsm_file_open", "fentry___fput"},
			{"fentry_file_open", "fentry_file_release"},
			{"fentry_file_open", "fentry___fput"},
			{"kprobe_file_open", "kprobe_file_release"},
			{"kprobe_file_open", "kprobe___fput"},
		}},
		file(event.FileCreate, security("path_mknod")),
		file(event.FileRename, security("path_rename"), "old_dir", "old_dentry", "new_dir", "new_dentry", "flags"),
		file(event.FileDelete, security("path_unlink", "path_rmdir")),
		file(event.FileLink, security("path_link")),
		file(event.FileSymlink, security("path_symlink")),
		file(event.FileMkdir, security("path_mkdir")),
		{
			kinds:     kinds(event.FileChmod, event.FileChown, event.FileTruncate, event.FileTimes),
			syscalls:  kinds(event.FileChmod, event.FileChown, event.FileTruncate, event.FileTimes),
			chain:     security("inode_setattr"),
			arguments: dentry,
		},
		file(event.FileXattr, security("inode_setxattr", "inode_removexattr", "?inode_set_acl", "?inode_remove_acl"), dentry...),
		file(event.FileChattr, slices.Concat(
			[]candidate{{"lsm_inode_file_setattr"}, {"fentry_vfs_fileattr_set"}, {"kprobe_vfs_fileattr_set"}},
			security("file_ioctl", "?file_ioctl_compat"),
		)),
		file(event.Mount, security("sb_mount")),
		file(event.Umount, security("sb_umount")),
		file(event.MountMove, security("move_mount")),
	}
}

func kinds(list ...event.Kind) []event.Kind { return list }

// tracepoint lists the forms of a program on a tracepoint.
func tracepoint(name string) []candidate {
	return []candidate{{"on_" + name}, {"raw_" + name}}
}

// security lists the forms of programs on security hooks.
func security(names ...string) []candidate {
	var chain []candidate
	for _, form := range []string{"lsm_", "fentry_", "kprobe_"} {
		var c candidate
		for _, name := range names {
			if rest, optional := strings.CutPrefix(name, "?"); optional {
				c = append(c, "?"+form+rest)
			} else {
				c = append(c, form+name)
			}
		}
		chain = append(chain, c)
	}
	return chain
}

// file is a hook for one kind of change, which system calls can tell as well.
func file(kind event.Kind, chain []candidate, arguments ...string) hook {
	return hook{kinds: kinds(kind), chain: chain, arguments: arguments, syscalls: kinds(kind)}
}

// Coverage says by which hook an event is seen on this host.
type Coverage struct {
	Event    string // event code, as in metadata.event_code
	Kind     event.Kind
	Required bool
	Hook     string   // e.g. "tp_btf/sched_process_exec"; empty when the event is missing
	Blind    string   // by which way the event happens unseen in spite of the hook, if any
	Errs     []string // why better candidates were refused, in order
}

// attachment is what became of a hook.
type attachment struct {
	hook
	candidate int    // of the chain that was taken
	section   string // of its programs, empty when none was
	programs  []*ebpf.Program
	spares    []*ebpf.Program // further copies of the only program
	links     []link.Link     // of programs, then of spares
	errs      []error         // against those that are not used
	lost      error           // why what is attached no longer works
}

// loader loads the programs of a hook. It returns nil without an error for an
// optional program that this kernel has no use for.
type loader func(h hook, program string) (*ebpf.Program, *ebpf.ProgramSpec, error)

// attach tries the hook's candidates in turn and keeps the first that the kernel
// loads and attaches. Trying is the only probe that tells the truth: the
// kernel's list of features does not know what a security policy refuses.
func (h hook) attach(load loader) attachment {
	a := attachment{hook: h}
	for i := range h.chain {
		if err := a.take(i, load); err != nil {
			a.errs = append(a.errs, errors.Join(err, a.detach()))
			continue
		}
		break
	}
	return a
}

// take attaches a candidate of the chain with its copies. After an error some programs
// may be attached; without a copy the hook works nevertheless.
func (a *attachment) take(i int, load loader) error {
	if err := a.try(a.chain[i], load); err != nil {
		return err
	}
	a.candidate = i
	for n := 2; n <= a.copies; n++ {
		h := a.hook
		h.copy = n - 1
		if err := a.spare(h, a.chain[i][0], load); err != nil {
			a.errs = append(a.errs, fmt.Errorf("copy %d: %w", n, err))
		}
	}
	return nil
}

// spare attaches one more copy of a program.
func (a *attachment) spare(h hook, name string, load loader) error {
	program, spec, err := load(h, name)
	if err != nil {
		return fmt.Errorf("load %s: %w", name, err)
	}
	l, err := attachProgram(program, spec)
	if err != nil {
		return errors.Join(fmt.Errorf("attach %s to %s: %w", name, spec.SectionName, err), program.Close())
	}
	a.spares, a.links = append(a.spares, program), append(a.links, l)
	return nil
}

// missed is how many runs the kernel left out, of all copies at least: what one of them
// was left out for, another one has reported.
func (a *attachment) missed() (uint64, error) {
	var sum, least uint64
	for i, p := range append(slices.Clip(a.programs), a.spares...) {
		stats, err := p.Stats()
		if err != nil {
			return sum, fmt.Errorf("read statistics of %s: %w", a.section, err)
		}
		switch n := stats.RecursionMisses; {
		case i < len(a.programs):
			sum += n
			least = sum
		default:
			least = min(least, n)
		}
	}
	return least, nil
}

// try attaches all programs of a candidate. After an error some of them may be.
func (a *attachment) try(c candidate, load loader) error {
	var sections []string
	for _, name := range c {
		program, spec, err := load(a.hook, name)
		if err != nil {
			return fmt.Errorf("load %s: %w", strings.TrimPrefix(name, "?"), err)
		}
		if program == nil {
			continue
		}
		a.programs = append(a.programs, program)
		l, err := attachProgram(program, spec)
		if err != nil {
			return fmt.Errorf("attach %s to %s: %w", strings.TrimPrefix(name, "?"), spec.SectionName, err)
		}
		a.links = append(a.links, l)
		sections = append(sections, spec.SectionName)
	}
	a.section = strings.Join(sections, ", ")
	return nil
}

// detach removes the programs. What was attached is still told by the section.
func (a *attachment) detach() error {
	var errs []error
	for _, l := range a.links {
		errs = append(errs, l.Close())
	}
	for _, p := range append(slices.Clip(a.programs), a.spares...) {
		errs = append(errs, p.Close())
	}
	a.links, a.programs, a.spares = nil, nil, nil
	return errors.Join(errs...)
}

// attachProgram attaches a program where its section says.
func attachProgram(program *ebpf.Program, spec *ebpf.ProgramSpec) (link.Link, error) {
	switch {
	case spec.Type == ebpf.RawTracepoint:
		return link.AttachRawTracepoint(link.RawTracepointOptions{Name: spec.AttachTo, Program: program})
	case spec.Type == ebpf.Kprobe:
		return link.Kprobe(spec.AttachTo, program, nil)
	case spec.Type == ebpf.LSM:
		return link.AttachLSM(link.LSMOptions{Program: program})
	case spec.AttachType == ebpf.AttachTraceIter:
		return link.AttachIter(link.IterOptions{Program: program})
	default:
		return link.AttachTracing(link.TracingOptions{Program: program, AttachType: spec.AttachType})
	}
}

// coverage lists every event of the kernel; before attach all are missing.
func (k *kernel) coverage() []Coverage {
	var list []Coverage
	for _, a := range k.hooks() {
		errs := sentences(a.errs)
		if a.lost != nil {
			errs = append(errs, fmt.Sprintf("%s is lost: %s", a.section, a.lost))
		}
		blind := ""
		if a.section == sysExit {
			blind = "io_uring" // makes no system calls
		}
		for _, kind := range a.kinds {
			list = append(list, Coverage{Event: kind.String(), Kind: kind, Required: a.required, Hook: a.seenBy(), Blind: blind, Errs: errs})
		}
	}
	return list
}

// sentences is what errors say, a line each, once. The advice that the library adds to
// every refusal is about kernels before 5.11, and misleading since.
func sentences(errs []error) []string {
	list := make([]string, len(errs))
	tidy := strings.NewReplacer("\n", ": ", " (MEMLOCK may be too low, consider rlimit.RemoveMemlock)", "")
	for i, err := range errs {
		list[i] = tidy.Replace(err.Error())
	}
	return slices.Compact(list)
}

// find returns the attachment for a kind of event, nil when there is none.
func (k *kernel) find(kind event.Kind) *attachment {
	for i := range k.attached {
		if slices.Contains(k.attached[i].kinds, kind) {
			return &k.attached[i]
		}
	}
	return nil
}
