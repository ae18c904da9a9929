// SPDX-License-Identifier: Apache-2.0

// Package sensor sees what happens on the host: it loads and attaches the
// kernel programs, reads their ring buffers in place, and runs the worker that
// decodes, enriches and encodes every record and hands it to a Sink.
//
// One goroutine, the one that calls [Sensor.Run], does all of that, so the
// process table needs no lock. Ring space is released only when the Sink says
// that the events are durable ([Sensor.Release]): the ring is the queue in
// front of the disk, and what it cannot hold is counted in the kernel.
package sensor

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/enrich"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf"
)

// ErrFull is what a Sink's End returns when the record would fit after a Flush.
var ErrFull = errors.New("flush before the next record")

// Sink takes the encoded events in order. All its methods are called by the
// worker only.
type Sink interface {
	// Next is the sequence number of the record that Begin starts.
	Next() uint64
	// Begin returns the slice to append one event to.
	Begin() []byte
	// BeginDecision returns the slice to append one decision to.
	BeginDecision(event.Decisions) []byte
	// End completes the record. Urgent asks for a commit at once; names are the
	// losses that this record reports. With an error nothing was added: ErrFull
	// asks for a Flush first, any other is final.
	End(rec []byte, urgent bool, names []event.Loss) error
	// Size is the number of bytes ended since the last Flush.
	Size() int
	// Flush hands over the records ended so far, and the mark to store with
	// them. It blocks while the disk cannot follow. On an error nothing was
	// handed over and the next Flush tries again.
	Flush(ctx context.Context, mark []byte) error
	// Unnamed appends the losses that no record has reported yet.
	Unnamed(dst []event.Loss) []event.Loss
	// Dropped is what the buffer no longer has and nobody is known to have received:
	// in part it may have been under way when it went, and is no loss until that is known.
	Dropped() event.Loss
}

// Options are what a Sensor needs. Encoder and Enricher belong to the worker
// from Open on.
type Options struct {
	Scope         Scope
	PriorityBytes int // ring for processes; a power of two, multiple of the page size
	BulkBytes     int // ring for the network and files
	Files         FileOptions
	Protected     []Protected // files of the sensor itself
	ForkEvents    bool
	Host          event.Host
	Encoder       *ocsf.Encoder
	Enricher      *enrich.Enricher
	Sink          Sink
	ExerciseDir   string // where the hooks are tried; nobody else may write there
	Mark          []byte // stored with the last durable commit of the run before, if any
	// Keeper, if set, keeps what is in the kernel over a restart; Kept is what it has kept.
	// Both are used until Close, which the descriptors do not survive.
	Keeper     Keeper
	Kept       []Kept
	Registerer prometheus.Registerer
	// CaseRoots, if set, is given every few seconds, and at the end of Run, what the
	// cases of subtrees need to go on in the next run. The worker waits for it.
	CaseRoots func(map[*event.Case][]event.ProcessKey)
}

const (
	pollRecords = 256       // records decoded before the first of them is enriched
	bulkShare   = 32        // of them kept for the bulk ring while the priority ring is never empty
	flushBytes  = 256 << 10 // handed over before a poll is complete, so that memory stays bounded
	tickEvery   = time.Second
	linesEvery  = 10 * time.Second // log lines that a record or a tick repeats
	maxNotices  = 1024
)

