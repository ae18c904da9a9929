// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync/atomic"
	"time"

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
	// went back further than the queue remembers. Of the range, the queue knows what
	// is named as lost already, and what the records in it had named. The next Read
	// returns only when that is durable.
	Forfeit(first, last uint64, cause string)
	// SetAside gives up a record that Read has returned, as Forfeit does, and keeps a
	// copy of it somewhere else. Without a copy nothing is given up.
	SetAside(rec buffer.Record, cause string) (path string, err error)
	// GivenUp returns the seqs of those that can still be read.
	GivenUp() []uint64
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
	pace    pace
	limiter *logging.Limiter
	finder  *finder
	slot    int       // of the agent's keys
	node    string    // the server dialled last
	lost    time.Time // when delivery broke off
	meta    bool      // the fleet's keys are ours, see checkMeta

	process string // our part of the session, the rest is the connection's number
	session string
	dials   uint16
	hello   bool               // our session has been installed once
	conn    *conn              // nil while not connected
	ready   bool               // conn may deliver: connect is through
	secret  *[sha256.Size]byte // of the password that was accepted last; nil: none was
	back    backoff
	failed  int  // failures since the last success, of any class
	told    bool // a line said that nothing is delivered, and none that it is again

	pos      uint64 // the server has everything up to here
	replied  uint64 // highest pos ever
	acked    uint64 // what the queue was told: as o.Ack demands
	sent     uint64 // highest seq the server can have from us
	flight   span   // the batch in flight or in doubt, and its stream
	stream   buffer.Stream
	holes    []span   // accounted for as lost since the server last went back, disjoint, newest last
	aside    []uint64 // records that were set aside
	breaks   breaks
	detours  int       // verdicts other than OK in a row
	fencedAt time.Time // the last renewal
	flapping bool      // no more of them

	doubt bool // the last failure was that of a write: a hello does not clear it

	recs, peek []buffer.Record
	tended     time.Time       // when tend is due
	refused    map[string]bool // what the user may not ask, see ask
	syncer     *syncer         // with AckFsync, while connected
	short1st   time.Time       // since when no replica confirms; zero: one does

	refusedSecret [sha256.Size]byte // of a password that the server did not take

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
	b, err := newBatch(&o, q.Epoch())
	if err != nil {
		return nil, err
	}
	bounds := q.Bounds()
	s := &Sender{
		o:       o,
		q:       q,
		m:       newMetrics(o.Registerer),
		batch:   b,
		pace:    pace{least: o.Linger, most: o.LingerLimit},
		limiter: logging.NewLimiter(time.Minute),
		told:    true,
		process: newProcess(""),
		back:    backoff{first: o.FirstReconnect, base: o.BackoffBase, cap: o.BackoffCap, healthy: o.HealthyAfter},
		pos:     bounds.Acked,
		replied: bounds.Acked,
		acked:   bounds.Acked,
		refused: make(map[string]bool),
		sent:    bounds.Last,
		aside:   q.GivenUp(),
		recs:    make([]buffer.Record, 0, o.BatchRecords),
		peek:    make([]buffer.Record, 0, 1),
	}
	s.finder = newFinder(&s.o)
	s.slot = slot("{" + o.Shard + "}")
	s.lost = time.Now()
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
	if st := *s.state.Load(); st.Phase == Connecting {
		st.Since = time.Now() // attaching programs can take seconds after New
		s.state.Store(&st)
	}
	for ctx.Err() == nil {
		err := s.serve(ctx, 0)
		if ctx.Err() != nil {
			break
		}
		if qe, broken := errors.AsType[*queueError](err); broken {
			return qe
		}
		if f, is := errors.AsType[*fencedError](err); is && s.renew(ctx, f.Fencing) {
			continue
		}
		s.pause(ctx, s.fail(ctx, err))
	}
	return nil
}

// Drain delivers what is durable now and returns when the server has it, when ctx
// ends, or at the first failure: the rest stays in the queue for the next start,
// and a stop does not wait for a server that is away. Where nothing is left, as far as the
// server has said, that it cannot be asked again is no error. Call it after Run.
func (s *Sender) Drain(ctx context.Context) error {
	until := s.q.Bounds().Last
	if until == 0 {
		return nil // nothing was ever appended
	}
	if err := s.serve(ctx, until); err != nil {
		if ctx.Err() == nil {
			s.fail(ctx, err)
		}
		_, ours := errors.AsType[*queueError](err)
		if left := until - min(s.reached(), until); left > 0 || ours {
			return fmt.Errorf("drain: %d records not delivered: %w", left, err)
		}
	}
	return nil
}

