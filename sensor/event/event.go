// SPDX-License-Identifier: Apache-2.0

// Package event is the vocabulary of the agent: what the kernel reported, and
// what the sensor says about itself, as decoded Go values. It holds no logic
// beyond small accessors and imports only the standard library.
//
// Byte slices in an Event point into the kernel's ring buffer. They are valid
// until the worker has encoded the event; who keeps one must copy it.
package event

import (
	"net/netip"
	"time"
)

// Kind says what an Event reports.
type Kind uint8

// The kinds. Those up to Heartbeat come from the kernel and have the numbers of
// enum event_kind in bpf/events.h; Lifecycle is made by the sensor itself. A Heartbeat
// is for the sensor alone and never becomes an Event.
const (
	None Kind = iota
	Exec
	Fork
	Exit
	Task
	TCPConnect
	TCPConnectFailed
	TCPAccept
	TCPListen
	TCPClose
	FileCreate
	FileModify
	FileDelete
	FileRename
	FileLink
	FileSymlink
	FileMkdir
	FileChmod
	FileChown
	FileTruncate
	FileXattr
	FileTimes
	Mount
	Umount
	MountMove
	FileOpenWrite
	FileChattr
	Signal
	Ptrace
	Heartbeat
	Lifecycle
	kinds
)

// Kinds is the number of kinds, for tables indexed by Kind.
const Kinds = int(kinds)

var names = [Kinds]string{
	None: "none", Exec: "process.exec", Fork: "process.fork", Exit: "process.exit", Task: "process.snapshot",
	TCPConnect: "net.connect", TCPConnectFailed: "net.connect_failed", TCPAccept: "net.accept",
	TCPListen: "net.listen", TCPClose: "net.close",
	FileCreate: "file.create", FileModify: "file.write", FileDelete: "file.delete", FileRename: "file.rename", FileLink: "file.link",
	FileSymlink: "file.symlink", FileMkdir: "file.mkdir", FileChmod: "file.chmod", FileChown: "file.chown", FileTruncate: "file.truncate",
	FileXattr: "file.xattr", FileTimes: "file.timestomp", Mount: "file.mount", Umount: "file.umount", MountMove: "file.move_mount",
	FileOpenWrite: "file.open_write", FileChattr: "file.chattr", Signal: "process.signal", Ptrace: "process.ptrace",
	Heartbeat: "sensor.heartbeat", Lifecycle: "sensor.lifecycle",
}

// String returns the kind's event code, as in metadata.event_code.
func (k Kind) String() string {
	if int(k) >= Kinds {
		return "unknown"
	}
	return names[k]
}

// ProcessKey identifies a process for the life of this boot: the tgid in the
// initial pid namespace and the start time in boottime nanoseconds.
type ProcessKey struct {
	StartTime uint64
	PID       uint32
}

// Event is one decoded record. Exactly one of the detail structs is meaningful,
// by Kind. The worker reuses one Event for all records.
type Event struct {
	Kind  Kind
	KTime uint64     // CLOCK_BOOTTIME nanoseconds, taken in the kernel
	Time  int64      // wall clock, nanoseconds since the Unix epoch; set by enrich
	Actor ProcessKey // the acting process
	TID   uint32
	Hook  string // where it was seen, e.g. "tp_btf/sched_process_exec"; set by sensor
	// Severity is OCSF's severity_id of what is done to the sensor, 0 of all else; set by
	// sensor.
	Severity uint8

	Exec   ExecInfo // Exec, Task
	Fork   ForkInfo
	Exit   ExitInfo
	TCP    TCPInfo
	File   FileInfo
	Tamper TamperInfo // Signal, Ptrace
	Self   *SelfInfo  // Lifecycle

	// Set by enrich. Subject is the process the event is about (the new image,
	// the child, the one that exited, the owner of the connection); Parent is
	// its parent, Creator the acting process where that is another one. Any
	// may be nil when unknown.
	Subject   *Process
	Parent    *Process
	Creator   *Process
	Ancestors []*Process // parent first; valid until the next event

	// The open cases that cover this event, the oldest first; valid until the next
	// event. Deep is whether one of them wants everything. Set by enrich.
	Cases []*Case
	Deep  bool
}

