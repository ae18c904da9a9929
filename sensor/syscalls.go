// SPDX-License-Identifier: Apache-2.0

package sensor

import "github.com/aurorasoc/edr-sensor/sensor/event"

// fileCall is struct syscall of bpf/syscall.bpf.h.
type fileCall struct {
	Kind, FD, Path, Path2, Name, Mode, UID, GID, Size, Flags, Times, Removed, Directory, Attributes, Command, Forms, Target uint8
}

// Constants of bpf/syscall.bpf.h.
const (
	result = 7 // SYSCALL_RESULT

	times32           = 1 << 0
	timesMicroseconds = 1 << 1
	timesSeconds      = 1 << 2
	ids16             = 1 << 3
	sizeHalves        = 1 << 4
)

// fileCalls lists the system calls that tell events of files, and of the sensor itself, by the kernel's names. No
// architecture has them all.
func fileCalls() map[string]fileCall {
	opened := fileCall{Kind: uint8(event.FileOpenWrite), FD: result}
	return map[string]fileCall{
		"open": opened, "creat": opened, "openat": opened, "openat2": opened, "open_by_handle_at": opened,

		"mknod":     {Kind: uint8(event.FileCreate), Path: 1, Mode: 2},
		"mknodat":   {Kind: uint8(event.FileCreate), Path: 2, Mode: 3},
		"mkdir":     {Kind: uint8(event.FileMkdir), Path: 1, Mode: 2, Directory: 1},
		"mkdirat":   {Kind: uint8(event.FileMkdir), Path: 2, Mode: 3, Directory: 1},
		"symlink":   {Kind: uint8(event.FileSymlink), Path: 2, Path2: 1},
		"symlinkat": {Kind: uint8(event.FileSymlink), Path: 3, Path2: 1},
		"link":      {Kind: uint8(event.FileLink), Path: 1, Path2: 2},
		"linkat":    {Kind: uint8(event.FileLink), Path: 2, Path2: 4},
		"unlink":    {Kind: uint8(event.FileDelete), Path: 1},
		"rmdir":     {Kind: uint8(event.FileDelete), Path: 1, Directory: 1},
		"unlinkat":  {Kind: uint8(event.FileDelete), Path: 2, Flags: 3},
		"rename":    {Kind: uint8(event.FileRename), Path: 1, Path2: 2},
		"renameat":  {Kind: uint8(event.FileRename), Path: 2, Path2: 4},
		"renameat2": {Kind: uint8(event.FileRename), Path: 2, Path2: 4, Flags: 5},

		"chmod":       {Kind: uint8(event.FileChmod), Path: 1, Mode: 2},
		"fchmod":      {Kind: uint8(event.FileChmod), FD: 1, Mode: 2},
		"fchmodat":    {Kind: uint8(event.FileChmod), Path: 2, Mode: 3},
		"fchmodat2":   {Kind: uint8(event.FileChmod), Path: 2, Mode: 3},
		"chown":       {Kind: uint8(event.FileChown), Path: 1, UID: 2, GID: 3},
		"lchown":      {Kind: uint8(event.FileChown), Path: 1, UID: 2, GID: 3},
		"fchown":      {Kind: uint8(event.FileChown), FD: 1, UID: 2, GID: 3},
		"fchownat":    {Kind: uint8(event.FileChown), Path: 2, UID: 3, GID: 4},
		"chown32":     {Kind: uint8(event.FileChown), Path: 1, UID: 2, GID: 3},
		"lchown32":    {Kind: uint8(event.FileChown), Path: 1, UID: 2, GID: 3},
		"fchown32":    {Kind: uint8(event.FileChown), FD: 1, UID: 2, GID: 3},
		"truncate":    {Kind: uint8(event.FileTruncate), Path: 1, Size: 2},
		"ftruncate":   {Kind: uint8(event.FileTruncate), FD: 1, Size: 2},
		"truncate64":  {Kind: uint8(event.FileTruncate), Path: 1, Size: wideArgument, Forms: sizeHalves},
		"ftruncate64": {Kind: uint8(event.FileTruncate), FD: 1, Size: wideArgument, Forms: sizeHalves},

		"utime":            {Kind: uint8(event.FileTimes), Path: 1, Times: 2, Forms: timesSeconds},
		"utimes":           {Kind: uint8(event.FileTimes), Path: 1, Times: 2, Forms: timesMicroseconds},
		"futimesat":        {Kind: uint8(event.FileTimes), FD: 1, Path: 2, Times: 3, Forms: timesMicroseconds},
		"utimensat":        {Kind: uint8(event.FileTimes), FD: 1, Path: 2, Times: 3},
		"utimensat_time64": {Kind: uint8(event.FileTimes), FD: 1, Path: 2, Times: 3},

		"setxattr":      {Kind: uint8(event.FileXattr), Path: 1, Name: 2},
		"lsetxattr":     {Kind: uint8(event.FileXattr), Path: 1, Name: 2},
		"fsetxattr":     {Kind: uint8(event.FileXattr), FD: 1, Name: 2},
		"setxattrat":    {Kind: uint8(event.FileXattr), FD: 1, Path: 2, Name: 4},
		"removexattr":   {Kind: uint8(event.FileXattr), Path: 1, Name: 2, Removed: 1},
		"lremovexattr":  {Kind: uint8(event.FileXattr), Path: 1, Name: 2, Removed: 1},
		"fremovexattr":  {Kind: uint8(event.FileXattr), FD: 1, Name: 2, Removed: 1},
		"removexattrat": {Kind: uint8(event.FileXattr), FD: 1, Path: 2, Name: 4, Removed: 1},
		"ioctl":         {Kind: uint8(event.FileChattr), FD: 1, Command: 2, Attributes: 3},
		"file_setattr":  {Kind: uint8(event.FileChattr), FD: 1, Path: 2, Attributes: 3},

		"mount":      {Kind: uint8(event.Mount), Path: 2, Path2: 1, Name: 3, Flags: 4},
		"umount":     {Kind: uint8(event.Umount), Path: 1},
		"umount2":    {Kind: uint8(event.Umount), Path: 1, Flags: 2},
		"move_mount": {Kind: uint8(event.MountMove), Path: 2, Path2: 4},

		"ptrace":            {Kind: uint8(event.Ptrace), Command: 1, Target: 2, Forms: uint8(event.TamperCallPtrace)},
		"process_vm_readv":  {Kind: uint8(event.Ptrace), Target: 1, Forms: uint8(event.TamperCallVMRead)},
		"process_vm_writev": {Kind: uint8(event.Ptrace), Target: 1, Forms: uint8(event.TamperCallVMWrite)},
	}
}

// narrow is a call as a 32-bit process makes it.
func narrow(name string, call fileCall) fileCall {
	switch name {
	case "utime", "utimes", "futimesat", "utimensat":
		call.Forms |= times32
	case "chown", "lchown", "fchown":
		call.Forms |= ids16
	}
	return call
}

// syscallPair is struct syscalls of bpf/syscall.bpf.h.
type syscallPair struct {
	Own, Compat fileCall
}

// syscallTable is what file_syscalls of bpf/syscall.bpf.h holds, by number.
func syscallTable() map[uint32]syscallPair {
	calls, table := fileCalls(), map[uint32]syscallPair{}
	for name, number := range nativeNumbers() {
		table[number] = syscallPair{Own: calls[name]}
	}
	for name, number := range compatNumbers() {
		table[number] = syscallPair{Own: table[number].Own, Compat: narrow(name, calls[name])}
	}
	return table
}
