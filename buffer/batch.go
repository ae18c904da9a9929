// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"errors"
	"slices"
)

// Sentinels of [Batch.End].
var (
	// ErrTooLarge is returned when a record exceeds Options.MaxRecord. The
	// record is not added; the caller counts it.
	ErrTooLarge = errors.New("record is larger than the buffer accepts")

	// ErrBatchFull is returned when the batch would outgrow what one commit
	// can hold. The record is not added: append the batch, then try again
	// with a new one.
	ErrBatchFull = errors.New("batch is full")
)

// batchSpare is the room that Begin offers at least, so that most records are
// encoded in place without growing anything.
const batchSpare = 8 << 10

// naming says that a record names losses.
type naming struct {
	index  int    // of the record in its batch
	seq    uint64 // set by Append
	losses []Loss
}

// Batch collects records that become durable together, with the mark that says
// how far their source was read. It is not safe for concurrent use.
type Batch struct {
	buf       []byte // frames, back to back
	count     int
	urgent    bool
	stream    Stream
	names     []naming
	mark      []byte
	marked    bool
	epoch     string // in whose numbers names are
	maxRecord int
	maxBytes  int
}

// Begin starts a record of stream s and returns an empty slice to append its
// payload to. A record that was begun and not ended is forgotten.
func (b *Batch) Begin(s Stream) []byte {
	n := len(b.buf) + frameHeader
	if cap(b.buf) < n+batchSpare {
		b.buf = slices.Grow(b.buf, frameHeader+batchSpare)
	}
	b.stream = s
	return b.buf[n:n]
}

// End completes the record begun last. rec is its whole payload, usually the
// slice that Begin returned, appended to; another slice is copied. The errors
// are [ErrTooLarge] and [ErrBatchFull]; with either nothing was added.
func (b *Batch) End(rec []byte, urgent bool) error {
	if len(rec) > b.maxRecord {
		return ErrTooLarge
	}
	n := len(b.buf)
	end := n + frameHeader + len(rec)
	if end > b.maxBytes {
		return ErrBatchFull
	}
	if cap(b.buf) < n+frameHeader+1 {
		b.buf = slices.Grow(b.buf, frameHeader+1)
	}
	b.buf = b.buf[:n+frameHeader]
	if cap(rec) > 0 && cap(b.buf) >= end && &rec[:1][0] == &b.buf[:n+frameHeader+1][n+frameHeader] {
		b.buf = b.buf[:end]
	} else {
		b.buf = append(b.buf, rec...)
	}
	putFrame(b.buf[n:], len(rec), b.stream, urgent)
	b.count++
	b.urgent = b.urgent || urgent
	return nil
}

// Name declares that the record ended last is the loss record that names l, as
// obtained from [Queue.Unnamed]. They become unnamed again when that record is lost
// itself: undelivered, or with a server that goes back, see [Queue.Forfeit].
func (b *Batch) Name(l []Loss) {
	if b.count == 0 || len(l) == 0 {
		return
	}
	b.names = append(b.names, naming{index: b.count - 1, losses: slices.Clone(l)})
}

// SetMark sets the mark that is stored in the same transaction as the batch,
// replacing the one before. It is copied.
func (b *Batch) SetMark(mark []byte) {
	b.mark = append(b.mark[:0], mark...)
	b.marked = true
}

// Len returns the number of records.
func (b *Batch) Len() int { return b.count }

// Size returns the bytes that the records take, framing included.
func (b *Batch) Size() int { return len(b.buf) }

func (b *Batch) reset() {
	if cap(b.buf) > maxBatchKept {
		b.buf = nil
	}
	clear(b.names)
	b.buf, b.names, b.mark = b.buf[:0], b.names[:0], b.mark[:0]
	b.count, b.urgent, b.marked = 0, false, false
}
