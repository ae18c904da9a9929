// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/enrich"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// caseRequest is a set of open cases on its way to the worker.
type caseRequest struct {
	open    []*event.Case
	covered chan []int // takes the answer without waiting
}

// SetCases makes list, oldest first and at most event.MaxCases long, the open cases:
// every event from the worker's next turn on that one of them covers carries its ids.
// The channel then gets how many running processes each covers; nothing when a later
// call came first, or the worker has ended. Safe for concurrent use; the list and
// what it points to must not be changed afterwards.
func (s *Sensor) SetCases(list []*event.Case) <-chan []int {
	r := &caseRequest{list, make(chan []int, 1)}
	s.cases.Store(r)
	s.wait.wake()
	return r.covered
}

// applyCases is the worker's part of SetCases. Without a request it is one load.
func (s *Sensor) applyCases() {
	if s.cases.Load() == nil {
		return
	}
	r := s.cases.Swap(nil)
	s.open = r.open
	r.covered <- s.o.Enricher.SetCases(r.open, s.kernel.deepen)
}

// seedCases looks for what the cases of an earlier run cover when all processes are
// known: a snapshot shows them in any order, children before their parents, too.
func (s *Sensor) seedCases() {
	if len(s.open) > 0 {
		s.o.Enricher.SetCases(s.open, s.kernel.deepen)
	}
	for pid := range s.kernel.deepBefore {
		s.kernel.deepen(pid, enrich.DeepOff) // its case was closed while no sensor ran
	}
}

// rootsEvery is how often what cases need in the next run is told: a process whose
// parent ended since the last time is lost to a case when the sensor is killed.
const rootsEvery = 5 * time.Second

// tellRoots tells what the open cases need in the next run.
func (s *Sensor) tellRoots(now time.Time, end bool) {
	if s.o.CaseRoots == nil || len(s.open) == 0 || !end && now.Sub(s.rooted) < rootsEvery {
		return
	}
	s.rooted = now
	if roots := s.o.Enricher.CaseRoots(); roots != nil {
		s.o.CaseRoots(roots)
	}
}

// countTagged counts a record for the cases whose ids it carries.
func (s *Sensor) countTagged(ev *event.Event) {
	if len(ev.Cases) == 0 {
		return
	}
	s.metrics.tagged.Inc()
	for _, c := range ev.Cases {
		c.Tagged.Add(1)
	}
}

// inCases binds the ids of the oldest case that covers an event, for lines about it.
func inCases(ctx context.Context, ev *event.Event) context.Context {
	if len(ev.Cases) == 0 {
		return ctx
	}
	c := ev.Cases[0]
	for key, value := range map[string]string{logging.KeyCaseID: c.ID, logging.KeyInvestigationID: c.InvestigationID, logging.KeyUserID: c.UserID} {
		if value != "" {
			ctx = logging.With(ctx, zap.String(key, value))
		}
	}
	return ctx
}

// deepen has the kernel lift or restore its limits for a running process. Where the
// map is full the limits hold, which the counters of what was suppressed show.
func (k *kernel) deepen(pid uint32, d enrich.Deep) {
	delete(k.deepBefore, pid)
	if d == enrich.DeepOff {
		_ = k.maps["deep_pids"].Delete(pid) // an exit took it out already
		return
	}
	_ = k.maps["deep_pids"].Put(pid, uint8(d))
}
