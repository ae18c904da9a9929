// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/bpf"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// wire lays out a fixed struct and what follows it as the kernel does; size is
// filled in.
func wire[T any](fixed T, parts ...string) []byte {
	b := bytes.Clone(unsafe.Slice((*byte)(unsafe.Pointer(&fixed)), unsafe.Sizeof(fixed)))
	for _, p := range parts {
		b = append(b, p...)
	}
	(*bpf.SensorEventHeader)(unsafe.Pointer(&b[0])).Size = uint32(len(b))
	return b
}

func wireChars(s string) (out [16]int8) {
	for i := range len(s) {
		out[i] = int8(s[i])
	}
	return out
}

func wireHeader(kind event.Kind) bpf.SensorEventHeader {
	return bpf.SensorEventHeader{Kind: bpf.SensorEventKind(kind), Ktime: 1e15 + 7, StartTime: 1e15, Pid: 4711, Tid: 4712}
}

func wireExec(kind event.Kind, flags event.ProcessFlags, filename, interp, exe, cwd, cgroup, argv string) []byte {
	return wire(bpf.SensorExecEvent{
		Header:          wireHeader(kind),
		ParentStartTime: 99, ParentPid: 98, NsPid: 7,
		Cred: bpf.SensorCredInfo{
			Uid: 1, Gid: 2, Euid: 3, Egid: 4, Suid: 5, Sgid: 6, Fsuid: 7, Fsgid: 8,
			CapPermitted: 9, CapEffective: 10, CapInheritable: 11, CapBounding: 12, CapAmbient: 13, Securebits: 14, SeccompMode: 2,
		},
		Ns: bpf.SensorNsInfo{Mnt: 21, Pid: 22, Net: 23, User: 24, Uts: 25, Ipc: 26, Cgroup: 27, Time: 28},
		Exe: bpf.SensorFileInfo{
			Ino: 31, Size: 32, MtimeNs: 33, CtimeNs: 34, DevMajor: 35, DevMinor: 36, Mode: 0o100755, Nlink: 37, Uid: 38, Gid: 39, FsMagic: 40,
		},
		CgroupId: 41, Loginuid: 42, Sessionid: 43, Flags: uint32(flags), ArgvSize: 1000,
		Comm: wireChars("sixteen bytes ok"), Tty: wireChars("pts/3"),
		FilenameLen: uint32(len(filename)), InterpLen: uint32(len(interp)), ExeLen: uint32(len(exe)),
		CwdLen: uint32(len(cwd)), CgroupLen: uint32(len(cgroup)), ArgvLen: uint32(len(argv)),
	}, filename, interp, exe, cwd, cgroup, argv)
}

func wireTCP(kind event.Kind, family uint16, local, remote string) []byte {
	r := bpf.SensorTcpEvent{
		Header: wireHeader(kind), ConnId: 1, Opened: 2, CgroupId: 3, BytesSent: 4, BytesReceived: 5, Netns: 6,
		Flags: uint32(event.TCPInitiated), SegsOut: 7, SegsIn: 8, Retransmits: 9, SrttUs: 10, Error: 111, Backlog: 12,
		Family: family, OldState: 2, LocalPort: 40000, RemotePort: 443, CloserStartTime: 13, CloserPid: 14,
	}
	copy(r.LocalAddr[:], netip.MustParseAddr(local).AsSlice())
	copy(r.RemoteAddr[:], netip.MustParseAddr(remote).AsSlice())
	return wire(r)
}

func wireExit() []byte {
	return wire(bpf.SensorExitEvent{
		Header: wireHeader(event.Exit), ParentStartTime: 1, UtimeNs: 2, StimeNs: 3, ParentPid: 4, ExitCode: 5, Signal: 6, CoreDumped: 1, Comm: wireChars("sleep"),
	})
}

