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
	Before      uint64 // seqs of earlier epochs of the file, see [Queue.Renew]; the counters below know them
	Truncated   uint64 // dropped undelivered, over the life of the file
	Reclaimed   uint64 // dropped after delivery
	Corrupt     uint64 // lost to damage
	InDoubt     uint64 // dropped while possibly under way; Truncated or Reclaimed once the server has said
	Losses      int    // entries in the list of losses not yet reported

	OldestUnsent time.Time // when the oldest unacknowledged record was written; zero when there is none
	Pending      int       // bytes that wait to be durable

	Hazards []Hazard // of the place where the file is, as Open found them

	Err      error     // why commits fail at the moment
	ErrSince time.Time // since when

	Resized     *Resized  // the last time that another size was asked for, nil when none was since Open
	Recovery    *Recovery // the last time that a damaged file was replaced, nil when none was since Open
	Salvaged    uint64    // records taken over from damaged files, over the life of the file
	Quarantined int64     // bytes of what was set aside
}

// Epoch returns the identity of this sequence of records: 12 hex digits of a
// millisecond timestamp, then 8 random ones. It lives as long as the file, or
// until [Queue.Renew].
func (q *Queue) Epoch() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.state.epoch
}

// Next returns the seq that the first record of the next batch gets.
func (q *Queue) Next() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.next - q.state.base
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
	return boundsOf(q.state, &q.index, q.ack)
}

func boundsOf(s *state, x *index, acked uint64) Bounds {
	b := Bounds{First: s.last + 1 - s.base, Acked: max(acked, s.base) - s.base, Last: s.last - s.base}
	if l := x.live(); len(l) > 0 {
		b.First = max(l[0].first, s.base+1) - s.base
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
	n := len(dst)
	dst = l.unnamed(dst)
	for i := range dst[n:] {
		dst[n+i] = dst[n+i].shift(-q.state.base)
	}
	return dst
}

// Stats returns a snapshot.
func (q *Queue) Stats() Stats {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.stats()
}

func (q *Queue) stats() Stats {
	s := statsOf(q.state, &q.index, q.ack)
	s.Hazards, s.Cap, s.Resized, s.Recovery, s.Quarantined = q.hazards, q.o.Cap, q.resized, q.recovery, q.quarantined
	s.Err, s.ErrSince = q.commitAt.err, q.commitAt.since
	for _, p := range []*pending{q.inflight, q.pending} {
		if p != nil {
			s.Pending += p.bytes
		}
	}
	if q.err != nil {
		s.Err = q.err
	}
	return s
}

// statsOf is what a state and the chunks with it say. The chunks must have been told
// of the acknowledgement.
func statsOf(st *state, x *index, acked uint64) Stats {
	s := Stats{
		Bounds: boundsOf(st, x, acked), Epoch: st.epoch, Before: st.base,
		Records: x.records, Bytes: int64(x.pages) * pageSize, UnsentBytes: int64(x.pages-x.ackedPages) * pageSize,
		Truncated: st.truncated, Reclaimed: st.reclaimed, Corrupt: st.corrupt,
		InDoubt: st.inDoubt(), Losses: len(st.losses.unreported(st.acked)), Salvaged: st.salvaged,
	}
	if e := x.oldestUnsent(); e != nil {
		if e.at != 0 {
			s.OldestUnsent = time.Unix(0, e.at)
		}
		s.Unsent = s.Records - x.ackedRecords
		if e.first <= acked {
			s.Unsent -= acked - e.first + 1
		}
	}
	return s
}
