// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"
)

// maxReadFaults is how often the disk may refuse a chunk before the chunk
// counts as damaged, and the file that is to be opened; otherwise one bad sector would
// stop delivery, or the sensor, for good.
const maxReadFaults = 5

// faultPause is between two tries to check a file that the disk refuses to read.
const faultPause = 50 * time.Millisecond

// reader is what Read keeps between calls. Chunks are read with pread, never
// through bbolt's mapping: that faults page by page, and dies with the process
// when the file is cut short.
type reader struct {
	plan  []entry
	ahead ahead
	codec decoder

	// The rest of the chunk that the last read ended in.
	rest []byte
	next uint64 // seq of its first record
	last uint64 // of its last record

	arena [2][]byte // chunks; one side holds rest, a read fills the other
	side  int       // that of rest

	faultAt uint64 // chunk that the disk refused
	faults  int
}

// Read appends to dst the records behind seq after, as many as are durable, at
// most maxRecords and about maxBytes but at least one, and blocks until there is
// one. It returns early with the error of ctx, or with [ErrClosed]. One
// goroutine reads; Data of the records returned is valid until its next Read.
//
// Records come in order. A seq that is skipped will never come: it is or will be
// part of a loss. To read again from an earlier seq is possible as far as
// [Bounds] reaches.
//
// Reading behind after is a statement: of the records above after that earlier
// calls returned, none is under way to the server any more. So ask the server
// where it is before the first Read of a connection. Reading ahead of
// acknowledgements is fine, as after then covers what is under way.
func (q *Queue) Read(ctx context.Context, after uint64, dst []Record, maxRecords, maxBytes int) ([]Record, error) {
	q.mu.Lock()
	base := q.state.base // Renew is called by the one who reads
	q.mu.Unlock()
	after += base
	defer func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.waiting, q.resolve = false, nil
	}()
	for {
		if err := ctx.Err(); err != nil {
			return dst, fmt.Errorf("read: %w", err)
		}
		ready, err := q.plan(after, maxBytes)
		if err != nil {
			return dst, fmt.Errorf("read: %w", err)
		}
		if ready {
			out, err := q.fetch(after, dst, maxRecords, maxBytes)
			if err != nil {
				q.metrics.errors.WithLabelValues(opRead).Inc()
				return dst, fmt.Errorf("read: %w", err)
			}
			if len(out) > len(dst) {
				for i := range out[len(dst):] {
					out[len(dst)+i].Seq -= base
				}
				return out, nil
			}
			continue
		}
		select {
		case <-q.readable:
		case <-ctx.Done():
		case <-q.done:
		}
	}
}

// plan chooses the chunks to read. When there are none, or when something has
// to become durable first, it asks the writer for that and returns false.
func (q *Queue) plan(after uint64, maxBytes int) (bool, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil {
		return false, q.err
	}
	r := &q.reader
	r.plan = r.plan[:0]
	q.resolve = nil
	for _, d := range q.state.doubt {
		if d.last > after {
			// Nothing behind these may be handed out before it is on
			// disk that they are lost: the acknowledgement of what
			// follows would look like theirs after a restart.
			q.resolve = &after
			q.force = true
			q.wake()
			return false, nil
		}
	}
	if len(q.damaged) > 0 {
		q.force = true // the same for what a damaged chunk held
		q.wake()
		return false, nil
	}
	if q.committed() < q.lossAt {
		return false, nil // and for what was forfeited, whose commit is forced
	}
	l := q.index.live()
	i := q.index.above(after)
	for i < len(l) && l[i].first <= q.state.lease && (maxBytes > 0 || len(r.plan) == 0) {
		r.plan = append(r.plan, l[i])
		maxBytes -= int(l[i].pages) * pageSize
		i++
	}
	r.ahead.plan(l, i)
	if len(r.plan) > 0 && max(after+1, r.plan[0].first) <= q.state.lease {
		q.waiting = false
		return true, nil
	}
	q.waiting = true
	if q.index.above(max(after, q.state.lease)) < len(l) {
		q.force = true // durable already; only the lease is missing
		q.wake()
	}
	return false, nil
}

