// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

func TestSuppressedIsReportedByWindowAndEpisode(t *testing.T) {
	start := time.Date(2026, 11, 23, 15, 0, 0, 0, time.UTC)
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	s := suppressed{from: start}
	report := func(now int, end bool, want ...event.SelfInfo) {
		t.Helper()
		if d := cmp.Diff(want, s.report(at(now), end)); d != "" {
			t.Errorf("at %d s (-want +got):\n%s", now, d)
		}
	}
	window := func(from, to int, message string, count uint64, kinds map[string]uint64) event.SelfInfo {
		return event.SelfInfo{
			Stream: event.DecisionsAgents, Activity: event.ActivitySuppressed, Severity: 1, Code: "SUPPRESSED", From: at(from), To: at(to), Message: message, Count: count, ByKind: kinds,
		}
	}
	started := event.SelfInfo{
		Stream: event.DecisionsAgents, Name: "Suppression Started", Severity: 1, Code: "SUPPRESSION_STARTED", Before: "complete", After: "suppressing",
		Message: "file events are left out, as sensor.file says",
	}
	ended := func(from, to int, message string, n uint64) event.SelfInfo {
		return event.SelfInfo{
			Stream: event.DecisionsAgents, Name: "Suppression Ended", Severity: 1, Code: "SUPPRESSION_ENDED", Before: "suppressing", After: "complete",
			Message: message, From: at(from), To: at(to), Attrs: map[string]any{"events": n},
		}
	}
	s.add(event.FileCreate, 3)
	report(9, false, started)
	s.add(event.FileCreate, 4)
	s.add(event.Mount, 1)
	report(10, false, window(0, 10, "8 events were left out, as sensor.file says", 8, map[string]uint64{"file.create": 7, "file.mount": 1}))
	report(25, false) // a quiet window ends too, the episode goes on
	s.add(event.FileModify, 1)
	report(35, false, window(25, 35, "1 events were left out, as sensor.file says", 1, map[string]uint64{"file.write": 1}))
	report(94, false)
	report(95, false, ended(9, 35, "9 file events were left out in all", 9))
	report(110, false)
	s.add(event.FileModify, 2)
	report(111, true, started, window(110, 111, "2 events were left out, as sensor.file says", 2, map[string]uint64{"file.write": 2}),
		ended(111, 111, "2 file events were left out in all", 2))
	report(112, true)
}
