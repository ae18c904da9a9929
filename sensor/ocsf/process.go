// SPDX-License-Identifier: Apache-2.0

package ocsf

import (
	"bytes"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const (
	processClass = `"category_uid":1,"category_name":"System Activity","class_uid":1007,"class_name":"Process Activity",`
	launch       = processClass + `"activity_id":1,"activity_name":"Launch","type_uid":100701,"type_name":"Process Activity: Launch",` + informational + success
	terminate    = processClass + `"activity_id":2,"activity_name":"Terminate","type_uid":100702,"type_name":"Process Activity: Terminate",` + informational + success
	query        = `"category_uid":5,"category_name":"Discovery","class_uid":5015,"class_name":"Process Query",` +
		`"activity_id":1,"activity_name":"Query","type_uid":501501,"type_name":"Process Query: Query",` + informational + success

	maxArgvArray       = 4096 // bytes of argv given as an array beside the command line
	maxAncestors       = 16
	maxAncestorCmdLine = 512 // bytes
)

func (e *Encoder) exec(w *writer, ev *event.Event) {
	w.raw(launch + `"launch_type_id":3,"launch_type":"Exec",`)
	w.raw(e.device)
	creator, key := ev.Creator, ev.Exec.Parent
	if creator == nil {
		creator = ev.Parent
	}
	w.actor(creator, key, withFile)
	e.fullProcess(w, ev)

	x := &ev.Exec
	w.open(`"unmapped":{"exec":{`)
	if len(x.Filename) > 0 {
		w.bytes(`"filename":`, x.Filename)
		base64IfInvalid(w, `"filename_base64":`, x.Filename)
	}
	if len(x.Interp) > 0 && !bytes.Equal(x.Interp, x.Filename) {
		w.bytes(`"interp":`, x.Interp)
		base64IfInvalid(w, `"interp_base64":`, x.Interp)
	}
	if x.OldPath != "" {
		w.str(`"old_path":`, x.OldPath)
		base64IfInvalid(w, `"old_path_base64":`, x.OldPath)
	}
	w.flag(`"script":`, x.Flags&event.FlagScript != 0)
	w.flag(`"memfd":`, x.Flags&event.FlagMemfd != 0)
	w.flag(`"fd_exec":`, bytes.HasPrefix(x.Filename, []byte("/dev/fd/")))
	w.flag(`"secureexec":`, x.Flags&event.FlagSecureExec != 0)
	w.close('}')
	w.close('}')
}

func (e *Encoder) task(w *writer, ev *event.Event) {
	w.raw(query + `"query_result_id":1,"query_result":"Exists",`)
	w.raw(e.device)
	e.fullProcess(w, ev)
}

func (e *Encoder) fork(w *writer, ev *event.Event) {
	w.raw(launch + `"launch_type_id":2,"launch_type":"Fork",`)
	w.raw(e.device)
	creator := ev.Creator
	if creator == nil {
		creator = ev.Parent
	}
	w.actor(creator, ev.Actor, withFile)
	w.open(`"process":{`)
	p := ev.Subject
	if p == nil {
		p = &event.Process{Key: ev.Fork.Child, Partial: true}
	}
	w.identity(p)
	w.cmdLine(p)
	w.user(p)
	w.container(p)
	w.open(`"xattributes":{`)
	w.kernelIdentity(p)
	w.close('}')
	w.close('}')
}

func (e *Encoder) exit(w *writer, ev *event.Event) {
	x := &ev.Exit
	w.raw(terminate)
	if x.Signal == 0 {
		w.int(`"exit_code":`, int64(x.Code))
	}
	p := ev.Subject
	if p == nil {
		p = &event.Process{Key: ev.Actor, Partial: true}
	}
	if p.Key.StartTime != 0 {
		w.int(`"duration":`, floorDiv(int64(ev.KTime-p.Key.StartTime), 1e6))
	}
	w.raw(e.device)
	w.actor(p, ev.Actor, 0)
	w.open(`"process":{`)
	w.knownProcess(ev, p)
	w.ms(`"terminated_time":`, ev.Time)
	w.parent(ev.Parent, x.Parent)
	w.open(`"xattributes":{`)
	w.kernelIdentity(p)
	w.rawStrings(p)
	w.close('}')
	w.close('}')
	w.open(`"unmapped":{"exit":{`)
	if x.Signal != 0 {
		w.uint(`"signal":`, uint64(x.Signal))
		w.opt(`"signal_name":`, unix.SignalName(unix.Signal(x.Signal)))
		w.raw(`"core_dumped":`)
		w.b = append(strconv.AppendBool(w.b, x.CoreDumped), ',')
	}
	w.uint(`"utime_ms":`, x.UTime/1e6)
	w.uint(`"stime_ms":`, x.STime/1e6)
	w.close('}')
	w.close('}')
}

// fullProcess writes everything that is known of the new image, or of a process
// that ran before the sensor.
func (e *Encoder) fullProcess(w *writer, ev *event.Event) {
	x := &ev.Exec
	p := ev.Subject
	if p == nil {
		p = &event.Process{Key: ev.Actor, Partial: true}
	}
	w.open(`"process":{`)
	w.identity(p)
	w.ptid(ev, p)
	if args := argv(ev); len(args) > 0 {
		e.scratch = event.AppendCmdLine(e.scratch[:0], args)
		w.bytes(`"cmd_line":`, e.scratch)
	} else {
		w.cmdLine(p)
	}
	w.opt(`"working_directory":`, p.CWD)
	w.file(p, true)
	w.credentials(p)
	w.container(p)
	w.parent(ev.Parent, x.Parent)
	w.ancestry(ev.Ancestors)
	w.open(`"xattributes":{`)
	w.kernelIdentity(p)
	w.rawStrings(p)
	w.argv(x, argv(ev))
	w.kernelState(p)
	w.close('}')
	w.close('}')
}

// argv is what the event itself carries of the arguments.
func argv(ev *event.Event) []byte {
	if ev.Kind == event.Exec || ev.Kind == event.Task {
		return ev.Exec.Argv
	}
	return nil
}

// knownProcess writes what joins an event with the exec before it and what
// rules ask for most often; the exec, fork or snapshot event has the rest.
func (w *writer) knownProcess(ev *event.Event, p *event.Process) {
	w.identity(p)
	w.ptid(ev, p)
	w.cmdLine(p)
	w.opt(`"working_directory":`, p.CWD)
	w.file(p, false)
	w.credentials(p)
	w.container(p)
}

// identity writes the fields that every process object has.
func (w *writer) identity(p *event.Process) {
	if p.CPID != "" {
		w.raw(`"uid":`)
		from := len(w.b)
		w.b = append(appendQuoted(w.b, p.CPID), ',')
		to := len(w.b)
		w.raw(`"cpid":`)
		w.b = append(w.b, w.b[from:to]...)
	}
	w.uint(`"pid":`, uint64(p.Key.PID))
	w.opt(`"name":`, or(p.Path[strings.LastIndexByte(p.Path, '/')+1:], p.Comm))
	w.opt(`"path":`, p.Path)
	if p.Key.StartTime != 0 {
		w.ms(`"created_time":`, w.wall+int64(p.Key.StartTime))
	}
}

func (w *writer) ptid(ev *event.Event, p *event.Process) {
	if ev.TID != 0 && ev.TID != p.Key.PID {
		w.uint(`"ptid":`, uint64(ev.TID))
	}
}

func (w *writer) cmdLine(p *event.Process) { w.opt(`"cmd_line":`, p.CmdLine) }

func (w *writer) flag(key string, set bool) {
	if set {
		w.raw(key)
		w.raw(`true,`)
	}
}

// actor writes who acted: a reference and the user.
func (w *writer) actor(p *event.Process, key event.ProcessKey, d detail) {
	if p == nil {
		p = &event.Process{Key: key, Partial: true}
	}
	w.open(`"actor":{"process":{`)
	w.identity(p)
	if d&withFile != 0 {
		w.file(p, false)
	}
	w.close('}')
	w.user(p)
	w.close('}')
}

type detail uint8

const withFile detail = 1

// parent writes the parent as a reference; key names it when nothing else does.
func (w *writer) parent(p *event.Process, key event.ProcessKey) {
	if p == nil {
		if key.PID == 0 {
			return
		}
		p = &event.Process{Key: key, Partial: true}
	}
	w.open(`"parent_process":{`)
	w.identity(p)
	w.cmdLine(p)
	w.user(p)
	if contained(p) { // one that differs from the child's is worth a look
		w.open(`"container":{`)
		w.str(`"uid":`, p.Container.ID)
		w.opt(`"runtime":`, p.Container.Runtime)
		w.close('}')
	}
	w.close('}')
}

// ancestry starts with the parent, as OCSF asks.
func (w *writer) ancestry(list []*event.Process) {
	if len(list) == 0 {
		return
	}
	w.open(`"ancestry":[`)
	for _, p := range list[:min(len(list), maxAncestors)] {
		w.open(`{`)
		w.identity(p)
		w.opt(`"cmd_line":`, cut(p.CmdLine, maxAncestorCmdLine))
		w.close('}')
	}
	w.close(']')
}

// cut shortens s to n bytes at most, between runes.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// file writes the executable.
func (w *writer) file(p *event.Process, full bool) {
	if p.Path == "" {
		return
	}
	f := &p.File
	slash := strings.LastIndexByte(p.Path, '/')
	w.open(`"file":{`)
	w.str(`"name":`, p.Path[slash+1:])
	w.str(`"path":`, p.Path)
	w.raw(`"type_id":8,"type":"Executable File",`)
	if p.SHA256 != "" {
		w.raw(`"hashes":[{"algorithm_id":3,"algorithm":"SHA-256",`)
		w.str(`"value":`, p.SHA256)
		w.close('}')
		w.close(']')
	}
	w.flag(`"is_deleted":`, p.Flags&event.FlagDeleted != 0)
	known := f.Ino != 0
	if known {
		w.inode(`"uid":`, f, f.Ino)
		w.uint(`"size":`, f.Size)
	}
	if full {
		if slash >= 0 {
			w.str(`"parent_folder":`, p.Path[:max(slash, 1)])
		}
		if known {
			w.ms(`"modified_time":`, f.MTime)
			w.ownedBy(f.UID, p.Owner)
		}
		w.open(`"xattributes":{`)
		if known {
			w.mode(`"mode":`, f.Mode)
			w.uint(`"nlink":`, uint64(f.Nlink))
			w.uid(`"gid":`, uint64(f.GID))
			w.ms(`"changed_time":`, f.CTime)
			w.fsMagic(f.FSMagic)
		}
		w.flag(`"memfd":`, p.Flags&event.FlagMemfd != 0)
		w.opt(`"hash_note":`, p.HashNote)
		w.close('}')
	}
	w.close('}')
}

// described tells whether credentials and the like are known, rather than zero:
// what the kernel or /proc told about a process always has its namespaces.
func described(p *event.Process) bool { return p != nil && p.NS != event.Namespaces{} }

// user writes the real user. Kinds of accounts follow login.defs: 1 to 999, and
// nobody, belong to the system.
func (w *writer) user(p *event.Process) {
	if !described(p) {
		return
	}
	w.open(`"user":{`)
	w.uid(`"uid":`, uint64(p.Cred.UID))
	w.opt(`"name":`, p.User)
	switch uid := p.Cred.UID; {
	case uid == 0:
		w.raw(`"type_id":2,"type":"Admin",`)
	case uid < 1000, uid == 65534:
		w.raw(`"type_id":3,"type":"System",`)
	default:
		w.raw(`"type_id":1,"type":"User",`)
	}
	w.close('}')
}

// credentials writes users, groups and session: what the profile linux_users
// is for.
func (w *writer) credentials(p *event.Process) {
	if !described(p) {
		return
	}
	w.user(p)
	w.open(`"group":{`)
	w.uid(`"uid":`, uint64(p.Cred.GID))
	w.opt(`"name":`, p.Group)
	w.close('}')
	w.uint(`"euid":`, uint64(p.Cred.EUID))
	w.uint(`"egid":`, uint64(p.Cred.EGID))
	if p.LoginUID != event.Unset {
		w.uint(`"auid":`, uint64(p.LoginUID))
	}
	if p.SessionID != event.Unset || p.TTY != "" {
		w.open(`"session":{`)
		if p.SessionID != event.Unset {
			w.uid(`"uid":`, uint64(p.SessionID))
		}
		w.opt(`"terminal":`, p.TTY)
		w.close('}')
	}
}

func (w *writer) container(p *event.Process) {
	if !contained(p) {
		return
	}
	c := p.Container
	if p.NSPID != 0 {
		w.uint(`"namespace_pid":`, uint64(p.NSPID))
	}
	w.open(`"container":{`)
	w.str(`"uid":`, c.ID)
	w.opt(`"runtime":`, c.Runtime)
	w.opt(`"orchestrator":`, c.Orchestrator)
	if isUUID(c.PodUUID) {
		w.str(`"pod_uuid":`, c.PodUUID)
	} else if c.PodUUID != "" { // static pods have a hash instead
		w.open(`"tags":[`)
		w.tag("pod_uid", c.PodUUID)
		w.close(']')
	}
	w.close('}')
}

func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case c-'0' > 9 && c|0x20-'a' > 5:
			return false
		}
	}
	return true
}

