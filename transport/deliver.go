// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/logging"
)

// queueError is a failure of our own queue, not of the server.
type queueError struct{ err error }

func (e *queueError) Error() string { return "read buffer: " + e.err.Error() }
func (e *queueError) Unwrap() error { return e.err }

// next reads the records after pos: as many as fit one batch, or fewer when no
// more came within the linger time. Nothing means that it is time to probe.
func (s *Sender) next(ctx context.Context, linger bool) ([]buffer.Record, error) {
	limit := jitter(s.o.ProbeInterval)
	if s.pos > s.acked {
		limit = min(limit, jitter(confirmInterval))
	}
	from := s.from(s.pos)
	recs, err := s.read(ctx, limit, from, s.recs[:0], s.o.BatchRecords, s.o.BatchBytes)
	if err != nil || !linger || !s.short(recs) {
		return recs, err
	}
	for deadline := time.Now().Add(s.pace.linger()); s.short(recs); {
		more, err := s.read(ctx, time.Until(deadline), recs[len(recs)-1].Seq, s.peek[:0], 1, 1)
		if err != nil {
			return nil, err
		}
		// The look ahead has invalidated what was read before it.
		again, err := s.read(ctx, time.Minute, from, s.recs[:0], s.o.BatchRecords, s.o.BatchBytes)
		if err != nil || len(more) == 0 {
			return again, err
		}
		recs = again
	}
	return recs, nil
}

// read is Queue.Read with a time limit; nothing within it is no error.
func (s *Sender) read(ctx context.Context, limit time.Duration, after uint64, dst []buffer.Record, n, size int) ([]buffer.Record, error) {
	rctx, cancel := context.WithTimeout(ctx, max(limit, 0))
	defer cancel()
	recs, err := s.q.Read(rctx, after, dst, n, size)
	switch {
	case err == nil:
		return recs, nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case errors.Is(err, context.DeadlineExceeded):
		return nil, nil
	}
	return nil, &queueError{err}
}

// short reports whether recs is worth waiting for company: nothing follows it
// yet and nothing in it is urgent.
func (s *Sender) short(recs []buffer.Record) bool {
	if len(recs) == 0 || len(recs) >= s.o.BatchRecords {
		return false
	}
	if s.q.Bounds().Last > recs[len(recs)-1].Seq {
		return false // the read stopped at a limit
	}
	size := 0
	for i := range recs {
		if recs[i].Urgent {
			return false
		}
		size += len(recs[i].Data)
	}
	return size < s.o.BatchBytes
}

// send delivers recs in as many calls as they have streams and holes, or more while
// large ones are broken off. After a
// verdict that moves pos elsewhere the rest is left to the next read.
func (s *Sender) send(ctx context.Context, recs []buffer.Record) error {
	defer s.batch.release()
	for len(recs) > 0 {
		n := s.batch.cut(recs, s.breaks.most(s.o.BatchRecords))
		if n = s.untilAside(recs[:n]); n == 0 {
			recs = recs[1:]
			continue
		}
		if first := recs[0].Seq; first > s.pos+1 && s.forfeit(ctx, span{s.pos + 1, first - 1}) {
			return nil // read again: the loss must be durable before we pass over it
		}
		s.flight, s.stream = span{recs[0].Seq, recs[n-1].Seq}, destination(recs[0].Stream)
		s.sent = max(s.sent, s.flight.last)
		if s.breaks.alone(recs[:n]) {
			if err := s.control(ctx, &recs[0]); err != nil {
				return fmt.Errorf("control before %d: %w", s.flight.first, err)
			}
		}
		start := time.Now()
		r, err := s.call(ctx, flagWrite, s.batch.write(s.session, s.pos, recs[:n]))
		if err != nil {
			s.m.failed.Inc()
			return fmt.Errorf("deliver %d-%d: %w", s.flight.first, s.flight.last, s.broken(ctx, recs[:n], err))
		}
		took := time.Since(start)
		s.pace.observe(took)
		s.m.seconds.Observe(took.Seconds())
		s.m.batches[r.verdict].Inc()
		if l := logging.From(ctx).Check(zapcore.DebugLevel, "batch answered"); l != nil {
			l.Write(zap.Uint64(logging.KeyFirst, s.flight.first), zap.Uint64(logging.KeyLast, s.flight.last),
				zap.String("verdict", string(r.verdict)), zap.Duration(logging.KeyDuration, took))
		}
		if err := s.check(r); err != nil {
			return err
		}
		if err := s.take(ctx, r); err != nil {
			return err
		}
		if s.pos != recs[n-1].Seq {
			return nil
		}
		s.breaks.taken(&s.o, n, took)
		s.back.delivered()
		recs = recs[n:]
	}
	return nil
}

// maxDetours is how many batches in a row may be answered with something other
// than OK. One rewind needs one; a server that keeps answering so is not ours.
const maxDetours = 8

// check holds a verdict on the batch in flight against what it can mean, so that
// a wrong server cannot make the Sender run in circles.
func (s *Sender) check(r reply) error {
	sane := true
	switch f := s.flight; r.verdict {
	case ok:
		sane = r.last == f.last
	case dup:
		sane = r.last >= f.last
	case overlap:
		sane = r.last >= f.first && r.last < f.last
	case gap:
		sane = r.last < s.pos
	}
	s.detours++
	if r.verdict == ok {
		s.detours = 0
	}
	if !sane || s.detours > maxDetours {
		return badReply(fmt.Sprintf("%s %d to batch %d-%d", r.verdict, r.last, s.flight.first, s.flight.last))
	}
	return nil
}

