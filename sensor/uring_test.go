// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The numbers of io_uring(7) that tests need.
const (
	opNop       = 0
	opAccept    = 13
	opConnect   = 16
	opOpenat    = 18
	opClose     = 19
	opWrite     = 23
	opOpenat2   = 28
	opRenameat  = 35
	opUnlinkat  = 36
	opMkdirat   = 37
	opSymlinkat = 38
	opLinkat    = 39
	opSetxattr  = 42
	opFtruncate = 55
	opBind      = 56
	opListen    = 57
	opsKnown    = 64

	setupSQPoll    = 1 << 1
	enterGetEvents = 1 << 0
	enterWakeup    = 1 << 1
	needWakeup     = 1 << 0
	byWorker       = 1 << 4 // IOSQE_ASYNC
	registerProbe  = 8
	offSQEs        = 0x10000000

	uringEntries = 8
	uringIdle    = 10 // milliseconds until the kernel's thread sleeps
)

// errMissing means that there is no such operation, in io_uring or in this kernel's.
var errMissing = errors.New("no such operation")

// sqe is struct io_uring_sqe; each operation has its own names for the fields.
type sqe struct {
	Opcode, Flags     uint8
	IOPrio            uint16
	FD                int32
	Off, Addr         uint64
	Len, OpFlags      uint32
	UserData          uint64
	BufIndex, Persona uint16
	FileIndex         int32
	Addr3, Pad        uint64
}

type uringParams struct {
	SQEntries, CQEntries, Flags, CPU, Idle, Features, WQ uint32
	_                                                    [3]uint32

	SQ struct { // offsets
		Head, Tail, Mask, Entries, Flags, Dropped, Array, _ uint32
		_                                                   uint64
	}
	CQ struct {
		Head, Tail, Mask, Entries, Overflow, CQEs, Flags, _ uint32
		_                                                   uint64
	}
}

// uring is an io_uring on which one operation is under way at a time.
type uring struct {
	fd     int
	p      uringParams
	memory []byte // both queues
	sqes   []byte
	has    [opsKnown]bool
}

// newUring makes a ring; polled, a thread of the kernel takes the submissions, and the
// process makes no system call for them.
func newUring(polled bool) (*uring, error) {
	u := new(uring)
	if polled {
		u.p.Flags, u.p.Idle = setupSQPoll, uringIdle
	}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uringEntries, uintptr(unsafe.Pointer(&u.p)), 0)
	if errno != 0 {
		disabled, _ := os.ReadFile("/proc/sys/kernel/io_uring_disabled")
		return nil, fmt.Errorf("io_uring_setup: %w (kernel.io_uring_disabled is %q)", errno, strings.TrimSpace(string(disabled)))
	}
	u.fd = int(fd)
	unix.CloseOnExec(u.fd)
	size := max(u.p.SQ.Array+u.p.SQEntries*4, u.p.CQ.CQEs+u.p.CQEntries*16)
	var err error
	if u.memory, err = unix.Mmap(u.fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return nil, fmt.Errorf("map the queues: %w", err)
	}
	u.sqes, err = unix.Mmap(u.fd, offSQEs, int(u.p.SQEntries)*int(unsafe.Sizeof(sqe{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map the entries: %w", err)
	}
	probe := make([]byte, 16+8*opsKnown)
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, fd, registerProbe, uintptr(unsafe.Pointer(&probe[0])), opsKnown, 0, 0); errno != 0 {
		return nil, fmt.Errorf("probe the operations: %w", errno)
	}
	for i := range int(probe[1]) {
		entry := probe[16+8*i:]
		u.has[entry[0]] = binary.NativeEndian.Uint16(entry[2:])&1 != 0
	}
	return u, nil
}

func (u *uring) word(offset uint32) *uint32 { return (*uint32)(unsafe.Pointer(&u.memory[offset])) }

// do has one operation done and returns its result. What the addresses in it point to
// must be kept by the caller.
func (u *uring) do(e sqe) (int, error) {
	if !u.has[e.Opcode] {
		return 0, errMissing
	}
	tail := atomic.LoadUint32(u.word(u.p.SQ.Tail))
	index := tail & *u.word(u.p.SQ.Mask)
	*(*sqe)(unsafe.Pointer(&u.sqes[uintptr(index)*unsafe.Sizeof(e)])) = e
	*u.word(u.p.SQ.Array + 4*index) = index
	atomic.StoreUint32(u.word(u.p.SQ.Tail), tail+1)
	head := atomic.LoadUint32(u.word(u.p.CQ.Head))
	submit := uintptr(1)
	for atomic.LoadUint32(u.word(u.p.CQ.Tail)) == head {
		flags := uintptr(enterGetEvents)
		if u.p.Flags&setupSQPoll != 0 {
			submit = 0
			if atomic.LoadUint32(u.word(u.p.SQ.Flags))&needWakeup != 0 {
				flags |= enterWakeup
			}
		}
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(u.fd), submit, 1, flags, 0, 0)
		if errno != 0 && errno != unix.EINTR {
			return 0, fmt.Errorf("io_uring_enter: %w", errno)
		}
		if errno == 0 {
			submit -= n
		}
	}
	result := int32(*u.word(u.p.CQ.CQEs + 16*(head&*u.word(u.p.CQ.Mask)) + 8))
	atomic.StoreUint32(u.word(u.p.CQ.Head), head+1)
	if result < 0 {
		return 0, unix.Errno(-result)
	}
	return int(result), nil
}

