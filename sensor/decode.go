// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/bpf"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// recordError says why bytes are not a record: kernel object and binary
// disagree, or the ring was overwritten.
type recordError struct {
	Kind  event.Kind // None when the header itself is cut; unknown kinds as found
	Size  int        // bytes given
	Field string     // the field that contradicts the size, or "kind", "family"
	Value uint64     // what it says
}

func (e *recordError) Error() string {
	return fmt.Sprintf("decode %s (kind %d) of %d bytes: %s is %d", e.Kind, uint8(e.Kind), e.Size, e.Field, e.Value)
}

const (
	headerSize = int(unsafe.Sizeof(bpf.SensorEventHeader{}))
	execSize   = int(unsafe.Sizeof(bpf.SensorExecEvent{}))
	forkSize   = int(unsafe.Sizeof(bpf.SensorForkEvent{}))
	exitSize   = int(unsafe.Sizeof(bpf.SensorExitEvent{}))
	tcpSize    = int(unsafe.Sizeof(bpf.SensorTcpEvent{}))
	fileSize   = int(unsafe.Sizeof(bpf.SensorFileEvent{}))
	tamperSize = int(unsafe.Sizeof(bpf.SensorTamperEvent{}))
)

// decoder turns records into events without copying them: the generated structs
// of bpf/events.h are laid over the record once its size is proven. Only paths,
// which the kernel gives leaf first, are rebuilt, in the decoder's arena.
//
// The zero value is ready to use. It is not safe for concurrent use.
type decoder struct {
	arena []byte
}

// Bounds of the arena: it starts with room for a batch of ordinary paths, and is
// given back when one batch of very long ones (up to 9 KiB a record) made it grow
// beyond arenaKeep.
const (
	arenaMin  = 64 << 10
	arenaKeep = 1 << 20
)

// reset forgets the paths of the events decoded so far; these become invalid.
func (d *decoder) reset() {
	d.arena = d.arena[:0]
	if cap(d.arena) > arenaKeep {
		d.arena = nil
	}
}

// decode fills ev from one record. ev's byte slices point into rec or into the
// arena. Detail structs of other kinds keep what they held. The error is a
// *recordError, and ev is then undefined.
func (d *decoder) decode(rec []byte, ev *event.Event) error {
	if len(rec) < headerSize {
		return &recordError{Size: len(rec), Field: "header", Value: uint64(headerSize)}
	}
	h := (*bpf.SensorEventHeader)(unsafe.Pointer(&rec[0]))
	if uint64(h.Kind) >= uint64(event.Lifecycle) {
		return &recordError{Kind: event.Kind(min(h.Kind, 255)), Size: len(rec), Field: "kind", Value: uint64(h.Kind)}
	}
	kind := event.Kind(h.Kind)
	if uint64(h.Size) != uint64(len(rec)) {
		return &recordError{Kind: kind, Size: len(rec), Field: "size", Value: uint64(h.Size)}
	}
	ev.Kind = kind
	ev.KTime = h.Ktime
	ev.Actor = event.ProcessKey{StartTime: h.StartTime, PID: h.Pid}
	ev.TID = h.Tid
	ev.Time, ev.Hook, ev.Severity, ev.Self = 0, "", 0, nil
	ev.Subject, ev.Parent, ev.Creator, ev.Ancestors = nil, nil, nil, nil
	ev.Cases, ev.Deep = nil, false
	switch kind {
	case event.Exec, event.Task:
		return d.exec(rec, ev)
	case event.Fork:
		return decodeFork(rec, ev)
	case event.Exit:
		return decodeExit(rec, ev)
	case event.TCPConnect, event.TCPConnectFailed, event.TCPAccept, event.TCPListen, event.TCPClose:
		return decodeTCP(rec, ev)
	case event.FileCreate, event.FileModify, event.FileDelete, event.FileRename, event.FileLink, event.FileSymlink, event.FileMkdir,
		event.FileChmod, event.FileChown, event.FileTruncate, event.FileXattr, event.FileTimes,
		event.Mount, event.Umount, event.MountMove, event.FileOpenWrite, event.FileChattr:
		return d.file(rec, ev)
	case event.Signal, event.Ptrace:
		return decodeTamper(rec, ev)
	default:
		return &recordError{Kind: kind, Size: len(rec), Field: "kind", Value: uint64(h.Kind)}
	}
}

