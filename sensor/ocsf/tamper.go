// SPDX-License-Identifier: Apache-2.0

package ocsf

import (
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const (
	terminates = processClass + `"activity_id":2,"activity_name":"Terminate","type_uid":100702,"type_name":"Process Activity: Terminate",`
	signals    = processClass + `"activity_id":99,"activity_name":"Signal","type_uid":100799,"type_name":"Process Activity: Other",`
	injects    = processClass + `"activity_id":4,"activity_name":"Inject","type_uid":100704,"type_name":"Process Activity: Inject",`
)

// stops tells the signals that do not end a process.
func stops(signal int32) bool {
	switch unix.Signal(signal) {
	case unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU:
		return true
	}
	return false
}

// signal writes who sent one to the sensor.
func (e *Encoder) signal(w *writer, ev *event.Event) {
	t := &ev.Tamper
	if stops(t.Signal) {
		w.raw(signals)
	} else {
		w.raw(terminates)
	}
	w.raw(severity(ev.Severity))
	if t.Result == 0 {
		w.raw(success)
	} else {
		w.raw(failure)
	}
	w.raw(e.device)
	w.actor(ev.Creator, ev.Actor, withFile)
	w.target(ev)
	w.open(`"unmapped":{"signal":{`)
	w.uint(`"nr":`, uint64(uint32(t.Signal)))
	w.opt(`"name":`, unix.SignalName(unix.Signal(t.Signal)))
	w.int(`"si_code":`, int64(t.Code))
	switch t.Result {
	case 0:
		w.raw(`"result":"delivered",`)
	case 1:
		w.raw(`"result":"ignored",`)
	case 2:
		w.raw(`"result":"pending",`)
	default:
		w.raw(`"result":"lost",`)
	}
	w.flag(`"by_kernel":`, t.Flags&event.TamperByKernel != 0)
	w.close('}')
	w.close('}')
}

// ptrace writes who took hold of the sensor's process, or tried.
func (e *Encoder) ptrace(w *writer, ev *event.Event) {
	t := &ev.Tamper
	w.raw(injects + `"injection_type_id":99,"injection_type":"Process Control",`)
	w.raw(severity(ev.Severity))
	degraded := t.Flags&event.TamperDegraded != 0
	if degraded {
		w.raw(success)
	} else { // the hook runs before the kernel decides
		w.raw(undecided)
	}
	w.raw(e.device)
	w.actor(ev.Creator, ev.Actor, withFile)
	w.target(ev)
	w.open(`"unmapped":{"ptrace":{`)
	if !degraded {
		w.uint(`"mode":`, uint64(t.Mode))
	}
	switch t.Call {
	case event.TamperCallPtrace:
		w.raw(`"system_call":"ptrace",`)
		w.uint(`"request":`, uint64(t.Request))
	case event.TamperCallVMRead:
		w.raw(`"system_call":"process_vm_readv",`)
	case event.TamperCallVMWrite:
		w.raw(`"system_call":"process_vm_writev",`)
	}
	w.close('}')
	if degraded {
		w.raw(`"degraded":{"reason":"syscall_argument"},`)
	}
	w.close('}')
}

// target writes the process that something was done to.
func (w *writer) target(ev *event.Event) {
	p := ev.Subject
	if p == nil {
		p = &event.Process{Key: ev.Tamper.Target, Partial: true}
	}
	w.open(`"process":{`)
	w.identity(p)
	if t := ev.Tamper.TID; t != 0 && t != p.Key.PID {
		w.uint(`"ptid":`, uint64(t))
	}
	w.cmdLine(p)
	w.file(p, false)
	w.credentials(p)
	w.container(p)
	w.open(`"xattributes":{`)
	w.kernelIdentity(p)
	w.close('}')
	w.close('}')
}
