// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

// errStalled says that a line was not written because its reader does not read.
var errStalled = errors.New("the reader of the log does not read")

// patience is how long a line may wait for its reader, at most once in
// patienceEvery: a burst gets through, and a reader that hangs costs the
// sensor no more than this share of its time.
const (
	patience      = 20 * time.Millisecond
	patienceEvery = time.Second
)

// outlet writes whole lines to a descriptor and does not wait for its reader: a
// container runtime or a journal that hangs must not stop the sensor. Its lock
// is the caller's.
type outlet struct {
	write func([]byte) (int, error) // does not block
	fd    int
	rest  []byte // of a line that was begun; it is finished before the next
	waits time.Time
}

// newOutlet picks how to write to w without blocking. Regular files, and what is
// no file, are written as they are.
func newOutlet(w io.Writer) zapcore.WriteSyncer {
	f, ok := w.(*os.File)
	if !ok {
		return zapcore.AddSync(w)
	}
	fd := int(f.Fd())
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return zapcore.AddSync(w)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFSOCK:
		return &outlet{fd: fd, write: func(p []byte) (int, error) {
			return unix.SendmsgN(fd, p, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		}}
	case unix.S_IFIFO, unix.S_IFCHR:
		// O_NONBLOCK belongs to the open file, which others share (a shell, the
		// other end of a script): open it once more. Where that is refused, block.
		own, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
		if err != nil {
			return zapcore.AddSync(w)
		}
		return &outlet{fd: own, write: func(p []byte) (int, error) { return unix.Write(own, p) }}
	}
	return zapcore.AddSync(w)
}

func (o *outlet) Sync() error { return nil }

// Write takes the whole line or none of it.
func (o *outlet) Write(p []byte) (int, error) {
	if len(o.rest) > 0 {
		n, err := o.push(o.rest)
		o.rest = o.rest[n:]
		if err != nil {
			return 0, err
		}
	}
	n, err := o.push(p)
	switch {
	case n == 0 && err != nil:
		return 0, err
	case n < len(p):
		o.rest = append([]byte(nil), p[n:]...)
	}
	return len(p), nil
}

// push writes what there is room for.
func (o *outlet) push(p []byte) (done int, err error) {
	for done < len(p) {
		n, err := o.write(p[done:])
		switch {
		case err == nil:
			done += n
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			if !await(o.fd, &o.waits) {
				return done, errStalled
			}
		default:
			return done, err
		}
	}
	return done, nil
}

// await waits until fd can be written, for patience at most and not again within
// patienceEvery.
func await(fd int, last *time.Time) bool {
	if time.Since(*last) < patienceEvery {
		return false
	}
	*last = time.Now()
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	n, err := unix.Poll(p, int(patience/time.Millisecond))
	return err == nil && n > 0
}
