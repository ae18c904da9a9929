// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// Run reports the processes that already run, then every event, until ctx ends.
// Then it detaches the programs, empties the rings, and hands over everything, for
// at most stopWithin. The time in which no sensor ran is reported first.
func (s *Sensor) Run(ctx context.Context, stopWithin time.Duration) error {
	ctx = logging.With(ctx, zap.String(logging.KeyComponent, "sensor"))
	// Handing over goes on for a while after ctx ended.
	write, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		s.wait.wake()
		time.AfterFunc(stopWithin, cancel)
	})
	defer stop()

	s.lastTick = time.Now()
	s.left.from = s.lastTick
	s.unwritten = map[string]uint64{}
	if s.keepErr != nil {
		s.Notify(ctx, event.SelfInfo{
			Name: "Keep Failed", Severity: 3, Failed: true, Code: "KEEP_FAILED",
			Message: "a restart of the sensor will miss what happens meanwhile: " + s.keepErr.Error(),
		})
	}
	known := s.takeOver(ctx)
	s.writeNotices(write)
	s.applyCases()
	if err := s.snapshot(write, known); err != nil {
		// Parents of running processes are then unknown: less, not nothing.
		s.Notify(ctx, event.SelfInfo{
			Activity: event.ActivityDegraded, Severity: 3, Failed: true, Code: "SNAPSHOT",
			Message: "processes that ran before the sensor are unknown: " + err.Error(),
		})
	}
	s.seedCases()
	if err := s.readPredecessor(ctx, write); err != nil {
		return err
	}
	close(s.settled)
	for ctx.Err() == nil {
		if err := s.turn(write); err != nil {
			return err
		}
	}
	return s.drain(write)
}

// turn handles what is there, or waits for more.
func (s *Sensor) turn(ctx context.Context) error {
	s.applyCases()
	n, err := s.poll(ctx)
	if err != nil {
		return err
	}
	s.writeNotices(ctx)
	if now := time.Now(); now.Sub(s.lastTick) >= tickEvery {
		s.tick(ctx, now)
	}
	if err := s.flush(ctx, false); err != nil {
		return err
	}
	s.dropPredecessor(ctx)
	s.beat.Store(int64(time.Since(s.born)))
	if n > 0 {
		return nil
	}
	return s.wait.wait(time.Until(s.lastTick.Add(tickEvery)))
}

// drain empties the rings after detaching; the record of the stop is among the
// last. Programs that are kept go on: of those it reads what they have seen so far, and
// whoever keeps them detaches them unless a new process comes.
func (s *Sensor) drain(ctx context.Context) error {
	s.tick(ctx, time.Now()) // the programs' statistics end with them
	var err error
	detached := s.o.Keeper == nil || s.keepErr != nil
	if detached {
		err = s.kernel.detach()
	}
	clean, rerr := s.empty(ctx, detached)
	if rerr != nil {
		return errors.Join(err, rerr)
	}
	s.tick(ctx, time.Now())
	if s.in == &s.own {
		s.reportSuppressed(ctx, time.Now(), true)
	}
	s.tellRoots(time.Now(), true)
	s.limiter.Flush()
	s.writeNotices(ctx)
	s.reportRepeats(ctx, time.Now(), true)
	return errors.Join(err, s.flush(ctx, clean))
}

// Conclude hands over what was decided since Run returned, as while the rest was delivered.
// What is decided after it has a log line only. Call it once, after Run.
func (s *Sensor) Conclude(ctx context.Context) error {
	ctx = logging.With(ctx, zap.String(logging.KeyComponent, "sensor"))
	s.writeNotices(ctx)
	s.reportRepeats(ctx, time.Now(), true)
	if !s.pending {
		return nil
	}
	return s.flush(ctx, s.mark.clean)
}

