// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/transport"
)

// decide makes a decision known, once in the log for engineers and once on a
// decisions stream for auditors, so that both say the same. The line has the
// decision's code, cause, states, evidence and ids beside what ctx binds.
func (a *Agent) decide(ctx context.Context, i event.SelfInfo) { a.sensor.Notify(ctx, i) }

// deliveryDecisions turns what the sender had to decide into decisions. The result
// is called on the sending goroutine.
func (a *Agent) deliveryDecisions(ctx context.Context) func(transport.State) {
	d := delivery{now: time.Now}
	return func(s transport.State) {
		for _, i := range d.step(s) {
			a.decide(ctx, i)
		}
	}
}

// delivery remembers the sender's state.
type delivery struct {
	before transport.State
	away   time.Time // since when Redis takes nothing; zero: it does
	told   bool      // and that a decision has said so
	now    func() time.Time
}

// step returns what has to be made known about the change to the state s.
func (d *delivery) step(s transport.State) (out []event.SelfInfo) {
	before := d.before
	d.before = s
	if s.Rewinds > before.Rewinds {
		out = append(out, event.SelfInfo{
			Name: "Rewind", Severity: 3, Failed: true, Code: "SERVER_BEHIND", Count: s.Behind.Last - s.Behind.First + 1,
			Message: fmt.Sprintf("Redis had less than it had confirmed: seqs %d to %d were missing; what the buffer still has of them is sent again", s.Behind.First, s.Behind.Last),
			Attrs:   map[string]any{"address": s.Address, "rewinds": s.Rewinds, "first": s.Behind.First, "last": s.Behind.Last},
		})
	}
	if s.Refusals > before.Refusals {
		out = append(out, event.SelfInfo{
			Name: "Record Refused", Severity: 4, Failed: true, Code: "RECORD_REFUSED", Count: 1,
			Message: fmt.Sprintf("Redis, or what stands before it, does not take record %d of %d bytes: a copy is in %s, and the record is lost to the stream", s.Refused.Seq, s.Refused.Bytes, s.Refused.Path),
			Attrs: map[string]any{
				"address": s.Address, "seq": s.Refused.Seq, "bytes": s.Refused.Bytes, "path": s.Refused.Path, "error": s.Refused.Error,
				"refusals": s.Refusals, "remedy": s.Refused.Hint,
			},
		})
	}
	if s.Rotations > before.Rotations {
		out = append(out, event.SelfInfo{
			Name: "Credentials Rotated", Severity: 1, Code: "CREDENTIALS_ROTATED",
			Message: "connected with another password than before",
			Attrs:   map[string]any{"address": s.Address, "rotations": s.Rotations},
		})
	}
	for _, r := range s.Risks {
		switch known := slices.ContainsFunc(before.Risks, func(b transport.Risk) bool { return b.Kind == r.Kind }); {
		case known:
		case r.Kind == transport.RiskEviction:
			out = append(out, event.SelfInfo{
				Name: "Eviction Risk", Severity: 3, Failed: true, Code: "EVICTION_RISK", Message: r.Text,
				Attrs: map[string]any{"address": s.Address},
			})
		default:
			out = append(out, event.SelfInfo{
				Name: "Server at Risk", Severity: 3, Failed: true, Code: "SERVER_AT_RISK", Message: r.Text,
				Attrs: map[string]any{"address": s.Address, "risk": string(r.Kind)},
			})
		}
	}
	evidence := map[string]any{"address": s.Address, "class": string(s.Class), "error": s.Error, "remedy": s.Hint, "acked": s.Acked}
	switch {
	case s.Phase == transport.Fenced && before.Phase != transport.Fenced:
		out = append(out, event.SelfInfo{
			Name: "Fenced", Severity: 5, Failed: true, Code: "FENCED", Before: string(before.Phase), After: string(s.Phase),
			Message: "delivery stopped: " + s.Error, Attrs: evidence,
		})
	case s.Phase == transport.Held && (before.Phase != transport.Held || before.Class != s.Class):
		out = append(out, event.SelfInfo{
			Name: "Delivery Held", Severity: 4, Failed: true, Code: "DELIVERY_HELD", Before: string(before.Phase), After: string(s.Phase),
			Message: "Redis does not take events until somebody acts: " + s.Hint, Attrs: evidence,
		})
	}
	needed := s.Phase == transport.Held || s.Phase == transport.Fenced
	switch {
	case s.Phase != transport.Connected && d.away.IsZero():
		d.away, d.told = d.now(), needed
	case s.Phase != transport.Connected:
		d.told = d.told || needed
	case !d.away.IsZero():
		from, to := d.away, d.now()
		d.away = time.Time{}
		if took := to.Sub(from); d.told || took >= awayGrace {
			out = append(out, event.SelfInfo{
				Name: "Delivery Resumed", Severity: 1, Code: "DELIVERY_RESUMED", Before: string(before.Phase), After: string(s.Phase),
				From: from, To: to, Message: fmt.Sprintf("Redis takes events again after %s", took.Round(time.Millisecond)),
				Attrs: map[string]any{"address": s.Address, "away_seconds": took.Seconds(), "acked": s.Acked},
			})
		}
	}
	return out
}
