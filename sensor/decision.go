// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf"
)

// Notify makes a decision known: at once as a log line, which has what ctx binds,
// and with the worker's next turn as a record. Safe for concurrent use; it never
// blocks. Equal decisions beyond a few in a minute are counted, and the count is
// made known when the minute is over. What does not fit into the queue is counted
// and reported with the next one.
func (s *Sensor) Notify(ctx context.Context, i event.SelfInfo) {
	if !s.repeats.admit(&i, time.Now()) {
		return
	}
	say(ctx, &i)
	s.mu.Lock()
	if len(s.notices) < maxNotices {
		s.notices = append(s.notices, i)
	} else {
		s.overflow++
	}
	s.mu.Unlock()
	s.wait.wake()
}

// decide is Notify for the worker: the record is written now, and names are the
// losses that it reports.
func (s *Sensor) decide(ctx context.Context, i *event.SelfInfo, names []event.Loss) {
	say(ctx, i)
	s.writeSelf(ctx, i, names)
}

// say writes the log line of a decision. Only those call it that write its record to the
// stream, so that the two cannot disagree.
func say(ctx context.Context, i *event.SelfInfo) {
	level := zapcore.InfoLevel
	switch {
	case i.Severity >= 4:
		level = zapcore.ErrorLevel
	case i.Severity >= 2:
		level = zapcore.WarnLevel
	}
	fields := []zap.Field{zap.String(logging.KeyCode, i.Code), zap.String(logging.KeyReason, i.Message)}
	for _, f := range [][2]string{{"before", i.Before}, {"after", i.After}} {
		if f[1] != "" {
			fields = append(fields, zap.String(f[0], f[1]))
		}
	}
	var ids []zap.Field // replace those that are bound
	for _, f := range [][2]string{
		{logging.KeyCaseID, i.CaseID}, {logging.KeyInvestigationID, i.InvestigationID}, {logging.KeyUserID, i.UserID},
	} {
		if f[1] != "" {
			ids = append(ids, zap.String(f[0], f[1]))
		}
	}
	if len(ids) > 0 {
		ctx = logging.With(ctx, ids...)
	}
	if i.Count > 0 {
		fields = append(fields, zap.Uint64(logging.KeyCount, i.Count))
	}
	if !i.From.IsZero() {
		fields = append(fields, zap.Time("from", i.From))
	}
	if !i.To.IsZero() {
		fields = append(fields, zap.Time("to", i.To))
	}
	if len(i.ByKind) > 0 {
		fields = append(fields, zap.Any("by_kind", i.ByKind))
	}
	if len(i.Losses) > 0 {
		fields = append(fields, zap.Any("ranges", i.Losses))
	}
	if len(i.Attrs) > 0 {
		fields = append(fields, zap.Any("evidence", i.Attrs))
	}
	logging.From(ctx).Log(level, "decided", fields...)
}

// How many equal decisions are made known in a window, and how many kinds of them
// are told apart.
const (
	repeatMost   = 5
	repeatWindow = time.Minute
	repeatKeys   = 256
)

// repeats bounds the decisions that say the same again and again, such as those of
// a mode that flaps. Safe for concurrent use.
type repeats struct {
	mu   sync.Mutex
	keys map[string]*repeat
}

// repeat is one window of equal decisions.
type repeat struct {
	since   time.Time
	count   int
	dropped int
	last    event.SelfInfo
	lastAt  time.Time
}

