// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf/btf"

	"github.com/aurorasoc/edr-sensor/bpf"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// kernelTypes returns the types the object was compiled with.
func kernelTypes(t *testing.T) *btf.Spec {
	t.Helper()
	spec, err := bpf.LoadSensor()
	if err != nil {
		t.Fatal(err)
	}
	return spec.Types
}

func TestLayout(t *testing.T) {
	types := kernelTypes(t)
	for _, tt := range []struct {
		name string
		size uintptr
	}{
		{"event_header", unsafe.Sizeof(bpf.SensorEventHeader{})},
		{"cred_info", unsafe.Sizeof(bpf.SensorCredInfo{})},
		{"ns_info", unsafe.Sizeof(bpf.SensorNsInfo{})},
		{"file_info", unsafe.Sizeof(bpf.SensorFileInfo{})},
		{"exec_event", unsafe.Sizeof(bpf.SensorExecEvent{})},
		{"fork_event", unsafe.Sizeof(bpf.SensorForkEvent{})},
		{"exit_event", unsafe.Sizeof(bpf.SensorExitEvent{})},
		{"tcp_event", unsafe.Sizeof(bpf.SensorTcpEvent{})},
		{"file_event", unsafe.Sizeof(bpf.SensorFileEvent{})},
		{"tamper_event", unsafe.Sizeof(bpf.SensorTamperEvent{})},
		{"sensor_process", unsafe.Sizeof(bpf.SensorSensorProcess{})},
		{"protection", unsafe.Sizeof(bpf.SensorProtection{})},
		{"name_key", unsafe.Sizeof(bpf.SensorNameKey{})},
		{"heartbeat", unsafe.Sizeof(bpf.SensorHeartbeat{})},
		{"announced", unsafe.Sizeof(bpf.SensorAnnounced{})},
		{"kind_counter", unsafe.Sizeof(bpf.SensorKindCounter{})},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var s *btf.Struct
			if err := types.TypeByName(tt.name, &s); err != nil {
				t.Fatal(err)
			}
			if uintptr(s.Size) != tt.size {
				t.Errorf("%s is %d bytes in C, %d in Go", tt.name, s.Size, tt.size)
			}
			if s.Size%8 != 0 {
				t.Errorf("%s is %d bytes, not a multiple of 8", tt.name, s.Size)
			}
			var end btf.Bits
			for _, m := range s.Members {
				size, err := btf.Sizeof(m.Type)
				if err != nil {
					t.Fatal(err)
				}
				if m.Offset != end {
					t.Errorf("%s: hole of %d bits before %s", tt.name, m.Offset-end, m.Name)
				}
				end = m.Offset + btf.Bits(size)*8
			}
			if want := btf.Bits(s.Size) * 8; end != want {
				t.Errorf("%s: ends at bit %d of %d", tt.name, end, want)
			}
		})
	}
}

// constants returns the enumerators of a C enum by name.
func constants(t *testing.T, enum string) map[string]uint64 {
	t.Helper()
	var e *btf.Enum
	if err := kernelTypes(t).TypeByName(enum, &e); err != nil {
		t.Fatal(err)
	}
	values := make(map[string]uint64)
	for _, v := range e.Values {
		values[v.Name] = v.Value
	}
	return values
}

func TestEventKinds(t *testing.T) {
	kinds := map[string]event.Kind{
		"NONE": event.None, "EXEC": event.Exec, "FORK": event.Fork, "EXIT": event.Exit, "TASK": event.Task,
		"TCP_CONNECT": event.TCPConnect, "TCP_CONNECT_FAILED": event.TCPConnectFailed, "TCP_ACCEPT": event.TCPAccept,
		"TCP_LISTEN": event.TCPListen, "TCP_CLOSE": event.TCPClose,
		"FILE_CREATE": event.FileCreate, "FILE_MODIFY": event.FileModify, "FILE_DELETE": event.FileDelete,
		"FILE_RENAME": event.FileRename, "FILE_LINK": event.FileLink, "FILE_SYMLINK": event.FileSymlink,
		"FILE_MKDIR": event.FileMkdir, "FILE_CHMOD": event.FileChmod, "FILE_CHOWN": event.FileChown,
		"FILE_TRUNCATE": event.FileTruncate, "FILE_XATTR": event.FileXattr, "FILE_TIMES": event.FileTimes,
		"MOUNT": event.Mount, "UMOUNT": event.Umount, "MOUNT_MOVE": event.MountMove,
		"FILE_OPEN_WRITE": event.FileOpenWrite, "FILE_CHATTR": event.FileChattr, "SIGNAL": event.Signal, "PTRACE": event.Ptrace, "HEARTBEAT": event.Heartbeat,
	}
	for name, number := range constants(t, "event_kind") {
		short := strings.TrimPrefix(name, "EVENT_KIND_")
		if short == "COUNT" {
			if int(number) != len(kinds) || int(number) > event.Kinds {
				t.Errorf("the kernel has %d kinds, this test %d, package event %d", number, len(kinds), event.Kinds)
			}
			continue
		}
		kind, ok := kinds[short]
		if !ok || uint64(kind) != number {
			t.Errorf("%s is %d in C and %d in Go (known: %t)", name, number, kind, ok)
		}
	}
}

