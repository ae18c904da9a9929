// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
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
	stuck             string   // the stage that does not move, if any
	bufferError       string
	truncated         uint64 // records, ever
	kernelLost        uint64 // events, this run
	delivering        bool
	transportReason   string
}

// How long a loss keeps its mode after the last one was seen.
const lossHold = 10 * time.Second

// modeState is one decision.
type modeState struct {
	Mode   Mode
	Reason string
	Since  time.Time
}

// modeMachine turns facts into the mode. It is owned by one goroutine;
// current may be read by any.
type modeMachine struct {
	current   atomic.Pointer[modeState]
	gauges    map[Mode]prometheus.Gauge
	changes   prometheus.Counter
	truncated uint64
	lost      uint64
	truncAt   time.Time
	lostAt    time.Time
}

func newModeMachine(reg prometheus.Registerer, truncated uint64, now time.Time) *modeMachine {
	f := promauto.With(reg)
	vec := f.NewGaugeVec(prometheus.GaugeOpts{Name: "agent_mode", Help: "1 for the mode the sensor is in, 0 for the others. If it is 1 for truncating or degraded, evidence is or may be lost: /readyz says what and why."}, []string{"mode"})
	m := &modeMachine{
		gauges:    map[Mode]prometheus.Gauge{},
		changes:   f.NewCounter(prometheus.CounterOpts{Name: "agent_mode_changes_total", Help: "Changes of the mode; each is also a log line and a record on the decisions stream. If it grows again and again, something comes and goes: read MODE on the decisions stream."}),
		truncated: truncated,
	}
	for _, mode := range modes() {
		m.gauges[mode] = vec.WithLabelValues(string(mode))
	}
	m.set(modeState{Mode: Starting, Reason: "the sensor was started", Since: now})
	return m
}

func (m *modeMachine) set(s modeState) {
	for mode, g := range m.gauges {
		g.Set(0)
		if mode == s.Mode {
			g.Set(1)
		}
	}
	m.current.Store(&s)
}

// step decides the mode. It returns the state before and whether the mode is
// another one now; a new reason alone is kept but is no change.
func (m *modeMachine) step(f facts, now time.Time) (before modeState, changed bool) {
	before = *m.current.Load()
	next := before
	next.Mode, next.Reason = m.decide(f, now)
	if changed = next.Mode != before.Mode; changed {
		next.Since = now
		m.changes.Inc()
	}
	m.set(next)
	return before, changed
}

func (m *modeMachine) decide(f facts, now time.Time) (Mode, string) {
	if f.truncated > m.truncated {
		m.truncated, m.truncAt = f.truncated, now
	}
	if f.kernelLost > m.lost {
		m.lost, m.lostAt = f.kernelLost, now
	}
	switch {
	case f.stopping:
		return Stopping, "the sensor was asked to stop"
	case !f.started:
		return Starting, "programs are being attached and Redis is being connected"
	case !m.truncAt.IsZero() && now.Sub(m.truncAt) < lossHold:
		return Truncating, fmt.Sprintf("the buffer is full and drops its oldest records: %d in all (buffer_truncations_total)", f.truncated)
	case f.bufferError != "":
		return Degraded, "the buffer cannot write: " + f.bufferError + " (buffer_errors_total)"
	case f.stuck != "":
		return Degraded, "stage " + f.stuck + " does not move"
	case !m.lostAt.IsZero() && now.Sub(m.lostAt) < lossHold:
		return Degraded, fmt.Sprintf("the kernel had no room for %d events in all (sensor_lost_events_total)", f.kernelLost)
	case len(f.missing) > 0:
		return Degraded, fmt.Sprintf("no hook for %v (sensor_hook_attached)", f.missing)
	case !f.delivering:
		return Buffering, f.transportReason
	}
	return Online, "all events are seen, kept and delivered"
}