// pinned are strings and structures that the kernel is told the addresses of.
type pinned struct{ runtime.Pinner }

func (p *pinned) text(s string) uint64 {
	b := append([]byte(s), 0)
	p.Pin(&b[0])
	return uint64(uintptr(unsafe.Pointer(&b[0])))
}

func pin[T any](p *pinned, v *T) uint64 {
	p.Pin(v)
	return uint64(uintptr(unsafe.Pointer(v)))
}

// change is change of files_test.go by this ring, as far as it goes.
func (u *uring) change(args []string) error {
	path, second := args[1], args[len(args)-1]
	const here = unix.AT_FDCWD
	var keep pinned
	defer keep.Unpin()
	one := func(e sqe) error {
		_, err := u.do(e)
		return err
	}
	var worker uint8
	if args[0] == "append" {
		worker = byWorker
	}
	opened := func(flags int, then func(fd int) error) error {
		fd, err := u.do(sqe{Opcode: opOpenat, FD: here, Addr: keep.text(path), OpFlags: uint32(flags), Len: 0o640})
		if err != nil {
			return err
		}
		return errors.Join(then(fd), one(sqe{Opcode: opClose, FD: int32(fd)}))
	}
	write := func(flags int, data string) error {
		return opened(flags, func(fd int) error {
			return one(sqe{Opcode: opWrite, Flags: worker, FD: int32(fd), Addr: keep.text(data), Len: uint32(len(data)), Off: ^uint64(0)})
		})
	}
	switch args[0] {
	case "create":
		return write(unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, "hello")
	case "append":
		return write(unix.O_WRONLY|unix.O_APPEND, ", world")
	case "overwrite":
		return write(unix.O_WRONLY|unix.O_TRUNC, "bye")
	case "open":
		how := &unix.OpenHow{Flags: unix.O_RDWR}
		fd, err := u.do(sqe{Opcode: opOpenat2, FD: here, Addr: keep.text(path), Off: pin(&keep, how), Len: uint32(unsafe.Sizeof(*how))})
		if err != nil {
			return err
		}
		return one(sqe{Opcode: opClose, FD: int32(fd)})
	case "mkdir":
		return one(sqe{Opcode: opMkdirat, FD: here, Addr: keep.text(path), Len: 0o750})
	case "symlink":
		return one(sqe{Opcode: opSymlinkat, FD: here, Addr: keep.text(second), Off: keep.text(path)})
	case "link":
		return one(sqe{Opcode: opLinkat, FD: here, Addr: keep.text(path), Len: here & 0xffffffff, Off: keep.text(second)})
	case "rename", "exchange":
		e := sqe{Opcode: opRenameat, FD: here, Addr: keep.text(path), Len: here & 0xffffffff, Off: keep.text(second)}
		if args[0] == "exchange" {
			e.OpFlags = unix.RENAME_EXCHANGE
		}
		return one(e)
	case "unlink":
		return one(sqe{Opcode: opUnlinkat, FD: here, Addr: keep.text(path)})
	case "rmdir":
		return one(sqe{Opcode: opUnlinkat, FD: here, Addr: keep.text(path), OpFlags: unix.AT_REMOVEDIR})
	case "truncate":
		if !u.has[opFtruncate] {
			return errMissing
		}
		return opened(unix.O_WRONLY, func(fd int) error { return one(sqe{Opcode: opFtruncate, FD: int32(fd), Off: 2}) })
	case "setxattr":
		return one(sqe{Opcode: opSetxattr, Addr: keep.text("trusted.edr"), Off: keep.text("value"), Len: 5, Addr3: keep.text(path)})
	}
	return errMissing
}

