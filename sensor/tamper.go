// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
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

// identity is what this process, and what has started it, look like in events.
type identity struct {
	pid        uint32 // in pid namespace pidNS, as it knows itself
	pidNS      uint32
	mntNS      uint32
	since      uint64 // kernel time, of about its start
	executable string
}

// whoAmI cannot fail for a process that has its /proc; without it nobody is recognised.
func whoAmI() identity {
	w := identity{pid: uint32(os.Getpid())}
	w.pidNS, _ = namespaceOf("self", "pid")
	w.mntNS, _ = namespaceOf("self", "mnt")
	w.since = bootTime()
	path, _ := os.Executable()
	w.executable = strings.TrimSuffix(path, " (deleted)")
	return w
}

// namespaceOf is the inode number of a process's namespace.
func namespaceOf(pid, kind string) (uint32, error) {
	var st unix.Stat_t
	path := filepath.Join("/proc", pid, "ns", kind)
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return uint32(st.Ino), nil
}

// is tells whether a process has this number in the sensor's pid namespace; with none known
// of it, whether that is its number on the host, which is the same for a sensor that runs as
// it should.
func (w identity) is(pid uint32, p *event.Process, key event.ProcessKey) bool {
	if p != nil && p.NSPID != 0 && p.NS.PID != 0 {
		return p.NSPID == pid && p.NS.PID == w.pidNS
	}
	return key.PID == pid
}

// starting tells whether the sensor, or systemd for it, acts while it starts: as the programs
// of a run before saw it. The process may be one that was killed before it read what those
// saw. Before it runs the sensor's program systemd mounts its directories where only it sees
// that: in a namespace whose number may be given to this process once that has gone.
func (w identity) starting(ev *event.Event) bool {
	p := ev.Subject
	if w.is(w.pid, p, ev.Actor) {
		return true
	}
	if p == nil || ev.Parent == nil || !w.is(1, ev.Parent, ev.Parent.Key) {
		return false
	}
	return p.Path == w.executable && w.executable != "" ||
		ev.Kind == event.Mount && p.Path == ev.Parent.Path && (ev.File.MntNS != w.mntNS || ev.KTime < w.since)
}

// gravity says how grave an event is: 0 when it is not about the sensor itself.
func (w identity) gravity(ev *event.Event) uint8 {
	switch ev.Kind {
	case event.Signal:
		signal := unix.Signal(ev.Tamper.Signal)
		if ev.Tamper.Flags&event.TamperByKernel != 0 {
			if signal == unix.SIGKILL {
				return gravityHigh // for want of memory
			}
			return gravityNone // a terminal's
		}
		if w.supervised(ev) && slices.Contains([]unix.Signal{unix.SIGTERM, unix.SIGKILL, unix.SIGABRT, unix.SIGINT, unix.SIGQUIT}, signal) {
			return gravityNone
		}
		return gravityHigh
	case event.Ptrace:
		return gravityHigh
	}
	if ev.File.Flags.Part() == "" || !isFile(ev.Kind) {
		return 0
	}
	if w.starting(ev) {
		return gravityNone
	}
	if (ev.Kind == event.Mount || ev.Kind == event.Umount || ev.Kind == event.MountMove) && becomesService(ev.Subject) {
		return gravityNone
	}
	if slices.ContainsFunc(append([]*event.Process{ev.Subject}, ev.Ancestors...), isPackageManager) {
		return gravityMedium
	}
	return gravityHigh
}

func isFile(k event.Kind) bool { return k >= event.FileCreate && k <= event.FileChattr }

// supervised tells whether who acts is who started the sensor, systemd mostly.
func (w identity) supervised(ev *event.Event) bool {
	return w.is(1, ev.Creator, ev.Actor) || ev.Subject != nil && ev.Subject.Parent.PID != 0 && ev.Actor == ev.Subject.Parent
}

// becomesService tells whether a process is a child of systemd that is yet to run its
// service's program. What it mounts over the sensor's files, at each start of a service with
// a sandbox and at each reload of the sensor's own, only that service sees.
func becomesService(p *event.Process) bool {
	return p != nil && p.Parent.PID == 1 && slices.Contains([]string{
		"/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/usr/lib/systemd/systemd-executor",
	}, p.Path)
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
		Attrs: map[string]any{"event": ev.Kind.String(), "hook": ev.Hook}, Process: ev.Subject, Boot: ev.Time - int64(ev.KTime),
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
