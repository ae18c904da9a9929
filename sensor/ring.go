// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// The layout of a BPF ring buffer, as in kernel/bpf/ringbuf.c. Each record is
// an 8-byte header (length and two flags, then a page offset that only the
// kernel needs) and its data, padded to 8 bytes.
const (
	ringHeader  = 8
	ringBusy    = 1 << 31
	ringDiscard = 1 << 30
	ringLength  = ringDiscard - 1
)

// errRing is returned when positions or a record header contradict each other:
// the memory is not a ring buffer, or something wrote into it.
var errRing = errors.New("corrupt ring")

// ring reads a BPF ring buffer in place and ahead of its consumer position. The
// library's reader advances that position with each record; here it is the
// acknowledgement, moved by release when the records are durable, so that
// the kernel keeps what a killed sensor did not store.
//
// next, seek, position and close belong to the one goroutine that reads. used
// and release are safe for concurrent use, also with close.
type ring struct {
	consumer *uint64 // shared with the kernel, which reads it
	produced *uint64 // shared with the kernel, which writes it
	data     []byte  // mapped twice in a row, so that no record wraps
	mask     uint64
	pos      uint64 // where next reads
	limit    uint64 // the producer position when last looked at; pos..limit is readable
	fd       int    // of the map, owned by it; -1 without one

	mu       sync.Mutex // orders release and used with close
	mappings [][]byte
}

// openRing maps a ring buffer and starts reading at its consumer position. The
// map must outlive the ring.
func openRing(m *ebpf.Map) (*ring, error) {
	if m.Type() != ebpf.RingBuf {
		return nil, fmt.Errorf("map ring: %s is a map of type %s", m, m.Type())
	}
	page, size := os.Getpagesize(), int(m.MaxEntries())
	consumer, err := unix.Mmap(m.FD(), 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map consumer page: %w", err)
	}
	producer, err := unix.Mmap(m.FD(), int64(page), page+2*size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("map data pages: %w", err), unix.Munmap(consumer))
	}
	r, err := newRing(consumer, producer[:page], producer[page:])
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(consumer), unix.Munmap(producer))
	}
	r.fd, r.mappings = m.FD(), [][]byte{consumer, producer}
	return r, nil
}

// newRing reads a ring in memory of the caller: the consumer page, the producer
// page, and the data area twice in a row.
func newRing(consumer, producer, data []byte) (*ring, error) {
	size := len(data) / 2
	if size < ringHeader || size&(size-1) != 0 || len(data)%2 != 0 || len(consumer) < 8 || len(producer) < 8 {
		return nil, fmt.Errorf("%w: pages of %d and %d bytes, data of %d", errRing, len(consumer), len(producer), len(data))
	}
	for _, b := range [...][]byte{consumer, producer, data} {
		if uintptr(unsafe.Pointer(&b[0]))%8 != 0 {
			return nil, fmt.Errorf("%w: memory is not aligned to 8 bytes", errRing)
		}
	}
	r := &ring{
		consumer: (*uint64)(unsafe.Pointer(&consumer[0])),
		produced: (*uint64)(unsafe.Pointer(&producer[0])),
		data:     data,
		mask:     uint64(size) - 1,
		fd:       -1,
	}
	return r, r.seek(atomic.LoadUint64(r.consumer))
}

