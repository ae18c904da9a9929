// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"maps"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// oldSyscalls adds those that newer architectures have no more.
func oldSyscalls(calls map[uint32]fileCall) {
	maps.Copy(calls, map[uint32]fileCall{
		unix.SYS_OPEN:  {Kind: uint8(event.FileOpenWrite), FD: result},
		unix.SYS_CREAT: {Kind: uint8(event.FileOpenWrite), FD: result},

		unix.SYS_MKNOD:   {Kind: uint8(event.FileCreate), Path: 1, Mode: 2},
		unix.SYS_MKDIR:   {Kind: uint8(event.FileMkdir), Path: 1, Mode: 2, Directory: 1},
		unix.SYS_SYMLINK: {Kind: uint8(event.FileSymlink), Path: 2, Path2: 1},
		unix.SYS_LINK:    {Kind: uint8(event.FileLink), Path: 1, Path2: 2},
		unix.SYS_UNLINK:  {Kind: uint8(event.FileDelete), Path: 1},
		unix.SYS_RMDIR:   {Kind: uint8(event.FileDelete), Path: 1, Directory: 1},
		unix.SYS_RENAME:  {Kind: uint8(event.FileRename), Path: 1, Path2: 2},

		unix.SYS_CHMOD:  {Kind: uint8(event.FileChmod), Path: 1, Mode: 2},
		unix.SYS_CHOWN:  {Kind: uint8(event.FileChown), Path: 1, UID: 2, GID: 3},
		unix.SYS_LCHOWN: {Kind: uint8(event.FileChown), Path: 1, UID: 2, GID: 3},
	})
}