// probe asks what the server has and moves pos there.
func (s *Sender) probe(ctx context.Context, flag string) error {
	if flag != flagProbe {
		s.session = fmt.Sprintf("%s%04x", s.process, s.dials)
	}
	r, err := s.call(ctx, flag, s.batch.probe(s.session, flag))
	if err != nil {
		return err
	}
	if flag == flagHello && r.verdict == ok {
		s.hello = true
		if r.session != "" && r.session[:processLen] > s.process {
			// The clock went back since the last start. Sessions must grow, see
			// take: go on under one that does.
			s.process = newProcess(r.session)
			s.introduce(ctx)
			return s.probe(ctx, flag)
		}
	}
	return s.take(ctx, r)
}

func (s *Sender) call(ctx context.Context, flag string, args []any) (reply, error) {
	text, err := s.conn.call(ctx, args)
	if err != nil {
		return reply{}, err
	}
	s.lastReply.Store(time.Now().UnixNano())
	return parseReply(flag, text)
}

// take acts on a verdict. Whatever it was, the server's last is the truth: pos
// goes there, forward or back.
func (s *Sender) take(ctx context.Context, r reply) error {
	if r.verdict == fenced {
		// A session not above ours in our own epoch means that the server went
		// back to a time before this connection, not that somebody has come.
		if s.hello && r.epoch == s.q.Epoch() && r.session[:processLen] <= s.process {
			return s.probe(ctx, flagHello)
		}
		// Fenced before anything was delivered, by a newer epoch: the queue was made
		// anew, and the clock had gone back. Otherwise somebody follows us.
		cloned := s.hello || s.acked > 0
		return fencing(max(r.epoch, s.q.Epoch()), cloned, "fenced by epoch %s session %s, ours are %s and %s", r.epoch, r.session, s.q.Epoch(), s.session)
	}
	if r.last > s.sent {
		return fencing(s.q.Epoch(), false, "the server has seq %d of epoch %s, we sent at most %d: the queue was copied or restored", r.last, s.q.Epoch(), s.sent)
	}
	if r.last < s.pos {
		s.holes = nil // the record that named one may be lost, too
		if s.syncer != nil {
			s.syncer.rewind(r.last)
		}
		s.m.rewinds.Inc()
		s.limiter.Log(ctx, zapcore.WarnLevel, "rewind", "server lost confirmed records, sending them again",
			zap.Uint64(logging.KeyFirst, r.last+1), zap.Uint64(logging.KeyLast, s.pos))
		st := *s.state.Load()
		st.Rewinds++
		st.Behind = Behind{r.last + 1, s.pos}
		s.set(&st)
	}
	if r.last > s.replied {
		s.count(s.replied+1, r.last)
		s.replied = r.last
	}
	s.pos = r.last
	if s.o.Ack == AckReply {
		s.confirm(r.last)
	}
	return nil
}

// count records which of the flight's records are confirmed now, and how long they took.
func (s *Sender) count(first, last uint64) {
	first, last = max(first, s.flight.first), min(last, s.flight.last)
	if last < first {
		return
	}
	s.m.delivered[s.stream].Add(float64(last - first + 1))
	now := time.Now().UnixNano()
	for _, t := range s.batch.times[first-s.flight.first : last-s.flight.first+1] {
		if t.stored != 0 {
			s.m.delivery.Observe(float64(max(now-t.stored, 0)) / 1e9)
		}
		if t.event != 0 {
			s.m.endToEnd.Observe(float64(max(now/1e6-t.event, 0)) / 1e3)
		}
	}
}

// maxHoles bounds the memory of holes. Forgetting the oldest can only make a
// range be named twice.
const maxHoles = 1024

// forfeit tells the queue which part of a hole had been delivered once and is
// now gone on both sides. What is above acked was dropped by the queue itself,
// which has accounted for it, and what was set aside is named as long as it can be read.
// It reports whether there was anything to tell.
func (s *Sender) forfeit(ctx context.Context, hole span) bool {
	known := slices.Clip(s.holes)
	first := s.q.Bounds().First
	for _, seq := range s.aside {
		if seq >= first {
			known = append(known, span{seq, seq})
		}
	}
	lost := subtract(span{hole.first, min(hole.last, s.acked)}, known)
	for _, gone := range lost {
		s.q.Forfeit(gone.first, gone.last, CauseServerLoss)
		s.limiter.Log(ctx, zapcore.ErrorLevel, "forfeit", "server lost records that the buffer no longer has",
			zap.Uint64(logging.KeyFirst, gone.first), zap.Uint64(logging.KeyLast, gone.last),
			zap.Uint64(logging.KeyCount, gone.len()))
	}
	s.holes = append(s.holes, subtract(hole, known)...)
	if n := len(s.holes) - maxHoles; n > 0 {
		s.holes = slices.Delete(s.holes, 0, n)
	}
	return len(lost) > 0
}