func wireFork() []byte {
	return wire(bpf.SensorForkEvent{
		Header: wireHeader(event.Fork), ChildStartTime: 1, ChildCgroupId: 2, ChildPid: 3, ChildNsPid: 4, ChildPidNs: 5, ChildComm: wireChars("sh"),
	})
}

func wireTamper(kind event.Kind) []byte {
	return wire(bpf.SensorTamperEvent{
		Header: wireHeader(kind), TargetStartTime: 1, TargetPid: 2, TargetTid: 3, Signal: 9, Code: -6, Result: 2, Mode: 18, Request: 16, Call: 1,
		Flags: uint32(event.TamperByKernel | event.TamperDegraded), Comm: wireChars("kill"),
	})
}

func wireFile(kind event.Kind, flags event.FileFlags, path, path2, name string) []byte {
	return wire(bpf.SensorFileEvent{
		Header: wireHeader(kind),
		File: bpf.SensorFileInfo{
			Ino: 31, Size: 32, MtimeNs: -33, CtimeNs: 34, DevMajor: 35, DevMinor: 36, Mode: 0o100755, Nlink: 37, Uid: 38, Gid: 39, FsMagic: 40,
		},
		CgroupId: 41, TargetIno: 42, NewSize: 43, NewAtimeNs: -44, NewMtimeNs: 45, BytesWritten: 46, Flags: uint32(flags), OpenFlags: 47,
		NewMode: 48, NewUid: 49, NewGid: 50, Suppressed: 51, MntNs: 52, Attributes: 53, NewAttributes: 54,
		PathLen: uint32(len(path)), Path2Len: uint32(len(path2)), NameLen: uint32(len(name)),
	}, path, path2, name)
}

func wantEvent(kind event.Kind) event.Event {
	return event.Event{Kind: kind, KTime: 1e15 + 7, Actor: event.ProcessKey{StartTime: 1e15, PID: 4711}, TID: 4712}
}

// texts makes the byte slices of an event comparable and readable.
var texts = cmp.Options{
	cmp.Transformer("text", func(b []byte) string { return string(b) }),
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
}

