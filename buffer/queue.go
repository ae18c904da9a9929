// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Stream says which stream a record goes to; at most 16 are possible.
type Stream = uint8

// The streams. Their numbers are on disk, so they never change.
const (
	Events Stream = iota
	DecisionsSystem
	DecisionsAgents
	DecisionsApprovals
	Streams // the number of streams
)

// Record is one durable record. Data is valid until the next [Queue.Read].
type Record struct {
	Seq    uint64
	Stream Stream
	Urgent bool
	// Stored is when the record became durable, in nanoseconds since the Unix
	// epoch; 0 when that was in an earlier run, or when it was acknowledged before.
	Stored int64
	Data   []byte
}

// ErrClosed is returned by operations on a closed [Queue].
var ErrClosed = errors.New("buffer is closed")

// Queue is the durable, bounded queue: one appender, one reader, any number of
// callers of the other methods, all at the same time.
type Queue struct {
	o       Options
	path    string
	hazards []Hazard
	dir     *os.File                // holds the lock
	file    atomic.Pointer[os.File] // for the reader's pread
	metrics *metrics

	kick     chan struct{} // wakes the writer
	room     chan struct{} // wakes the appender
	readable chan struct{} // wakes the reader
	stop     chan struct{} // closed by Close
	done     chan struct{} // closed by the writer at its end

	reader reader // used by Read only

	resizing sync.Mutex // held by Resize

	mu          sync.Mutex
	quarantined int64     // bytes that were set aside
	recovery    *Recovery // the last one, nil when there was none
	resized     *Resized  // the same of sizes
	resize      *resize   // the writer is to do it
	target      int64     // smaller cap that drops are planned for; 0 when there is none
	state       *state    // as on disk; replaced, never changed
	index       index
	next        uint64 // seq of the next record appended
	pending     *pending
	inflight    *pending // being committed
	taken       uint64   // commits of this run, inflight included; transactions are more
	spare       *pending
	batches     []*Batch // free list
	chunks      [][]byte // free list

	// What the next transaction has to take in, besides pending.
	ack      uint64
	forfeits []Loss
	given    []uint64 // all that SetAside gave up, see state.given
	renew    string   // epoch to begin
	lossAt   uint64   // the commit that holds the last Forfeit
	damaged  []damage
	resolve  *uint64   // a Read waits until doubt about what is above is decided
	handed   uint64    // newest record handed out
	waiting  bool      // a Read waits for records
	dirtyAt  time.Time // of the first change that is not on disk
	force    bool      // commit at once

	flushes  []flush
	closing  bool
	err      error // terminal
	commitAt commitError
}

// commitError is the last error of the writer, while it lasts.
type commitError struct {
	err   error
	since time.Time
}

type damage struct{ first, after uint64 }

// flush waits for a record and for a commit, as a mark may come alone.
type flush struct {
	seq, commit uint64
	done        chan struct{}
}

// clean reports whether everything is durable. Called with the lock held.
func (q *Queue) clean() bool {
	return q.pending.empty() && q.inflight == nil && q.dirtyAt.IsZero()
}

// committed is the last commit that is durable. Called with the lock held.
func (q *Queue) committed() uint64 {
	if q.inflight != nil {
		return q.taken - 1
	}
	return q.taken
}

// wake makes the writer look at its plan again.
func (q *Queue) wake() {
	signal(q.kick)
}

// Ack says that everything up to seq was delivered. It is persisted with the
// next commit, or within a second; until then a restart delivers again. The
// watermark never goes back, and never beyond what is durable.
func (q *Queue) Ack(seq uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if seq = min(seq+q.state.base, q.state.last); seq > q.ack {
		q.ack = seq
		q.dirty()
	}
}

// Forfeit reports a loss of delivered records that was found elsewhere: the
// server has gone back further than the queue reaches. It joins the losses to
// be named, and so do those again that records in the range had named. cause is
// one of a small closed set, at most 255 bytes. The next Read returns only when
// that is durable: whoever sends what it returns passes over the range for good.
func (q *Queue) Forfeit(first, last uint64, cause string) {
	if first == 0 || last < first {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.forfeit(first, last, cause)
}

// forfeit is Forfeit with the lock held.
func (q *Queue) forfeit(first, last uint64, cause string) {
	q.forfeits = append(q.forfeits, span{first, last}.loss(cause[:min(len(cause), 255)]).shift(q.state.base))
	q.lossAt = q.taken + 1
	q.force = true
	q.dirty()
	q.wake()
}

// SetAside gives up a record that Read has returned: it keeps a copy beside the file, whose
// path it returns, and reports the loss as [Queue.Forfeit] does. Without the copy nothing is
// given up. The record stays readable for as long as its neighbours, and whoever sends
// passes over it, see [Queue.GivenUp].
func (q *Queue) SetAside(rec Record, cause string) (string, error) {
	path, err := quarantineRecord(q.path, time.Now(), q.o.Cap, q.Epoch(), &rec)
	if err != nil {
		return "", fmt.Errorf("set record %d aside: %w", rec.Seq, err)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.quarantined = quarantined(q.path)
	q.given = append(q.given, rec.Seq+q.state.base)
	q.given = slices.Delete(q.given, 0, max(0, len(q.given)-maxGiven))
	q.forfeit(rec.Seq, rec.Seq, cause) // in the same transaction
	return path, nil
}

// GivenUp returns the seqs of the records that [Queue.SetAside] has given up and Read still
// returns, in this run or one before.
func (q *Queue) GivenUp() []uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	var out []uint64
	for _, seq := range q.given {
		if seq > q.state.base {
			out = append(out, seq-q.state.base)
		}
	}
	return out
}

// dirty plans a commit for what came in besides records.
func (q *Queue) dirty() {
	if q.dirtyAt.IsZero() {
		q.dirtyAt = time.Now()
		q.wake()
	}
}

// Flush waits until what was appended, acknowledged and forfeited so far is
// durable.
func (q *Queue) Flush(ctx context.Context) error {
	q.mu.Lock()
	if err := q.usable(); err != nil {
		q.mu.Unlock()
		return fmt.Errorf("flush: %w", err)
	}
	if q.clean() {
		q.mu.Unlock()
		return nil
	}
	f := flush{seq: q.next - 1, commit: q.taken + 1, done: make(chan struct{})}
	q.flushes = append(q.flushes, f)
	q.force = true
	q.wake()
	q.mu.Unlock()
	select {
	case <-f.done:
		return nil
	case <-q.done:
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.clean() || q.state.last >= f.seq && q.committed() >= f.commit {
			return nil
		}
		return fmt.Errorf("flush: %w", q.err)
	case <-ctx.Done():
		return fmt.Errorf("flush: %w", ctx.Err())
	}
}

// Close makes durable what was appended and closes the file in a form that
// opens fast. When ctx ends first the writer is left to end on its own as soon
// as the disk answers; everything durable is safe at any time.
func (q *Queue) Close(ctx context.Context) error {
	q.mu.Lock()
	if !q.closing {
		q.closing = true
		close(q.stop)
	}
	q.mu.Unlock()
	select {
	case <-q.done:
	case <-ctx.Done():
		return fmt.Errorf("close buffer: %w", ctx.Err())
	}
	q.resizing.Lock() // one that is under way ends by itself
	defer q.resizing.Unlock()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil && !errors.Is(q.err, ErrClosed) {
		return fmt.Errorf("close buffer: %w", q.err)
	}
	return nil
}
