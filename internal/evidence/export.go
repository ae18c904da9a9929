// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"strconv"
	"time"

	"github.com/aurorasoc/edr-sensor/buffer"
)

// Source is a buffer, in use or not.
type Source interface {
	Info() buffer.Info
	Walk(context.Context, buffer.Range, func(*buffer.Chunk) bool) error
}

// Why a record that was wanted is missing, beside the causes that the buffer knows.
const (
	CauseGone   = "gone"   // left the buffer before: delivered, or named in a loss
	CauseLeft   = "left"   // left it during the export
	CauseFuture = "future" // was not there yet
)

// Missing is a range of seqs that was wanted and could not be written.
type Missing struct {
	Cause  string `json:"cause"`
	First  uint64 `json:"first"`
	Last   uint64 `json:"last"`
	Reason string `json:"reason,omitempty"` // the error, where there is one
}

// Count is how many seqs these are.
func (m *Missing) Count() uint64 { return m.Last - m.First + 1 }

// mostMissing bounds what a summary names; what is beyond is only counted.
const mostMissing = 100

// Summary says what an export was.
type Summary struct {
	Epoch   string    `json:"epoch"`
	First   uint64    `json:"first"` // the range of seqs that was looked at; Last is before First when there is nothing
	Last    uint64    `json:"last"`
	Records uint64    `json:"records"` // written
	Bytes   int64     `json:"bytes"`   // written
	SHA256  string    `json:"sha256"`  // of what was written
	Missing []Missing `json:"missing,omitempty"`
	More    uint64    `json:"missing_more,omitempty"` // seqs that are missing beside those that are named
	Unknown uint64    `json:"unknown,omitempty"`      // records that could not be selected by what they say: they are none of the sensor's
	Begins  time.Time `json:"begins,omitzero"`        // since when the buffer has records, where that is after the begin that was asked for
	Error   string    `json:"error,omitempty"`        // why it ended early
}

// Complete tells whether all that was wanted was written.
func (s *Summary) Complete() bool {
	return len(s.Missing) == 0 && s.More == 0 && s.Unknown == 0 && s.Begins.IsZero() && s.Error == ""
}

func (s *Summary) miss(cause string, first, last uint64, err error) {
	if last < first {
		return
	}
	if n := len(s.Missing); n > 0 && s.Missing[n-1].Cause == cause && s.Missing[n-1].Last+1 == first && err == nil {
		s.Missing[n-1].Last = last
		return
	}
	if len(s.Missing) >= mostMissing {
		s.More += last - first + 1
		return
	}
	m := Missing{Cause: cause, First: first, Last: last}
	if err != nil {
		m.Reason = fmt.Sprintf("%.200s", err.Error())
	}
	s.Missing = append(s.Missing, m)
}

// clockSlack is by how much the clock may have been set back between an event and its
// record without the event being overlooked by its time.
const clockSlack = time.Hour

// Export writes the records that q selects to w, one JSON document per line, in order,
// each byte for byte as it is delivered. What was delivered in an earlier epoch of the
// buffer and is still there has no seq: it is part of what no First is asked for. Memory is that of a chunk. With an error the
// summary is of what was written until then.
func Export(ctx context.Context, src Source, q Query, w io.Writer) (Summary, error) {
	i := src.Info()
	e := exporter{src: src, q: q, w: w, hash: sha256.New(), info: i}
	e.s = Summary{Epoch: i.Epoch, First: i.First, Last: i.Last}
	e.bound()
	r := buffer.Range{First: q.First, Last: e.s.Last}
	if !q.Since.IsZero() {
		e.since = q.Since.Add(-clockSlack)
		r.Since = e.since
	}
	var err error
	if e.at = e.s.First; e.s.First <= e.s.Last || q.First == 0 {
		err = src.Walk(ctx, r, e.chunk)
	}
	if e.err == nil && err == nil {
		e.hole(e.s.Last + 1)
		if q.Last > i.Last {
			e.s.miss(CauseFuture, max(q.First, i.Last+1), q.Last, nil)
		}
	} else if e.err != nil {
		err = e.err
	}
	e.s.SHA256 = hex.EncodeToString(e.hash.Sum(nil))
	if err != nil {
		e.s.Error = fmt.Sprintf("%.200s", err.Error())
	}
	return e.s, err
}