// empty reads what is in the rings and, where nothing is attached any more, what programs
// that were under way then have yet to write. It reports whether that is all: one that is
// not done with its record after a while holds up those behind it.
func (s *Sensor) empty(ctx context.Context, detached bool) (all bool, err error) {
	ends, late := [...]uint64{s.in.priority.producer(), s.in.bulk.producer()}, time.Now().Add(drainAtMost)
	for looked := !detached; ; {
		s.applyCases() // who closes a case now is to be answered in time for its record
		switch {
		case !s.in.reached(ends):
		case looked:
			return true, nil
		default:
			looked = true
			<-time.After(drainPause)
			ends = [...]uint64{s.in.priority.producer(), s.in.bulk.producer()}
			continue
		}
		n, err := s.poll(ctx)
		if err != nil {
			return false, err
		}
		if err := s.flush(ctx, false); err != nil {
			return false, err
		}
		switch {
		case n > 0:
			late = time.Now().Add(drainAtMost)
		case time.Now().After(late) && detached:
			logging.From(ctx).Error("what is behind a record that a program does not finish is left, as after a kill")
			return false, nil
		case time.Now().After(late):
			return true, nil // the next process reads on
		default:
			<-time.After(pollMin)
		}
	}
}

// How long a program may take to write its record after it was detached.
const (
	drainPause  = 5 * time.Millisecond
	drainAtMost = time.Second
)

// poll reads up to pollRecords records ahead, starts the hashing they need, and
// then writes them in order.
func (s *Sensor) poll(ctx context.Context) (int, error) {
	s.dec.reset()
	// What the bulk ring holds now was caused by processes that the priority
	// ring already shows, so the priority ring goes first.
	in := s.in
	priority, bulk := in.limits()
	first, bad, err := s.read(ctx, in.priority, priority, 0, pollRecords-bulkShare)
	if err != nil {
		return 0, err
	}
	n, more, err := s.read(ctx, in.bulk, bulk, first, pollRecords)
	if err != nil {
		return 0, err
	}
	now := time.Now().UnixNano()
	for i := range s.events[:n] {
		ev := &s.events[i]
		s.o.Enricher.Apply(ev)
		s.metrics.latency.Observe(seconds(now - ev.Time))
		ev.Severity = s.who.gravity(ev)
		if ev.Kind != event.Fork || s.o.ForkEvents || ev.Deep {
			s.write(ctx, now, ev, ev.Severity > gravityNone, nil)
		}
		if ev.Severity > 0 {
			s.tampering(ctx, ev)
		}
		s.discard("UNDECODABLE", s.bad[i]) // the mark is to cover them, and no others
		s.mark.ktime, s.mark.wall = max(s.mark.ktime, ev.KTime), max(s.mark.wall, ev.Time)
		if i < first {
			s.mark.priority.pos = s.after[i]
		} else {
			s.mark.bulk.pos = s.after[i]
		}
		if s.o.Sink.Size() >= flushBytes {
			if err := s.flush(ctx, false); err != nil {
				return i, err
			}
		}
	}
	// Records that were discarded or could not be decoded are covered too.
	s.discard("UNDECODABLE", bad+more)
	s.mark.priority.pos, s.mark.bulk.pos = in.priority.position(), in.bulk.position()
	if in == &s.own {
		s.pulse.rings[0].reached.Store(s.mark.priority.pos)
		s.pulse.rings[1].reached.Store(s.mark.bulk.pos)
	}
	s.o.Enricher.EndBatch()
	return n, nil
}

// seconds of a span that a clock which was set may have made negative.
func seconds(ns int64) float64 { return float64(max(ns, 0)) / 1e9 }

