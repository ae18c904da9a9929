// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"fmt"
	"time"
)

// pending is what the next transaction will store: whole batches only, so
// that a mark is never durable before the records it stands for, nor after.
type pending struct {
	chunks  []chunk
	bytes   int
	records int
	names   []naming
	mark    []byte
	since   time.Time // of the first batch
	due     time.Time
}

func (p *pending) empty() bool { return p.since.IsZero() }

// NewBatch returns an empty batch, a used one where possible.
func (q *Queue) NewBatch() *Batch {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n := len(q.batches); n > 0 {
		b := q.batches[n-1]
		q.batches = q.batches[:n-1]
		b.epoch = q.state.epoch
		return b
	}
	return &Batch{maxRecord: q.o.MaxRecord, maxBytes: q.o.maxBatch(), epoch: q.state.epoch}
}

// Append hands b over to the next commit. The batch becomes durable as a
// whole, in order, after those appended before. Append blocks while enough
// batches wait; on an error b is still the caller's. One goroutine appends.
func (q *Queue) Append(ctx context.Context, b *Batch) error {
	for {
		q.mu.Lock()
		if err := q.usable(); err != nil {
			q.mu.Unlock()
			return fmt.Errorf("append: %w", err)
		}
		if q.pending.empty() || q.pending.bytes+len(b.buf) <= q.o.maxPending() {
			break
		}
		q.mu.Unlock()
		select {
		case <-q.room:
		case <-ctx.Done():
			return fmt.Errorf("append: %w", ctx.Err())
		case <-q.done:
		}
	}
	defer q.mu.Unlock()
	if b.count > 0 || b.marked {
		q.add(b, time.Now())
	}
	q.recycle(b)
	return nil
}

// add copies b into pending and wakes the writer when its plan changes.
func (q *Queue) add(b *Batch, now time.Time) {
	p := q.pending
	due := now.Add(q.o.CommitInterval)
	if b.urgent {
		due = now.Add(min(urgentInterval, q.o.CommitInterval))
	}
	wake := false
	if p.empty() {
		p.since, p.due = now, due
		wake = true
	} else if due.Before(p.due) {
		p.due = due
		wake = true
	}
	full := p.bytes >= q.o.CommitBytes
	for _, n := range b.names {
		if b.epoch != q.state.epoch {
			break // what it names has no such numbers any more, and stays unnamed
		}
		for i, l := range n.losses {
			n.losses[i] = l.shift(q.state.base)
		}
		n.seq = q.next + uint64(n.index)
		p.names = append(p.names, n)
	}
	if b.marked {
		p.mark = append([]byte{}, b.mark...)
	}
	q.addFrames(p, b.buf, b.count)
	p.bytes += len(b.buf)
	p.records += b.count
	if wake || !full && p.bytes >= q.o.CommitBytes {
		q.wake()
	}
}

// addFrames distributes n frames over chunks: one copy as long as they fit.
func (q *Queue) addFrames(p *pending, b []byte, n int) {
	limit := q.o.chunkBytes()
	for n > 0 {
		if len(p.chunks) == 0 {
			q.addChunk(p)
		}
		c := &p.chunks[len(p.chunks)-1]
		fit, count := b, n
		if len(c.buf)+len(b) > limit {
			fit, count = nil, 0
			for rest := b; len(rest) > 0; {
				_, r, _ := nextFrame(rest)
				if end := len(b) - len(r); len(c.buf)+end <= limit || c.count == 0 && count == 0 {
					fit, count = b[:end], count+1
					rest = r
					continue
				}
				break
			}
			if count == 0 {
				q.addChunk(p)
				continue
			}
		}
		c.buf = append(c.buf, fit...)
		c.count += uint32(count)
		q.next += uint64(count)
		b, n = b[len(fit):], n-count
	}
}

func (q *Queue) addChunk(p *pending) {
	var buf []byte
	if n := len(q.chunks); n > 0 {
		buf = q.chunks[n-1]
		q.chunks = q.chunks[:n-1]
	} else {
		buf = make([]byte, 0, max(minChunk, q.o.CommitBytes))
	}
	p.chunks = append(p.chunks, chunk{buf: buf[:chunkHeader], first: q.next})
}

// recyclePending takes back a committed one.
func (q *Queue) recyclePending(p *pending) {
	for _, c := range p.chunks {
		if cap(c.buf) <= maxRecycle && len(q.chunks) < 2*q.o.maxPending()/q.o.CommitBytes {
			q.chunks = append(q.chunks, c.buf)
		}
	}
	clear(p.chunks)
	clear(p.names)
	*p = pending{chunks: p.chunks[:0], names: p.names[:0]}
	q.spare = p
}

// usable says why the queue takes no more work.
func (q *Queue) usable() error {
	if q.err != nil {
		return q.err
	}
	if q.closing {
		return ErrClosed
	}
	return nil
}

func (q *Queue) recycle(b *Batch) {
	b.reset()
	if len(q.batches) < 4 {
		q.batches = append(q.batches, b)
	}
}
