// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/logging"
)

// CauseRefused is the cause of a record given to [Queue.SetAside].
const CauseRefused = "refused"

// A server, or what stands before it, that does not take a request for its size or its
// content mostly says nothing and resets the connection. A batch that is broken off again
// and again, while the server answers all else, is halved, down to one record; when that
// alone does not pass, and others of its kind do, it is set aside. Any other failure in
// between starts over: a network that breaks everything must never come so far.
const (
	breaksToHalve = 3
	latesToHalve  = 2 // batches that are not answered in time: nothing is set aside for these
	// Each break of a single record follows a hello that was answered, those from the fourth
	// on a control, too. A network that resets at random all but hellos, half of it, which is
	// the worst, does that to one record in 5e8; one that resets hellos, or less, to far fewer.
	breaksToRefuse = 16
	// So many records refused in a row, with none taken, are no matter of the records.
	maxRefusals = 8
	// As large as most records.
	controlBytes = 1 << 10
)

// breaks are the requests for one batch that were broken off, and what follows from them.
type breaks struct {
	first uint64    // seq of the batch
	count int       // in a row
	limit int       // records a call may have; 0: as many as fit
	late  int       // batches in a row that were not answered in time
	slow  int       // records a call may have so that it is; 0: as many as fit
	since time.Time // when limit or slow was set
	row   int       // records refused since one was taken
	calm  bool      // a control was broken off, too: no hurry until something is taken
	stuck bool      // a record is refused, and cannot be set aside
}

// most is how many records the next call may have.
func (b *breaks) most(limit int) int {
	for _, l := range []int{b.limit, b.slow} {
		if l > 0 {
			limit = min(l, limit)
		}
	}
	return limit
}

// alone reports whether the record was broken off alone so often that it needs a control.
func (b *breaks) alone(recs []buffer.Record) bool {
	return len(recs) == 1 && b.first == recs[0].Seq && b.count >= breaksToHalve
}

// hurry reports whether the search for what does not pass should go on soon. It is short,
// and the server answers.
func (b *breaks) hurry() bool { return !b.calm && !b.stuck && (b.limit > 0 || b.count > 1) }

// forget starts over. How much a slow link carries is not forgotten: there, connects fail, too.
func (b *breaks) forget() { b.first, b.count, b.limit, b.stuck = 0, 0, 0, false }

// taken notes that the server took a batch of n records. Where the whole of a request was
// too large, or too slow, the next ones would be: the limit is lifted step by step, that of
// a slow link only when twice as much leaves time to spare.
func (b *breaks) taken(o *Options, n int, took time.Duration) {
	b.first, b.count, b.late, b.row, b.calm, b.stuck = 0, 0, 0, 0, false, false
	lift := func(limit *int) {
		if *limit > 0 && time.Since(b.since) > o.HealthyAfter {
			if *limit, b.since = 2**limit, time.Now(); *limit >= o.BatchRecords {
				*limit = 0
			}
		}
	}
	lift(&b.limit)
	if n >= b.slow && took < o.Timeout/4 {
		lift(&b.slow)
	}
}

// timedOut notes that a batch of n records was not answered in time. A link that is too slow
// for it is too slow for it each time; one record has to wait for a better link.
func (b *breaks) timedOut(n int) {
	if b.late++; b.late >= latesToHalve && n > 1 {
		b.late, b.slow, b.since = 0, n/2, time.Now()
	}
}

// errSetAside is that of a batch which needs no further attempt.
var errSetAside = errors.New("set aside")

// broken takes note of the error that ended the call for recs.
func (s *Sender) broken(ctx context.Context, recs []buffer.Record, err error) error {
	b := &s.breaks
	if c := classify(err); ctx.Err() != nil || c != ClassNetwork && c != ClassOversize {
		if b.forget(); c == ClassTimeout && ctx.Err() == nil {
			b.timedOut(len(recs))
		}
		return err
	}
	if b.first != recs[0].Seq {
		b.first, b.count = recs[0].Seq, 0
	}
	if b.count++; b.count < breaksToHalve {
		return err
	}
	size := 0
	for i := range recs {
		size += len(recs[i].Data)
	}
	err = fmt.Errorf("broken off %d times in a row, with %d bytes, while the server answers others: %w", b.count, size, err)
	switch {
	case len(recs) > 1:
		b.limit, b.since, b.count = len(recs)/2, time.Now(), 0
	case b.count >= breaksToRefuse:
		err = s.refuse(ctx, &recs[0], err)
	}
	return &classError{ClassOversize, err}
}

// control asks for what is like a record and what no server stores, for it follows itself:
// that the script calls it malformed says that others of its kind arrive.
func (s *Sender) control(ctx context.Context, rec *buffer.Record) error {
	filler := buffer.Record{Seq: rec.Seq, Stream: rec.Stream, Data: make([]byte, controlBytes)}
	for i := range filler.Data {
		filler.Data[i] = 'a' + byte(rand.N(26))
	}
	text, err := s.conn.call(ctx, s.batch.write(s.session, rec.Seq, []buffer.Record{filler}))
	switch re, said := errors.AsType[redis.Error](err); {
	case said && strings.HasPrefix(re.Error(), "EDRCALL "):
		return nil
	case err == nil:
		err = badReply(text)
	}
	s.breaks.forget()
	s.breaks.calm = true
	return err
}

// refuse sets a record aside, if it can be, and returns the error that says so.
func (s *Sender) refuse(ctx context.Context, rec *buffer.Record, cause error) error {
	b := &s.breaks
	if b.stuck = true; b.row >= maxRefusals {
		return fmt.Errorf("%w; %d records before it were set aside, and none was taken since", cause, b.row)
	}
	path, err := s.q.SetAside(*rec, CauseRefused)
	if err != nil {
		return fmt.Errorf("%w; %w", cause, err)
	}
	b.forget()
	b.row++
	s.aside = s.q.GivenUp()
	s.m.refused.Inc()
	hint := ClassOversize.policy().hint
	logging.From(ctx).Error("redis does not take a record, set aside and counted as lost", zap.Uint64(logging.KeySeq, rec.Seq),
		zap.Int("bytes", len(rec.Data)), zap.String("path", path), zap.Error(cause), zap.String(logging.KeyRemedy, hint))
	st := *s.state.Load()
	st.Refusals++
	st.Refused = Refused{rec.Seq, len(rec.Data), path, cause.Error(), hint}
	s.set(&st)
	return fmt.Errorf("record %d %w as %s: %w", rec.Seq, errSetAside, path, cause)
}

// from is pos, or the last of the records set aside that follow it.
func (s *Sender) from(pos uint64) uint64 {
	for slices.Contains(s.aside, pos+1) {
		pos++
	}
	return pos
}

// untilAside returns how many of recs come before one that was set aside.
func (s *Sender) untilAside(recs []buffer.Record) int {
	if len(s.aside) == 0 {
		return len(recs)
	}
	n := slices.IndexFunc(recs, func(r buffer.Record) bool { return slices.Contains(s.aside, r.Seq) })
	if n < 0 {
		n = len(recs)
	}
	return n
}
