// SPDX-License-Identifier: Apache-2.0

package sensor

// nativeNumbers are this processor's numbers of the calls in fileCalls.
func nativeNumbers() map[string]uint32 {
	return map[string]uint32{
		"open": 2, "creat": 85, "openat": 257, "openat2": 437, "open_by_handle_at": 304, "mknod": 133, "mknodat": 259, "mkdir": 83,
		"mkdirat": 258, "symlink": 88, "symlinkat": 266, "link": 86, "linkat": 265, "unlink": 87, "rmdir": 84, "unlinkat": 263, "rename": 82,
		"renameat": 264, "renameat2": 316, "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "lchown": 94, "fchown": 93,
		"fchownat": 260, "truncate": 76, "ftruncate": 77, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280, "setxattr": 188,
		"lsetxattr": 189, "fsetxattr": 190, "setxattrat": 463, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199,
		"removexattrat": 466, "ioctl": 16, "file_setattr": 469, "mount": 165, "umount2": 166, "move_mount": 429, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
	}
}

// compatNumbers are those of i386, which 32-bit processes have.
func compatNumbers() map[string]uint32 {
	return map[string]uint32{
		"open": 5, "creat": 8, "openat": 295, "openat2": 437, "open_by_handle_at": 342, "mknod": 14, "mknodat": 297, "mkdir": 39, "mkdirat": 296,
		"symlink": 83, "symlinkat": 304, "link": 9, "linkat": 303, "unlink": 10, "rmdir": 40, "unlinkat": 301, "rename": 38, "renameat": 302,
		"renameat2": 353, "chmod": 15, "fchmod": 94, "fchmodat": 306, "fchmodat2": 452, "chown": 182, "lchown": 16, "fchown": 95,
		"fchownat": 298, "chown32": 212, "lchown32": 198, "fchown32": 207, "truncate": 92, "ftruncate": 93, "truncate64": 193,
		"ftruncate64": 194, "utime": 30, "utimes": 271, "futimesat": 299, "utimensat": 320, "utimensat_time64": 412, "setxattr": 226,
		"lsetxattr": 227, "fsetxattr": 228, "setxattrat": 463, "removexattr": 235, "lremovexattr": 236, "fremovexattr": 237,
		"removexattrat": 466, "ioctl": 54, "file_setattr": 469, "mount": 21, "umount": 22, "umount2": 52, "move_mount": 429, "ptrace": 26, "process_vm_readv": 347, "process_vm_writev": 348,
	}
}

// wideArgument is where the halves of a 64-bit argument begin that follows one argument.
const wideArgument = 2
