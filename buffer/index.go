// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"sort"
	"time"
)

// entry is one live chunk: where its records are and for how long.
type entry struct {
	first uint64
	root  uint64 // page of the chunk's leaf
	at    int64  // ns since the epoch: when it became durable, 0 when not known yet; once acknowledged, when that was
	count uint32
	pages uint32
}

func (e *entry) last() uint64 { return e.first + uint64(e.count) - 1 }
func (e *entry) span() span   { return span{e.first, e.last()} }

// index lists the live chunks in seq order. It is rebuilt from the keys at
// open and kept in step by the writer, so that neither reader nor accounting
// needs a transaction. 32 bytes for a chunk of at least one page: less than a
// hundredth of the file even when every chunk is tiny.
type index struct {
	entries []entry // live ones start at head
	head    int
	pages   uint64 // sum over live chunks
	records uint64 // sum over live chunks

	acked        int    // leading chunks that are acknowledged as a whole
	ackedPages   uint64 // sum over these
	ackedRecords uint64 // sum over these
}

func (x *index) live() []entry { return x.entries[x.head:] }

func (x *index) push(e entry) {
	x.entries = append(x.entries, e)
	x.pages += uint64(e.pages)
	x.records += uint64(e.count)
}

// popFront removes the n oldest chunks.
func (x *index) popFront(n int) {
	for i, e := range x.live()[:n] {
		x.pages -= uint64(e.pages)
		x.records -= uint64(e.count)
		if i < x.acked {
			x.ackedPages -= uint64(e.pages)
			x.ackedRecords -= uint64(e.count)
		}
	}
	x.acked -= min(n, x.acked)
	x.head += n
	if x.head > len(x.entries)/2 {
		x.entries = x.entries[:copy(x.entries, x.live())]
		x.head = 0
	}
}

// remove takes the chunk that starts at first out of the middle.
func (x *index) remove(first uint64) {
	if i, ok := x.find(first); ok {
		l := x.live()
		x.pages -= uint64(l[i].pages)
		x.records -= uint64(l[i].count)
		if i < x.acked {
			x.acked--
			x.ackedPages -= uint64(l[i].pages)
			x.ackedRecords -= uint64(l[i].count)
		}
		x.entries = append(x.entries[:x.head+i], l[i+1:]...)
	}
}

// find returns the place of the chunk that starts at first.
func (x *index) find(first uint64) (int, bool) {
	l := x.live()
	i := sort.Search(len(l), func(i int) bool { return l[i].first >= first })
	return i, i < len(l) && l[i].first == first
}

// above returns the place of the first chunk with a record above seq.
func (x *index) above(seq uint64) int {
	l := x.live()
	return sort.Search(len(l), func(i int) bool { return l[i].last() > seq })
}

// ack dates the chunks that have become acknowledged as a whole.
func (x *index) ack(seq uint64, now time.Time) {
	l := x.live()
	for x.acked < len(l) && l[x.acked].last() <= seq {
		l[x.acked].at = now.UnixNano()
		x.ackedPages += uint64(l[x.acked].pages)
		x.ackedRecords += uint64(l[x.acked].count)
		x.acked++
	}
}

// oldestUnsent returns the first chunk with a record that is not acknowledged,
// nil when there is none.
func (x *index) oldestUnsent() *entry {
	if l := x.live(); x.acked < len(l) {
		return &l[x.acked]
	}
	return nil
}