// next returns the next committed record, skipping those the kernel discarded.
// The slice points into the ring; it stays valid until a release that covers it,
// or close. ok is false at a record still being written and at the end.
func (r *ring) next() (rec []byte, ok bool, err error) {
	for {
		if r.pos == r.limit {
			if r.data == nil {
				return nil, false, os.ErrClosed
			}
			if r.limit = r.producer(); r.limit == r.pos {
				return nil, false, nil
			}
			if ahead := r.limit - r.pos; ahead > r.mask+1 || ahead%8 != 0 {
				r.limit = r.pos
				return nil, false, fmt.Errorf("%w: producer is %d bytes ahead of %d, in a ring of %d", errRing, ahead, r.pos, len(r.data)/2)
			}
		}
		header := r.header()
		if header&ringBusy != 0 {
			return nil, false, nil
		}
		length := uint64(header & ringLength)
		whole := ringHeader + (length+7)&^7
		if whole > r.limit-r.pos {
			// The kernel moves the producer position past a record before it
			// fills it in, so a record that reaches beyond was never written.
			return nil, false, fmt.Errorf("%w: record of %d bytes at %d, %d before the producer", errRing, length, r.pos, r.limit-r.pos)
		}
		start := r.pos&r.mask + ringHeader
		r.pos += whole
		if header&ringDiscard == 0 {
			return r.data[start : start+length : start+length], true, nil
		}
	}
}

// header reads the length and flags at the read position. The atomic load pairs
// with the kernel's exchange in bpf_ringbuf_commit: what is not busy is complete.
func (r *ring) header() uint32 {
	return atomic.LoadUint32((*uint32)(unsafe.Pointer(&r.data[r.pos&r.mask])))
}

// scan calls visit for each record that next would return now, and leaves the reading
// where it is. It returns the position behind the last of them.
func (r *ring) scan(visit func(rec []byte)) (end uint64, err error) {
	c := ring{consumer: r.consumer, produced: r.produced, data: r.data, mask: r.mask, pos: r.pos, limit: r.pos, fd: -1}
	for {
		rec, ok, err := c.next()
		if err != nil || !ok {
			return c.pos, err
		}
		visit(rec)
	}
}

// find returns the position before the first record that matches, of those that next would
// return now; without one, behind the last of them. The reading stays where it is.
func (r *ring) find(match func(rec []byte) bool) (at uint64, err error) {
	c := ring{consumer: r.consumer, produced: r.produced, data: r.data, mask: r.mask, pos: r.pos, limit: r.pos, fd: -1}
	for {
		at = c.pos
		rec, ok, err := c.next()
		if err != nil || !ok {
			return c.pos, err
		}
		if match(rec) {
			return at, nil
		}
	}
}

// position is the position up to which next has returned everything.
func (r *ring) position() uint64 { return r.pos }

// producer is the position up to which the kernel has reserved records.
func (r *ring) producer() uint64 { return atomic.LoadUint64(r.produced) }

// seek makes pos, a record's start between the consumer and the producer
// position, the one that next reads.
func (r *ring) seek(pos uint64) error {
	consumer, producer := atomic.LoadUint64(r.consumer), r.producer()
	if held := producer - consumer; held > r.mask+1 || pos-consumer > held || pos%8 != 0 {
		return fmt.Errorf("%w: no record starts at %d between consumer %d and producer %d", errRing, pos, consumer, producer)
	}
	r.pos, r.limit = pos, pos
	return nil
}

// release gives the space before pos back to the kernel. A position that was
// released before, or that was never produced, changes nothing.
func (r *ring) release(pos uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	consumer := atomic.LoadUint64(r.consumer)
	if ahead := pos - consumer; ahead == 0 || ahead > r.producer()-consumer {
		return
	}
	// Stored with full ordering: the kernel, after its next commit, either sees
	// it and wakes the waiter, or the waiter sees the new producer position.
	atomic.StoreUint64(r.consumer, pos)
}

// used is the number of bytes between the consumer and the producer position,
// those of records read but not released included.
func (r *ring) used() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.producer() - atomic.LoadUint64(r.consumer)
}

// released tells whether the space before pos was given back. Safe for concurrent use.
func (r *ring) released(pos uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return int64(atomic.LoadUint64(r.consumer)-pos) >= 0
}

// size is the capacity in bytes.
func (r *ring) size() int { return int(r.mask) + 1 }

// unread tells whether records were reserved after the read position.
func (r *ring) unread() bool { return r.pos != r.producer() }

// readable tells whether next would return or skip a record.
func (r *ring) readable() bool {
	return r.pos != r.producer() && r.header()&ringBusy == 0
}

