// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	logtest "go.uber.org/zap/zaptest/observer"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

func observed(t *testing.T) (context.Context, *logtest.ObservedLogs) {
	t.Helper()
	core, logs := logtest.New(zapcore.DebugLevel)
	return logging.Into(t.Context(), zap.New(core)), logs
}

// TestDecisionIsSaidWhole compares the line with the decision: nothing that is
// evidence may be in one and not in the other.
func TestDecisionIsSaidWhole(t *testing.T) {
	ctx, logs := observed(t)
	ctx = logging.With(ctx, zap.String(logging.KeyAgentID, "a"), zap.String(logging.KeyCaseID, "of the run"))
	from, to := time.Unix(10, 0).UTC(), time.Unix(20, 0).UTC()
	say(ctx, &event.SelfInfo{
		Severity: 3, Code: "X", Message: "why", Before: "a", After: "b", Count: 7, From: from, To: to,
		ByKind: map[string]uint64{"process.exec": 7}, Losses: []event.Loss{{Cause: "truncated", First: 1, Last: 7, Count: 7}},
		Attrs: map[string]any{"n": 1}, CaseID: "C", InvestigationID: "I", UserID: "U",
	})
	say(ctx, &event.SelfInfo{Code: "Y", Message: "all else is empty"})
	say(ctx, &event.SelfInfo{Code: "Z", Severity: 4})
	var got []map[string]any
	for _, e := range logs.All() {
		m := e.ContextMap()
		m["level"] = e.Level.String()
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var plain map[string]any
		if err := json.Unmarshal(b, &plain); err != nil {
			t.Fatal(err)
		}
		got = append(got, plain)
	}
	want := []map[string]any{
		{
			"level": "warn", "agent_id": "a", "case_id": "C", "investigation_id": "I", "user_id": "U", "code": "X", "reason": "why", "before": "a", "after": "b",
			"count": 7.0, "from": "1970-01-01T00:00:10Z", "to": "1970-01-01T00:00:20Z", "by_kind": map[string]any{"process.exec": 7.0},
			"ranges":   []any{map[string]any{"cause": "truncated", "first": 1.0, "last": 7.0, "count": 7.0}},
			"evidence": map[string]any{"n": 1.0},
		},
		{"level": "info", "agent_id": "a", "case_id": "of the run", "code": "Y", "reason": "all else is empty"},
		{"level": "error", "agent_id": "a", "case_id": "of the run", "code": "Z", "reason": ""},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("lines (-want +got):\n%s", d)
	}
}

func TestRepeatedDecisionsAreBounded(t *testing.T) {
	start := time.Date(2026, 11, 23, 15, 0, 0, 0, time.UTC)
	var r repeats
	known := map[string]int{}
	offer := func(i event.SelfInfo, at time.Duration) {
		if r.admit(&i, start.Add(at)) {
			known[i.Code+" "+i.After]++
		}
	}
	for n := range 100 { // a mode that flaps
		at := time.Duration(n) * 100 * time.Millisecond
		offer(event.SelfInfo{Code: "MODE", Before: "online", After: "buffering", Message: fmt.Sprint(n)}, at)
		offer(event.SelfInfo{Code: "MODE", Before: "buffering", After: "online"}, at)
		offer(event.SelfInfo{Stream: event.DecisionsApprovals, Code: "CASE_OPENED"}, at)
	}
	offer(event.SelfInfo{Code: "REWIND"}, 0)
	if d := cmp.Diff(map[string]int{"MODE buffering": repeatMost, "MODE online": repeatMost, "CASE_OPENED ": 100, "REWIND ": 1}, known); d != "" {
		t.Errorf("made known (-want +got):\n%s", d)
	}
	if due := r.due(start.Add(repeatWindow-1), false); len(due) > 0 {
		t.Errorf("before the window is over: %+v", due)
	}
	due := r.due(start.Add(repeatWindow), false)
	slices.SortFunc(due, func(a, b event.SelfInfo) int { return len(a.After) - len(b.After) })
	const since = "2026-11-23T15:00:00Z"
	want := []event.SelfInfo{
		{Code: "MODE", Before: "buffering", After: "online", Message: " (the last of 95 like it that were left out since 15:00:00)", Attrs: map[string]any{"repeated": 95, "repeated_since": since}},
		{Code: "MODE", Before: "online", After: "buffering", Message: "99 (the last of 95 like it that were left out since 15:00:00)", Attrs: map[string]any{"repeated": 95, "repeated_since": since}},
	}
	if d := cmp.Diff(want, due); d != "" {
		t.Errorf("due (-want +got):\n%s", d)
	}
	if len(r.keys) > 0 {
		t.Errorf("%d windows are kept", len(r.keys))
	}
	// No number of different decisions takes more memory.
	for n := range 10 * repeatKeys {
		r.admit(&event.SelfInfo{Code: "CODE", After: fmt.Sprint(n)}, start)
	}
	if len(r.keys) != repeatKeys+1 {
		t.Errorf("%d windows for %d different decisions, want %d", len(r.keys), 10*repeatKeys, repeatKeys+1)
	}
	if due := r.due(start, true); len(due) != 1 || due[0].Attrs["repeated"] != 9*repeatKeys-repeatMost {
		t.Errorf("due %+v of %v", due, slices.Collect(maps.Keys(r.keys)))
	}
}