type exporter struct {
	src   Source
	q     Query
	w     io.Writer
	hash  hash.Hash
	info  buffer.Info
	s     Summary
	since time.Time // chunks written before do not matter
	at    uint64    // next seq that is expected
	late  bool      // what comes was written after all that is wanted
	line  []byte
	err   error
}

// bound narrows the range down to what was asked for, and says what of that has left.
func (e *exporter) bound() {
	i, s := &e.info, &e.s
	if e.q.First > 0 {
		e.gone(e.q.First, i.First-1)
		s.First = max(s.First, e.q.First)
	}
	if e.q.Last > 0 {
		s.Last = min(s.Last, e.q.Last)
	}
	if e.q.First == 0 && i.First > 1 && !e.q.Since.IsZero() && e.q.Since.Before(i.Oldest) {
		s.Begins = i.Oldest
	}
}

// gone says what became of the range before the oldest record, as far as that is still
// known.
func (e *exporter) gone(first, last uint64) {
	if e.q.Last > 0 {
		last = min(last, e.q.Last)
	}
	for first <= last {
		cause, end := CauseGone, last
		for _, l := range e.info.Lost {
			switch {
			case l.First == 0 || l.Count != l.Last-l.First+1: // not known exactly
			case l.First <= first && first <= l.Last:
				cause, end = l.Cause, min(last, l.Last)
			case l.First > first && l.First <= end && cause == CauseGone:
				end = l.First - 1
			}
		}
		e.s.miss(cause, first, end, nil)
		first = end + 1
	}
}

// hole accounts for the seqs before next that the walk has not shown.
func (e *exporter) hole(next uint64) {
	if next <= e.at || e.late {
		return
	}
	left := min(next, e.src.Info().First)
	if left > e.at {
		e.s.miss(CauseLeft, e.at, left-1, nil)
		e.at = left
	}
	e.s.miss(buffer.CauseCorrupt, e.at, next-1, nil) // nothing else takes chunks out of the middle
	e.at = next
}

func (e *exporter) chunk(c *buffer.Chunk) bool {
	early := c.Err == nil && c.Written.Before(e.since)
	if !early {
		e.hole(min(max(c.First, e.s.First), e.s.Last+1))
	}
	e.at = max(e.at, min(c.Last, e.s.Last)+1) // one of an earlier epoch has no seqs
	e.late = c.Err == nil && !e.q.Until.IsZero() && c.Written.After(e.q.Until.Add(clockSlack))
	if c.Err != nil {
		cause, err := buffer.CauseCorrupt, c.Err
		if c.Gone {
			cause, err = CauseLeft, nil
		}
		e.s.miss(cause, max(c.First, e.s.First), min(c.Last, e.s.Last), err)
		return true
	}
	for r := range c.Records() {
		if r.Seq < e.q.First || !e.q.ofStream(r.Stream) {
			continue
		}
		if r.Seq > e.s.Last {
			break
		}
		if e.q.reads() {
			wanted, known := e.q.match(r.Data)
			if !known {
				e.s.Unknown++
			}
			if !wanted {
				continue
			}
		}
		if e.err = e.write(&r); e.err != nil {
			return false
		}
	}
	return true
}

func (e *exporter) write(r *buffer.Record) error {
	b := e.line[:0]
	if e.q.Envelope {
		b = append(b, `{"epoch":"`...)
		if r.Seq > 0 {
			b = append(b, e.s.Epoch...)
		}
		b = append(b, `","seq":`...)
		b = strconv.AppendUint(b, r.Seq, 10)
		b = append(b, `,"stream":"`...)
		b = append(b, streamName(r.Stream)...)
		b = append(b, `","delivered":`...)
		b = strconv.AppendBool(b, r.Seq <= e.info.Acked)
		b = append(b, `,"stored":"`...)
		b = time.Unix(0, r.Stored).UTC().AppendFormat(b, time.RFC3339Nano)
		b = append(b, `","event":`...)
		b = append(b, r.Data...)
		b = append(b, '}')
	} else {
		b = append(b, r.Data...)
	}
	b = append(b, '\n')
	e.line = b
	n, err := e.w.Write(b)
	e.hash.Write(b[:n])
	e.s.Bytes += int64(n)
	if err != nil {
		return err
	}
	e.s.Records++
	return nil
}