// unreleased tells whether records were read whose space the kernel still keeps.
func (r *ring) unreleased() bool { return r.pos != atomic.LoadUint64(r.consumer) }

// close unmaps the ring. Records that next returned must not be used afterwards.
func (r *ring) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	for _, m := range r.mappings {
		errs = append(errs, unix.Munmap(m))
	}
	// An empty ring in memory of our own, for a release that comes too late.
	r.consumer, r.produced, r.data, r.mappings, r.fd = new(uint64), new(uint64), nil, nil, -1
	r.pos, r.limit = 0, 0
	return errors.Join(errs...)
}

// Polling intervals of a waiter while records are unreleased.
const (
	pollMin = time.Millisecond
	pollMax = 10 * time.Millisecond
)

// waiter blocks until one of its rings has something to read.
//
// The kernel notifies only for the record at the consumer position, and reports
// a ring as readable while consumer and producer differ. So, while a ring holds
// records that were read and not released, a notification would not come and a
// poll(2) on it would not block: then, and only then, the waiter looks at the
// producer positions at intervals that grow from pollMin to pollMax. A ring
// that is fully released costs nothing while it is idle.
//
// wait and close belong to the goroutine that reads the rings.
type waiter struct {
	rings    []*ring
	fds      []unix.PollFd // the eventfd, then the rings
	interval time.Duration

	mu     sync.Mutex // orders wake with close
	closed bool
}

// newWaiter makes a waiter; the rings must stay open as long as it is used.
func newWaiter(rings ...*ring) (*waiter, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	w := &waiter{rings: rings, interval: pollMin, fds: []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}}
	for _, r := range rings {
		w.fds = append(w.fds, unix.PollFd{Fd: int32(r.fd), Events: unix.POLLIN})
	}
	return w, nil
}

// wait returns when a ring is readable, after wake, or when timeout has passed;
// it may return early for no reason.
func (w *waiter) wait(timeout time.Duration) error {
	for deadline := time.Now().Add(timeout); ; {
		readable, lagging := w.look()
		if readable {
			w.interval = pollMin
			return nil
		}
		left := max(time.Until(deadline), 0)
		if !lagging {
			w.interval = pollMin
			_, err := w.poll(w.fds, left)
			return err
		}
		woken, err := w.poll(w.fds[:1], min(left, w.interval))
		if err != nil || woken || left <= w.interval {
			return err
		}
		w.interval = min(2*w.interval, pollMax)
	}
}

// look says whether a ring is readable, and whether one is lagging: it would be
// reported as readable, or not at all, for records that are of no use now.
func (w *waiter) look() (readable, lagging bool) {
	for _, r := range w.rings {
		if r.readable() {
			return true, false
		}
		lagging = lagging || r.unread() || r.unreleased() || r.fd < 0
	}
	return false, lagging
}

// poll waits for the descriptors and says whether wake ended it. Unlike epoll,
// poll(2) asks each ring for its state before it sleeps, so nothing that came
// since look is missed.
func (w *waiter) poll(fds []unix.PollFd, timeout time.Duration) (woken bool, err error) {
	ts := unix.NsecToTimespec(timeout.Nanoseconds())
	if _, err := unix.Ppoll(fds, &ts, nil); err != nil && !errors.Is(err, unix.EINTR) {
		return false, fmt.Errorf("poll rings: %w", err)
	}
	var count [8]byte
	_, err = unix.Read(int(w.fds[0].Fd), count[:])
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, unix.EAGAIN) {
		return false, fmt.Errorf("read eventfd: %w", err)
	}
	return false, nil
}

// wake ends the current wait, or the next one when there is none. Safe for
// concurrent use, also after close.
func (w *waiter) wake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed {
		// Fails only when the counter is at its limit: then it is awake anyway.
		_, _ = unix.Write(int(w.fds[0].Fd), []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
}

// close ends the use of the waiter; the rings stay open.
func (w *waiter) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	return unix.Close(int(w.fds[0].Fd))
}
