// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"fmt"
	"time"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const (
	// suppressedEvery is how often what the kernel left out on purpose is reported.
	// Under a flood that is all the time, so once a second would be a flood of its own.
	suppressedEvery = 10 * time.Second
	// suppressedQuiet is how long nothing must have been left out for the episode to end.
	suppressedQuiet = time.Minute
)

// suppressed sums up what the kernel left out: by kind over a window, and over an
// episode, which lasts as long as anything is left out now and then.
type suppressed struct {
	from  time.Time // of the window
	count [event.Kinds]uint64
	sum   uint64

	shed        string    // by what the limit is lower than configured
	since, last time.Time // of the episode; since is zero when there is none
	total       uint64
}

func (s *suppressed) add(k event.Kind, n uint64) {
	s.count[k] += n
	s.sum += n
}

// report returns what is to be made known: that an episode begins, what was left out
// in a window that is over, or that has to end now, and that an episode has ended.
func (s *suppressed) report(now time.Time, end bool) (out []event.SelfInfo) {
	if s.sum > 0 && s.since.IsZero() {
		s.since, s.total = now, 0
		out = append(out, event.SelfInfo{
			Stream: event.DecisionsAgents, Name: "Suppression Started", Severity: 1, Code: "SUPPRESSION_STARTED", Before: "complete", After: "suppressing",
			Message: "file events are left out, as sensor.file says",
		})
	}
	if end || now.Sub(s.from) >= suppressedEvery {
		out = append(out, s.window(now)...)
	}
	if !s.since.IsZero() && (end || s.sum == 0 && now.Sub(s.last) >= suppressedQuiet) {
		out = append(out, event.SelfInfo{
			Stream: event.DecisionsAgents, Name: "Suppression Ended", Severity: 1, Code: "SUPPRESSION_ENDED", Before: "suppressing", After: "complete",
			From: s.since, To: s.last, Attrs: map[string]any{"events": s.total},
			Message: fmt.Sprintf("%d file events were left out in all", s.total),
		})
		s.since = time.Time{}
	}
	return out
}

// window ends the window.
func (s *suppressed) window(now time.Time) []event.SelfInfo {
	from, count, sum := s.from, s.count, s.sum
	s.from, s.count, s.sum = now, [event.Kinds]uint64{}, 0
	if sum == 0 {
		return nil
	}
	s.last, s.total = now, s.total+sum
	i := event.SelfInfo{
		Stream: event.DecisionsAgents, Activity: event.ActivitySuppressed, Severity: 1, Code: "SUPPRESSED", Count: sum, From: from, To: now, ByKind: map[string]uint64{},
		Message: fmt.Sprintf("%d events were left out, as sensor.file says", sum),
	}
	if s.shed != "" {
		i.Message += ", and " + s.shed
		i.Attrs = map[string]any{"shed": s.shed}
	}
	for k, n := range count {
		if n > 0 {
			i.ByKind[event.Kind(k).String()] = n
		}
	}
	return []event.SelfInfo{i}
}
