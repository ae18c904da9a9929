// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
	"fmt"
	"os"
	"path"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// How grave it is what is done to the sensor, as OCSF's severity_id.
const (
	gravityNone   = 1 // it is in order
	gravityMedium = 3 // a package manager does so, too
	gravityHigh   = 4
)

// gravity says how grave an event is: 0 when it is not about the sensor itself.
func gravity(ev *event.Event) uint8 {
	switch ev.Kind {
	case event.Signal:
		signal := unix.Signal(ev.Tamper.Signal)
		if ev.Tamper.Flags&event.TamperByKernel != 0 {
			if signal == unix.SIGKILL {
				return gravityHigh // for want of memory
			}
			return gravityNone // a terminal's
		}
		if supervised(ev) && slices.Contains([]unix.Signal{unix.SIGTERM, unix.SIGKILL, unix.SIGABRT, unix.SIGINT, unix.SIGQUIT}, signal) {
			return gravityNone
		}
		return gravityHigh
	case event.Ptrace:
		return gravityHigh
	}
	if ev.File.Flags.Part() == "" || !isFile(ev.Kind) {
		return 0
	}
	if ev.Actor.PID == uint32(os.Getpid()) {
		return gravityNone // as the programs of the process before saw it
	}
	if slices.ContainsFunc(append([]*event.Process{ev.Subject}, ev.Ancestors...), isPackageManager) {
		return gravityMedium
	}
	return gravityHigh
}

func isFile(k event.Kind) bool { return k >= event.FileCreate && k <= event.FileChattr }

// supervised tells whether who acts is who started the sensor, systemd mostly.
func supervised(ev *event.Event) bool {
	return ev.Actor.PID == 1 || ev.Subject != nil && ev.Subject.Parent.PID != 0 && ev.Actor == ev.Subject.Parent
}

// isPackageManager goes by the executable's name, which is no proof: it makes a change of the
// sensor's files less grave, not invisible.
func isPackageManager(p *event.Process) bool {
	if p == nil {
		return false
	}
	switch path.Base(p.Path) {
	case "dpkg", "rpm", "dnf5", "dnf5daemon-server", "microdnf", "zypper", "packagekitd":
		return true
	}
	return p.Comm == "dnf" || p.Comm == "yum" // scripts
}

// tampering makes known what was done to the sensor, after the event that shows it.
func (s *Sensor) tampering(ctx context.Context, ev *event.Event) {
	s.metrics.tampering.Inc()
	if ev.Severity <= gravityNone {
		return
	}
	i := event.SelfInfo{
		Name: "Tampering", Severity: ev.Severity, Failed: true, Code: "TAMPERING", After: ev.Kind.String(),
		Attrs: map[string]any{"event": ev.Kind.String(), "hook": ev.Hook}, Process: ev.Subject,
	}
	who := "an unknown process"
	if isTamper := ev.Kind == event.Signal || ev.Kind == event.Ptrace; isTamper {
		i.Process = ev.Creator
	}
	if i.Process != nil {
		p := *i.Process // which the decision outlives
		i.Process = &p
		who = fmt.Sprintf("%s (process %d)", or(p.Path, or(p.Comm, "unknown")), p.Key.PID)
		i.Attrs["process"] = map[string]any{"pid": p.Key.PID, "cpid": p.CPID, "path": p.Path, "cmd_line": p.CmdLine, "user": or(p.User, fmt.Sprint(p.Cred.UID))}
	}
	switch ev.Kind {
	case event.Signal:
		name := unix.SignalName(unix.Signal(ev.Tamper.Signal))
		i.After += " " + name
		i.Message = fmt.Sprintf("%s sent %s to the sensor", who, name)
		if ev.Tamper.Flags&event.TamperByKernel != 0 {
			i.Message = fmt.Sprintf("the kernel sent %s to the sensor while %s ran: look for want of memory in the kernel's log", name, who)
		}
	case event.Ptrace:
		i.Message = who + " asked to control the sensor's process or to use its memory"
	default:
		f := &ev.File
		i.After += " " + string(f.Path)
		i.Attrs["path"], i.Attrs["part"] = string(f.Path), f.Flags.Part()
		if len(f.Path2) > 0 {
			i.After += " " + string(f.Path2)
			i.Attrs["path2"] = string(f.Path2)
		}
		i.Message = fmt.Sprintf("%s changed the sensor's %s: %s of %s", who, f.Flags.Part(), ev.Kind, f.Path)
	}
	if s.repeats.admit(&i, time.Now()) {
		s.decide(ctx, &i, nil)
	}
}
