// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf"
)

// fullSink refuses every record for ever, or none.
type fullSink struct{ err error }

func (s *fullSink) Next() uint64                          { return 1 }
func (s *fullSink) Begin() []byte                         { return nil }
func (s *fullSink) BeginDecision(event.Decisions) []byte  { return nil }
func (s *fullSink) End([]byte, bool, []event.Loss) error  { return s.err }
func (s *fullSink) Size() int                             { return 0 }
func (s *fullSink) Flush(context.Context, []byte) error   { return nil }
func (s *fullSink) Unnamed(dst []event.Loss) []event.Loss { return dst }
func (s *fullSink) Dropped() event.Loss                   { return event.Loss{} }

// newWorker is a Sensor without a kernel.
func newWorker(reg prometheus.Registerer, sink Sink) *Sensor {
	return &Sensor{
		in:        &rings{},
		o:         Options{Sink: sink, Encoder: ocsf.New(event.Host{}, event.Agent{ID: "a"})},
		metrics:   newMetrics(reg),
		unwritten: map[string]uint64{},
		limiter:   logging.NewLimiter(linesEvery),
	}
}

// TestWhatCannotBecomeARecordIsCounted puts a record into a ring that no program
// of ours writes, and an event into a sink that takes none.
func TestWhatCannotBecomeARecordIsCounted(t *testing.T) {
	ctx := logging.Into(t.Context(), zap.NewNop())
	reg := prometheus.NewPedanticRegistry()
	sink := &fullSink{}
	s := newWorker(reg, sink)
	before := metricstest.Gather(t, reg)

	m := newMemoryRing(4096)
	m.put([]byte("what is this?"), 0)
	n, bad, err := s.read(ctx, m.open(t), ^uint64(0), 0, pollRecords)
	if n != 0 || bad != 1 || err != nil {
		t.Errorf("%d events, %d none, %v", n, bad, err)
	}
	sink.err = errors.New("too large")
	s.write(ctx, 0, &event.Event{Kind: event.Exit}, false, nil)
	if s.Discarded() != 1 || s.unwritten["TOO_LARGE"] != 1 {
		t.Errorf("%d discarded, %v to report", s.Discarded(), s.unwritten)
	}

	sink.err = nil
	s.write(ctx, 0, &event.Event{Kind: event.Exit, Cases: []*event.Case{{ID: "C-1"}}}, false, nil)
	metricstest.Moved(t, before, metricstest.Gather(t, reg),
		"sensor_decode_errors_total", "sensor_rejected_events_total", "sensor_case_events_total")
}

// flushSink notes what was in the batch of each Flush.
type flushSink struct {
	fullSink
	batch   []string
	flushed [][]string
}

func (s *flushSink) End(rec []byte, _ bool, _ []event.Loss) error {
	if s.err != nil {
		return s.err
	}
	s.batch = append(s.batch, string(rec))
	return nil
}

func (s *flushSink) Flush(context.Context, []byte) error {
	s.flushed, s.batch, s.err = append(s.flushed, s.batch), nil, nil
	return nil
}

// TestWhatCannotBecomeARecordIsNamedWithTheMark: the mark of a batch covers it, so a process
// that is killed behind that batch must not be the only one to know.
func TestWhatCannotBecomeARecordIsNamedWithTheMark(t *testing.T) {
	ctx := logging.Into(t.Context(), zap.NewNop())
	sink := &flushSink{}
	s := newWorker(prometheus.NewPedanticRegistry(), sink)
	s.discard("UNDECODABLE", 3)
	if err := s.flush(ctx, false); err != nil {
		t.Fatal(err)
	}
	// And where a decision finds the batch full, without taking its place.
	s.writeSelf(ctx, &event.SelfInfo{Code: "START"}, nil)
	s.discard("TOO_LARGE", 1)
	sink.err = ErrFull
	s.writeSelf(ctx, &event.SelfInfo{Code: "MODE"}, nil)
	if err := s.flush(ctx, false); err != nil {
		t.Fatal(err)
	}
	var got [][]string
	for _, batch := range sink.flushed {
		var codes []string
		for _, rec := range batch {
			var d struct {
				Code  string `json:"status_code"`
				Count int    `json:"count"`
			}
			if err := json.Unmarshal([]byte(rec), &d); err != nil {
				t.Fatalf("%v: %s", err, rec)
			}
			codes = append(codes, fmt.Sprint(d.Code, " ", d.Count))
		}
		got = append(got, codes)
	}
	if diff := cmp.Diff([][]string{{"UNDECODABLE 3"}, {"START 0"}, {"TOO_LARGE 1"}, {"MODE 0"}}, got); diff != "" {
		t.Errorf("records by batch (-want +got):\n%s", diff)
	}
}

func TestCoverageIsAMetric(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	m := newMetrics(reg)
	m.covered(Coverage{Event: "net.close", Hook: "tp_btf/inet_sock_set_state"})
	before := metricstest.Gather(t, reg)
	m.covered(Coverage{Event: "net.close"})
	metricstest.Moved(t, before, metricstest.Gather(t, reg), "sensor_hook_attached")
}
