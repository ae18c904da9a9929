// SPDX-License-Identifier: Apache-2.0

// Command actor32 is built for 32 bits and does one thing that tests ask for, as change
// of files_test.go does.
package main

import (
	"os"
	"strconv"
	"syscall"
	"unsafe"
)

func main() {
	if len(os.Args) > 2 {
		if err := change(os.Args[1], os.Args[2], os.Args[len(os.Args)-1]); err != nil {
			println(err.Error())
		}
	}
}

func change(what, path, second string) error {
	write := func(flags int, data string) error {
		fd, err := syscall.Open(path, flags|syscall.O_CLOEXEC, 0o640)
		if err != nil {
			return err
		}
		if data != "" {
			if _, err := syscall.Write(fd, []byte(data)); err != nil {
				return err
			}
		}
		return syscall.Close(fd)
	}
	switch what {
	case "create":
		return write(syscall.O_CREAT|syscall.O_EXCL|syscall.O_WRONLY, "hello")
	case "append":
		return write(syscall.O_WRONLY|syscall.O_APPEND, ", world")
	case "overwrite":
		return write(syscall.O_WRONLY|syscall.O_TRUNC, "bye")
	case "open":
		return write(syscall.O_RDWR, "")
	case "mknod":
		return syscall.Mknod(path, syscall.S_IFIFO|0o600, 0)
	case "mkdir":
		return syscall.Mkdir(path, 0o750)
	case "symlink":
		return syscall.Symlink(second, path)
	case "link":
		return syscall.Link(path, second)
	case "rename":
		return syscall.Rename(path, second)
	case "unlink":
		return syscall.Unlink(path)
	case "rmdir":
		return syscall.Rmdir(path)
	case "chmod":
		return syscall.Chmod(path, 0o4755)
	case "chown":
		return syscall.Chown(path, 12, 34)
	case "truncate":
		return syscall.Truncate(path, 2)
	case "times":
		return syscall.UtimesNano(path, []syscall.Timespec{{Sec: 1_000_000_000}, {Sec: 1_100_000_000, Nsec: 5}})
	case "setxattr":
		return syscall.Setxattr(path, "trusted.edr", []byte("value"), 0)
	case "removexattr":
		return syscall.Removexattr(path, "trusted.edr")
	case "chattr":
		return ioctl(path, 0x40046602, unsafe.Pointer(&[]uint32{number(second)}[0])) // FS_IOC32_SETFLAGS
	case "fsxattr":
		return ioctl(path, 0x401c5820, unsafe.Pointer(&[7]uint32{0x8})) // FS_IOC_FSSETXATTR
	case "mount":
		return syscall.Mount("edr-test", path, "tmpfs", syscall.MS_NOSUID, "")
	case "umount":
		return syscall.Unmount(path, syscall.MNT_DETACH)
	case "refused":
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := syscall.Connect(fd, &syscall.SockaddrInet4{Port: 1, Addr: [4]byte{127, 0, 0, 1}}); err != syscall.ECONNREFUSED {
			return err
		}
		return syscall.Close(fd)
	case "converse":
		return converse()
	case "signal":
		if err := syscall.Kill(int(number(path)), syscall.SIGSTOP); err != nil {
			return err
		}
		return syscall.Kill(int(number(path)), syscall.SIGCONT)
	case "seize": // until this process ends
		if _, _, errno := syscall.Syscall6(syscall.SYS_PTRACE, 0x4206, uintptr(number(path)), 0, 0, 0, 0); errno != 0 {
			return errno
		}
		return nil
	}
	println("no such operation")
	return nil
}

func ioctl(path string, command uintptr, argument unsafe.Pointer) error {
	fd, err := syscall.Open(path, syscall.O_RDONLY, 0)
	if err != nil {
		return err
	}
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), command, uintptr(argument)); errno != 0 {
		return errno
	}
	return syscall.Close(fd)
}

func number(s string) uint32 {
	n, err := strconv.ParseUint(s, 0, 32)
	if err != nil {
		panic(err)
	}
	return uint32(n)
}

// converse listens, connects to itself, accepts, and closes all.
func converse() error {
	var fds [2]int
	for i := range fds {
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		fds[i] = fd
	}
	if err := syscall.Bind(fds[0], &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return err
	}
	if err := syscall.Listen(fds[0], 8); err != nil {
		return err
	}
	name, err := syscall.Getsockname(fds[0])
	if err != nil {
		return err
	}
	if err := syscall.Connect(fds[1], name); err != nil {
		return err
	}
	accepted, _, err := syscall.Accept(fds[0])
	if err != nil {
		return err
	}
	for _, fd := range []int{fds[1], accepted, fds[0]} {
		if err := syscall.Close(fd); err != nil {
			return err
		}
	}
	return nil
}