func (d *decoder) exec(rec []byte, ev *event.Event) error {
	if len(rec) < execSize {
		return &recordError{Kind: ev.Kind, Size: len(rec), Field: "fixed size", Value: uint64(execSize)}
	}
	r := (*bpf.SensorExecEvent)(unsafe.Pointer(&rec[0]))
	x := &ev.Exec
	x.Parent = event.ProcessKey{StartTime: r.ParentStartTime, PID: r.ParentPid}
	x.NSPID = r.NsPid
	x.Cred = event.Cred{
		UID: r.Cred.Uid, GID: r.Cred.Gid, EUID: r.Cred.Euid, EGID: r.Cred.Egid,
		SUID: r.Cred.Suid, SGID: r.Cred.Sgid, FSUID: r.Cred.Fsuid, FSGID: r.Cred.Fsgid,
		CapPermitted: r.Cred.CapPermitted, CapEffective: r.Cred.CapEffective, CapInheritable: r.Cred.CapInheritable,
		CapBounding: r.Cred.CapBounding, CapAmbient: r.Cred.CapAmbient,
		Securebits: r.Cred.Securebits, SeccompMode: r.Cred.SeccompMode,
	}
	x.NS = event.Namespaces{
		Mnt: r.Ns.Mnt, PID: r.Ns.Pid, Net: r.Ns.Net, User: r.Ns.User,
		UTS: r.Ns.Uts, IPC: r.Ns.Ipc, Cgroup: r.Ns.Cgroup, Time: r.Ns.Time,
	}
	x.Exe = fileOf(&r.Exe)
	x.CgroupID = r.CgroupId
	x.LoginUID, x.SessionID = r.Loginuid, r.Sessionid
	x.Flags = event.ProcessFlags(r.Flags)
	x.ArgvSize = r.ArgvSize
	x.Comm, x.TTY = fixedText(&r.Comm), fixedText(&r.Tty)
	x.OldPath = ""

	v := variable{rest: rec[execSize:]}
	x.Filename = v.take("filename_len", r.FilenameLen)
	x.Interp = v.take("interp_len", r.InterpLen)
	exe := v.take("exe_len", r.ExeLen)
	cwd := v.take("cwd_len", r.CwdLen)
	cgroup := v.take("cgroup_len", r.CgroupLen)
	x.Argv = v.take("argv_len", r.ArgvLen)
	if err := v.end(ev.Kind, len(rec)); err != nil {
		return err
	}
	x.ExePath = d.path(exe, x.Flags&event.FlagExeTruncated != 0 || x.Flags&event.FlagKThread != 0)
	x.CWD = d.path(cwd, x.Flags&event.FlagCWDTruncated != 0 || x.Flags&event.FlagKThread != 0)
	x.CgroupPath = d.path(cgroup, x.Flags&event.FlagCgroupTruncated != 0)
	return nil
}

