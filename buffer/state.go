// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
)

// state is what the file says about the queue as a whole. It is one value in
// bucket m, written by every transaction, so it is always as old as the chunks.
// The writer derives the next state from a clone and publishes it only after
// the transaction that stored it is durable.
//
// Every seq up to last is in exactly one place:
//
//	last = truncated + reclaimed + corrupt + records in doubt + live records
//
// and as records leave at the front, save for damaged chunks:
//
//	first live = 1 + truncated + reclaimed + corrupt + in doubt
type state struct {
	epoch string
	base  uint64 // seqs here up to base are of earlier epochs; that of the epoch is lower by base
	gen   uint64 // transactions; tells after a failed commit which state is on disk

	last  uint64 // newest durable record
	head  uint64 // no record below is live; 0 in files of version 1
	acked uint64 // everything up to here was delivered or is a loss
	// The reader may hand out records up to lease only. What is above was
	// certainly never sent, whenever the process died.
	lease uint64

	truncated uint64 // records dropped undelivered
	reclaimed uint64 // records dropped after they were acknowledged
	corrupt   uint64 // records lost to damage
	salvaged  uint64 // records taken over from a file that was set aside

	// Records that were dropped while they may have been under way: they are
	// decided by the acknowledgement that covers them (delivered) or by the
	// next Read that asks for what is behind a lower seq (lost).
	doubt []doubt

	// Records that were given up and are named as lost, among those that are live or in
	// doubt: to account for them once more would be one loss too many.
	given []uint64

	losses losses
	mark   []byte // nil when none was set
}

// maxGiven bounds given, which is stored with every commit. One that is forgotten is sent
// again, should it have to be read again.
const maxGiven = 512

// doubt is a range that may have been delivered, and what becomes of it if not.
type doubt struct {
	span
	corrupt bool
}

func (d doubt) cause() string {
	if d.corrupt {
		return CauseCorrupt
	}
	return CauseTruncated
}

func (s *state) clone() *state {
	c := *s
	c.doubt = slices.Clone(s.doubt)
	c.given = slices.Clone(s.given)
	c.losses = slices.Clone(s.losses)
	return &c // mark is immutable
}

func (s *state) inDoubt() (n uint64) {
	for _, r := range s.doubt {
		n += r.count()
	}
	return n
}

// gone is the number of records that are no longer live.
func (s *state) gone() uint64 { return s.truncated + s.reclaimed + s.corrupt + s.inDoubt() }

// resolve decides the doubt about everything above after: it was not delivered.
func (s *state) resolve(after uint64) {
	all := s.doubt
	s.doubt = nil
	for _, d := range all {
		keep, lost := d.split(after)
		if !keep.empty() {
			s.doubt = append(s.doubt, doubt{keep, d.corrupt})
		}
		s.lose(lost, d.cause())
	}
}

// ack moves the watermark and decides the doubt about everything up to it.
func (s *state) ack(seq uint64) {
	s.acked = max(s.acked, min(seq, s.last))
	s.lease = max(s.lease, s.acked)
	all := s.doubt
	s.doubt = nil
	for _, d := range all {
		done, keep := d.split(s.acked)
		s.reclaimed += done.count()
		if !keep.empty() {
			s.doubt = append(s.doubt, doubt{keep, d.corrupt})
		}
	}
	s.losses.delivered(s.acked)
}

// drop accounts for records that leave the queue undamaged.
func (s *state) drop(r span) {
	acked, rest := r.split(s.acked)
	s.reclaimed += acked.count()
	leased, unsent := rest.split(s.lease)
	s.hold(leased, false)
	s.lose(unsent, CauseTruncated)
}

// damage accounts for a damaged chunk, found by a reader that asked for what
// is behind after: up to there it has been sent before.
func (s *state) damage(r span, after uint64) {
	sent, lost := r.split(after)
	acked, leased := sent.split(s.acked)
	s.reclaimed += acked.count()
	s.hold(leased, true)
	s.lose(lost, CauseCorrupt)
}

func (s *state) hold(r span, corrupt bool) {
	switch n := len(s.doubt); {
	case r.empty():
	case n > 0 && s.doubt[n-1].last+1 == r.first && s.doubt[n-1].corrupt == corrupt:
		s.doubt[n-1].last = r.last
	default:
		s.doubt = append(s.doubt, doubt{r, corrupt})
	}
}

func (s *state) lose(r span, cause string) {
	if r.empty() {
		return
	}
	s.losses.unname(r, s.acked)
	s.reclaimed += r.count() // of it what is a loss already
	for _, r := range r.without(s.givenUp()) {
		s.reclaimed -= r.count()
		if cause == CauseCorrupt {
			s.corrupt += r.count()
		} else {
			s.truncated += r.count()
		}
		s.losses.add(r.loss(cause))
	}
}

func (s *state) givenUp() (out []span) {
	for _, seq := range s.given {
		out = append(out, span{seq, seq})
	}
	return out
}

// forget is for those given up of which nothing more can become known.
func (s *state) forget() {
	least := s.head
	for _, d := range s.doubt {
		least = min(least, d.first)
	}
	s.given = slices.DeleteFunc(s.given, func(seq uint64) bool { return seq < least })
}

