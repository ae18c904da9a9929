// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/logging"
)

// Queue is what the Sender needs of the buffer. All methods but Bounds are
// called from the sending goroutine only.
type Queue interface {
	// Epoch names the life of the queue's sequence, 20 lower-case hex digits.
	Epoch() string
	// Read appends to dst up to maxRecords and, beyond the first record, about
	// maxBytes of the durable records after seq after, and waits while there is
	// none. Their Data is valid until the next Read. Reading again what an
	// earlier call returned says that it is not under way to the server.
	Read(ctx context.Context, after uint64, dst []buffer.Record, maxRecords, maxBytes int) ([]buffer.Record, error)
	// Ack says that the server has everything up to seq.
	Ack(seq uint64)
	// Bounds returns the oldest readable, the acknowledged and the last seq.
	Bounds() buffer.Bounds
	// Forfeit says that a range that had been acknowledged is lost: the server
	// went back further than the queue remembers. The next Read returns only
	// when that is durable.
	Forfeit(first, last uint64, cause string)
}

// CauseServerLoss is the cause of a range given to [Queue.Forfeit].
const CauseServerLoss = "server_loss"

// Sender delivers the records of a [Queue]. [Sender.Run] and [Sender.Drain] must
// not run at the same time; [Sender.State] is safe at any time.
type Sender struct {
	o       Options
	q       Queue
	m       *metrics
	batch   *batch
	limiter *logging.Limiter

	process string // our part of the session, the rest is the connection's number
	session string
	dials   uint16
	hello   bool               // our session has been installed once
	conn    *conn              // nil while not connected
	secret  *[sha256.Size]byte // of the password that was accepted last; nil: none was
	back    backoff
	failed  int  // failures since the last success, of any class
	told    bool // a line said that nothing is delivered, and none that it is again

	pos     uint64 // the server has everything up to here
	acked   uint64 // highest pos ever
	sent    uint64 // highest seq the server can have from us
	flight  span   // the batch in flight or in doubt, and its stream
	stream  buffer.Stream
	holes   []span // ranges that are accounted for as lost, disjoint, newest last
	detours int    // verdicts other than OK in a row
	doubt   bool   // the last failure was that of a write: a hello does not clear it

	recs, peek []buffer.Record
	warning    string
	asked      bool // evictionPolicy need not be asked again

	state     atomic.Pointer[State]
	lastAcked atomic.Uint64
	lastReply atomic.Int64 // Unix nanoseconds
}

// New returns a Sender for q. It connects to nothing and starts no goroutine.
func New(o Options, q Queue) (*Sender, error) {
	o.setDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	if !isHex(q.Epoch(), epochLen) {
		return nil, fmt.Errorf("epoch %q is not %d hex digits", q.Epoch(), epochLen)
	}
	bounds := q.Bounds()
	s := &Sender{
		o:       o,
		q:       q,
		m:       newMetrics(o.Registerer),
		batch:   newBatch(&o, q.Epoch()),
		limiter: logging.NewLimiter(time.Minute),
		told:    true,
		process: newProcess(""),
		back:    backoff{first: o.FirstReconnect, base: o.BackoffBase, cap: o.BackoffCap, healthy: o.HealthyAfter},
		pos:     bounds.Acked,
		acked:   bounds.Acked,
		sent:    bounds.Last,
		recs:    make([]buffer.Record, 0, o.BatchRecords),
		peek:    make([]buffer.Record, 0, 1),
	}
	s.lastAcked.Store(s.acked)
	s.state.Store(&State{Phase: Connecting, Since: time.Now(), Address: o.Addr})
	return s, nil
}

// State returns a snapshot.
func (s *Sender) State() State {
	st := *s.state.Load()
	st.Acked = s.lastAcked.Load()
	if t := s.lastReply.Load(); t != 0 {
		st.LastReply = time.Unix(0, t)
	}
	return st
}

// Run delivers until ctx ends and then returns nil, at most one Timeout later:
// a batch in flight gets its reply. It returns an error only when the queue
// cannot be read; no condition of the server or the network ends it.
func (s *Sender) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		err := s.serve(ctx, 0)
		if ctx.Err() != nil {
			break
		}
		if qe, broken := errors.AsType[*queueError](err); broken {
			return qe
		}
		sleep(ctx, s.fail(ctx, err))
	}
	return nil
}

// Drain delivers what is durable now and returns when the server has it, when ctx
// ends, or at the first failure: the rest stays in the queue for the next start,
// and a stop does not wait for a server that is away. Call it after Run.
func (s *Sender) Drain(ctx context.Context) error {
	until := s.q.Bounds().Last
	if err := s.serve(ctx, until); err != nil {
		if ctx.Err() == nil {
			s.fail(ctx, err)
		}
		return fmt.Errorf("drain: %d records not delivered: %w", until-min(s.pos, until), err)
	}
	return nil
}

// Close drops the connection. Call it last.
func (s *Sender) Close() {
	s.disconnect()
	s.m.connected.Set(0)
	s.limiter.Flush()
}

