// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"fmt"
	"strconv"
	"time"
	"unsafe"

	"github.com/klauspost/compress/zstd"

	"github.com/aurorasoc/edr-sensor/buffer"
)

// Encoding says how records become entries of the events stream. Decisions are
// always sent as [JSON]: they are few, and others read and write beside them.
type Encoding string

// The encodings. Package consumer reads both, also mixed in one stream.
const (
	// JSON makes one entry of each event, readable by anyone.
	JSON Encoding = "json"
	// ZstdBatch makes one entry of a batch: a fifth of the memory and of the
	// network's load, and less of the server's CPU.
	ZstdBatch Encoding = "zstd-batch"
)

// batch holds the arguments of one script call. It is built anew for each call
// in the same memory: an argument is a pointer to a string of the table, because
// boxing a slice per field would allocate three times per record.
type batch struct {
	keys  [buffer.Streams]string
	limit [buffer.Streams]string // about how many entries a stream may have; 0: any number
	args  []any
	head  [9]string // agent, epoch, session, flag, after, first, n, limit, codec
	key   string
	table []string
	times []times // kept after release, for the records of the last write

	zstd         *zstd.Encoder // nil: nothing is packed
	plain, frame []byte
}

// times are those of one record; 0 where unknown.
type times struct {
	event  int64 // ms since the Unix epoch
	stored int64 // ns since the Unix epoch
}

const callHead = 5 + 9 // EVALSHA sha numkeys stream cursors, then head

func newBatch(o *Options, epoch string) (*batch, error) {
	tag := o.Prefix + ":{" + o.Shard + "}:"
	b := &batch{table: make([]string, 3*o.BatchRecords), times: make([]times, o.BatchRecords)}
	b.keys[buffer.Events] = tag + "events"
	b.keys[buffer.DecisionsSystem] = o.SystemKey
	b.keys[buffer.DecisionsAgents] = o.AgentsKey
	b.keys[buffer.DecisionsApprovals] = o.ApprovalsKey
	for s := range b.limit {
		b.limit[s] = trim(o.TrimLength, o.TrimAge)
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
	if o.Encoding != ZstdBatch {
		return b, nil
	}
	// The window need not be larger than a batch. Nothing is encoded beside the
	// caller: there is nothing to close.
	var err error
	b.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(512<<10), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("zstd encoder: %w", err)
	}
	return b, nil
}

// trim is the limit of the events stream as the script takes it.
func trim(length int, age time.Duration) string {
	if age > 0 {
		return strconv.FormatInt(-age.Milliseconds(), 10)
	}
	return strconv.Itoa(length)
}

// probe returns the arguments of a call without records.
func (b *batch) probe(session, flag string) []any {
	b.key = b.keys[buffer.Events]
	b.head[2], b.head[3], b.head[4], b.head[5], b.head[6], b.head[7] = session, flag, "0", "0", "0", "0"
	b.head[8] = codecJSON
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
	pack := b.packs(to)
	for i := range recs {
		id, stamp, millis := identify(recs[i].Data)
		b.times[i] = times{millis, recs[i].Stored}
		if pack {
			continue
		}
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
	if pack {
		b.head[8], b.table[0] = codecZstd, view(b.pack(recs))
		return b.args[:callHead+1]
	}
	b.head[8] = codecJSON
	return b.args[:callHead+3*len(recs)]
}

// The codecs of a call, see deliver.lua.
const (
	codecJSON = "j"
	codecZstd = "z"
)

// packs reports whether the records of a stream are sent as one entry.
func (b *batch) packs(s buffer.Stream) bool { return b.zstd != nil && s == buffer.Events }

// pack compresses the records, joined by line breaks.
func (b *batch) pack(recs []buffer.Record) []byte {
	plain := b.plain[:0]
	for i := range recs {
		if i > 0 {
			plain = append(plain, '\n')
		}
		plain = append(plain, recs[i].Data...)
	}
	b.plain = plain
	b.frame = b.zstd.EncodeAll(plain, b.frame[:0])
	return b.frame
}

// destination is the stream that s is sent to. A record of a stream that only a
// newer version knows, which the buffer kept through a downgrade, is a decision.
func destination(s buffer.Stream) buffer.Stream {
	if s < buffer.Streams {
		return s
	}
	return buffer.DecisionsSystem
}

// keepPlain is how much memory for packing is kept from one batch to the next: a
// record that was larger than a batch gives back what it took.
const keepPlain = 2 << 20

// release forgets the records, which their owner is about to overwrite.
func (b *batch) release() {
	clear(b.table)
	if cap(b.plain) > keepPlain {
		b.plain, b.frame = nil, nil
	}
}

// view is p as a string without a copy. It is read only while the call runs, and
// the records stay as they are until the next Read.
func view(p []byte) string { return unsafe.String(unsafe.SliceData(p), len(p)) }

// cut returns how many of recs go into one call: those of the first one's stream
// that follow each other without a hole, at most limit.
func (b *batch) cut(recs []buffer.Record, limit int) int {
	pack := b.packs(destination(recs[0].Stream))
	n := 1
	for n < len(recs) && n < limit && recs[n].Stream == recs[0].Stream && recs[n].Seq == recs[n-1].Seq+1 &&
		(!pack || plainLine(recs[n-1].Data) && plainLine(recs[n].Data)) {
		n++
	}
	return n
}

// plainLine reports whether a record can be told from its neighbours in a batch.
// The encoder's always can; another one travels alone.
func plainLine(data []byte) bool { return bytes.IndexByte(data, '\n') < 0 }