// converse listens, connects to itself, accepts, and closes all, each by the ring as far as
// this kernel's has the operation; listened says whether it had that one.
func (u *uring) converse() (answer reply, listened bool, err error) {
	var keep pinned
	defer keep.Unpin()
	var fds [2]int
	for i := range fds {
		if fds[i], err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return answer, false, err
		}
	}
	if err := unix.Bind(fds[0], &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return answer, false, err
	}
	_, err = u.do(sqe{Opcode: opListen, FD: int32(fds[0]), Len: 8})
	if listened = err == nil; errors.Is(err, errMissing) {
		err = unix.Listen(fds[0], 8)
	}
	if err != nil {
		return answer, listened, fmt.Errorf("listen: %w", err)
	}
	name, err := unix.Getsockname(fds[0])
	if err != nil {
		return answer, listened, err
	}
	port := name.(*unix.SockaddrInet4).Port
	if _, err := u.do(u.connect(&keep, fds[1], port)); err != nil {
		return answer, listened, fmt.Errorf("connect: %w", err)
	}
	name, err = unix.Getsockname(fds[1])
	if err != nil {
		return answer, listened, err
	}
	accepted, err := u.do(sqe{Opcode: opAccept, FD: int32(fds[0])})
	if err != nil {
		return answer, listened, fmt.Errorf("accept: %w", err)
	}
	for _, fd := range []int{fds[1], accepted, fds[0]} {
		if _, err := u.do(sqe{Opcode: opClose, FD: int32(fd)}); err != nil {
			return answer, listened, fmt.Errorf("close: %w", err)
		}
	}
	answer.Local = fmt.Sprintf("127.0.0.1:%d", name.(*unix.SockaddrInet4).Port)
	answer.Remote = fmt.Sprintf("127.0.0.1:%d", port)
	return answer, listened, nil
}

// refused connects to where nobody listens.
func (u *uring) refused() error {
	var keep pinned
	defer keep.Unpin()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if _, err := u.do(u.connect(&keep, fd, 1)); !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("connect to port 1: %w", err)
	}
	_, err = u.do(sqe{Opcode: opClose, FD: int32(fd)})
	return err
}

func (u *uring) connect(keep *pinned, fd, port int) sqe {
	to := &unix.RawSockaddrInet4{Family: unix.AF_INET, Port: uint16(port>>8 | port<<8), Addr: [4]byte{127, 0, 0, 1}}
	return sqe{Opcode: opConnect, FD: int32(fd), Addr: pin(keep, to), Off: uint64(unsafe.Sizeof(*to))}
}