// serve connects if needed and delivers until an error; with until > 0 it stops
// when the server has that seq, and does not wait for batches to fill.
func (s *Sender) serve(ctx context.Context, until uint64) error {
	if s.conn == nil {
		if err := s.connect(ctx); err != nil {
			s.disconnect()
			return err
		}
	}
	for until == 0 || s.pos < until {
		s.limiter.Settle()
		recs, err := s.next(ctx, until == 0)
		switch {
		case err != nil:
			return err // the connection is fine
		case len(recs) == 0:
			err = s.probe(ctx, flagProbe)
		default:
			err = s.send(ctx, recs)
			s.doubt = err != nil
		}
		if err != nil {
			s.disconnect()
			return err
		}
		if s.state.Load().Phase != Connected {
			s.doubt = false
			s.recover(ctx)
		}
	}
	return nil
}

// connect dials and learns from the server what it has.
func (s *Sender) connect(ctx context.Context) error {
	c, err := dial(ctx, &s.o)
	if err != nil {
		return err
	}
	s.conn = c
	// Each connection has its own session: a request that is still under way on
	// an older one cannot be applied after the server has said where it is. Only
	// the first one takes the session from whoever had it; later a process that
	// has replaced us keeps it.
	s.dials++
	flag := flagContinue
	if !s.hello {
		flag = flagHello
	}
	if err := s.probe(ctx, flag); err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	s.rotate()
	if !s.asked {
		if err := s.inspect(ctx); err != nil {
			return fmt.Errorf("inspect: %w", err)
		}
	}
	if !s.doubt {
		s.recover(ctx)
	}
	return nil
}

// rotate takes note of the password that the server has just accepted.
func (s *Sender) rotate() {
	secret := s.conn.secret
	if s.secret != nil && *s.secret != secret {
		st := *s.state.Load()
		st.Rotations++
		s.set(&st)
	}
	s.secret = &secret
}

func (s *Sender) disconnect() {
	if s.conn != nil {
		s.conn.close()
		s.conn = nil
	}
}

// inspect looks for settings under which the server deletes events silently.
func (s *Sender) inspect(ctx context.Context) error {
	policy, known, err := s.conn.evictionPolicy(ctx)
	if err != nil {
		return err
	}
	s.asked = !known // each refusal is a line in the server's ACL log
	s.warning = ""
	s.m.eviction.Set(0)
	if strings.HasPrefix(policy, "allkeys-") {
		s.m.eviction.Set(1)
		s.warning = "maxmemory-policy is " + policy + ": a full server deletes whole streams without an error; set noeviction"
		s.limiter.Log(ctx, zapcore.WarnLevel, "eviction", "redis may delete events silently", zap.String(logging.KeyReason, s.warning))
	}
	return nil
}

// queueError is a failure of our own queue, not of the server.
type queueError struct{ err error }

func (e *queueError) Error() string { return "read buffer: " + e.err.Error() }
func (e *queueError) Unwrap() error { return e.err }

