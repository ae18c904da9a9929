// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/sensor"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

func TestModeIsTheWorstThatHolds(t *testing.T) {
	ok := facts{started: true, delivering: true, truncated: 7, corrupt: 3, transportReason: "away"}
	with := func(change func(*facts)) facts { f := ok; change(&f); return f }
	for _, tt := range []struct {
		name string
		f    facts
		want Mode
		why  string // in /readyz, with a metric; "" when all is well
		code int
	}{
		{"all well; losses of an earlier run do not count", ok, Online, "", 200},
		{"not attached", with(func(f *facts) { f.started = false }), Starting, "being attached", 503},
		{"redis away", with(func(f *facts) { f.delivering = false }), Buffering, "away (transport_connected)", 200},
		{"hook missing and redis away", with(func(f *facts) { f.missing = []string{"net.close"}; f.delivering = false }), Degraded, "no hook for [net.close] (sensor_hook_attached)\naway (transport_connected)", 200},
		{"kernel loss", with(func(f *facts) { f.kernelLost = 1 }), Degraded, "(sensor_lost_events_total, sensor_missed_runs_total)", 503},
		{"disk error", with(func(f *facts) { f.bufferError = "no space left on device" }), Degraded, "no space left on device (buffer_errors_total)", 503},
		{"stuck", with(func(f *facts) { f.stuck = "worker" }), Degraded, "stuck at stage worker (agent_stuck)", 503},
		{"discarded", with(func(f *facts) { f.discarded = 2 }), Degraded, "2 events in all could not become records (sensor_decode_errors_total, sensor_rejected_events_total)", 503},
		{"damaged on disk", with(func(f *facts) { f.corrupt = 9 }), Degraded, "damaged on disk (buffer_corrupt_records_total)", 503},
		{"damaged in an earlier run", with(func(f *facts) { f.corrupt = 3 }), Online, "", 200},
		{"truncating beats degraded", with(func(f *facts) { f.truncated = 8; f.kernelLost = 1 }), Truncating, "8 in all (buffer_truncations_total)\nthe kernel", 503},
		{"stopping beats all", with(func(f *facts) { f.truncated = 8; f.stopping = true }), Stopping, "asked to stop\nthe buffer is full", 503},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newModeMachine(prometheus.NewPedanticRegistry(), facts{truncated: 7, corrupt: 3}, time.Unix(0, 0))
			m.step(tt.f, time.Unix(1, 0))
			if got := m.current.Load().Mode; got != tt.want {
				t.Errorf("mode %s, want %s", got, tt.want)
			}
			for mode, g := range m.gauges {
				if want := map[bool]float64{true: 1}[mode == tt.want]; testutil.ToFloat64(g) != want {
					t.Errorf("agent_mode{mode=%q} is %v, want %v", mode, testutil.ToFloat64(g), want)
				}
			}
			code, body := readyz(t, m)
			if code != tt.code || !strings.Contains(body, tt.why) || tt.why == "" && strings.Count(body, "\n") != 1 {
				t.Errorf("/readyz: %d %q, want %d and %q", code, body, tt.code, tt.why)
			}
			if want := map[int]float64{200: 1}[code]; testutil.ToFloat64(m.ready) != want {
				t.Errorf("agent_ready is %v, /readyz %d", testutil.ToFloat64(m.ready), code)
			}
			if want := map[string]float64{"worker": 1}[tt.f.stuck]; testutil.ToFloat64(m.stuck) != want {
				t.Errorf("agent_stuck is %v", testutil.ToFloat64(m.stuck))
			}
		})
	}
}

// readyz asks as Prometheus' blackbox or a person does.
func readyz(t *testing.T, m *modeMachine) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	(&Agent{mode: m}).readyz(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/readyz", nil))
	return w.Code, w.Body.String()
}

