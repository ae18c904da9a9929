// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// hook is one place in the kernel where events are seen.
type hook struct {
	kinds    []event.Kind
	required bool     // the sensor makes no sense without
	programs []string // functions of bpf/sensor.bpf.c that do the same, best first
}

// hooks returns every hook in the order of attaching. Fork and exit come first:
// they keep the process tree of the scope, which the others ask.
func hooks() []hook {
	tcp := []event.Kind{event.TCPConnect, event.TCPConnectFailed, event.TCPAccept, event.TCPListen, event.TCPClose}
	return []hook{
		{[]event.Kind{event.Fork}, true, []string{"on_sched_process_fork", "raw_sched_process_fork"}},
		{[]event.Kind{event.Exit}, true, []string{"on_sched_process_exit", "raw_sched_process_exit"}},
		{[]event.Kind{event.Exec}, true, []string{"on_sched_process_exec", "raw_sched_process_exec"}},
		{tcp, false, []string{"on_inet_sock_set_state", "raw_inet_sock_set_state"}},
		{[]event.Kind{event.Task}, false, []string{"on_task"}},
	}
}

// Coverage says by which hook an event is seen on this host.
type Coverage struct {
	Event    string // event code, as in metadata.event_code
	Kind     event.Kind
	Required bool
	Hook     string   // e.g. "tp_btf/sched_process_exec"; empty when the event is missing
	Errs     []string // why better candidates were refused, in order
}

// attachment is what became of a hook.
type attachment struct {
	hook
	section string // of the program that runs, empty when none does
	program *ebpf.Program
	link    link.Link
	errs    []error
}

// attach tries the hook's programs in turn and keeps the first that the kernel
// loads and attaches. Trying is the only probe that tells the truth: the
// kernel's list of features does not know what a security policy refuses.
func (h hook) attach(load func(program string) (*ebpf.Program, *ebpf.ProgramSpec, error)) attachment {
	a := attachment{hook: h}
	for _, name := range h.programs {
		program, spec, err := load(name)
		if err != nil {
			a.errs = append(a.errs, fmt.Errorf("load %s: %w", name, err))
			continue
		}
		l, err := attachProgram(program, spec)
		if err != nil {
			a.errs = append(a.errs, errors.Join(fmt.Errorf("attach %s to %s: %w", name, spec.SectionName, err), program.Close()))
			continue
		}
		a.section, a.program, a.link = spec.SectionName, program, l
		break
	}
	return a
}

// attachProgram attaches a program where its section says.
func attachProgram(program *ebpf.Program, spec *ebpf.ProgramSpec) (link.Link, error) {
	switch {
	case spec.Type == ebpf.RawTracepoint:
		return link.AttachRawTracepoint(link.RawTracepointOptions{Name: spec.AttachTo, Program: program})
	case spec.AttachType == ebpf.AttachTraceIter:
		return link.AttachIter(link.IterOptions{Program: program})
	default:
		return link.AttachTracing(link.TracingOptions{Program: program, AttachType: spec.AttachType})
	}
}

// coverage lists every event of the kernel; before attach all are missing.
func (k *kernel) coverage() []Coverage {
	var list []Coverage
	for _, a := range k.attached {
		errs := make([]string, len(a.errs))
		for i, err := range a.errs {
			errs[i] = err.Error()
		}
		for _, kind := range a.kinds {
			list = append(list, Coverage{Event: kind.String(), Kind: kind, Required: a.required, Hook: a.section, Errs: errs})
		}
	}
	return list
}
