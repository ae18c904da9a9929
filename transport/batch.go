// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"strconv"
	"time"
	"unsafe"

	"github.com/aurorasoc/edr-sensor/buffer"
)

// batch holds the arguments of one script call. It is built anew for each call
// in the same memory: an argument is a pointer to a string of the table, because
// boxing a slice per field would allocate three times per record.
type batch struct {
	keys  [buffer.Streams]string
	limit [buffer.Streams]string // about how many entries a stream may have; 0: any number
	args  []any
	head  [8]string // agent, epoch, session, flag, after, first, n, limit
	key   string
	table []string
	times []times // kept after release, for the records of the last write
}

// times are those of one record; 0 where unknown.
type times struct {
	event  int64 // ms since the Unix epoch
	stored int64 // ns since the Unix epoch
}

const callHead = 5 + 8 // EVALSHA sha numkeys stream cursors, then head

func newBatch(o *Options, epoch string) *batch {
	tag := o.Prefix + ":{" + o.Shard + "}:"
	b := &batch{table: make([]string, 3*o.BatchRecords), times: make([]times, o.BatchRecords)}
	b.keys[buffer.Events] = tag + "events"
	b.keys[buffer.DecisionsSystem] = o.SystemKey
	b.keys[buffer.DecisionsAgents] = o.AgentsKey
	b.keys[buffer.DecisionsApprovals] = o.ApprovalsKey
	for s := range b.limit {
		b.limit[s] = "0"
		if s != int(buffer.Events) {
			b.limit[s] = strconv.Itoa(o.DecisionsLimit)
		}
	}
	b.head[0], b.head[1] = o.AgentID, epoch
	b.args = append(b.args, "EVALSHA", deliverSHA(), "2", &b.key, tag+"cursors")
	for i := range b.head {
		b.args = append(b.args, &b.head[i])
	}
	for i := range b.table {
		b.args = append(b.args, &b.table[i])
	}
	return b
}

// probe returns the arguments of a call without records.
func (b *batch) probe(session, flag string) []any {
	b.key = b.keys[buffer.Events]
	b.head[2], b.head[3], b.head[4], b.head[5], b.head[6], b.head[7] = session, flag, "0", "0", "0", "0"
	return b.args[:callHead]
}

// write returns the arguments of a call that stores recs, at most BatchRecords
// of one stream and contiguous, on a server that has everything up to after but for
// what was accounted for. They point into recs.
func (b *batch) write(session string, after uint64, recs []buffer.Record) []any {
	to := destination(recs[0].Stream)
	b.key, b.head[7] = b.keys[to], b.limit[to]
	b.head[2], b.head[3], b.head[4] = session, flagWrite, strconv.FormatUint(after, 10)
	b.head[5], b.head[6] = strconv.FormatUint(recs[0].Seq, 10), strconv.Itoa(len(recs))
	for i := range recs {
		id, stamp, millis := identify(recs[i].Data)
		b.times[i] = times{millis, recs[i].Stored}
		b.table[3*i] = view(id)
		b.table[3*i+1] = view(stamp)
		b.table[3*i+2] = view(recs[i].Data)
		// Both are always there in what the encoder writes; these are for a
		// record that is not an event.
		if id == nil {
			b.table[3*i] = fmt.Sprintf("%s-%d", b.head[1], recs[i].Seq)
		}
		if stamp == nil {
			b.table[3*i+1] = string(appendTime(nil, time.Now()))
		}
	}
	return b.args[:callHead+3*len(recs)]
}

// destination is the stream that s is sent to. A record of a stream that only a
// newer version knows, which the buffer kept through a downgrade, is a decision.
func destination(s buffer.Stream) buffer.Stream {
	if s < buffer.Streams {
		return s
	}
	return buffer.DecisionsSystem
}

// release forgets the records, which their owner is about to overwrite.
func (b *batch) release() { clear(b.table) }

// view is p as a string without a copy. It is read only while the call runs, and
// the records stay as they are until the next Read.
func view(p []byte) string { return unsafe.String(unsafe.SliceData(p), len(p)) }

// cut returns how many of recs go into one call: those of the first one's stream
// that follow each other without a hole, at most limit.
func cut(recs []buffer.Record, limit int) int {
	n := 1
	for n < len(recs) && n < limit && recs[n].Stream == recs[0].Stream && recs[n].Seq == recs[n-1].Seq+1 {
		n++
	}
	return n
}
