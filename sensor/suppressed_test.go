// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

func TestSuppressedIsReportedOncePerWindow(t *testing.T) {
	start := time.Date(2026, 11, 23, 15, 0, 0, 0, time.UTC)
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	s := suppressed{from: start}
	want := func(now time.Time, end bool, want *event.SelfInfo) {
		t.Helper()
		got, ok := s.report(now, end)
		if ok != (want != nil) {
			t.Fatalf("at %v: reported %v: %+v", now, ok, got)
		}
		if ok {
			if d := cmp.Diff(*want, got); d != "" {
				t.Errorf("at %v (-want +got):\n%s", now, d)
			}
		}
	}
	record := func(from, to int, message string, count uint64, kinds map[string]uint64) *event.SelfInfo {
		return &event.SelfInfo{
			Stream: event.DecisionsAgents, Activity: event.ActivitySuppressed, Severity: 1, Code: "SUPPRESSED", From: at(from), To: at(to), Message: message, Count: count, ByKind: kinds,
		}
	}
	s.add(event.FileCreate, 3)
	want(at(9), false, nil)
	s.add(event.FileCreate, 4)
	s.add(event.Mount, 1)
	want(at(10), false, record(0, 10, "8 events were left out, as sensor.file says", 8, map[string]uint64{"file.create": 7, "file.mount": 1}))
	want(at(25), false, nil) // a quiet window ends too
	s.add(event.FileModify, 1)
	want(at(26), true, record(25, 26, "1 events were left out, as sensor.file says", 1, map[string]uint64{"file.write": 1}))
	want(at(27), true, nil)
}
