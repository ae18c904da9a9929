// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"time"
)

// Range selects what a walk looks at.
type Range struct {
	First uint64    // oldest seq; 0: from the oldest record there is, of an earlier epoch perhaps
	Last  uint64    // newest seq; 0: up to the newest record there is when the walk begins
	Since time.Time // chunks that were written before are shown without records, unread where possible; zero: none is
}

// of returns the range in the numbers of a file in which those of the epoch are higher by
// base, and end with last.
func (r Range) of(base, last uint64) (uint64, uint64) {
	first := uint64(1)
	if r.First > 0 {
		first = r.First + base
	}
	if r.Last > 0 {
		last = min(last, r.Last)
	}
	return first, last + base
}

// walkAhead is how many chunks a walk looks up at a time: it holds the lock for these
// few, and what has left the queue since is not read in vain.
const walkAhead = 64

// Walk calls visit for each chunk with records in r, oldest first, delivered or not,
// until visit returns false. The chunk is valid until visit returns, and has all its
// records, of which r may want only some. Any goroutine may call it at any time, and
// visit may take its time: it is a view that pins nothing and hands out nothing in the
// sense of [Queue.Read]. A chunk that leaves the queue meanwhile is not shown; one that
// cannot be read is shown with the reason, but left for Read to report. Memory is that
// of the largest chunk. The error is that of ctx, or [ErrClosed].
func (q *Queue) Walk(ctx context.Context, r Range, visit func(*Chunk) bool) error {
	q.mu.Lock()
	base, last := q.state.base, r.Last
	if last == 0 {
		last = q.state.last - base
	}
	q.mu.Unlock()
	var plan []entry
	var acked uint64
	var buf scratch
	for at, last := r.of(base, last); at <= last; {
		if plan, acked = q.ahead(plan[:0], at); len(plan) == 0 {
			return nil
		}
		for i := range plan {
			e := &plan[i]
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("walk: %w", err)
			}
			if e.first > last {
				return nil
			}
			c := readLeaf(q.file.Load(), e, base, r.Since, &buf)
			if c.Err != nil {
				again, err := q.overtaken(e)
				if err != nil {
					return fmt.Errorf("walk: %w", err)
				}
				if again {
					break // look up what is there now
				}
			}
			at = e.last() + 1
			c.Delivered = e.last() <= acked
			if !visit(&c) {
				return nil
			}
		}
	}
	return nil
}

// ahead appends the next chunks with records from seq on to dst.
func (q *Queue) ahead(dst []entry, seq uint64) (plan []entry, acked uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := q.index.live()
	l = l[q.index.above(seq-1):]
	return append(dst, l[:min(len(l), walkAhead)]...), q.ack
}

// overtaken tells whether e was not read because it is no longer where it was.
func (q *Queue) overtaken(e *entry) (bool, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil {
		return false, q.err
	}
	i, live := q.index.find(e.first)
	return !live || q.index.live()[i].root != e.root, nil
}

// scratch is the memory of a walk.
type scratch struct {
	stored, raw []byte // a chunk as it is in the file, and its frames where those are compressed
	codec       decoder
}

// room returns n bytes for a chunk as it is in the file.
func (b *scratch) room(n int64) []byte {
	b.stored = slices.Grow(b.stored[:0], int(n))[:n]
	return b.stored
}

// readLeaf reads the chunk e from its leaf into buf and verifies it; of one that was
// written before since only when that was.
func readLeaf(f io.ReaderAt, e *entry, base uint64, since time.Time, buf *scratch) Chunk {
	c := chunkOf(e, base)
	// An entry's time is that of its commit or later.
	if e.at != 0 && !since.IsZero() && e.at < since.UnixNano() {
		c.Written = time.Unix(0, e.at)
		return c
	}
	p := buf.room(c.Bytes)
	if _, c.Err = f.ReadAt(p, c.Offset); c.Err != nil {
		return c
	}
	c.open(e, p[leafHeader:], since, buf)
	return c
}

// chunkOf is the chunk e of a file in which the seqs of the epoch are higher by base.
func chunkOf(e *entry, base uint64) Chunk {
	return Chunk{First: max(e.first, base) - base, Last: max(e.last(), base) - base, Count: e.count, Offset: int64(e.root) * pageSize, Bytes: int64(e.pages) * pageSize}
}

// open verifies the value that was read of a chunk. That the checksum and the seq are
// right proves that these are the bytes.
func (c *Chunk) open(e *entry, v []byte, since time.Time, buf *scratch) {
	if c.frames, c.Err = buf.codec.frames(buf.raw[:0], v, e.first, e.count); c.Err != nil {
		return
	}
	if v[9] != codecNone {
		buf.raw = c.frames
	}
	if c.Written = time.Unix(0, int64(binary.LittleEndian.Uint64(v[32:]))); c.Written.Before(since) {
		c.frames = nil
	}
}

// Scan calls visit for the durable records written since a time or a moment before
// it, oldest first, delivered or not, until visit returns false. Data is valid until
// visit returns. The seq of one of an earlier epoch is 0. It is a [Queue.Walk] that passes over what cannot be read.
func (q *Queue) Scan(ctx context.Context, since time.Time, visit func(Record) bool) error {
	return q.Walk(ctx, Range{Since: since}, func(c *Chunk) bool {
		for r := range c.Records() {
			if !visit(r) {
				return false
			}
		}
		return true
	})
}
