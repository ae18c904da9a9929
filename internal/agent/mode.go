// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// Mode is what the sensor as a whole is doing. Exactly one holds at a time.
type Mode string

// The modes, from the start on. Truncating is worse than degraded, which is
// worse than buffering: the worst that holds is the mode.
const (
	Starting   Mode = "starting"   // not everything is in place yet
	Online     Mode = "online"     // events are seen, kept and delivered
	Buffering  Mode = "buffering"  // events are seen and kept; Redis does not take them
	Degraded   Mode = "degraded"   // something the sensor should see or keep is missing
	Truncating Mode = "truncating" // the buffer is full: the oldest records are dropped
	Stopping   Mode = "stopping"
)

func modes() []Mode { return []Mode{Starting, Online, Buffering, Degraded, Truncating, Stopping} }

// facts are what a mode is decided on, all of one moment.
type facts struct {
	started, stopping bool
	missing           []string // events without a hook
	stuck             string   // the stage that does not move, if any, and how that shows
	restart           bool     // a new start may cure it
	bufferError       string
	truncated         uint64 // records, ever
	corrupt           uint64 // records, ever
	kernelLost        uint64 // events, this run
	discarded         uint64 // events that could not become records, this run
	delivering        bool
	transportReason   string
	unserved          string // why http.listen is not, if it should be
}

// How long a loss keeps its mode after the last one was seen.
const lossHold = 10 * time.Second

// Problem is one thing that is not as it should be.
type Problem struct {
	Mode   Mode   `json:"mode"` // that it leads to
	Reason string `json:"reason"`
	Metric string `json:"metric,omitempty"` // that shows it
	Ready  bool   `json:"ready"`            // events are seen and kept nevertheless
}

func (p Problem) String() string {
	if p.Metric == "" {
		return p.Reason
	}
	return p.Reason + " (" + p.Metric + ")"
}

// modeState is one decision.
type modeState struct {
	Mode     Mode
	Reason   string
	Since    time.Time
	Problems []Problem // worst first; the first one made the mode
}

// ready says whether all that the host does is seen and kept, delivered or not. What
// this host cannot show from the start on does not count: it is no loss that
// anybody could end, and the coverage tells it.
func (s *modeState) ready() bool {
	return !slices.ContainsFunc(s.Problems, func(p Problem) bool { return !p.Ready })
}

// loss watches a counter of losses.
type loss struct {
	total uint64
	at    time.Time // when it was last seen to grow
}

// recent notes the counter's value and says whether it grew within lossHold.
func (l *loss) recent(total uint64, now time.Time) bool {
	if total > l.total {
		l.total, l.at = total, now
	}
	return !l.at.IsZero() && now.Sub(l.at) < lossHold
}

// modeMachine turns facts into the mode. One goroutine at a time has it step (see
// [Agent.stepMode]); current may be read by any.
type modeMachine struct {
	current atomic.Pointer[modeState]
	gauges  map[Mode]prometheus.Gauge
	ready   prometheus.Gauge
	stuck   prometheus.Gauge
	changes prometheus.Counter

	truncated, corrupt, kernelLost, discarded loss

	started bool
	absent  []string // events that had no hook when the sensor had started
}

// newModeMachine takes the losses of earlier runs, which do not count.
func newModeMachine(reg prometheus.Registerer, earlier facts, now time.Time) *modeMachine {
	f := promauto.With(reg)
	vec := f.NewGaugeVec(prometheus.GaugeOpts{Name: "agent_mode", Help: "1 for the mode the sensor is in, 0 for the others. If it is 1 for truncating or degraded, evidence is or may be lost: /readyz says what and why."}, []string{"mode"})
	m := &modeMachine{
		gauges: map[Mode]prometheus.Gauge{},
		ready: f.NewGauge(prometheus.GaugeOpts{
			Name: "agent_ready",
			Help: "1 while /readyz answers ready: events are seen and kept, delivered or not. If it is 0, evidence is being lost or a stage is stuck: /readyz names each reason and its metric.",
		}),
		stuck: f.NewGauge(prometheus.GaugeOpts{
			Name: "agent_stuck",
			Help: "1 while a stage of the sensor does not move, by heartbeats that it sends through the kernel. If it is 1, /readyz names the stage and how that shows: a disk that does not answer (buffer_commit_seconds), a host without CPU, a hook that is gone; systemd restarts the sensor when that may cure it.",
		}),
		changes: f.NewCounter(prometheus.CounterOpts{
			Name: "agent_mode_changes_total",
			Help: "Changes of the mode; each is also a log line and a record on the decisions stream. If it grows again and again, something comes and goes: read MODE on the decisions stream.",
		}),
		truncated: loss{total: earlier.truncated},
		corrupt:   loss{total: earlier.corrupt},
	}
	for _, mode := range modes() {
		m.gauges[mode] = vec.WithLabelValues(string(mode))
	}
	m.set(modeState{Mode: Starting, Reason: "the sensor was started", Since: now, Problems: []Problem{{Mode: Starting, Reason: "the sensor was started"}}})
	return m
}