// Sensor is one set of attached programs and the worker that reads them.
type Sensor struct {
	o        Options
	metrics  *metrics
	kernel   *kernel
	priority *ring
	bulk     *ring
	own      rings  // those two
	in       *rings // that the worker reads: own, or those of the process before
	taken    takeover
	settled  chan struct{} // closed when only the own are read
	keepErr  error         // why nothing outlives this process
	wait     *waiter
	dec      decoder
	hooks    atomic.Pointer[[event.Kinds]string] // by what each kind is seen
	coverage atomic.Pointer[[]Coverage]
	pulse    pulse
	born     time.Time // what times are counted from, so that the clock may be set

	events  [pollRecords]event.Event
	after   [pollRecords]uint64 // the ring's position behind each event
	self    event.Event
	losses  []event.Loss
	open    []*event.Case // as applied last
	rooted  time.Time     // when CaseRoots was given its last
	mark    mark
	markBuf []byte
	pending bool // records ended since the last Flush

	old       atomic.Pointer[rings] // of the process before, once they are opened
	committed atomic.Uint64         // serial of the newest durable mark
	beat      atomic.Int64          // ns after born of the last turn of the loop
	lost      atomic.Uint64         // kernel losses reported so far
	discarded atomic.Uint64         // events that could not become records so far

	cases atomic.Pointer[caseRequest] // for the worker, the newest only

	mu       sync.Mutex // notices come from other goroutines, rarely
	notices  []event.SelfInfo
	overflow uint64
	repeats  repeats
	recalled told

	told told // the worker's

	reported  [event.Kinds]KindCounter // kernel counters at the last tick
	unwritten map[string]uint64        // events that could not become records since the last tick, by reason
	missed    uint64                   // program runs left out by the kernel, reported so far
	left      suppressed
	shed      atomic.Pointer[string] // of the file options
	limiter   *logging.Limiter       // of lines that a record or a tick can repeat
	lastTick  time.Time
}

// Open loads the programs into the kernel; nothing is attached yet. The caller
// must Close the Sensor. Errors name the program or map and the remedy.
func Open(o Options) (*Sensor, error) {
	s := &Sensor{o: o, metrics: newMetrics(o.Registerer), limiter: logging.NewLimiter(linesEvery), born: time.Now(), settled: make(chan struct{})}
	if err := s.inherit(kernelOptions{Scope: o.Scope, PriorityBytes: o.PriorityBytes, BulkBytes: o.BulkBytes, Files: o.Files, Protected: o.Protected, Keeper: o.Keeper}); err != nil {
		return nil, fmt.Errorf("load sensor: %w", err)
	}
	s.cover(nil)
	if err := s.openRings(); err != nil {
		return nil, errors.Join(fmt.Errorf("open sensor: %w", err), s.Close())
	}
	return s, nil
}

func (s *Sensor) openRings() (err error) {
	if s.priority, err = openRing(s.kernel.priority); err != nil {
		return fmt.Errorf("priority ring: %w", err)
	}
	if s.bulk, err = openRing(s.kernel.bulk); err != nil {
		return fmt.Errorf("bulk ring: %w", err)
	}
	for i, r := range [...]*ring{s.priority, s.bulk} {
		exposeRing(s.o.Registerer, ringNames[i], r, func() float64 { return s.pulseAge(i) })
	}
	if s.wait, err = newWaiter(s.priority, s.bulk); err != nil {
		return fmt.Errorf("ring waiter: %w", err)
	}
	if s.mark.priority.id, err = mapID(s.kernel.priority); err != nil {
		return fmt.Errorf("priority ring: %w", err)
	}
	if s.mark.bulk.id, err = mapID(s.kernel.bulk); err != nil {
		return fmt.Errorf("bulk ring: %w", err)
	}
	s.mark.bootID = parseBootID(s.o.Host.BootID)
	s.own = rings{priority: s.priority, bulk: s.bulk, ids: [...]uint32{s.mark.priority.id, s.mark.bulk.id}}
	s.continueRings()
	s.readFrom(&s.own)
	if s.taken.how == howAdopted {
		s.pulse.serial = bootTime() // greater than any that the process before has sent
	}
	return nil
}

// Close releases everything but for what is kept for the next process. It must not run
// at the same time as Run.
func (s *Sensor) Close() error {
	var errs []error
	s.kernel.leaving = s.o.Keeper != nil
	if s.taken.old != nil {
		errs = append(errs, s.taken.old.close())
	}
	if s.wait != nil {
		errs = append(errs, s.wait.close())
	}
	for _, r := range []*ring{s.priority, s.bulk} {
		if r != nil {
			errs = append(errs, r.close())
		}
	}
	return errors.Join(append(errs, s.kernel.close())...)
}