// file decodes a change of the file system. Where it comes from a system call the
// paths are text that the caller wrote, but for that of an open file.
func (d *decoder) file(rec []byte, ev *event.Event) error {
	if len(rec) < fileSize {
		return &recordError{Kind: ev.Kind, Size: len(rec), Field: "fixed size", Value: uint64(fileSize)}
	}
	r := (*bpf.SensorFileEvent)(unsafe.Pointer(&rec[0]))
	ev.File = event.FileInfo{
		File: fileOf(&r.File), Flags: event.FileFlags(r.Flags), OpenFlags: r.OpenFlags, MntNS: r.MntNs, CgroupID: r.CgroupId,
		TargetIno: r.TargetIno, NewMode: r.NewMode, NewUID: r.NewUid, NewGID: r.NewGid, NewSize: r.NewSize,
		NewATime: r.NewAtimeNs, NewMTime: r.NewMtimeNs, Written: r.BytesWritten, Suppressed: r.Suppressed,
		Attributes: r.Attributes, NewAttributes: r.NewAttributes,
	}
	f := &ev.File
	v := variable{rest: rec[fileSize:]}
	path := v.take("path_len", r.PathLen)
	path2 := v.take("path2_len", r.Path2Len)
	f.Name = v.take("name_len", r.NameLen)
	if err := v.end(ev.Kind, len(rec)); err != nil {
		return err
	}
	degraded := f.Flags&event.FileDegraded != 0
	if f.Path = path; !degraded || f.Flags&event.FileWalked != 0 {
		f.Path = d.path(path, f.Flags&event.FilePathTruncated != 0)
	}
	f.Path2 = path2
	switch ev.Kind {
	case event.FileRename, event.FileLink, event.MountMove:
		if !degraded {
			f.Path2 = d.path(path2, f.Flags&event.FilePath2Truncated != 0)
		}
	}
	return nil
}

func fileOf(f *bpf.SensorFileInfo) event.File {
	return event.File{
		Ino: f.Ino, Size: f.Size, MTime: f.MtimeNs, CTime: f.CtimeNs,
		DevMajor: f.DevMajor, DevMinor: f.DevMinor, Mode: f.Mode, Nlink: f.Nlink,
		UID: f.Uid, GID: f.Gid, FSMagic: f.FsMagic,
	}
}

func decodeFork(rec []byte, ev *event.Event) error {
	if len(rec) != forkSize {
		return &recordError{Kind: ev.Kind, Size: len(rec), Field: "fixed size", Value: uint64(forkSize)}
	}
	r := (*bpf.SensorForkEvent)(unsafe.Pointer(&rec[0]))
	ev.Fork = event.ForkInfo{
		Child:    event.ProcessKey{StartTime: r.ChildStartTime, PID: r.ChildPid},
		CgroupID: r.ChildCgroupId, NSPID: r.ChildNsPid, PIDNS: r.ChildPidNs, Comm: fixedText(&r.ChildComm),
	}
	return nil
}

func decodeExit(rec []byte, ev *event.Event) error {
	if len(rec) != exitSize {
		return &recordError{Kind: ev.Kind, Size: len(rec), Field: "fixed size", Value: uint64(exitSize)}
	}
	r := (*bpf.SensorExitEvent)(unsafe.Pointer(&rec[0]))
	ev.Exit = event.ExitInfo{
		Parent: event.ProcessKey{StartTime: r.ParentStartTime, PID: r.ParentPid},
		UTime:  r.UtimeNs, STime: r.StimeNs, Code: r.ExitCode, Signal: r.Signal,
		CoreDumped: r.CoreDumped != 0, Comm: fixedText(&r.Comm),
	}
	return nil
}

func decodeTamper(rec []byte, ev *event.Event) error {
	if len(rec) != tamperSize {
		return &recordError{Kind: ev.Kind, Size: len(rec), Field: "fixed size", Value: uint64(tamperSize)}
	}
	r := (*bpf.SensorTamperEvent)(unsafe.Pointer(&rec[0]))
	ev.Tamper = event.TamperInfo{
		Target: event.ProcessKey{StartTime: r.TargetStartTime, PID: r.TargetPid}, TID: r.TargetTid,
		Signal: r.Signal, Code: r.Code, Result: r.Result, Mode: r.Mode, Request: r.Request,
		Call: event.TamperCall(r.Call), Flags: event.TamperFlags(r.Flags),
		Comm: fixedText(&r.Comm),
	}
	return nil
}