// TestReadyRecovers follows a sensor through a bad hour: /readyz fails only while
// evidence is lost or something is stuck, and comes back by itself.
func TestReadyRecovers(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	m := newModeMachine(reg, facts{}, time.Unix(0, 0))
	if code, body := readyz(t, m); code != 503 {
		t.Errorf("before the first step: %d %s", code, body)
	}
	absent := []string{"file.move_mount"}
	f := facts{delivering: true, missing: absent}
	for _, step := range []struct {
		name   string
		at     int64
		change func()
		mode   Mode
		code   int
	}{
		{"starting", 1, func() {}, Starting, 503},
		{"started on a kernel without one hook", 2, func() { f.started = true }, Degraded, 200},
		{"redis away as well", 3, func() { f.delivering = false }, Degraded, 200},
		{"a hook is gone", 4, func() { f.missing = []string{"net.connect", "file.move_mount"} }, Degraded, 503},
		{"it is back", 5, func() { f.missing = absent }, Degraded, 200},
		{"the buffer overflows", 6, func() { f.truncated = 1 }, Truncating, 503},
		{"and on", 12, func() { f.truncated = 2 }, Truncating, 503},
		{"no more, but just now", 21, func() {}, Truncating, 503},
		{"no more", 22, func() {}, Degraded, 200},
		{"the worker hangs", 23, func() { f.stuck = "worker" }, Degraded, 503},
		{"and goes on", 24, func() { f.stuck = "" }, Degraded, 200},
		{"all is well", 25, func() { f.delivering, f.missing = true, nil }, Online, 200},
	} {
		step.change()
		before := metricstest.Gather(t, reg)
		m.step(f, time.Unix(step.at, 0))
		if step.name == "the worker hangs" {
			metricstest.Moved(t, before, metricstest.Gather(t, reg), "agent_stuck", "agent_ready")
		}
		code, body := readyz(t, m)
		if mode := m.current.Load().Mode; code != step.code || mode != step.mode {
			t.Errorf("%s: %s, %d %s; want %s, %d", step.name, mode, code, body, step.mode, step.code)
		}
	}
}

func TestModeKeepsALossForAWhile(t *testing.T) {
	m := newModeMachine(prometheus.NewPedanticRegistry(), facts{}, time.Unix(0, 0))
	f := facts{started: true, delivering: true, truncated: 1}
	for _, step := range []struct {
		at      int64
		want    Mode
		changed bool
	}{{1, Truncating, true}, {5, Truncating, false}, {11, Online, true}, {12, Online, false}} {
		if _, changed := m.step(f, time.Unix(step.at, 0)); changed != step.changed || m.current.Load().Mode != step.want {
			t.Errorf("at %d s: mode %s, changed %v; want %s, %v", step.at, m.current.Load().Mode, changed, step.want, step.changed)
		}
	}
	if got := testutil.ToFloat64(m.changes); got != 2 {
		t.Errorf("agent_mode_changes_total is %v, want 2", got)
	}
}

// TestStoppingIsTheLastMode, also when facts from before the stop come after it, as they do
// when the monitor is between reading and deciding while a signal arrives.
func TestStoppingIsTheLastMode(t *testing.T) {
	a := &Agent{mode: newModeMachine(prometheus.NewPedanticRegistry(), facts{}, time.Unix(0, 0))}
	var told []Mode
	for _, f := range []facts{{started: true, delivering: true}, {stopping: true}, {started: true, delivering: true}, {stopping: true}} {
		a.stepMode(f, func(before, now modeState) { told = append(told, before.Mode, now.Mode) })
	}
	if want := []Mode{Starting, Online, Online, Stopping}; !slices.Equal(told, want) {
		t.Errorf("told %v, want %v", told, want)
	}
}

func TestBuildInfoTellsBuildsApart(t *testing.T) {
	gather := func(version, kernel string) metricstest.Page {
		reg := prometheus.NewPedanticRegistry()
		newMetrics(reg, version, kernel)
		return metricstest.Gather(t, reg)
	}
	metricstest.Moved(t, gather("1.0.0", "6.1"), gather("1.0.1", "6.1"), "agent_build_info")
	metricstest.Moved(t, gather("1.0.0", "6.1"), gather("1.0.0", "6.12"), "agent_build_info")
}

func TestUnseen(t *testing.T) {
	covered := func(k event.Kind, hook string) sensor.Coverage {
		return sensor.Coverage{Event: k.String(), Kind: k, Hook: hook}
	}
	write, create := covered(event.FileModify, ""), covered(event.FileCreate, "")
	for _, tt := range []struct {
		name     string
		coverage []sensor.Coverage
		want     []string
	}{
		{"all seen", []sensor.Coverage{covered(event.Exec, "tp_btf/sched_process_exec")}, nil},
		{"opens in place of writes", []sensor.Coverage{write, create, covered(event.FileOpenWrite, "raw_tp/sys_exit")}, []string{"file.create"}},
		{"neither opens nor writes", []sensor.Coverage{write, covered(event.FileOpenWrite, "")}, []string{"file.write", "file.open_write"}},
		{"no files at all", []sensor.Coverage{write, create}, []string{"file.write", "file.create"}},
	} {
		if d := cmp.Diff(tt.want, unseen(tt.coverage)); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, d)
		}
	}
}