// numberedSink takes everything, and loses what it is told to.
type numberedSink struct {
	fullSink
	n    uint64
	recs []string
	lost []event.Loss
	gone event.Loss
}

func (s *numberedSink) Dropped() event.Loss { return s.gone }

func (s *numberedSink) Next() uint64 { return s.n + 1 }

func (s *numberedSink) End(rec []byte, _ bool, names []event.Loss) error {
	s.n++
	s.recs = append(s.recs, string(rec))
	if len(names) > 0 {
		s.lost = nil
	}
	return nil
}

func (s *numberedSink) Unnamed(dst []event.Loss) []event.Loss { return append(dst, s.lost...) }

// TestLostDecisionsAreWrittenAgain loses decisions once and again: each comes back
// with its own time and its first seq, in order, and what names losses does not.
func TestLostDecisionsAreWrittenAgain(t *testing.T) {
	ctx, logs := observed(t)
	sink := &numberedSink{}
	s := newWorker(prometheus.NewPedanticRegistry(), sink)
	for n := range 4 {
		s.decide(ctx, &event.SelfInfo{Activity: event.ActivityMode, Code: "MODE", After: fmt.Sprint("mode ", n+1), Attrs: map[string]any{"n": n}}, nil)
	}
	times := map[string]int64{}
	tell := func(losses ...event.Loss) (out []string) {
		t.Helper()
		first := s.o.Sink.Next()
		sink.lost = losses
		if s.losses = s.o.Sink.Unnamed(s.losses[:0]); len(s.losses) > 0 {
			s.decide(ctx, &event.SelfInfo{Activity: event.ActivityLost, Code: "RECORDS_LOST", Losses: s.losses}, s.losses)
		}
		s.tellAgain(ctx)
		for n, rec := range sink.recs {
			var r struct {
				Time int64
				Code string `json:"status_code"`
				Self struct {
					Sensor struct {
						After string
						Seq   uint64 `json:"restated_seq"`
					}
				} `json:"unmapped"`
			}
			if err := json.Unmarshal([]byte(rec), &r); err != nil {
				t.Fatal(err)
			}
			if mode := r.Self.Sensor.After; mode != "" {
				if at, known := times[mode]; known && at != r.Time {
					t.Errorf("%s was decided at %d, and then at %d", mode, at, r.Time)
				}
				times[mode] = r.Time
			}
			if n >= int(first)-1 {
				out = append(out, fmt.Sprint(r.Code, " ", r.Self.Sensor.After, " ", r.Self.Sensor.Seq))
			}
		}
		return out
	}
	if d := cmp.Diff([]string{"RECORDS_LOST  0", "MODE mode 2 2", "MODE mode 3 3"}, tell(event.Loss{Cause: "truncated", First: 2, Last: 3, Count: 2})); d != "" {
		t.Errorf("lost once (-want +got):\n%s", d)
	}
	// The names of the first loss are gone, too: those are the buffer's to remember.
	if d := cmp.Diff([]string{"RECORDS_LOST  0", "MODE mode 4 4", "MODE mode 2 2"}, tell(event.Loss{First: 4, Last: 6, Count: 3})); d != "" {
		t.Errorf("lost again (-want +got):\n%s", d)
	}
	// Of an earlier epoch, of an unknown number.
	if d := cmp.Diff([]string{"RECORDS_LOST  0"}, tell(event.Loss{Cause: "corrupt"})); d != "" {
		t.Errorf("of another run (-want +got):\n%s", d)
	}
	// The next run has only the records.
	next := newWorker(prometheus.NewPedanticRegistry(), sink)
	for n, rec := range sink.recs {
		if err := next.Recall(uint64(n)+1, []byte(rec)); err != nil {
			t.Error(err)
		}
	}
	next.decide(ctx, &event.SelfInfo{Code: "START"}, nil)
	s = next
	if d := cmp.Diff([]string{"RECORDS_LOST  0", "MODE mode 3 3", "MODE mode 4 4", "START  12"}, tell(event.Loss{First: 7, Last: 9, Count: 3}, event.Loss{First: 12, Last: 12, Count: 1})); d != "" {
		t.Errorf("after a restart (-want +got):\n%s", d)
	}
	// No loss yet, as it may have been received.
	sink.gone = event.Loss{First: 10, Last: 14}
	if d := cmp.Diff([]string{"MODE mode 2 2", "MODE mode 3 3"}, tell()); d != "" {
		t.Errorf("dropped in doubt (-want +got):\n%s", d)
	}
	if got := tell(); got != nil {
		t.Errorf("dropped in doubt and known: %v", got)
	}
	if n := logs.FilterField(zap.String(logging.KeyCode, "MODE")).Len(); n != 4 {
		t.Errorf("%d lines of 4 decisions", n)
	}
	for range 2 * maxTold {
		s.decide(ctx, &event.SelfInfo{Code: "MODE"}, nil)
	}
	if len(s.told) != maxTold {
		t.Errorf("%d are remembered, want %d", len(s.told), maxTold)
	}
}
