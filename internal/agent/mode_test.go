// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/aurorasoc/edr-sensor/sensor"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

func TestModeIsTheWorstThatHolds(t *testing.T) {
	ok := facts{started: true, delivering: true, truncated: 7}
	with := func(change func(*facts)) facts { f := ok; change(&f); return f }
	for _, tt := range []struct {
		name string
		f    facts
		want Mode
	}{
		{"all well; truncations of an earlier run do not count", ok, Online},
		{"not attached", with(func(f *facts) { f.started = false }), Starting},
		{"redis away", with(func(f *facts) { f.delivering = false }), Buffering},
		{"hook missing and redis away", with(func(f *facts) { f.missing = []string{"net.close"}; f.delivering = false }), Degraded},
		{"kernel loss", with(func(f *facts) { f.kernelLost = 1 }), Degraded},
		{"disk error", with(func(f *facts) { f.bufferError = "no space left on device" }), Degraded},
		{"stuck", with(func(f *facts) { f.stuck = "worker" }), Degraded},
		{"truncating beats degraded", with(func(f *facts) { f.truncated = 8; f.kernelLost = 1 }), Truncating},
		{"stopping beats all", with(func(f *facts) { f.truncated = 8; f.stopping = true }), Stopping},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newModeMachine(prometheus.NewPedanticRegistry(), 7, time.Unix(0, 0))
			m.step(tt.f, time.Unix(1, 0))
			if got := m.current.Load().Mode; got != tt.want {
				t.Errorf("mode %s, want %s", got, tt.want)
			}
			for mode, g := range m.gauges {
				if want := map[bool]float64{true: 1}[mode == tt.want]; testutil.ToFloat64(g) != want {
					t.Errorf("agent_mode{mode=%q} is %v, want %v", mode, testutil.ToFloat64(g), want)
				}
			}
		})
	}
}

func TestModeKeepsALossForAWhile(t *testing.T) {
	m := newModeMachine(prometheus.NewPedanticRegistry(), 0, time.Unix(0, 0))
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