func decodeTCP(rec []byte, ev *event.Event) error {
	if len(rec) != tcpSize {
		return &recordError{Kind: ev.Kind, Size: len(rec), Field: "fixed size", Value: uint64(tcpSize)}
	}
	r := (*bpf.SensorTcpEvent)(unsafe.Pointer(&rec[0]))
	ev.TCP = event.TCPInfo{
		ConnID: r.ConnId, Opened: r.Opened, CgroupID: r.CgroupId,
		BytesSent: r.BytesSent, BytesReceived: r.BytesReceived,
		NetNS: r.Netns, Flags: event.TCPFlags(r.Flags), SegsOut: r.SegsOut, SegsIn: r.SegsIn,
		Retransmits: r.Retransmits, SRTT: r.SrttUs, Errno: r.Error, Backlog: r.Backlog,
		Closer:   event.ProcessKey{StartTime: r.CloserStartTime, PID: r.CloserPid},
		OldState: r.OldState,
	}
	var local, remote netip.Addr
	switch r.Family {
	case unix.AF_INET:
		local, remote = netip.AddrFrom4([4]byte(r.LocalAddr[:4])), netip.AddrFrom4([4]byte(r.RemoteAddr[:4]))
	case unix.AF_INET6:
		// An IPv4 peer of a dual-stack socket shows as ::ffff:a.b.c.d; it is
		// reported as the address that is on the wire.
		local, remote = netip.AddrFrom16(r.LocalAddr).Unmap(), netip.AddrFrom16(r.RemoteAddr).Unmap()
	default:
		return &recordError{Kind: ev.Kind, Size: len(rec), Field: "family", Value: uint64(r.Family)}
	}
	ev.TCP.Local, ev.TCP.Remote = netip.AddrPortFrom(local, r.LocalPort), netip.AddrPortFrom(remote, r.RemotePort)
	return nil
}

// variable hands out the parts that follow a record's fixed struct.
type variable struct {
	rest  []byte
	field string // the first length that does not fit
	value uint64
}

func (v *variable) take(field string, length uint32) []byte {
	if v.field != "" {
		return nil
	}
	if uint64(length) > uint64(len(v.rest)) {
		v.field, v.value = field, uint64(length)
		return nil
	}
	part := v.rest[:length:length]
	v.rest = v.rest[length:]
	return part
}

// end checks that the parts fit, and that nothing follows them.
func (v *variable) end(kind event.Kind, size int) error {
	if v.field == "" && len(v.rest) > 0 {
		v.field, v.value = "bytes left over", uint64(len(v.rest))
	}
	if v.field != "" {
		return &recordError{Kind: kind, Size: size, Field: v.field, Value: v.value}
	}
	return nil
}

// path turns "passwd\0etc\0" into "/etc/passwd". Nothing is the root, or no path
// at all when the walk was cut short; what then is known is the path's end,
// given without the leading slash.
func (d *decoder) path(names []byte, cut bool) []byte {
	if len(names) == 0 {
		if cut {
			return nil
		}
		return d.take(append(d.room(1), '/'))
	}
	if names[len(names)-1] == 0 {
		names = names[:len(names)-1]
	}
	out := d.room(len(names) + 1)
	for end := len(names); end >= 0; {
		start := bytes.LastIndexByte(names[:end], 0) + 1
		out = append(out, '/')
		out = append(out, names[start:end]...)
		end = start - 1
	}
	if cut {
		out = out[1:]
	}
	return d.take(out)
}

// room returns an empty slice at the arena's end with at least n bytes of
// capacity. An arena that is full is left to the events that point into it.
func (d *decoder) room(n int) []byte {
	if cap(d.arena)-len(d.arena) < n {
		d.arena = make([]byte, 0, max(n, 2*cap(d.arena), arenaMin))
	}
	return d.arena[len(d.arena):]
}

// take makes out, which room gave and which was appended to, part of the arena.
func (d *decoder) take(out []byte) []byte {
	d.arena = d.arena[:cap(d.arena)-cap(out)+len(out)]
	return slices.Clip(out)
}

// fixedText is a NUL-terminated string of fixed size, in place.
func fixedText(s *[16]int8) []byte {
	b := (*[16]byte)(unsafe.Pointer(s))[:]
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return slices.Clip(b)
}