// Attach puts the programs in place. It fails only when an event that the
// sensor cannot do without has no hook; Coverage tells about the others.
func (s *Sensor) Attach() error {
	var err error
	if s.taken.how != howAdopted { // else they are
		err = s.kernel.attach()
	}
	if err == nil && s.taken.old != nil {
		s.taken.carryErr = s.carryOn(s.taken.old.set)
	}
	s.taken.attached = bootTime()
	s.cover(s.kernel.coverage())
	if err != nil {
		return fmt.Errorf("attach sensor: %w", err)
	}
	s.keepErr = s.kernel.keep(s.o.Host.BootID)
	return nil
}

// Coverage is what each event is seen by on this host, after Attach. Safe for concurrent
// use; the slice must not be changed.
func (s *Sensor) Coverage() []Coverage { return *s.coverage.Load() }

// Beat is when the worker last finished a turn; zero before Run.
func (s *Sensor) Beat() time.Time {
	if ns := s.beat.Load(); ns != 0 {
		return s.born.Add(time.Duration(ns))
	}
	return time.Time{}
}

// Lost is the number of events the kernel had no room for, since Run.
func (s *Sensor) Lost() uint64 { return s.lost.Load() }

// Discarded is the number of events that could not become records, since Run:
// undecodable, too large, or too many about the sensor itself at once.
func (s *Sensor) Discarded() uint64 { return s.discarded.Load() }

// discard counts events that cannot become records; the next tick reports them.
func (s *Sensor) discard(reason string, n uint64) {
	s.unwritten[reason] += n
	s.discarded.Add(n)
}

// Release frees the ring space that a durable mark covers. The sink's owner
// calls it after each commit, from any one goroutine.
func (s *Sensor) Release(stored []byte) {
	m, err := parseMark(stored)
	if err != nil {
		return
	}
	ids := [...]uint32{m.priority.id, m.bulk.id}
	in := &s.own
	if old := s.old.Load(); old != nil && ids == old.ids {
		in = old
	} else if ids != s.own.ids {
		return // the mark of an earlier run
	}
	in.priority.release(m.priority.pos)
	in.bulk.release(m.bulk.pos)
	s.committed.Store(m.serial)
}

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
	if s.o.Keeper == nil || s.keepErr != nil {
		err = s.kernel.detach()
	}
	ends := [...]uint64{s.in.priority.producer(), s.in.bulk.producer()}
	for n := 1; n > 0 && (int64(ends[0]-s.in.priority.position()) > 0 || int64(ends[1]-s.in.bulk.position()) > 0); {
		var perr error
		if n, perr = s.poll(ctx); perr != nil {
			return errors.Join(err, perr)
		}
		if ferr := s.flush(ctx, false); ferr != nil {
			return errors.Join(err, ferr)
		}
	}
	s.tick(ctx, time.Now())
	s.reportSuppressed(ctx, time.Now(), true)
	s.tellRoots(time.Now(), true)
	s.limiter.Flush()
	s.writeNotices(ctx)
	s.reportRepeats(ctx, time.Now(), true)
	return errors.Join(err, s.flush(ctx, true))
}