func (m *modeMachine) set(s modeState) {
	for mode, g := range m.gauges {
		g.Set(0)
		if mode == s.Mode {
			g.Set(1)
		}
	}
	m.ready.Set(0)
	if s.ready() {
		m.ready.Set(1)
	}
	m.current.Store(&s)
}

// step decides the mode. It returns the state before and whether the mode is
// another one now; a new reason alone is kept but is no change. Stopping is the last:
// facts may have been read before the stop was asked for.
func (m *modeMachine) step(f facts, now time.Time) (before modeState, changed bool) {
	before = *m.current.Load()
	if before.Mode == Stopping {
		return before, false
	}
	next := modeState{Mode: Online, Reason: "all events are seen, kept and delivered", Since: before.Since, Problems: m.problems(f, now)}
	if len(next.Problems) > 0 {
		next.Mode, next.Reason = next.Problems[0].Mode, next.Problems[0].String()
	}
	if changed = next.Mode != before.Mode; changed {
		next.Since = now
		m.changes.Inc()
	}
	m.stuck.Set(0)
	if f.stuck != "" {
		m.stuck.Set(1)
	}
	m.set(next)
	return before, changed
}

// problems lists what is not as it should be, worst first.
func (m *modeMachine) problems(f facts, now time.Time) (list []Problem) {
	add := func(holds bool, p Problem) {
		if holds {
			list = append(list, p)
		}
	}
	if f.started && !m.started {
		m.started, m.absent = true, f.missing
	}
	var lost, absent []string
	for _, e := range f.missing {
		if slices.Contains(m.absent, e) {
			absent = append(absent, e)
		} else {
			lost = append(lost, e)
		}
	}
	add(f.stopping, Problem{Mode: Stopping, Reason: "the sensor was asked to stop"})
	add(!f.started && !f.stopping, Problem{Mode: Starting, Reason: "programs are being attached and Redis is being connected"})
	add(m.truncated.recent(f.truncated, now), Problem{
		Mode: Truncating, Metric: "buffer_truncations_total",
		Reason: fmt.Sprintf("the buffer is full and drops its oldest records: %d in all", f.truncated),
	})
	add(f.bufferError != "", Problem{Mode: Degraded, Metric: "buffer_errors_total", Reason: "the buffer cannot write: " + f.bufferError})
	add(f.stuck != "", Problem{Mode: Degraded, Metric: "agent_stuck", Reason: "stuck at stage " + f.stuck})
	add(m.kernelLost.recent(f.kernelLost, now), Problem{
		Mode: Degraded, Metric: "sensor_lost_events_total, sensor_missed_runs_total",
		Reason: fmt.Sprintf("the kernel lost %d events in all", f.kernelLost),
	})
	add(m.discarded.recent(f.discarded, now), Problem{
		Mode: Degraded, Metric: "sensor_decode_errors_total, sensor_rejected_events_total",
		Reason: fmt.Sprintf("%d events in all could not become records", f.discarded),
	})
	add(m.corrupt.recent(f.corrupt, now), Problem{
		Mode: Degraded, Metric: "buffer_corrupt_records_total",
		Reason: fmt.Sprintf("%d records in all were damaged on disk", f.corrupt),
	})
	add(len(lost) > 0, Problem{Mode: Degraded, Metric: "sensor_hook_attached", Reason: fmt.Sprintf("the hook for %v is gone", lost)})
	add(len(absent) > 0, Problem{Mode: Degraded, Metric: "sensor_hook_attached", Reason: fmt.Sprintf("no hook for %v", absent), Ready: true})
	add(!f.delivering && !f.stopping, Problem{Mode: Buffering, Metric: "transport_connected", Reason: f.transportReason, Ready: true})
	// No other mode: nothing is lost by it, and delivery does not need it.
	add(f.unserved != "" && !f.stopping, Problem{Mode: Online, Reason: "http.listen is not served: " + f.unserved, Ready: true})
	return list
}