// renew begins another epoch in the same file: what is not acknowledged goes on as its
// first records. To it, nothing has been sent. What was lost before cannot be named in its
// numbers; how much it was can.
func (s *state) renew(epoch string) {
	s.resolve(s.acked)
	s.epoch, s.base, s.lease = epoch, s.acked, s.acked
	s.given = nil // the server may be another one, and take them
	all := s.losses.unreported(s.acked)
	s.losses = nil
	for _, l := range all {
		s.losses.add(Loss{Cause: l.Cause, Count: l.Count})
	}
}

// The encoding of state: fixed fields, lists, mark, CRC32C. Version 1 had no head,
// no number of salvaged records and no causes of doubt; it is read, and written as 2.
// Version 3 adds base and version 4 what was given up. Either is written only where there
// is such a thing, so that an older program can go on with all other files.
const stateVersion = 4

func (s *state) version() byte {
	switch {
	case len(s.given) > 0:
		return 4
	case s.base > 0:
		return 3
	}
	return 2
}

var errState = errors.New("damaged state")

func (s *state) encode(b []byte) []byte {
	le := binary.LittleEndian
	start := len(b)
	v := s.version()
	b = append(b, v)
	b = append(b, s.epoch...)
	for _, n := range []uint64{s.gen, s.last, s.acked, s.lease, s.truncated, s.reclaimed, s.corrupt, s.head, s.salvaged} {
		b = le.AppendUint64(b, n)
	}
	if v > 2 {
		b = le.AppendUint64(b, s.base)
	}
	if v > 3 {
		b = le.AppendUint32(b, uint32(len(s.given)))
		for _, seq := range s.given {
			b = le.AppendUint64(b, seq)
		}
	}
	b = le.AppendUint32(b, uint32(len(s.doubt)))
	for _, d := range s.doubt {
		b = le.AppendUint64(b, d.first)
		b = le.AppendUint64(b, d.last)
		if d.corrupt {
			b = append(b, 1)
		} else {
			b = append(b, 0)
		}
	}
	b = le.AppendUint32(b, uint32(len(s.losses)))
	for _, l := range s.losses {
		b = append(b, byte(len(l.Cause)))
		b = append(b, l.Cause...)
		for _, v := range []uint64{l.First, l.Last, l.Count, l.by} {
			b = le.AppendUint64(b, v)
		}
	}
	if s.mark == nil {
		b = append(b, 0)
	} else {
		b = append(b, 1)
		b = le.AppendUint32(b, uint32(len(s.mark)))
		b = append(b, s.mark...)
	}
	return le.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

func decodeState(b []byte) (*state, error) {
	if len(b) < 4 {
		return nil, fmt.Errorf("%w: %d bytes", errState, len(b))
	}
	body, sum := b[:len(b)-4], binary.LittleEndian.Uint32(b[len(b)-4:])
	if got := crc32.Checksum(body, castagnoli); got != sum {
		return nil, fmt.Errorf("%w: checksum %08x, want %08x", errState, got, sum)
	}
	d := cursor{b: body}
	v := d.byte()
	if v == 0 || v > stateVersion {
		return nil, fmt.Errorf("%w: version %d, this program knows up to %d", errState, v, stateVersion)
	}
	s := &state{epoch: string(d.bytes(epochLen))}
	for _, p := range []*uint64{&s.gen, &s.last, &s.acked, &s.lease, &s.truncated, &s.reclaimed, &s.corrupt} {
		*p = d.uint64()
	}
	if v > 1 {
		s.head, s.salvaged = d.uint64(), d.uint64()
	}
	if v > 2 {
		s.base = d.uint64()
		d.bad = d.bad || s.base == 0 && v == 3
	}
	if v > 3 {
		n := d.uint32()
		for d.bad = d.bad || n == 0 || n > maxGiven; n > 0 && !d.bad; n-- {
			s.given = append(s.given, d.uint64())
		}
	}
	for n := d.uint32(); n > 0 && !d.bad; n-- {
		r := doubt{span: span{d.uint64(), d.uint64()}}
		if v > 1 {
			c := d.byte()
			r.corrupt, d.bad = c == 1, d.bad || c > 1
		}
		s.doubt = append(s.doubt, r)
	}
	for n := d.uint32(); n > 0 && !d.bad; n-- {
		l := loss{Loss: Loss{Cause: string(d.bytes(int(d.byte())))}}
		l.First, l.Last, l.Count, l.by = d.uint64(), d.uint64(), d.uint64(), d.uint64()
		s.losses = append(s.losses, l)
	}
	switch d.byte() {
	case 0:
	case 1:
		s.mark = append([]byte{}, d.bytes(int(d.uint32()))...)
	default:
		d.bad = true
	}
	if d.bad || len(d.b) != 0 {
		return nil, fmt.Errorf("%w: lengths do not add up", errState)
	}
	return s, nil
}

// cursor reads fields off b; once out of bounds it yields zeros.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) bytes(n int) []byte {
	if n < 0 || n > len(c.b) {
		c.bad = true
		c.b = nil
		return nil
	}
	v := c.b[:n]
	c.b = c.b[n:]
	return v
}

func (c *cursor) byte() byte {
	if b := c.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (c *cursor) uint32() uint32 {
	if b := c.bytes(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (c *cursor) uint64() uint64 {
	if b := c.bytes(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}