// poll reads up to pollRecords records ahead, starts the hashing they need, and
// then writes them in order.
func (s *Sensor) poll(ctx context.Context) (int, error) {
	s.dec.reset()
	// What the bulk ring holds now was caused by processes that the priority
	// ring already shows, so the priority ring goes first.
	in := s.in
	limit := in.bulk.producer()
	first, err := s.read(ctx, in.priority, ^uint64(0), 0, pollRecords-bulkShare)
	if err != nil {
		return 0, err
	}
	n, err := s.read(ctx, in.bulk, limit, first, pollRecords)
	if err != nil {
		return 0, err
	}
	now := time.Now().UnixNano()
	for i := range s.events[:n] {
		ev := &s.events[i]
		s.o.Enricher.Apply(ev)
		s.metrics.latency.Observe(seconds(now - ev.Time))
		ev.Severity = gravity(ev)
		if ev.Kind != event.Fork || s.o.ForkEvents || ev.Deep {
			s.write(ctx, now, ev, ev.Severity > gravityNone, nil)
		}
		if ev.Severity > 0 {
			s.tampering(ctx, ev)
		}
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

// read decodes records of one ring into s.events[n:most], up to a position.
func (s *Sensor) read(ctx context.Context, r *ring, limit uint64, n, most int) (int, error) {
	for n < most && r.position() < limit {
		rec, ok, err := r.next()
		if err != nil {
			return n, fmt.Errorf("read ring: %w", err)
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
				s.discard("UNDECODABLE", 1)
			}
			continue
		}
		ev := &s.events[n]
		if err := s.dec.decode(rec, ev); err != nil {
			s.metrics.decodeErrors.Inc()
			s.discard("UNDECODABLE", 1)
			s.limiter.Log(ctx, zap.ErrorLevel, "decode", "decode record", zap.Error(err))
			continue
		}
		ev.Hook = s.hooks.Load()[ev.Kind]
		s.after[n] = r.position()
		s.metrics.events[ev.Kind].Inc()
		s.o.Enricher.Prefetch(ev)
		n++
	}
	return n, nil
}

// write encodes one event into the sink's open batch. What fits neither there
// nor into an empty one is counted, and named at the next tick.
func (s *Sensor) write(ctx context.Context, now int64, ev *event.Event, urgent bool, names []event.Loss) {
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
		return
	}
	s.pending = true
	s.countTagged(ev)
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
		s.self.Actor = i.Process.Key
	}
	s.metrics.events[event.Lifecycle].Inc()
	seq := s.o.Sink.Next()
	s.write(ctx, now, &s.self, i.Severity >= 4, names)
	if s.o.Sink.Next() > seq && len(names) == 0 {
		s.told.add(telling{seq, at, *i})
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
	for reason, n := range s.unwritten {
		i := lost
		i.Code, i.Count, i.Message = reason, n, fmt.Sprintf("%d events could not become records", n)
		delete(s.unwritten, reason)
		s.decide(ctx, &i, nil)
	}
	s.reportKernelLoss(ctx, lost)
	s.reportMissed(ctx, lost)
	s.reportSuppressed(ctx, now, false)
	s.tellRoots(now, false)
	s.reportRepeats(ctx, now, false)
	s.limiter.Settle()
}

// reportRepeats makes known how many equal decisions were left out.
func (s *Sensor) reportRepeats(ctx context.Context, now time.Time, all bool) {
	for _, i := range s.repeats.due(now, all) {
		s.decide(ctx, &i, nil)
	}
}

// reportMissed reports runs of our programs that the kernel left out, which no
// counter of ours can see.
func (s *Sensor) reportMissed(ctx context.Context, i event.SelfInfo) {
	missed, err := s.kernel.missed()
	if err != nil || missed <= s.missed {
		return // statistics end with the detached programs
	}
	i.Count, s.missed = missed-s.missed, missed
	s.metrics.missed.Add(float64(i.Count))
	s.lost.Add(i.Count)
	i.Code, i.Message = "RECURSION", fmt.Sprintf("the kernel left out up to %d events, since the programs that see them were interrupted on their CPU", i.Count)
	s.decide(ctx, &i, nil)
	s.mark.missed = missed // not before: the mark must not be ahead of the record
}

// reportSuppressed reports what the kernel left out on purpose, once per window.
func (s *Sensor) reportSuppressed(ctx context.Context, now time.Time, end bool) {
	if shed := s.shed.Load(); shed != nil {
		s.left.shed = *shed
	}
	for _, i := range s.left.report(now, end) {
		s.decide(ctx, &i, nil)
	}
	if s.left.sum == 0 {
		for kind := range s.reported {
			s.mark.suppressed[kind] = s.reported[kind].Suppressed
		}
	}
}

// reportKernelLoss reports what the kernel had no ring space for, by kind, and
// takes note of what it left out on purpose.
func (s *Sensor) reportKernelLoss(ctx context.Context, i event.SelfInfo) {
	counters, err := s.kernel.counters()
	if err != nil {
		s.limiter.Log(ctx, zap.ErrorLevel, "counters", "read kernel loss counters", zap.Error(err))
		return
	}
	s.reportLoss(ctx, i, counters)
}