// OfSensor tells whether the event is about the sensor itself.
func (ev *Event) OfSensor() bool {
	switch {
	case ev.Kind == Signal, ev.Kind == Ptrace:
		return true
	case ev.Kind >= FileCreate && ev.Kind <= FileChattr:
		return ev.File.Flags&FileOfSensor != 0
	}
	return false
}

// ExecInfo is what an exec (or the snapshot of a running process) carries.
type ExecInfo struct {
	Parent     ProcessKey
	NSPID      uint32
	Cred       Cred
	NS         Namespaces
	Exe        File
	CgroupID   uint64
	LoginUID   uint32 // Unset when never logged in
	SessionID  uint32
	Flags      ProcessFlags
	ArgvSize   uint32 // bytes before any cut
	Comm, TTY  []byte
	Filename   []byte // what was asked for
	Interp     []byte // what runs it
	ExePath    []byte // in slash form, built by decode
	CWD        []byte
	CgroupPath []byte
	Argv       []byte // NUL-terminated arguments, in place
	OldPath    string // Exec: path of the image replaced; set by enrich
}

// Unset is the value of LoginUID and SessionID before a login set them.
const Unset = ^uint32(0)

// ProcessFlags are those of enum process_flags in bpf/events.h.
type ProcessFlags uint32

// The process flags; bpf/events.h says what each means.
const (
	FlagMemfd ProcessFlags = 1 << iota
	FlagDeleted
	FlagScript
	FlagSecureExec
	FlagArgvTruncated
	FlagExeTruncated
	FlagCWDTruncated
	FlagCgroupV1
	FlagCgroupTruncated
	FlagKThread
	FlagArgvFault
)

// Cred is a task's credentials and capability sets.
type Cred struct {
	UID, GID, EUID, EGID, SUID, SGID, FSUID, FSGID                      uint32
	CapPermitted, CapEffective, CapInheritable, CapBounding, CapAmbient uint64
	Securebits, SeccompMode                                             uint32
}

// Namespaces are the inode numbers in /proc/PID/ns.
type Namespaces struct {
	Mnt, PID, Net, User, UTS, IPC, Cgroup, Time uint32
}

// File identifies an executable file and one version of its content.
type File struct {
	Ino                uint64
	Size               uint64
	MTime, CTime       int64 // nanoseconds since the Unix epoch
	DevMajor, DevMinor uint32
	Mode, Nlink        uint32
	UID, GID           uint32
	FSMagic            uint32
}

// ForkInfo is a new process; Event.Actor is its parent.
type ForkInfo struct {
	Child    ProcessKey
	CgroupID uint64
	NSPID    uint32
	PIDNS    uint32 // pid namespace of the child, in which it has NSPID
	Comm     []byte
}

// ExitInfo is the end of a process's last thread.
type ExitInfo struct {
	Parent       ProcessKey
	UTime, STime uint64 // nanoseconds, whole process
	Code         int32  // as passed to exit(2)
	Signal       uint32 // 0 when it exited by itself
	CoreDumped   bool
	Comm         []byte
}

// FileInfo is a change of the file system, or of what is mounted where.
type FileInfo struct {
	File               File   // before the change; Ino 0 when there was none
	Path               []byte // in slash form, built by decode
	Path2              []byte // new path, link target, mount source
	Name               []byte // xattr name, file system type
	Flags              FileFlags
	OpenFlags          uint32
	MntNS              uint32
	CgroupID           uint64
	TargetIno          uint64 // what a rename replaced
	NewMode            uint32 // the New fields are valid as Flags says
	NewUID, NewGID     uint32
	NewSize            uint64
	Attributes         uint32 // FileChattr: FS_*_FL before, of those that an inode has
	NewAttributes      uint32 // FileChattr: FS_*_FL
	NewATime, NewMTime int64  // nanoseconds since the Unix epoch
	Written            uint64
	Suppressed         uint32 // events of this process that the token bucket dropped before
	Owner, NewOwner    string // names of File.UID and NewUID, empty when unknown; set by enrich
}