func TestDecode(t *testing.T) {
	exec := func(kind event.Kind, flags event.ProcessFlags, exe, cwd, cgroup string) event.Event {
		ev := wantEvent(kind)
		ev.Exec = event.ExecInfo{
			Parent: event.ProcessKey{StartTime: 99, PID: 98}, NSPID: 7,
			Cred: event.Cred{
				UID: 1, GID: 2, EUID: 3, EGID: 4, SUID: 5, SGID: 6, FSUID: 7, FSGID: 8,
				CapPermitted: 9, CapEffective: 10, CapInheritable: 11, CapBounding: 12, CapAmbient: 13, Securebits: 14, SeccompMode: 2,
			},
			NS: event.Namespaces{Mnt: 21, PID: 22, Net: 23, User: 24, UTS: 25, IPC: 26, Cgroup: 27, Time: 28},
			Exe: event.File{
				Ino: 31, Size: 32, MTime: 33, CTime: 34, DevMajor: 35, DevMinor: 36, Mode: 0o100755, Nlink: 37, UID: 38, GID: 39, FSMagic: 40,
			},
			CgroupID: 41, LoginUID: 42, SessionID: 43, Flags: flags, ArgvSize: 1000,
			Comm: []byte("sixteen bytes ok"), TTY: []byte("pts/3"),
			ExePath: []byte(exe), CWD: []byte(cwd), CgroupPath: []byte(cgroup),
		}
		return ev
	}
	script := exec(event.Exec, event.FlagScript, "/usr/bin/dash", "/", "/")
	script.Exec.Filename, script.Exec.Interp, script.Exec.Argv = []byte("./run.sh"), []byte("/bin/sh"), []byte("/bin/sh\x00./run.sh\x00\x00")

	fork := wantEvent(event.Fork)
	fork.Fork = event.ForkInfo{Child: event.ProcessKey{StartTime: 1, PID: 3}, CgroupID: 2, NSPID: 4, PIDNS: 5, Comm: []byte("sh")}
	exit := wantEvent(event.Exit)
	exit.Exit = event.ExitInfo{Parent: event.ProcessKey{StartTime: 1, PID: 4}, UTime: 2, STime: 3, Code: 5, Signal: 6, CoreDumped: true, Comm: []byte("sleep")}
	tcp := func(kind event.Kind, local, remote string) event.Event {
		ev := wantEvent(kind)
		ev.TCP = event.TCPInfo{
			ConnID: 1, Opened: 2, CgroupID: 3, BytesSent: 4, BytesReceived: 5, NetNS: 6, Flags: event.TCPInitiated,
			SegsOut: 7, SegsIn: 8, Retransmits: 9, SRTT: 10, Errno: 111, Backlog: 12,
			Local: netip.MustParseAddrPort(local), Remote: netip.MustParseAddrPort(remote),
			Closer: event.ProcessKey{StartTime: 13, PID: 14}, OldState: 2,
		}
		return ev
	}

	tamper := func(kind event.Kind) event.Event {
		ev := wantEvent(kind)
		ev.Tamper = event.TamperInfo{
			Target: event.ProcessKey{StartTime: 1, PID: 2}, TID: 3, Signal: 9, Code: -6, Result: 2, Mode: 18, Request: 16, Call: event.TamperCallPtrace,
			Flags: event.TamperByKernel | event.TamperDegraded, Comm: []byte("kill"),
		}
		return ev
	}
	file := func(kind event.Kind, flags event.FileFlags, path, path2, name string) event.Event {
		ev := wantEvent(kind)
		ev.File = event.FileInfo{
			File: event.File{
				Ino: 31, Size: 32, MTime: -33, CTime: 34, DevMajor: 35, DevMinor: 36, Mode: 0o100755, Nlink: 37, UID: 38, GID: 39, FSMagic: 40,
			},
			Path: []byte(path), Path2: []byte(path2), Name: []byte(name), Flags: flags,
			CgroupID: 41, TargetIno: 42, NewSize: 43, NewATime: -44, NewMTime: 45, Written: 46, OpenFlags: 47,
			NewMode: 48, NewUID: 49, NewGID: 50, Attributes: 53, NewAttributes: 54, Suppressed: 51, MntNS: 52,
		}
		return ev
	}

	for _, tt := range []struct {
		name string
		rec  []byte
		want event.Event
	}{
		{"file created", wireFile(event.FileCreate, event.FileNewMode, "x\x00tmp\x00", "", ""), file(event.FileCreate, event.FileNewMode, "/tmp/x", "", "")},
		{"renamed to the root", wireFile(event.FileRename, event.FileReplaced, "x\x00tmp\x00", "y\x00", ""), file(event.FileRename, event.FileReplaced, "/tmp/x", "/y", "")},
		{
			"renamed, both paths cut", wireFile(event.FileRename, event.FilePathTruncated|event.FilePath2Truncated, "x\x00tmp\x00", "", ""),
			file(event.FileRename, event.FilePathTruncated|event.FilePath2Truncated, "tmp/x", "", ""),
		},
		{"linked", wireFile(event.FileLink, 0, "x\x00", "y\x00tmp\x00", ""), file(event.FileLink, 0, "/x", "/tmp/y", "")},
		{"a symlink's target is text", wireFile(event.FileSymlink, 0, "x\x00", "../y", ""), file(event.FileSymlink, 0, "/x", "../y", "")},
		{"a mount's source is text", wireFile(event.Mount, 0, "mnt\x00", "none", "tmpfs"), file(event.Mount, 0, "/mnt", "none", "tmpfs")},
		{"unmounted root", wireFile(event.Umount, 0, "", "", "ext4"), file(event.Umount, 0, "/", "", "ext4")},
		{"mount moved", wireFile(event.MountMove, 0, "", "lib\x00", ""), file(event.MountMove, 0, "/", "/lib", "")},
		{"file flags", wireFile(event.FileChattr, 0, "x\x00", "", ""), file(event.FileChattr, 0, "/x", "", "")},
		{"attribute", wireFile(event.FileXattr, 0, "x\x00", "", "user.a"), file(event.FileXattr, 0, "/x", "", "user.a")},
		{
			"arguments of a system call", wireFile(event.FileRename, event.FileDegraded|event.FileRelative, "./x", "/y/", ""),
			file(event.FileRename, event.FileDegraded|event.FileRelative, "./x", "/y/", ""),
		},
		{"argument that could not be read", wireFile(event.FileDelete, event.FileDegraded, "", "", ""), file(event.FileDelete, event.FileDegraded, "", "", "")},
		{
			"file of a system call", wireFile(event.FileOpenWrite, event.FileDegraded|event.FileWalked, "x\x00tmp\x00", "", ""),
			file(event.FileOpenWrite, event.FileDegraded|event.FileWalked, "/tmp/x", "", ""),
		},
		{"exec of a script in /", wireExec(event.Exec, event.FlagScript, "./run.sh", "/bin/sh", "dash\x00bin\x00usr\x00", "", "", "/bin/sh\x00./run.sh\x00\x00"), script},
		{
			"task", wireExec(event.Task, 0, "", "", "systemd\x00lib\x00", "a\x00", "init.scope\x00", ""),
			exec(event.Task, 0, "/lib/systemd", "/a", "/init.scope"),
		},
		{"kernel thread", wireExec(event.Task, event.FlagKThread, "", "", "", "", "", ""), exec(event.Task, event.FlagKThread, "", "", "/")},
		{
			"paths cut short",
			wireExec(event.Exec, event.FlagExeTruncated|event.FlagCWDTruncated|event.FlagCgroupTruncated, "", "", "c\x00b\x00", "", "y\x00", ""),
			exec(event.Exec, event.FlagExeTruncated|event.FlagCWDTruncated|event.FlagCgroupTruncated, "b/c", "", "y"),
		},
		{
			"memfd named with a slash, name without its NUL",
			wireExec(event.Exec, event.FlagMemfd|event.FlagDeleted, "", "", "memfd:a/b\x00", "last\x00fi", "\x00", ""),
			exec(event.Exec, event.FlagMemfd|event.FlagDeleted, "/memfd:a/b", "/fi/last", "/"),
		},
		{"fork", wireFork(), fork},
		{"exit", wireExit(), exit},
		{"signal", wireTamper(event.Signal), tamper(event.Signal)},
		{"ptrace", wireTamper(event.Ptrace), tamper(event.Ptrace)},
		{"connect", wireTCP(event.TCPConnect, unix.AF_INET, "10.0.0.1", "192.0.2.7"), tcp(event.TCPConnect, "10.0.0.1:40000", "192.0.2.7:443")},
		{"failed", wireTCP(event.TCPConnectFailed, unix.AF_INET6, "::1", "2001:db8::1"), tcp(event.TCPConnectFailed, "[::1]:40000", "[2001:db8::1]:443")},
		{"IPv4 on a dual-stack socket", wireTCP(event.TCPAccept, unix.AF_INET6, "::ffff:10.0.0.1", "::ffff:192.0.2.7"), tcp(event.TCPAccept, "10.0.0.1:40000", "192.0.2.7:443")},
		{"listen", wireTCP(event.TCPListen, unix.AF_INET6, "::", "::"), tcp(event.TCPListen, "[::]:40000", "[::]:443")},
		{"close", wireTCP(event.TCPClose, unix.AF_INET, "0.0.0.0", "0.0.0.0"), tcp(event.TCPClose, "0.0.0.0:40000", "0.0.0.0:443")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var d decoder
			// What an event held before must not show, as far as it is of its kind.
			got := event.Event{
				Time: 1, Hook: "x", Self: &event.SelfInfo{}, Subject: &event.Process{}, Parent: &event.Process{},
				Severity: 4, Creator: &event.Process{}, Ancestors: []*event.Process{{}}, Cases: []*event.Case{{ID: "c"}}, Deep: true,
			}
			got.Exec.OldPath = "/old"
			if tt.want.File.MntNS != 0 {
				got.File = event.FileInfo{Owner: "o", NewOwner: "n", Name: []byte("n")}
			}
			if err := d.decode(tt.rec, &got); err != nil {
				t.Fatal(err)
			}
			if tt.want.Kind != event.Exec && tt.want.Kind != event.Task {
				tt.want.Exec.OldPath = "/old"
			}
			if diff := cmp.Diff(tt.want, got, texts); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeRefuses(t *testing.T) {
	set := func(rec []byte, change func(*bpf.SensorExecEvent)) []byte {
		rec = bytes.Clone(rec)
		change((*bpf.SensorExecEvent)(unsafe.Pointer(&rec[0])))
		return rec
	}
	exec := wireExec(event.Exec, 0, "file", "interp", "exe\x00", "cwd\x00", "cgroup\x00", "argv\x00")
	resized := func(rec []byte, n int) []byte {
		rec = append(bytes.Clone(rec), make([]byte, max(n, 0))...)[:len(rec)+n]
		(*bpf.SensorEventHeader)(unsafe.Pointer(&rec[0])).Size = uint32(len(rec))
		return rec
	}
	for _, tt := range []struct {
		name string
		rec  []byte
		want recordError
	}{
		{"empty", nil, recordError{Field: "header", Value: 32}},
		{"half a header", exec[:31], recordError{Size: 31, Field: "header", Value: 32}},
		{"kind none", wire(wireHeader(event.None)), recordError{Size: 32, Field: "kind"}},
		{"kind of no record", wire(wireHeader(event.Lifecycle)), recordError{Kind: event.Lifecycle, Size: 32, Field: "kind", Value: uint64(event.Lifecycle)}},
		{"unknown kind", wire(bpf.SensorEventHeader{Kind: 1 << 31}), recordError{Kind: 255, Size: 32, Field: "kind", Value: 1 << 31}},
		{"cut", exec[:len(exec)-1], recordError{Kind: event.Exec, Size: len(exec) - 1, Field: "size", Value: uint64(len(exec))}},
		{"only a header", wire(wireHeader(event.Exec)), recordError{Kind: event.Exec, Size: 32, Field: "fixed size", Value: uint64(execSize)}},
		{"bytes left over", resized(exec, 1), recordError{Kind: event.Exec, Size: len(exec) + 1, Field: "bytes left over", Value: 1}},
		{"one byte short", resized(exec, -1), recordError{Kind: event.Exec, Size: len(exec) - 1, Field: "argv_len", Value: 5}},
		{"filename too long", set(exec, func(r *bpf.SensorExecEvent) { r.FilenameLen = 1 << 31 }), recordError{Kind: event.Exec, Size: len(exec), Field: "filename_len", Value: 1 << 31}},
		{"interp too long", set(exec, func(r *bpf.SensorExecEvent) { r.InterpLen = ^uint32(0) }), recordError{Kind: event.Exec, Size: len(exec), Field: "interp_len", Value: 1<<32 - 1}},
		{"exe too long", set(exec, func(r *bpf.SensorExecEvent) { r.ExeLen = 100 }), recordError{Kind: event.Exec, Size: len(exec), Field: "exe_len", Value: 100}},
		{"cwd too long", set(exec, func(r *bpf.SensorExecEvent) { r.CwdLen = 100 }), recordError{Kind: event.Exec, Size: len(exec), Field: "cwd_len", Value: 100}},
		{"cgroup too long", set(exec, func(r *bpf.SensorExecEvent) { r.CgroupLen = 100 }), recordError{Kind: event.Exec, Size: len(exec), Field: "cgroup_len", Value: 100}},
		{"fork too long", resized(wireFork(), 8), recordError{Kind: event.Fork, Size: forkSize + 8, Field: "fixed size", Value: uint64(forkSize)}},
		{"exit too short", resized(wireExit(), -8), recordError{Kind: event.Exit, Size: exitSize - 8, Field: "fixed size", Value: uint64(exitSize)}},
		{"tcp too short", resized(wireTCP(event.TCPClose, 2, "::", "::"), -1), recordError{Kind: event.TCPClose, Size: tcpSize - 1, Field: "fixed size", Value: uint64(tcpSize)}},
		{"signal too short", resized(wireTamper(event.Signal), -8), recordError{Kind: event.Signal, Size: tamperSize - 8, Field: "fixed size", Value: uint64(tamperSize)}},
		{"only the header of a file event", wire(wireHeader(event.FileCreate)), recordError{Kind: event.FileCreate, Size: 32, Field: "fixed size", Value: uint64(fileSize)}},
		{"file event cut", resized(wireFile(event.FileXattr, 0, "x\x00", "", "name"), -1), recordError{Kind: event.FileXattr, Size: fileSize + 5, Field: "name_len", Value: 4}},
		{"file event too long", resized(wireFile(event.FileXattr, 0, "x\x00", "", "name"), 3), recordError{Kind: event.FileXattr, Size: fileSize + 9, Field: "bytes left over", Value: 3}},
		{"unknown family", wireTCP(event.TCPClose, 1, "::", "::"), recordError{Kind: event.TCPClose, Size: tcpSize, Field: "family", Value: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var (
				d   decoder
				ev  event.Event
				got *recordError
			)
			if err := d.decode(tt.rec, &ev); !errors.As(err, &got) {
				t.Fatalf("decode = %v, want a *recordError", err)
			}
			if diff := cmp.Diff(tt.want, *got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	err := &recordError{Kind: event.Exec, Size: 360, Field: "argv_len", Value: 4096}
	if want := "decode process.exec (kind 1) of 360 bytes: argv_len is 4096"; err.Error() != want {
		t.Errorf("Error() = %q, want %q", err.Error(), want)
	}
}

// TestDecoderArena decodes more paths than the arena holds: events decoded before
// stay intact, and the arena does not keep the size of its worst batch.
func TestDecoderArena(t *testing.T) {
	var d decoder
	long := strings.Repeat("directory\x00", 400)
	rec := wireExec(event.Exec, 0, "", "", "a\x00", "b\x00c\x00", "d\x00", "")
	big := wireExec(event.Exec, 0, "", "", long, long, long, "")
	for range 3 {
		d.reset()
		var events [256]event.Event
		for i := range events {
			r := rec
			if i%2 == 1 {
				r = big
			}
			if err := d.decode(r, &events[i]); err != nil {
				t.Fatal(err)
			}
		}
		for i := range events {
			x := events[i].Exec
			want := []string{"/a", "/c/b", "/d"}
			if i%2 == 1 {
				path := strings.Repeat("/directory", 400)
				want = []string{path, path, path}
			}
			if diff := cmp.Diff(want, []string{string(x.ExePath), string(x.CWD), string(x.CgroupPath)}); diff != "" {
				t.Fatalf("event %d (-want +got):\n%s", i, diff)
			}
		}
	}
	d.reset()
	if cap(d.arena) > arenaKeep {
		t.Errorf("the arena keeps %d bytes", cap(d.arena))
	}
}

func TestDecodeDoesNotAllocate(t *testing.T) {
	var (
		d  decoder
		ev event.Event
	)
	for name, rec := range benchmarkRecords() {
		allocs := testing.AllocsPerRun(100, func() {
			d.reset()
			if err := d.decode(rec, &ev); err != nil {
				t.Fatal(err)
			}
		})
		if allocs != 0 {
			t.Errorf("%s: %v allocations", name, allocs)
		}
	}
}

func benchmarkRecords() map[string][]byte {
	return map[string][]byte{
		"exec": wireExec(
			event.Exec, 0, "/usr/bin/python3", "/usr/bin/python3", "python3.11\x00bin\x00usr\x00", "project\x00alice\x00home\x00",
			"session-4.scope\x00user-1000.slice\x00user.slice\x00", "python3\x00-m\x00http.server\x00--bind\x00127.0.0.1\x008080\x00",
		),
		"fork":   wireFork(),
		"exit":   wireExit(),
		"tcp":    wireTCP(event.TCPClose, unix.AF_INET, "10.0.0.1", "192.0.2.7"),
		"tamper": wireTamper(event.Signal),
		"file":   wireFile(event.FileRename, 0, ".cache.php\x00html\x00www\x00var\x00", "index.php\x00html\x00www\x00var\x00", ""),
	}
}

// FuzzDecode feeds arbitrary bytes: no panic, and an event only of bytes that
// belong to the record or to the arena.
func FuzzDecode(f *testing.F) {
	for _, rec := range benchmarkRecords() {
		f.Add(rec)
		f.Add(rec[:len(rec)-1])
	}
	f.Add(wireExec(event.Task, event.FlagKThread, "", "", "", "", "", ""))
	f.Add(wireExec(event.Exec, ^event.ProcessFlags(0), "\x00", "\xff", "\x00\x00a", "\x00", "x", "\x00\x00"))
	f.Add(wireFile(event.Mount, ^event.FileFlags(0), "\x00", "\xff", "\x00\x00a"))
	f.Add(wireFile(event.FileLink, event.FilePathTruncated, "", "a\x00", "x"))
	f.Add(wireFile(event.FileTimes, event.FileDegraded, "../x", "", ""))
	f.Add(wireTCP(event.TCPAccept, unix.AF_INET6, "::ffff:1.2.3.4", "::"))
	f.Fuzz(func(t *testing.T, rec []byte) {
		var (
			d  decoder
			ev event.Event
		)
		rec = slices.Clip(rec)
		before := bytes.Clone(rec)
		err := d.decode(rec, &ev)
		if !bytes.Equal(before, rec) {
			t.Fatal("decode changed the record")
		}
		if err != nil {
			if re := (*recordError)(nil); !errors.As(err, &re) || re.Size != len(rec) {
				t.Fatalf("error %v of %d bytes", err, len(rec))
			}
			return
		}
		if c := &ev.File; ev.Kind >= event.FileCreate && ev.Kind <= event.FileChattr {
			if n := fileSize + len(c.Path) + len(c.Path2) + len(c.Name); n > len(rec)+4 {
				t.Fatalf("%d bytes from a record of %d", n, len(rec))
			}
			if c.Flags&event.FileDegraded == 0 && bytes.IndexByte(c.Path, 0) >= 0 {
				t.Fatalf("path %q", c.Path)
			}
			return
		}
		x := &ev.Exec
		if ev.Kind == event.Exec || ev.Kind == event.Task {
			total := execSize + len(x.Filename) + len(x.Interp) + len(x.Argv)
			if paths := len(x.ExePath) + len(x.CWD) + len(x.CgroupPath); total > len(rec) || paths > len(rec)-total+6 {
				t.Fatalf("%d bytes in place and %d of paths from a record of %d", total, paths, len(rec))
			}
			for _, p := range [][]byte{x.ExePath, x.CWD, x.CgroupPath} {
				if bytes.IndexByte(p, 0) >= 0 {
					t.Fatalf("path %q", p)
				}
			}
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	for name, rec := range benchmarkRecords() {
		b.Run(name, func(b *testing.B) {
			var (
				d  decoder
				ev event.Event
			)
			b.ReportAllocs()
			b.SetBytes(int64(len(rec)))
			for b.Loop() {
				d.reset()
				if err := d.decode(rec, &ev); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