func TestFlags(t *testing.T) {
	for enum, flags := range map[string]map[string]uint64{
		"process_flags": {
			"PROCESS_MEMFD": uint64(event.FlagMemfd), "PROCESS_DELETED": uint64(event.FlagDeleted),
			"PROCESS_SCRIPT": uint64(event.FlagScript), "PROCESS_SECUREEXEC": uint64(event.FlagSecureExec),
			"PROCESS_ARGV_TRUNCATED": uint64(event.FlagArgvTruncated), "PROCESS_EXE_TRUNCATED": uint64(event.FlagExeTruncated),
			"PROCESS_CWD_TRUNCATED": uint64(event.FlagCWDTruncated), "PROCESS_CGROUP_V1": uint64(event.FlagCgroupV1),
			"PROCESS_CGROUP_TRUNCATED": uint64(event.FlagCgroupTruncated), "PROCESS_KTHREAD": uint64(event.FlagKThread),
			"PROCESS_ARGV_FAULT": uint64(event.FlagArgvFault),
		},
		"tamper_flags": {"TAMPER_BY_KERNEL": uint64(event.TamperByKernel), "TAMPER_DEGRADED": uint64(event.TamperDegraded)},
		"tamper_call": {
			"TAMPER_CALL_PTRACE": uint64(event.TamperCallPtrace), "TAMPER_CALL_VM_READ": uint64(event.TamperCallVMRead), "TAMPER_CALL_VM_WRITE": uint64(event.TamperCallVMWrite),
		},
		"tcp_flags": {
			"TCP_FLAG_INITIATED": uint64(event.TCPInitiated), "TCP_FLAG_OWNER_LISTENER": uint64(event.TCPOwnerListener),
			"TCP_FLAG_OWNER_UNKNOWN": uint64(event.TCPOwnerUnknown), "TCP_FLAG_EARLY": uint64(event.TCPEarly),
		},
		"file_flags": {
			"FILE_DEGRADED": uint64(event.FileDegraded), "FILE_PATH_TRUNCATED": uint64(event.FilePathTruncated),
			"FILE_PATH2_TRUNCATED": uint64(event.FilePath2Truncated), "FILE_REPLACED": uint64(event.FileReplaced),
			"FILE_EXCHANGED": uint64(event.FileExchanged), "FILE_WHITEOUT": uint64(event.FileWhiteout),
			"FILE_DIRECTORY": uint64(event.FileDirectory), "FILE_XATTR_REMOVED": uint64(event.FileXattrRemoved),
			"FILE_CREATED_HERE": uint64(event.FileCreatedHere), "FILE_RELATIVE": uint64(event.FileRelative),
			"FILE_NEW_MODE": uint64(event.FileNewMode), "FILE_NEW_UID": uint64(event.FileNewUID),
			"FILE_NEW_GID": uint64(event.FileNewGID), "FILE_NEW_SIZE": uint64(event.FileNewSize),
			"FILE_NEW_ATIME": uint64(event.FileNewATime), "FILE_NEW_MTIME": uint64(event.FileNewMTime),
			"FILE_WALKED": uint64(event.FileWalked), "FILE_ARGUMENT": uint64(event.FileArgument),
			"FILE_EARLY": uint64(event.FileEarly), "FILE_OF_BINARY": uint64(event.FileOfBinary), "FILE_OF_UNIT": uint64(event.FileOfUnit),
			"FILE_OF_CONFIG": uint64(event.FileOfConfig), "FILE_OF_STATE": uint64(event.FileOfState),
		},
	} {
		for name, bit := range constants(t, enum) {
			want, ok := flags[name]
			if !ok || want != bit {
				t.Errorf("%s is %#x in C and %#x in Go (known: %t)", name, bit, want, ok)
			}
		}
	}
}