// next reads the records after pos: as many as fit one batch, or fewer when no
// more came within the linger time. Nothing means that it is time to probe.
func (s *Sender) next(ctx context.Context, linger bool) ([]buffer.Record, error) {
	recs, err := s.read(ctx, jitter(s.o.ProbeInterval), s.pos, s.recs[:0], s.o.BatchRecords, s.o.BatchBytes)
	if err != nil || !linger || !s.short(recs) {
		return recs, err
	}
	for deadline := time.Now().Add(s.o.Linger); s.short(recs); {
		more, err := s.read(ctx, time.Until(deadline), recs[len(recs)-1].Seq, s.peek[:0], 1, 1)
		if err != nil {
			return nil, err
		}
		// The look ahead has invalidated what was read before it.
		again, err := s.read(ctx, time.Minute, s.pos, s.recs[:0], s.o.BatchRecords, s.o.BatchBytes)
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

// send delivers recs in as many calls as they have streams and holes. After a
// verdict that moves pos elsewhere the rest is left to the next read.
func (s *Sender) send(ctx context.Context, recs []buffer.Record) error {
	defer s.batch.release()
	for len(recs) > 0 {
		n := cut(recs, s.o.BatchRecords)
		if first := recs[0].Seq; first > s.pos+1 && s.forfeit(ctx, span{s.pos + 1, first - 1}) {
			return nil // read again: the loss must be durable before we pass over it
		}
		s.flight, s.stream = span{recs[0].Seq, recs[n-1].Seq}, destination(recs[0].Stream)
		s.sent = max(s.sent, s.flight.last)
		start := time.Now()
		r, err := s.call(ctx, flagWrite, s.batch.write(s.session, s.pos, recs[:n]))
		if err != nil {
			s.m.failed.Inc()
			return fmt.Errorf("deliver %d-%d: %w", s.flight.first, s.flight.last, err)
		}
		s.m.seconds.Observe(time.Since(start).Seconds())
		s.m.batches[r.verdict].Inc()
		if l := logging.From(ctx).Check(zapcore.DebugLevel, "batch answered"); l != nil {
			l.Write(zap.Uint64(logging.KeyFirst, s.flight.first), zap.Uint64(logging.KeyLast, s.flight.last),
				zap.String("verdict", string(r.verdict)), zap.Duration(logging.KeyDuration, time.Since(start)))
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
		return &classError{ClassFenced, fmt.Errorf("fenced by epoch %s session %s, ours are %s and %s", r.epoch, r.session, s.q.Epoch(), s.session)}
	}
	if r.last > s.sent {
		return &classError{ClassFenced, fmt.Errorf("the server has seq %d of epoch %s, we sent at most %d: the queue was copied or restored", r.last, s.q.Epoch(), s.sent)}
	}
	if r.last < s.pos {
		s.m.rewinds.Inc()
		s.limiter.Log(ctx, zapcore.WarnLevel, "rewind", "server lost confirmed records, sending them again",
			zap.Uint64(logging.KeyFirst, r.last+1), zap.Uint64(logging.KeyLast, s.pos))
		st := *s.state.Load()
		st.Rewinds++
		st.Behind = Behind{r.last + 1, s.pos}
		s.set(&st)
	}
	if r.last > s.acked {
		s.count(s.acked+1, r.last)
		s.acked = r.last
		s.lastAcked.Store(r.last)
		s.q.Ack(r.last)
	}
	s.pos = r.last
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
// range be named twice, if the server loses it once more.
const maxHoles = 1024

// forfeit tells the queue which part of a hole had been delivered once and is
// now gone on both sides. What is above acked was dropped by the queue itself,
// which has accounted for it. It reports whether there was anything to tell.
func (s *Sender) forfeit(ctx context.Context, hole span) bool {
	lost := subtract(span{hole.first, min(hole.last, s.acked)}, s.holes)
	for _, gone := range lost {
		s.q.Forfeit(gone.first, gone.last, CauseServerLoss)
		s.limiter.Log(ctx, zapcore.ErrorLevel, "forfeit", "server lost records that the buffer no longer has",
			zap.Uint64(logging.KeyFirst, gone.first), zap.Uint64(logging.KeyLast, gone.last),
			zap.Uint64(logging.KeyCount, gone.len()))
	}
	s.holes = append(s.holes, subtract(hole, s.holes)...)
	if n := len(s.holes) - maxHoles; n > 0 {
		s.holes = slices.Delete(s.holes, 0, n)
	}
	return len(lost) > 0
}

// fail records a failure and returns how long to wait before the next attempt.
func (s *Sender) fail(ctx context.Context, err error) time.Duration {
	class := classify(err)
	p := class.policy()
	s.failed++
	if class == ClassServer && s.failed < 3 {
		p.phase = Retrying
	}
	s.m.errors[class].Inc()
	s.m.connected.Set(0)

	prev := s.state.Load()
	st := &State{Phase: p.phase, Since: prev.Since, Address: s.o.Addr, Class: class, Error: err.Error(), Hint: p.hint, Warning: s.warning, Rewinds: prev.Rewinds, Behind: prev.Behind, Rotations: prev.Rotations}
	var up time.Duration
	if prev.Phase != st.Phase {
		st.Since = time.Now()
	}
	if prev.Phase == Connected {
		up = max(time.Since(prev.Since), 1)
	}
	wait := s.back.next(up, p.slow)

	level := zapcore.WarnLevel
	if p.phase != Retrying {
		level = zapcore.ErrorLevel
	}
	if s.limiter.Log(ctx, level, string(p.phase)+string(class), "not delivering, events stay in the buffer",
		zap.String(logging.KeyCode, "NOT_DELIVERING"), zap.String(logging.KeyClass, string(class)), zap.Error(err), zap.String(logging.KeyRemedy, p.hint),
		zap.Int(logging.KeyAttempt, s.failed), zap.String(logging.KeyAddress, s.o.Addr)) {
		s.told = true
	}
	s.set(st)
	return wait
}

// recover records that delivery works again.
func (s *Sender) recover(ctx context.Context) {
	s.m.connected.Set(1)
	prev := s.state.Load()
	st := &State{Phase: Connected, Since: time.Now(), Address: s.o.Addr, Warning: s.warning, Rewinds: prev.Rewinds, Behind: prev.Behind, Rotations: prev.Rotations}
	if s.told {
		s.told = false
		logging.From(ctx).Info("delivering", zap.String(logging.KeyCode, "DELIVERING"),
			zap.String(logging.KeyAddress, s.o.Addr), zap.Uint64(logging.KeySeq, s.pos), zap.Int(logging.KeyAttempt, s.failed),
			zap.Duration(logging.KeyDuration, st.Since.Sub(prev.Since)))
	}
	s.failed = 0
	s.set(st)
}

func (s *Sender) set(st *State) {
	if old := s.state.Swap(st); old.differs(st) {
		s.o.OnChange(s.State())
	}
}

// newProcess returns the process's part of sessions, greater than that of prev:
// the time in milliseconds and 32 random bits, in hex.
func newProcess(prev string) string {
	ms := uint64(time.Now().UnixMilli())
	if prev != "" {
		if before, err := strconv.ParseUint(prev[:12], 16, 64); err == nil {
			ms = max(ms, before+1)
		}
	}
	return fmt.Sprintf("%012x%08x", ms&(1<<48-1), rand.Uint32())
}