// admit reports whether i is to be made known now. A decision of an operator always
// is, and so are those that frame a run.
func (r *repeats) admit(i *event.SelfInfo, now time.Time) bool {
	if i.Stream == event.DecisionsApprovals || i.Activity == event.ActivityStart || i.Activity == event.ActivityStop {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	key := strings.Join([]string{i.Code, i.Before, i.After, i.CaseID}, "\x00")
	w := r.keys[key]
	if w == nil && len(r.keys) >= repeatKeys {
		key = i.Code // from a closed set
		w = r.keys[key]
	}
	if w == nil {
		if r.keys == nil {
			r.keys = map[string]*repeat{}
		}
		w = &repeat{since: now}
		r.keys[key] = w
	}
	if w.count++; w.count <= repeatMost {
		return true
	}
	w.dropped++
	w.last, w.lastAt = *i, now
	return false
}

// due ends the windows that are over, or all of them, and returns a decision for
// each in which some were left out: the last of them, with their number.
func (r *repeats) due(now time.Time, all bool) (out []event.SelfInfo) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, w := range r.keys {
		if !all && now.Sub(w.since) < repeatWindow {
			continue
		}
		delete(r.keys, key)
		if w.dropped == 0 {
			continue
		}
		i := w.last
		i.Attrs = maps.Clone(i.Attrs)
		if i.Attrs == nil {
			i.Attrs = map[string]any{}
		}
		i.Attrs["repeated"], i.Attrs["repeated_since"] = w.dropped, w.since.UTC().Format(time.RFC3339Nano)
		i.Message += fmt.Sprintf(" (the last of %d like it that were left out since %s)", w.dropped, w.since.UTC().Format(time.TimeOnly))
		out = append(out, i)
	}
	return out
}

// maxTold is how many of the newest decisions can be written again.
const maxTold = 256

// told remembers the newest decisions by their seq. When the buffer has to drop its
// oldest records, those go first that tell how it came to that, and an auditor has
// nothing but the decisions; so what is lost of them is written again.
type told []telling

type telling struct {
	seq  uint64
	at   int64 // when it was decided, ns since the Unix epoch
	info event.SelfInfo
}

func (t *told) add(d telling) {
	if len(*t) == maxTold {
		*t = slices.Delete(*t, 0, 1)
	}
	*t = append(*t, d)
}

// lost takes out what one of the losses covers, and returns it. A loss of unknown seqs,
// which starts at 0, covers nothing.
func (t *told) lost(losses []event.Loss) (out []telling) {
	*t = slices.DeleteFunc(*t, func(d telling) bool {
		gone := slices.ContainsFunc(losses, func(l event.Loss) bool { return l.First > 0 && l.First <= d.seq && d.seq <= l.Last })
		if gone {
			out = append(out, d)
		}
		return gone
	})
	return out
}

// Recall has the worker remember a decision of an earlier run that is in the buffer
// still, by its record. Safe for concurrent use; rec may change afterwards.
func (s *Sensor) Recall(seq uint64, rec []byte) error {
	i, at, err := ocsf.Recall(rec)
	if err != nil || len(i.Losses) > 0 {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recalled.add(telling{seq, at, i})
	return nil
}

// takeRecalled puts what was recalled before what this run has decided.
func (s *Sensor) takeRecalled() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.recalled) == 0 {
		return
	}
	s.told = append(s.told, s.recalled...)
	s.recalled = nil
	slices.SortFunc(s.told, func(a, b telling) int { return cmp.Compare(a.seq, b.seq) })
	s.told = slices.Delete(s.told, 0, max(0, len(s.told)-maxTold))
}

// tellAgain writes the decisions again that are lost, in their order, with the time at
// which they were made and the seq that they had first. Their lines are in the log
// already. One that was dropped in doubt does not wait for the doubt to end, for which
// this run may not live long enough; the server may have it twice then.
func (s *Sensor) tellAgain(ctx context.Context) {
	s.takeRecalled()
	for _, d := range s.told.lost(append(s.losses, s.o.Sink.Dropped())) {
		if d.info.Attrs["restated_seq"] == nil {
			attrs := maps.Clone(d.info.Attrs)
			if attrs == nil {
				attrs = map[string]any{}
			}
			attrs["restated_seq"] = d.seq
			d.info.Attrs = attrs
		}
		s.writeSelfAt(ctx, time.Now().UnixNano(), d.at, &d.info, nil)
	}
}