// kernelIdentity writes what the kernel calls the process.
func (w *writer) kernelIdentity(p *event.Process) {
	if p.Comm != "" {
		w.str(`"comm":`, p.Comm)
		base64IfInvalid(w, `"comm_base64":`, p.Comm)
	}
	if p.Key.StartTime != 0 {
		w.uid(`"start_boottime_ns":`, p.Key.StartTime)
	}
	w.flag(`"partial":`, p.Partial)
	w.flag(`"kernel_thread":`, p.Flags&event.FlagKThread != 0)
}

func (w *writer) rawStrings(p *event.Process) {
	base64IfInvalid(w, `"path_base64":`, p.Path)
	base64IfInvalid(w, `"working_directory_base64":`, p.CWD)
}

// argv writes the arguments as an array when they are short. The command line
// can be split into them again, so nothing is missing when they are long.
func (w *writer) argv(x *event.ExecInfo, args []byte) {
	if len(args) == 0 {
		return
	}
	w.flag(`"argv_truncated":`, x.Flags&event.FlagArgvTruncated != 0)
	if len(args) > maxArgvArray {
		w.raw(`"argv_in_cmd_line":true,`)
		return
	}
	w.open(`"argv":[`)
	for rest := args; len(rest) > 0; {
		arg := rest
		if i := bytes.IndexByte(rest, 0); i >= 0 {
			arg, rest = rest[:i], rest[i+1:]
		} else {
			rest = nil
		}
		w.b = append(appendQuoted(w.b, arg), ',')
	}
	w.close(']')
	base64IfInvalid(w, `"argv_base64":`, args)
}