// read decodes records of one ring into s.events[n:most], up to a position. bad is how many
// behind the last event could not be decoded.
func (s *Sensor) read(ctx context.Context, r *ring, limit uint64, n, most int) (end int, bad uint64, err error) {
	for n < most && r.position() < limit {
		rec, ok, err := r.next()
		if err != nil {
			return n, bad, fmt.Errorf("read ring: %w", err)
		}
		if !ok {
			break
		}
		if serial, ok := asHeartbeat(rec); ok {
			if s.in == &s.own {
				s.pulse.rings[s.ringIndex(r)].met(serial, r.position(), time.Since(s.born))
			}
			continue
		}
		if !s.in.counts(rec) {
			continue // read from the rings before these, or after
		}
		if f := s.in.foreign[kindNumber(rec)]; f != 0 {
			if f == lostRecord {
				s.metrics.decodeErrors.Inc()
				bad++
			}
			continue
		}
		ev := &s.events[n]
		if err := s.dec.decode(rec, ev); err != nil {
			s.metrics.decodeErrors.Inc()
			bad++
			s.limiter.Log(ctx, zap.ErrorLevel, "decode", "decode record", zap.Error(err))
			continue
		}
		ev.Hook = s.hooks.Load()[ev.Kind]
		s.after[n], s.bad[n], bad = r.position(), bad, 0
		s.metrics.events[ev.Kind].Inc()
		s.o.Enricher.Prefetch(ev)
		n++
	}
	return n, bad, nil
}

// write encodes one event into the sink's open batch. What fits neither there
// nor into an empty one is counted, and named with the next flush. It reports whether it fit.
func (s *Sensor) write(ctx context.Context, now int64, ev *event.Event, urgent bool, names []event.Loss) bool {
	rec := s.o.Encoder.Append(s.begin(ev), s.o.Sink.Next(), now, ev)
	err := s.o.Sink.End(rec, urgent, names)
	if errors.Is(err, ErrFull) && s.flush(ctx, false) == nil {
		rec = s.o.Encoder.Append(s.begin(ev), s.o.Sink.Next(), now, ev)
		err = s.o.Sink.End(rec, urgent, names)
	}
	if err != nil {
		s.metrics.rejected.Inc()
		s.discard("TOO_LARGE", 1)
		key := "rejected"
		if len(ev.Cases) > 0 {
			key += " " + ev.Cases[0].ID // one case's line must not stand for another's
		}
		s.limiter.Log(inCases(ctx, ev), zap.ErrorLevel, key, "record rejected", zap.Stringer(logging.KeyEvent, ev.Kind), zap.Int(logging.KeyBytes, len(rec)), zap.Error(err))
		return false
	}
	s.pending = true
	s.countTagged(ev)
	return true
}

func (s *Sensor) begin(ev *event.Event) []byte {
	if ev.Kind == event.Lifecycle {
		return s.o.Sink.BeginDecision(ev.Self.Stream)
	}
	return s.o.Sink.Begin()
}

// flush hands over what was written. Records that produced nothing (forks that
// are not reported) release their ring space without a commit of their own.
func (s *Sensor) flush(ctx context.Context, clean bool) error {
	s.tellUnwritten(ctx) // the mark covers them
	if !s.pending && !clean {
		if s.committed.Load() == s.mark.serial {
			s.in.priority.release(s.mark.priority.pos)
			s.in.bulk.release(s.mark.bulk.pos)
		}
		return nil
	}
	s.mark.serial++
	s.mark.clean = clean
	s.mark.wall = max(s.mark.wall, time.Now().UnixNano())
	s.markBuf = s.mark.append(s.markBuf[:0])
	s.pulse.handing.Store(int64(time.Since(s.born)))
	err := s.o.Sink.Flush(ctx, s.markBuf)
	s.pulse.handing.Store(0)
	if err != nil {
		return fmt.Errorf("hand over events: %w", err)
	}
	s.pending = false
	return nil
}

// tellUnwritten names what could not become a record, in the batch whose mark covers it: a
// process that is killed leaves nothing untold. The log has one line of it in a while.
func (s *Sensor) tellUnwritten(ctx context.Context) {
	if len(s.unwritten) == 0 {
		return
	}
	self := s.self // may be what is being written
	for reason, n := range s.unwritten {
		i := event.SelfInfo{
			Activity: event.ActivityLost, Severity: 4, Failed: true, From: s.lastTick, To: time.Now(),
			Code: reason, Count: n, Message: fmt.Sprintf("%d events could not become records", n),
		}
		delete(s.unwritten, reason)
		if left, ok := s.limiter.Allow(reason); ok {
			said := ctx
			if left > 0 {
				said = logging.With(ctx, zap.Uint64(logging.KeySuppressed, left))
			}
			say(said, &i)
		}
		s.writeSelf(ctx, &i, nil)
	}
	s.self = self
}

