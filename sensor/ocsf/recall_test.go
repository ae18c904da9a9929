// SPDX-License-Identifier: Apache-2.0

package ocsf

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// TestRecalledIsTheSameRecord encodes what was read back: not a byte may differ.
func TestRecalledIsTheSameRecord(t *testing.T) {
	for seed := range uint64(500) {
		r := random{rand.New(rand.NewPCG(seed, 2))}
		i := event.SelfInfo{
			Stream: event.Decisions(r.IntN(3)), Activity: event.Activity(r.IntN(7)), Name: "Delivery Held", Severity: uint8(1 + r.IntN(5)), Failed: r.maybe(),
			Code: r.string(), Message: r.string(), Count: r.uint64(), Before: r.string(), After: r.string(),
			Attrs: map[string]any{"seq": 1<<63 + r.uint64()&1, "ratio": 0.1, "list": []string{strings.ToValidUTF8(r.string(), "")}, "map": map[string]int{"a": r.IntN(9)}, "on": r.maybe(), "restated_seq": uint64(7)},
		}
		if r.maybe() {
			i.CaseID, i.InvestigationID, i.UserID = "C-17", "I-4", "mara"
		}
		if r.maybe() {
			i.From, i.To = time.UnixMilli(int64(r.Uint32())), time.UnixMilli(int64(r.Uint32()))
		}
		if r.maybe() {
			i.ByKind = map[string]uint64{"process.exec": r.uint64(), "file.create": 1}
		}
		if r.maybe() {
			i.Activity, i.Losses = event.ActivityLost, []event.Loss{{Cause: "truncated", First: 1, Last: 1 << 60, Count: 3}}
		}
		e, at := r.encoder(), int64(r.Uint32())*1_000_003
		e.Bind("0123456789abcdef0123")
		want := e.Append(nil, 9, 5, &event.Event{Kind: event.Lifecycle, Time: at, Self: &i})
		again, when, err := Recall(want)
		if err != nil || when != at {
			t.Fatalf("seed %d: at %d, want %d, %v: %s", seed, when, at, err, want)
		}
		got := e.Append(nil, 9, 5, &event.Event{Kind: event.Lifecycle, Time: when, Self: &again})
		if d := cmp.Diff(string(want), string(got)); d != "" {
			t.Fatalf("seed %d (-want +got):\n%s", seed, d)
		}
	}
	for _, rec := range []string{``, `{}`, `{"metadata":{"log_name":"events"},"time_dt":"2026-01-01T00:00:00Z"}`, `{"metadata":{"log_name":"decisions:system"},"time_dt":"yesterday"}`} {
		if i, _, err := Recall([]byte(rec)); err == nil {
			t.Errorf("%s is %+v", rec, i)
		}
	}
}