// FileFlags are those of enum file_flags in bpf/events.h.
type FileFlags uint32

// The file flags; bpf/events.h says what each means.
const (
	FileDegraded FileFlags = 1 << iota
	FilePathTruncated
	FilePath2Truncated
	FileReplaced
	FileExchanged
	FileWhiteout
	FileDirectory
	FileXattrRemoved
	FileCreatedHere
	FileRelative
	FileNewMode
	FileNewUID
	FileNewGID
	FileNewSize
	FileNewATime
	FileNewMTime
	FileWalked
	FileArgument
	FileEarly
	FileOfBinary
	FileOfUnit
	FileOfConfig
	FileOfState
)

// FileOfSensor are the flags of a change of the sensor's own files.
const FileOfSensor = FileOfBinary | FileOfUnit | FileOfConfig | FileOfState

// Part names what of the sensor a change is about, empty for nothing of it.
func (f FileFlags) Part() string {
	switch {
	case f&FileOfBinary != 0:
		return "binary"
	case f&FileOfUnit != 0:
		return "unit"
	case f&FileOfConfig != 0:
		return "configuration"
	case f&FileOfState != 0:
		return "state"
	}
	return ""
}

// TamperInfo is what Event.Actor does to the sensor's process.
type TamperInfo struct {
	Target  ProcessKey
	TID     uint32 // of the target
	Signal  int32
	Code    int32  // Signal: si_code
	Result  uint32 // Signal: 0 delivered, 1 ignored, 2 one was pending already
	Mode    uint32 // Ptrace: PTRACE_MODE_*
	Request uint32 // Ptrace by a system call: of ptrace(2)
	Call    TamperCall
	Flags   TamperFlags
	Comm    []byte // of Event.Actor
}

// TamperFlags are those of enum tamper_flags in bpf/events.h.
type TamperFlags uint32

// The flags; bpf/events.h says what each means.
const (
	TamperByKernel TamperFlags = 1 << iota
	TamperDegraded
)

// TamperCall is enum tamper_call of bpf/events.h.
type TamperCall uint32

// The system calls that tell of ptrace where nothing better does.
const (
	TamperCallPtrace TamperCall = iota + 1
	TamperCallVMRead
	TamperCallVMWrite
)

// TCPInfo is one state of a TCP connection or listener.
type TCPInfo struct {
	ConnID                   uint64
	Opened                   uint64 // KTime of the open
	CgroupID                 uint64
	BytesSent, BytesReceived uint64
	NetNS                    uint32
	Flags                    TCPFlags
	SegsOut, SegsIn          uint32
	Retransmits, SRTT        uint32 // SRTT in microseconds
	Errno                    int32
	Backlog                  uint32
	Local, Remote            netip.AddrPort
	Closer                   ProcessKey
	OldState                 uint16
}

// TCPFlags are those of enum tcp_flags in bpf/events.h.
type TCPFlags uint32

// The TCP flags; bpf/events.h says what each means.
const (
	TCPInitiated TCPFlags = 1 << iota
	TCPOwnerListener
	TCPOwnerUnknown
	TCPEarly
)

