// SPDX-License-Identifier: Apache-2.0

// Package fdstore speaks with systemd about file descriptors that it keeps for a
// service while that is restarted: sd_notify(3) on one side, sd_listen_fds(3) on the
// other.
package fdstore

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// File is a descriptor that was kept, and the name it was kept under. Names are unique.
type File struct {
	Name string
	*os.File
}

// firstFD is the first descriptor that is passed, SD_LISTEN_FDS_START.
const firstFD = 3

// maxFDs bounds what an environment that nobody vouches for can ask to be looked at.
const maxFDs = 4096

// Inherited takes what systemd has kept out of the environment of this process and off
// its descriptors. None of them is passed on to children. The error says what is wrong
// with the environment; descriptors that are not there, or have no name or one that
// another one has, are left out.
func Inherited() ([]File, error) {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, name := range [...]string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(name) // fails for names that are none
	}
	list, err := parse(pid, count, names, os.Getpid())
	if err != nil {
		return nil, fmt.Errorf("take over descriptors: %w", err)
	}
	var files []File
	seen := map[string]bool{}
	for i, name := range list {
		fd := firstFD + i
		// What was passed on is not closed at exec. All else is a descriptor of our own.
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC != 0 {
			continue
		}
		unix.CloseOnExec(fd)
		if name == "" || seen[name] {
			_ = unix.Close(fd)
			continue
		}
		seen[name] = true
		files = append(files, File{name, os.NewFile(uintptr(fd), name)})
	}
	return files, nil
}

// parse returns the names of the descriptors from firstFD on, empty for those without.
func parse(pid, count, names string, self int) ([]string, error) {
	if pid == "" && count == "" {
		return nil, nil
	}
	if p, err := strconv.Atoi(pid); err != nil || p != self {
		if err != nil {
			return nil, fmt.Errorf("LISTEN_PID=%q is no number", pid)
		}
		return nil, nil // meant for another process
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > maxFDs {
		return nil, fmt.Errorf("LISTEN_FDS=%q is no number of descriptors", count)
	}
	list := make([]string, n)
	if names != "" {
		for i, name := range strings.Split(names, ":") {
			if i < n {
				list[i] = name
			}
		}
	}
	return list, nil
}

// Store is the service manager's end. Its methods may be called at the same time.
type Store struct {
	socket unix.Sockaddr
}

// settleWithin bounds the wait for a manager that is busy.
const settleWithin = 10 * time.Second

// Open returns the store of the manager that listens on a socket (NOTIFY_SOCKET); nil
// without one.
func Open(socket string) *Store {
	if socket == "" {
		return nil
	}
	if socket[0] == '@' {
		socket = "\x00" + socket[1:]
	}
	return &Store{&unix.SockaddrUnix{Name: socket}}
}

// Keep has the manager keep a descriptor; the caller may close its own at any time. It
// must have no other of that name. That it was taken in is known after Settle only.
func (s *Store) Keep(name string, fd int) error {
	if err := s.send("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, fd); err != nil {
		return fmt.Errorf("keep descriptor %s: %w", name, err)
	}
	return nil
}

// Drop has the manager close what it keeps under these names.
func (s *Store) Drop(names ...string) error {
	for _, name := range names {
		if err := s.send("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
			return fmt.Errorf("drop descriptor %s: %w", name, err)
		}
	}
	return nil
}

// Settle returns when the manager has done all it was asked for before.
func (s *Store) Settle() (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("wait for the service manager: %w", err)
		}
	}()
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	defer unix.Close(ends[0])
	err = s.send("BARRIER=1", ends[1])
	err = errors.Join(err, unix.Close(ends[1])) // the manager has the other copy, and closes it
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(settleWithin); ; {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("no answer within %s", settleWithin)
		}
		fds := []unix.PollFd{{Fd: int32(ends[0])}} // a hang-up is always told
		n, err := unix.Poll(fds, int(min(left.Milliseconds()+1, math.MaxInt32)))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			return nil
		}
	}
}

// send passes a message with descriptors. It blocks while the manager's queue is full,
// for a bounded time.
func (s *Store) send(message string, fds ...int) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	wait := unix.NsecToTimeval(settleWithin.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait); err != nil {
		return err
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	for {
		err := unix.Sendmsg(fd, []byte(message), rights, s.socket, unix.MSG_NOSIGNAL)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
