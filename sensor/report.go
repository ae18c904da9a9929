// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

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
	if err != nil {
		return // statistics end with the detached programs
	}
	if missed > s.missed {
		s.tellMissed(ctx, i, missed-s.missed)
	}
	// Less than before where programs are gone, with what they counted. Not sooner: the
	// mark must not be ahead of the record.
	s.missed, s.mark.missed = missed, missed
}

func (s *Sensor) tellMissed(ctx context.Context, i event.SelfInfo, n uint64) {
	s.metrics.missed.Add(float64(n))
	s.lost.Add(n)
	i.Code, i.Count, i.Message = "RECURSION", n, fmt.Sprintf("the kernel left out up to %d events, since the programs that see them were interrupted on their CPU", n)
	s.decide(ctx, &i, nil)
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