func (s *Sensor) writeNotices(ctx context.Context) {
	s.mu.Lock()
	notices, overflow := s.notices, s.overflow
	s.notices, s.overflow = nil, 0
	s.mu.Unlock()
	for i := range notices {
		s.writeSelf(ctx, &notices[i], nil)
	}
	if overflow > 0 {
		s.discard("NOTICES", overflow)
	}
}

func (s *Sensor) writeSelf(ctx context.Context, i *event.SelfInfo, names []event.Loss) {
	now := time.Now().UnixNano()
	s.writeSelfAt(ctx, now, now, i, names)
}

// writeSelfAt writes what was decided at a time. What names losses needs no memory of
// ours: the buffer has it named again.
func (s *Sensor) writeSelfAt(ctx context.Context, now, at int64, i *event.SelfInfo, names []event.Loss) {
	s.self = event.Event{Kind: event.Lifecycle, Time: at, Self: i, Hook: "userspace/agent", Subject: i.Process}
	if i.Process != nil {
		s.self.Actor, s.self.KTime = i.Process.Key, uint64(at-i.Boot)
	}
	s.metrics.events[event.Lifecycle].Inc()
	if s.write(ctx, now, &s.self, i.Severity >= 4, names) && len(names) == 0 {
		s.told.add(telling{s.o.Sink.Next() - 1, at, *i})
	}
}

// tick reports what was lost since the last one.
func (s *Sensor) tick(ctx context.Context, now time.Time) {
	from := s.lastTick
	s.lastTick = now
	if l := logging.From(ctx).Check(zap.DebugLevel, "tick"); l != nil {
		l.Write(zap.Uint64(logging.KeySeq, s.o.Sink.Next()), zap.Uint64("priority_bytes", s.priority.used()), zap.Uint64("bulk_bytes", s.bulk.used()))
	}
	lost := event.SelfInfo{Activity: event.ActivityLost, Severity: 4, Failed: true, From: from, To: now}
	if s.losses = s.o.Sink.Unnamed(s.losses[:0]); len(s.losses) > 0 {
		i := lost
		i.Code, i.Losses = "RECORDS_LOST", s.losses
		for _, l := range s.losses {
			i.Count += l.Count
		}
		i.Message = fmt.Sprintf("%d records will not be delivered", i.Count)
		s.decide(ctx, &i, s.losses)
	}
	s.tellAgain(ctx)
	if s.in == &s.own { // else the mark is about others, and whoever reads them reports it
		s.reportKernelLoss(ctx, lost)
		s.reportMissed(ctx, lost)
		s.reportSuppressed(ctx, now, false)
	}
	s.tellRoots(now, false)
	s.reportRepeats(ctx, now, false)
	s.limiter.Settle()
}

// snapshot reports the processes that run already, before the first event, or only takes
// note of them when they are known from the process before.
func (s *Sensor) snapshot(ctx context.Context, known bool) error {
	n := 0
	err := s.kernel.snapshot(func(rec []byte) error {
		if n++; n%pollRecords == 0 {
			s.o.Enricher.EndBatch()
			if err := s.flush(ctx, false); err != nil {
				return err
			}
		}
		s.dec.reset()
		ev := &s.events[0]
		if err := s.dec.decode(rec, ev); err != nil {
			s.metrics.decodeErrors.Inc()
			return fmt.Errorf("decode: %w", err)
		}
		ev.Hook = s.hooks.Load()[ev.Kind]
		s.o.Enricher.Apply(ev)
		if !known {
			s.metrics.events[ev.Kind].Inc()
			s.write(ctx, time.Now().UnixNano(), ev, false, nil)
		}
		return ctx.Err()
	})
	s.o.Enricher.EndBatch()
	if known {
		err = errors.Join(err, s.unlearn())
	}
	if err != nil {
		return err
	}
	return s.flush(ctx, false)
}