// kernelState writes what OCSF has no attribute for.
func (w *writer) kernelState(p *event.Process) {
	if !described(p) {
		return
	}
	c := &p.Cred
	for _, id := range [...]struct {
		key       string
		id, usual uint32
	}{{`"suid":`, c.SUID, c.EUID}, {`"fsuid":`, c.FSUID, c.EUID}, {`"sgid":`, c.SGID, c.EGID}, {`"fsgid":`, c.FSGID, c.EGID}} {
		if id.id != id.usual {
			w.uint(id.key, uint64(id.id))
		}
	}
	w.hex(`"cap_permitted":`, c.CapPermitted)
	w.hex(`"cap_effective":`, c.CapEffective)
	w.hex(`"cap_bounding":`, c.CapBounding)
	if c.CapInheritable != 0 {
		w.hex(`"cap_inheritable":`, c.CapInheritable)
	}
	if c.CapAmbient != 0 {
		w.hex(`"cap_ambient":`, c.CapAmbient)
	}
	if c.Securebits != 0 {
		w.uint(`"securebits":`, uint64(c.Securebits))
	}
	if c.SeccompMode != 0 {
		w.uint(`"seccomp":`, uint64(c.SeccompMode))
	}
	n := &p.NS
	w.open(`"ns":{`)
	for _, ns := range [...]struct {
		key string
		ino uint32
	}{
		{`"mnt":`, n.Mnt},
		{`"pid":`, n.PID},
		{`"net":`, n.Net},
		{`"user":`, n.User},
		{`"uts":`, n.UTS},
		{`"ipc":`, n.IPC},
		{`"cgroup":`, n.Cgroup},
		{`"time":`, n.Time},
	} {
		if ns.ino != 0 {
			w.uint(ns.key, uint64(ns.ino))
		}
	}
	w.close('}')
	if !contained(p) && p.NSPID != 0 && p.NSPID != p.Key.PID {
		w.uint(`"namespace_pid":`, uint64(p.NSPID))
	}
	if p.CgroupID != 0 || p.CgroupPath != "" {
		w.open(`"cgroup":{`)
		w.uid(`"id":`, p.CgroupID)
		w.opt(`"path":`, p.CgroupPath)
		base64IfInvalid(w, `"path_base64":`, p.CgroupPath)
		w.raw(`"version":`)
		if p.Flags&event.FlagCgroupV1 != 0 {
			w.raw(`1,`)
		} else {
			w.raw(`2,`)
		}
		w.close('}')
	}
}