// Process is what the process table knows of one process: a copy that outlives
// the records it was made from. It is written by the worker only; readers of an
// Event may keep the pointer until the worker goes on.
type Process struct {
	Key         ProcessKey
	Parent      ProcessKey
	CPID        string // OCSF Common Process ID, a UUID
	NSPID       uint32
	Comm        string
	Path        string // executable
	CmdLine     string // shell-joined, cut at MaxCmdLine bytes
	CWD         string
	TTY         string
	File        File
	Flags       ProcessFlags
	SHA256      string // hex; empty when unknown, then HashNote says why
	HashNote    string // "", "pending", "rate", "size", "gone", "changed", "error", "shed"
	Cred        Cred
	User, Group string // names of Cred.UID and Cred.GID, empty when unknown
	Owner       string // name of File.UID
	NS          Namespaces
	CgroupID    uint64
	CgroupPath  string
	Container   *Container
	LoginUID    uint32
	SessionID   uint32
	Exited      bool
	ExitTime    uint64 // KTime
	Partial     bool   // seen only as an actor, not through exec, fork or snapshot
}

// MaxCmdLine bounds Process.CmdLine, in bytes. The exec event itself carries
// the whole command line.
const MaxCmdLine = 4096

// Container is the container a process runs in, as its cgroup path tells.
type Container struct {
	ID           string // full id (64 hex for docker, containerd, cri-o), or the machine's name
	Runtime      string // docker, containerd, cri-o, podman, systemd-nspawn
	Orchestrator string // "kubernetes" or empty
	PodUUID      string
}

// Activity is what a SelfInfo reports.
type Activity uint8

// The activities of the sensor about itself.
const (
	ActivityOther Activity = iota // SelfInfo.Name says which
	ActivityStart
	ActivityStop
	ActivityDegraded
	ActivityLost
	ActivityMode
	ActivitySuppressed
)

// Decisions is the stream that a record about the sensor goes to.
type Decisions uint8

// The decision streams.
const (
	DecisionsSystem    Decisions = iota // about itself: modes, coverage, configuration, losses
	DecisionsAgents                     // about what it observed: suppression, aggregation
	DecisionsApprovals                  // what an operator approved through it: cases
)

// SelfInfo is what the sensor decided, lost or became, and why. It goes to a
// decisions stream.
type SelfInfo struct {
	Stream   Decisions
	Activity Activity
	Name     string // activity_name for ActivityOther, e.g. "Rewind"
	Severity uint8  // OCSF severity_id
	Failed   bool   // status_id 2
	Code     string // machine-readable cause, e.g. "RINGBUF_FULL"
	Message  string // one sentence for people
	Count    uint64 // events lost or suppressed, if any
	From, To time.Time
	Losses   []Loss            // ActivityLost: what exactly
	ByKind   map[string]uint64 // kernel losses, or what was suppressed, by event code
	Before   string            // state before and after, where it changed
	After    string
	Attrs    map[string]any // further evidence, under unmapped.sensor
	Process  *Process       // who did what the record is about; nil: nobody, or unknown
	Boot     int64          // when the clock of Process.Key.StartTime began, in ns since the Unix epoch
	// The case that the decision is about, and who made it, if any.
	CaseID, InvestigationID, UserID string
}

// Loss names records that will not be delivered: First..Last (both included) of
// the sender's seq numbers. Count is Last-First+1 unless ranges had to be merged.
type Loss struct {
	Cause string `json:"cause"` // truncated, corrupt, server, rejected
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	Count uint64 `json:"count"`
}

// Host describes the machine; it is constant while the sensor runs, but for a
// renamed host.
type Host struct {
	Hostname      string
	MachineID     string // 32 hex digits of /etc/machine-id, empty when absent
	BootID        string // UUID of this boot
	BootTime      time.Time
	OSName        string // e.g. "Debian GNU/Linux"
	OSVersion     string
	KernelRelease string
	IP            string // address of the interface that has the default route, if any
	CPUBits       int
	PIDNS         uint64 // inode of the initial pid namespace
}

// Agent says who reports.
type Agent struct {
	ID      string
	Version string
	Tenant  string
	// The case that the whole run belongs to, from the configuration.
	CaseID, InvestigationID, UserID string
}