// Close drops the connection. Call it last.
func (s *Sender) Close() {
	s.disconnect()
	s.finder.close()
	s.m.connected.Set(0)
	s.limiter.Flush()
}

// serve connects if needed and delivers until an error; with until > 0 it stops
// when the server has that seq, and does not wait for batches to fill.
func (s *Sender) serve(ctx context.Context, until uint64) error {
	if !s.ready {
		if err := s.connect(ctx); err != nil {
			s.breaks.forget()
			if s.finder.conn != nil {
				err = fmt.Errorf("%s, told by %s: %w", s.node, s.finder.from, err)
			}
			// A server that loads its data can be asked again on this connection. Another
			// one would cost it a handshake, from each sensor of the fleet.
			if classify(err) != ClassLoading || s.finder.moves() {
				s.disconnect()
			}
			return err
		}
	}
	for until == 0 || s.reached() < until {
		s.limiter.Settle()
		recs, err := s.next(ctx, until == 0)
		switch {
		case err != nil:
			return err // the connection is fine
		case len(recs) == 0:
			err = s.probe(ctx, flagProbe)
		default:
			err = s.send(ctx, recs)
			s.doubt = err != nil && !errors.Is(err, errSetAside)
		}
		if err == nil {
			err = s.settle(ctx)
		}
		if err == nil && time.Now().After(s.tended) {
			err = s.tend(ctx)
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

// reached is how far the server has everything that the queue can give it. After a rewind
// that is less than it had confirmed.
func (s *Sender) reached() uint64 {
	return min(s.from(s.acked), max(s.from(s.pos), s.q.Bounds().First-1))
}

// connect dials, unless there is a connection, and learns from the server what it has.
func (s *Sender) connect(ctx context.Context) error {
	if epoch := s.q.Epoch(); epoch != s.batch.head[1] {
		// A renewal that a stop kept from being answered: our numbers are not the queue's.
		return &queueError{fmt.Errorf("it is in epoch %s, expected %s", epoch, s.batch.head[1])}
	}
	if s.conn == nil {
		addr, err := s.finder.find(ctx, s.slot)
		if err != nil {
			return fmt.Errorf("find the server: %w", err)
		}
		s.node = addr
		if s.conn, err = dial(ctx, &s.o, addr, login{s.o.Username, s.o.PasswordFile}, s.o.DB); err != nil {
			return err
		}
		s.dials++
	}
	// Each connection has its own session: a request that is still under way on
	// an older one cannot be applied after the server has said where it is. Only
	// the first one takes the session from whoever had it; later a process that
	// has replaced us keeps it.
	flag := flagContinue
	if !s.hello {
		flag = flagHello
		if err := s.look(ctx); err != nil {
			return fmt.Errorf("look: %w", err)
		}
		s.introduce(ctx)
	}
	if err := s.probe(ctx, flag); err != nil {
		if !s.conn.net.spoke && classify(err) == ClassNetwork {
			return fmt.Errorf("closed before a first reply, does the port expect TLS? %w", err)
		}
		return fmt.Errorf("hello: %w", err)
	}
	s.rotate()
	if err := s.checkMeta(ctx); err != nil {
		return fmt.Errorf("check the fleet's keys: %w", err)
	}
	s.finder.settled()
	if s.o.Ack == AckFsync {
		if err := s.startSyncer(ctx); err != nil {
			return fmt.Errorf("confirm: %w", err)
		}
	}
	if err := s.settle(ctx); err != nil {
		return err
	}
	if err := s.tend(ctx); err != nil {
		return err
	}
	s.ready = true
	if !s.doubt {
		s.recover(ctx)
	}
	return nil
}

func (s *Sender) disconnect() {
	if s.syncer != nil {
		s.syncer.stop()
		s.syncer = nil
	}
	if s.conn != nil {
		s.conn.close()
		s.conn, s.ready = nil, false
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
