// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"slices"
	"time"
)

// Bounds says what the queue holds. With nothing to read First is Last+1.
type Bounds struct {
	First uint64 // oldest record that can be read, delivered ones included
	Acked uint64 // everything up to here is acknowledged
	Last  uint64 // newest durable record
}

// Recovery says how a damaged file was replaced.
type Recovery struct {
	At       time.Time
	Cause    error  // what was found
	Aside    string // where the damaged file is; "" when there was none, or no space for it
	Exact    bool   // the epoch goes on, and every record lost is counted and named
	Salvaged uint64 // records that the new file has of it
	Lost     uint64 // records lost, where that is exact; those in doubt are counted when that is decided
}

// Stats is a snapshot of the queue.
type Stats struct {
	Bounds
	Epoch       string
	Records     uint64 // live, acknowledged ones included
	Unsent      uint64 // live and not acknowledged
	Bytes       int64  // of the pages that hold live chunks
	UnsentBytes int64  // of those with a record that is not acknowledged
	Cap         int64
	Truncated   uint64 // dropped undelivered, over the life of the file
	Reclaimed   uint64 // dropped after delivery
	Corrupt     uint64 // lost to damage
	InDoubt     uint64 // dropped while possibly under way; Truncated or Reclaimed once the server has said
	Losses      int    // entries in the list of losses not yet reported

	OldestUnsent time.Time // when the oldest unacknowledged record was written; zero when there is none
	Pending      int       // bytes that wait to be durable

	Err      error     // why commits fail at the moment
	ErrSince time.Time // since when

	Recovery    *Recovery // the last time that a damaged file was replaced, nil when none was since Open
	Salvaged    uint64    // records taken over from damaged files, over the life of the file
	Quarantined int64     // bytes of what was set aside
}

// Epoch returns the identity of this sequence of records: 12 hex digits of a
// millisecond timestamp, then 8 random ones. It lives as long as the file.
func (q *Queue) Epoch() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.state.epoch
}

// Next returns the seq that the first record of the next batch gets.
func (q *Queue) Next() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.next
}

// Mark returns the mark of the last durable commit, nil when none was set.
func (q *Queue) Mark() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.state.mark)
}

// Bounds returns what the queue holds.
func (q *Queue) Bounds() Bounds {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.bounds()
}

func (q *Queue) bounds() Bounds {
	b := Bounds{First: q.state.last + 1, Acked: q.ack, Last: q.state.last}
	if l := q.index.live(); len(l) > 0 {
		b.First = l[0].first
	}
	return b
}

// Unnamed appends to dst the losses that no live or delivered record names, nor
// one that waits to be durable.
func (q *Queue) Unnamed(dst []Loss) []Loss {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := slices.Clone(q.state.losses)
	for _, p := range []*pending{q.inflight, q.pending} {
		if p == nil {
			continue
		}
		for _, n := range p.names {
			for _, x := range n.losses {
				l.name(x, n.seq)
			}
		}
	}
	return l.unnamed(dst)
}

// Stats returns a snapshot.
func (q *Queue) Stats() Stats {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := Stats{
		Bounds: q.bounds(), Epoch: q.state.epoch,
		Records: q.index.records, Bytes: int64(q.index.pages) * pageSize, UnsentBytes: int64(q.index.pages-q.index.ackedPages) * pageSize, Cap: q.o.Cap,
		Truncated: q.state.truncated, Reclaimed: q.state.reclaimed, Corrupt: q.state.corrupt,
		InDoubt: q.state.inDoubt(), Losses: len(q.state.losses),
		Err: q.commitAt.err, ErrSince: q.commitAt.since, Recovery: q.recovery, Quarantined: q.quarantined, Salvaged: q.state.salvaged,
	}
	for _, p := range []*pending{q.inflight, q.pending} {
		if p != nil {
			s.Pending += p.bytes
		}
	}
	if q.err != nil {
		s.Err = q.err
	}
	if e := q.index.oldestUnsent(); e != nil {
		if e.at != 0 {
			s.OldestUnsent = time.Unix(0, e.at)
		}
		s.Unsent = s.Records - q.index.ackedRecords
		if e.first <= s.Acked {
			s.Unsent -= s.Acked - e.first + 1
		}
	}
	return s
}