func (s *Sensor) reportLoss(ctx context.Context, i event.SelfInfo, counters [event.Kinds]KindCounter) {
	i.ByKind = map[string]uint64{}
	for k := range counters {
		if event.Kind(k) == event.Heartbeat {
			continue // no event; Stuck says what became of it
		}
		if d := counters[k].Lost - s.reported[k].Lost; d != 0 {
			i.ByKind[event.Kind(k).String()] = d
			i.Count += d
			s.metrics.lost[k].Add(float64(d))
		}
		if d := counters[k].Suppressed - s.reported[k].Suppressed; d != 0 {
			s.left.add(event.Kind(k), d)
			s.metrics.suppressed[k].Add(float64(d))
		}
	}
	s.reported = counters
	if i.Count == 0 {
		return
	}
	s.lost.Add(i.Count)
	i.Code, i.Message = "RINGBUF_FULL", fmt.Sprintf("the kernel had no room for %d events", i.Count)
	s.decide(ctx, &i, nil)
	for kind := range counters {
		s.mark.lost[kind] = counters[kind].Lost
	}
}

// reportGap names the time in which no sensor watched: with rings of its own, a
// new process knows nothing of what happened since the last durable mark.
func (s *Sensor) reportGap(ctx context.Context) {
	m, err := s.taken.mark, s.taken.markErr
	if m == nil && err == nil {
		if len(s.o.Kept) == 0 {
			return // the first start
		}
		err = errors.New("the buffer says nothing of it")
	}
	i := event.SelfInfo{Activity: event.ActivityLost, Severity: 3, Failed: true, To: time.Now(), Attrs: map[string]any{"why": s.taken.why}}
	switch {
	case err != nil:
		i.Code, i.Message = "BLIND_UNKNOWN", "when the sensor last ran is unknown: "+err.Error()
	case m.bootID != s.mark.bootID:
		i.Code, i.Message, i.From = "BLIND_REBOOT", "the host was rebooted; events between the last record and this start were not seen", time.Unix(0, m.wall)
	case m.clean:
		i.Code, i.Message, i.From = "BLIND_STOPPED", "the sensor was stopped; events between its stop and this start were not seen", time.Unix(0, m.wall)
	default:
		i.Code, i.Message, i.From = "BLIND_KILLED", "the sensor ended without a stop; events between its last durable record and this start were not seen or not kept", time.Unix(0, m.wall)
	}
	s.Notify(ctx, i)
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

// Stats is a snapshot of the kernel side, for people.
type Stats struct {
	Events map[string]uint64 `json:"events"` // attempts to report, by event code, since the programs were loaded
	Lost   map[string]uint64 `json:"lost"`   // those the ring had no room for
	// Left out on purpose, and not among the events: too many of one process, or excluded.
	Suppressed map[string]uint64 `json:"suppressed"`
	Rings      map[string]Ring   `json:"rings"`
	Beat       time.Time         `json:"beat"` // when the worker last finished a turn
}

// Ring is how full a ring is, in bytes; what is read but not yet durable counts.
type Ring struct {
	Used uint64 `json:"used"`
	Size uint64 `json:"size"`
}

// Stats may be called at any time before Close, from any goroutine.
func (s *Sensor) Stats() (Stats, error) {
	counters, err := s.kernel.counters()
	if err != nil {
		return Stats{}, fmt.Errorf("read kernel counters: %w", err)
	}
	st := Stats{Events: map[string]uint64{}, Lost: map[string]uint64{}, Suppressed: map[string]uint64{}, Beat: s.Beat(), Rings: map[string]Ring{
		"priority": {s.priority.used(), uint64(s.priority.size())},
		"bulk":     {s.bulk.used(), uint64(s.bulk.size())},
	}}
	for k := event.None + 1; k < event.Heartbeat; k++ {
		st.Events[k.String()], st.Lost[k.String()] = counters[k].Attempts, counters[k].Lost
		if n := counters[k].Suppressed; n > 0 {
			st.Suppressed[k.String()] = n
		}
	}
	return st, nil
}
