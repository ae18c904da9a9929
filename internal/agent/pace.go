// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"sync"
	"time"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/sensor"
)

// Rates are what happens a second, over the last moments.
type Rates struct {
	Seconds   float64            `json:"seconds"`   // they are over
	Events    map[string]float64 `json:"events"`    // by event code; not those without any
	Lost      map[string]float64 `json:"lost"`      // likewise
	Delivered float64            `json:"delivered"` // records
	// Fill is by how many bytes what waits in the buffer grows, over up to a minute:
	// chunks come and go by the hundred kilobytes. It shrinks when negative.
	Fill float64 `json:"fill_bytes"`
}

// Over how long rates are.
const (
	paceOver  = 10 * time.Second
	fillOver  = time.Minute
	paceStale = 5 * time.Second // without a sample: the monitor does not move
)

// pace keeps what the monitor counted, for rates. Safe for concurrent use.
type pace struct {
	mu      sync.Mutex
	samples []sample // oldest first, a second apart
}

type sample struct {
	at           time.Time
	events, lost map[string]uint64 // nil in samples older than paceOver
	acked        uint64
	unsent       int64 // bytes
}

func (p *pace) add(now time.Time, s sensor.Stats, b buffer.Stats) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.samples = append(p.samples, sample{now, s.Events, s.Lost, b.Acked, b.UnsentBytes})
	old := 0
	for i := range p.samples {
		switch age := now.Sub(p.samples[i].at); {
		case age > fillOver:
			old = i + 1
		case age > paceOver:
			p.samples[i].events, p.samples[i].lost = nil, nil
		}
	}
	p.samples = append(p.samples[:0], p.samples[old:]...)
}

// rates are nil when nothing is known yet.
func (p *pace) rates(now time.Time) *Rates {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.samples) < 2 {
		return nil
	}
	last := p.samples[len(p.samples)-1]
	from := 0
	for p.samples[from].events == nil {
		from++
	}
	first := p.samples[from]
	over := last.at.Sub(first.at).Seconds()
	if over <= 0 || now.Sub(last.at) > paceStale {
		return nil
	}
	each := func(before, after map[string]uint64) map[string]float64 {
		out := map[string]float64{}
		for code, n := range after {
			if n > before[code] {
				out[code] = float64(n-before[code]) / over
			}
		}
		return out
	}
	r := &Rates{Seconds: over, Events: each(first.events, last.events), Lost: each(first.lost, last.lost)}
	if last.acked > first.acked {
		r.Delivered = float64(last.acked-first.acked) / over
	}
	oldest := p.samples[0]
	r.Fill = float64(last.unsent-oldest.unsent) / last.at.Sub(oldest.at).Seconds()
	return r
}

// fullIn is how many seconds are left, at this rate, until the oldest record that is
// not delivered has to go; nil when what waits does not grow, or waits only for its
// turn in a delivery that keeps up: a batch under way comes and goes.
func fullIn(b buffer.Stats, r *Rates, now time.Time, delivering bool) *float64 {
	keepsUp := delivering && now.Sub(b.OldestUnsent) < paceOver
	if r == nil || r.Fill <= 0 || b.OldestUnsent.IsZero() || keepsUp {
		return nil
	}
	left := float64(max(b.Cap-b.UnsentBytes, 0)) / r.Fill
	return &left
}