// fetch reads the planned chunks and appends their records behind after.
// Nothing is appended when the plan has been overtaken by the writer, or met a
// damaged chunk first.
func (q *Queue) fetch(after uint64, dst []Record, maxRecords, maxBytes int) ([]Record, error) {
	r := &q.reader
	r.ahead.tell(q.file.Load())
	fill := 1 - r.side
	r.arena[fill] = r.arena[fill][:0]
	q.mu.Lock()
	lease, acked := q.state.lease, q.ack
	q.mu.Unlock()
	out, bytes := dst, 0
	for _, e := range r.plan {
		var b []byte
		next := e.first
		if r.next > e.first && r.next <= after+1 && r.last == e.last() && r.next <= r.last {
			b, next = r.rest, r.next // go on where the last read ended
		} else {
			var err error
			if b, err = q.readChunk(&e, fill); err != nil {
				if len(out) > len(dst) {
					break // deliver what is before it; the next call meets it again
				}
				return dst, q.damage(&e, after, err)
			}
			r.side = fill
		}
		r.next, r.last, r.rest = next, e.last(), b
		for r.next <= min(e.last(), lease) {
			rec, rest, ok := nextFrame(r.rest)
			if !ok {
				break // verified; cannot be
			}
			rec.Seq = r.next
			if e.last() > acked {
				rec.Stored = e.at
			}
			if rec.Seq > after {
				if n := len(out) - len(dst); n > 0 && (n >= maxRecords || bytes+len(rec.Data) > maxBytes) {
					return q.handOut(dst, out)
				}
				out = append(out, rec)
				bytes += len(rec.Data)
			}
			r.next, r.rest = r.next+1, rest
		}
	}
	return q.handOut(dst, out)
}

// handOut lets the records go if the first of them is still live: chunks leave
// in order, so all of them are, and were while they were read. Should they
// leave from now on, they are in doubt, as the lease covers them.
func (q *Queue) handOut(dst, out []Record) ([]Record, error) {
	if len(out) == len(dst) {
		return dst, nil
	}
	first := out[len(dst)].Seq
	q.mu.Lock()
	defer q.mu.Unlock()
	if l := q.index.live(); len(l) == 0 || first < l[0].first {
		return dst, nil
	}
	q.handed = max(q.handed, out[len(out)-1].Seq)
	return out, nil
}

// readChunk reads and verifies a chunk into one side of the arena.
func (q *Queue) readChunk(e *entry, side int) ([]byte, error) {
	a := &q.reader.arena[side]
	n, end := len(*a), len(*a)+int(e.pages)*pageSize
	*a = slices.Grow(*a, end-n)[:end] // what was handed out from an old array stays valid
	p := (*a)[n:end]
	if _, err := q.file.Load().ReadAt(p, int64(e.root)*pageSize); err != nil {
		return nil, fmt.Errorf("chunk at seq %d: %w", e.first, err)
	}
	v := p[leafHeader:] // whatever the page header says: the checksum and the seq prove the rest
	// What is compressed is restored behind what is stored, in the same array.
	if len(v) > chunkHeader && v[9] != codecNone {
		raw := min(int(binary.LittleEndian.Uint32(v[40:])), maxChunk)
		*a = slices.Grow(*a, raw)
		b, err := q.reader.codec.frames((*a)[end:], v, e.first, e.count)
		*a = (*a)[:end+len(b)]
		return b, err
	}
	return frames(v, e.first, e.count)
}

// damage reports chunk e, unless the disk may yet yield it or the writer has
// overtaken the read. A nil error means: plan again.
func (q *Queue) damage(e *entry, after uint64, err error) error {
	r := &q.reader
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil {
		return q.err
	}
	if i, live := q.index.find(e.first); !live || q.index.live()[i].root != e.root {
		return nil
	}
	if errors.Is(err, os.ErrClosed) {
		return nil // the file was replaced by one of another size
	}
	if !errors.Is(err, errChunk) && !errors.Is(err, io.EOF) {
		if r.faultAt != e.first {
			r.faultAt, r.faults = e.first, 0
		}
		if r.faults++; r.faults < maxReadFaults {
			return err
		}
	}
	q.damagedChunk(e, after)
	return nil
}

// damagedChunk has the next transaction delete the chunk e, and account for it. Called
// with the lock held.
func (q *Queue) damagedChunk(e *entry, after uint64) {
	if !slices.ContainsFunc(q.damaged, func(d damage) bool { return d.first == e.first }) {
		q.damaged = append(q.damaged, damage{e.first, after})
		q.metrics.corruptChunks.Inc()
		q.keep(e)
	}
}

// keep sets a copy of the damaged chunk e aside. That it may not succeed on a disk
// that does such things changes nothing.
func (q *Queue) keep(e *entry) {
	p := make([]byte, min(int(e.pages), 64)*pageSize)
	n, _ := q.file.Load().ReadAt(p, int64(e.root)*pageSize)
	if quarantineChunk(q.path, time.Now(), e.first, p[:n]) == nil {
		q.quarantined = quarantined(q.path)
	}
}
