// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/aurorasoc/edr-sensor/internal/logging"
)

// Phase is what a [Sender] is doing.
type Phase string

// The phases. In all but Connected the buffer keeps what is not delivered.
const (
	Connecting Phase = "connecting" // not connected yet
	Connected  Phase = "connected"
	Retrying   Phase = "retrying" // a failure that usually passes by itself
	Held       Phase = "held"     // a failure that needs somebody; still tried now and then
	Fenced     Phase = "fenced"   // another process writes as this agent
)

// State is a snapshot of a [Sender].
type State struct {
	Phase   Phase
	Since   time.Time // when this phase began
	Address string    // as configured
	Node    string    // the server dialled last; empty: none yet
	// Class, Error and Hint describe the last failure, and are empty while
	// connected. Hint says what a person can do.
	Class Class
	Error string
	Hint  string
	// Risks are what would make the server lose events without telling anybody, or
	// soon take no more. Empty when nothing is known against it.
	Risks []Risk
	// Acked is the highest seq the server has confirmed, and LastReply when it
	// last answered (zero: never).
	Acked     uint64
	LastReply time.Time
	// Rewinds counts how often the server had less than it had confirmed, and Behind
	// is what it lacked the last time; zero before the first.
	Rewinds uint64
	Behind  Behind
	// Rotations counts the connects with another password than before.
	Rotations uint64
	// Refusals counts the records that were set aside because the server does not take
	// them, and Refused is the last one; zero before the first.
	Refusals uint64
	Refused  Refused
}

// Refused is a record that was set aside: where its copy is, what was seen, and what a
// person can do so that there are no more.
type Refused struct {
	Seq   uint64
	Bytes int
	Path  string
	Error string
	Hint  string
}

// Behind is a range of seqs, both ends included.
type Behind struct{ First, Last uint64 }

func (s *State) differs(o *State) bool {
	return s.Phase != o.Phase || s.Class != o.Class || !slices.EqualFunc(s.Risks, o.Risks, func(a, b Risk) bool { return a.Kind == b.Kind }) || s.Rewinds != o.Rewinds || s.Refusals != o.Refusals || s.Rotations != o.Rotations
}

// failoverTime is how long an outage may be a failover, for whose end attempts are
// made at least each second.
const failoverTime = 15 * time.Second

// fail records a failure and returns how long to wait before the next attempt.
func (s *Sender) fail(ctx context.Context, err error) time.Duration {
	class := classify(err)
	p := class.policy()
	s.failed++
	if class == ClassServer && s.failed < 3 || class == ClassOversize && !s.breaks.stuck {
		p.phase = Retrying
	}
	s.m.errors[class].Inc()
	s.m.connected.Set(0)

	prev := s.state.Load()
	st := *prev
	st.Phase, st.Node, st.Class, st.Error, st.Hint = p.phase, s.node, class, err.Error(), p.hint
	var up time.Duration
	if prev.Phase != st.Phase {
		st.Since = time.Now()
	}
	if prev.Phase == Connected {
		up = max(time.Since(prev.Since), 1)
	}
	if prev.Phase == Connected || prev.Phase == Connecting && s.failed == 1 {
		s.lost = time.Now()
	}
	wait := s.back.next(up, p.slow, torn(err))
	if s.finder.moves() {
		s.finder.moved(err, s.node)
		s.finder.failed = s.node
		if p.phase == Retrying && !p.slow && time.Since(s.lost) < failoverTime {
			wait = min(wait, rand.N(time.Second))
		}
	}
	if s.breaks.hurry() {
		wait = min(wait, rand.N(time.Second))
	}

	level := zapcore.WarnLevel
	if p.phase != Retrying {
		level = zapcore.ErrorLevel
	}
	if s.limiter.Log(ctx, level, string(p.phase)+string(class), "not delivering, events stay in the buffer",
		zap.String(logging.KeyCode, "NOT_DELIVERING"), zap.String(logging.KeyClass, string(class)), zap.Error(err), zap.String(logging.KeyRemedy, p.hint),
		zap.Int(logging.KeyAttempt, s.failed), zap.String(logging.KeyAddress, s.o.Addr)) {
		s.told = true
	}
	s.set(&st)
	return wait
}

// recover records that delivery works again.
func (s *Sender) recover(ctx context.Context) {
	s.m.connected.Set(1)
	prev := s.state.Load()
	st := *prev
	st.Phase, st.Since, st.Node, st.Class, st.Error, st.Hint = Connected, time.Now(), s.node, ClassNone, "", ""
	if s.told {
		s.told = false
		logging.From(ctx).Info("delivering", zap.String(logging.KeyCode, "DELIVERING"),
			zap.String(logging.KeyAddress, s.o.Addr), zap.Uint64(logging.KeySeq, s.pos), zap.Int(logging.KeyAttempt, s.failed),
			zap.Duration(logging.KeyDuration, st.Since.Sub(prev.Since)))
	}
	s.failed = 0
	s.set(&st)
}

func (s *Sender) set(st *State) {
	if old := s.state.Swap(st); old.differs(st) {
		s.o.OnChange(s.State())
	}
}
