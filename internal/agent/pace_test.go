// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/sensor"
)

func TestPace(t *testing.T) {
	start := time.Date(2026, 11, 24, 3, 0, 0, 0, time.UTC)
	at := func(second int) (time.Time, sensor.Stats, buffer.Stats) {
		n := uint64(second)
		return start.Add(time.Duration(second) * time.Second),
			sensor.Stats{Events: map[string]uint64{"process.exec": 3 * n, "net.close": 7}, Lost: map[string]uint64{"process.exec": n / 10}},
			buffer.Stats{Bounds: buffer.Bounds{Acked: 20 * n}, Cap: 100_000, UnsentBytes: int64(100 * n)}
	}
	var p pace
	if r := p.rates(start); r != nil {
		t.Errorf("without a sample: %+v", r)
	}
	p.add(at(0))
	if r := p.rates(start); r != nil {
		t.Errorf("with one sample: %+v", r)
	}
	for i := 1; i <= 200; i++ {
		p.add(at(i))
	}
	now, _, b := at(200)
	got := p.rates(now)
	want := &Rates{Seconds: 10, Events: map[string]float64{"process.exec": 3}, Lost: map[string]float64{"process.exec": 0.1}, Delivered: 20, Fill: 100}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if n := len(p.samples); n > 62 {
		t.Errorf("%d samples are kept", n)
	}
	for _, tt := range []struct {
		waits      time.Duration // the oldest record; negative: there is none
		delivering bool
		want       float64 // negative: never
	}{{paceOver, true, 800}, {paceOver, false, 800}, {paceOver / 2, false, 800}, {paceOver / 2, true, -1}, {-1, false, -1}} {
		if b.OldestUnsent = now.Add(-tt.waits); tt.waits < 0 {
			b.OldestUnsent = time.Time{}
		}
		if left := fullIn(b, got, now, tt.delivering); (left == nil) != (tt.want < 0) || left != nil && *left != tt.want {
			t.Errorf("%+v: full in %v", tt, left)
		}
	}
	b.OldestUnsent = start
	if r := p.rates(now.Add(time.Minute)); r != nil {
		t.Errorf("of a monitor that stands still: %+v", r)
	}
	// After a pause of the whole machine there is one sample of late.
	p.add(at(500))
	if r := p.rates(start.Add(500 * time.Second)); r != nil {
		t.Errorf("after a pause: %+v", r)
	}
	if left := fullIn(b, &Rates{Fill: -1}, now, false); left != nil {
		t.Errorf("a buffer that drains is full in %v", *left)
	}
}
