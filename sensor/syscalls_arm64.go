// SPDX-License-Identifier: Apache-2.0

package sensor

// nativeNumbers are this processor's numbers of the calls in fileCalls.
func nativeNumbers() map[string]uint32 {
	return map[string]uint32{
		"openat": 56, "openat2": 437, "open_by_handle_at": 265, "mknodat": 33, "mkdirat": 34, "symlinkat": 36, "linkat": 37, "unlinkat": 35,
		"renameat": 38, "renameat2": 276, "fchmod": 52, "fchmodat": 53, "fchmodat2": 452, "fchown": 55, "fchownat": 54, "truncate": 45,
		"ftruncate": 46, "utimensat": 88, "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "setxattrat": 463, "removexattr": 14,
		"lremovexattr": 15, "fremovexattr": 16, "removexattrat": 466, "ioctl": 29, "file_setattr": 469, "mount": 40, "umount2": 39,
		"move_mount": 429, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271,
	}
}

// compatNumbers are those of 32-bit ARM, which 32-bit processes have.
func compatNumbers() map[string]uint32 {
	return map[string]uint32{
		"open": 5, "creat": 8, "openat": 322, "openat2": 437, "open_by_handle_at": 371, "mknod": 14, "mknodat": 324, "mkdir": 39, "mkdirat": 323,
		"symlink": 83, "symlinkat": 331, "link": 9, "linkat": 330, "unlink": 10, "rmdir": 40, "unlinkat": 328, "rename": 38, "renameat": 329,
		"renameat2": 382, "chmod": 15, "fchmod": 94, "fchmodat": 333, "fchmodat2": 452, "chown": 182, "lchown": 16, "fchown": 95,
		"fchownat": 325, "chown32": 212, "lchown32": 198, "fchown32": 207, "truncate": 92, "ftruncate": 93, "truncate64": 193,
		"ftruncate64": 194, "utimes": 269, "futimesat": 326, "utimensat": 348, "utimensat_time64": 412, "setxattr": 226, "lsetxattr": 227,
		"fsetxattr": 228, "setxattrat": 463, "removexattr": 235, "lremovexattr": 236, "fremovexattr": 237, "removexattrat": 466, "ioctl": 54,
		"file_setattr": 469, "mount": 21, "umount2": 52, "move_mount": 429, "ptrace": 26, "process_vm_readv": 376, "process_vm_writev": 377,
	}
}

// wideArgument is where the halves of a 64-bit argument begin that follows one argument.
const wideArgument = 3
