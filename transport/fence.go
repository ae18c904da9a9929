// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/aurorasoc/edr-sensor/internal/logging"
)

// Fencing says how the server answered that somebody else has written as this agent.
type Fencing struct {
	// Epoch is the newest the server knows of, to be exceeded.
	Epoch string
	// Cloned: the other one has this queue's epoch or followed it, and may live. If
	// not, it is this queue that went back: it was wiped, copied or restored.
	Cloned bool
	// Cause is for people.
	Cause string
}

// fencedError is the refusal that a [Fencing] is about.
type fencedError struct{ Fencing }

func (e *fencedError) Error() string { return e.Cause }

// flapTime is how far apart two fencings have to be. Closer ones come from twins
// that take the agent from each other, which only a person can end.
const flapTime = 10 * time.Minute

// fencing builds the error for a server that knows another writer.
func fencing(epoch string, cloned bool, format string, args ...any) error {
	return &classError{ClassFenced, &fencedError{Fencing{epoch, cloned, fmt.Sprintf(format, args...)}}}
}

// renew goes on under the identity that the owner of the queue gives us after a
// fencing, and reports whether there is one. A second fencing soon after the first
// ends that.
func (s *Sender) renew(ctx context.Context, f Fencing) bool {
	if s.o.Renew == nil || s.flapping {
		return false
	}
	if !s.fencedAt.IsZero() && time.Since(s.fencedAt) < flapTime {
		s.flapping = true
		logging.From(ctx).Error("fenced twice, stopped", zap.String(logging.KeyReason, f.Cause), zap.Time("before", s.fencedAt))
		return false
	}
	s.fencedAt = time.Now()
	before, epoch := s.o.AgentID, s.q.Epoch()
	agent, err := s.o.Renew(ctx, f)
	if err != nil {
		s.limiter.Log(ctx, zapcore.ErrorLevel, "renew", "no new epoch after being fenced", zap.Error(err))
		s.fencedAt = time.Time{}
		return false
	}
	s.o.AgentID = agent
	s.o.place()
	b, err := newBatch(&s.o, s.q.Epoch())
	if err != nil {
		s.limiter.Log(ctx, zapcore.ErrorLevel, "renew", "no new epoch after being fenced", zap.Error(err))
		return false
	}
	s.batch, s.slot = b, slot("{"+s.o.Shard+"}")
	bounds := s.q.Bounds()
	s.pos, s.acked, s.replied, s.sent = bounds.Acked, bounds.Acked, bounds.Acked, bounds.Last
	s.lastAcked.Store(s.acked)
	s.hello, s.doubt, s.holes, s.aside, s.flight, s.detours = false, false, nil, nil, span{}, 0
	s.breaks.forget()
	s.process = newProcess("")
	s.m.renewals.Inc()
	logging.From(ctx).Warn("fenced, going on in a new epoch", zap.String(logging.KeyReason, f.Cause),
		zap.String("agent_before", before), zap.String("agent_after", agent), zap.String("epoch_before", epoch), zap.String("epoch_after", s.q.Epoch()))
	return true
}

// introduce makes the owner remember our process before the server gets to know it.
// If that fails, a next start may take what this one delivers for another's and begin
// an epoch: records come twice then, which is better than not at all.
func (s *Sender) introduce(ctx context.Context) {
	if s.o.Remember == nil || slices.Contains(s.o.Processes, s.process) {
		return
	}
	s.o.Processes = append(s.o.Processes, s.process)
	if n := len(s.o.Processes) - maxProcesses; n > 0 {
		s.o.Processes = slices.Delete(s.o.Processes, 0, n)
	}
	if err := s.o.Remember(slices.Clone(s.o.Processes)); err != nil {
		s.limiter.Log(ctx, zapcore.ErrorLevel, "remember", "this process is not remembered as one that delivered", zap.Error(err))
	}
}

// maxProcesses is how many are remembered: those that may have failed in a row
// between being remembered and being known to the server.
const maxProcesses = 32

// look asks who has the agent before a hello takes it. A process of which we know
// nothing, in our own epoch, has a copy of our queue: what the server has is then not
// ours, although its numbers are, and taking the session would fence the other one too.
func (s *Sender) look(ctx context.Context) error {
	if len(s.o.Processes) == 0 {
		return nil
	}
	s.session = fmt.Sprintf("%s%04x", s.process, s.dials)
	r, err := s.call(ctx, flagProbe, s.batch.probe(s.session, flagProbe))
	if err != nil {
		return err
	}
	if r.verdict != fenced || r.epoch != s.q.Epoch() || slices.Contains(append(s.o.Processes, s.process), r.session[:processLen]) {
		return nil
	}
	return fencing(r.epoch, true, "session %s, which is none of ours, delivers in epoch %s: the queue was copied", r.session, r.epoch)
}
