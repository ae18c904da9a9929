// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/sensor"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// The policy by which the sensor does less when it takes too much of the host, or the host
// has too little: which signals count, what is given up in which order, and how slowly. What
// is never given up: that programs start and end, losses, decisions, and what is done to the
// sensor itself.

const (
	shedAfter    = 5 * time.Second  // of pressure, for each step
	restoreAfter = 30 * time.Second // of calm, for each step back
)

// step is one thing more that is given up.
type step struct {
	name string // what is not done any more, or less
	shed shed   // all that is given up then
}

// shed is what is given up.
type shed struct {
	hashes  bool // executables are not read; hashes that are known are told
	lookups bool // processes that were not seen to start are not looked up in /proc
	files   int  // file events of one process are divided by this; 0: as configured
}

func steps() []step {
	return []step{
		{"nothing", shed{}},
		{"hashes", shed{hashes: true}},
		{"lookups", shed{hashes: true, lookups: true}},
		{"files", shed{hashes: true, lookups: true, files: 10}},
		{"most files", shed{hashes: true, lookups: true, files: 100}},
	}
}

// readings are what the guard goes by, all of one moment. Zero is calm, or unknown.
type readings struct {
	Busy      float64 `json:"cpu_percent"`           // own CPU time over ten seconds, of one CPU
	Waiting   float64 `json:"cpu_stall_percent"`     // of the time something waited for a CPU: PSI
	Throttled float64 `json:"cpu_throttled_percent"` // of the time its quota kept the control group from running
	Used      float64 `json:"memory_percent"`        // of the control group's limit, without what the kernel can take back
	Reclaim   float64 `json:"memory_stall_percent"`  // of the time nothing went on for want of memory: PSI
	UsedBytes int64   `json:"memory_bytes"`
	Limit     int64   `json:"memory_limit_bytes"` // 0: none
}

// signal is one reason for pressure.
type signal struct {
	name         string
	enter, leave float64 // above the first it is pressure, below the second calm
	read         func(readings) float64
}

// signals are those of a sensor that may use budget percent of a CPU; 0 is no budget.
func signals(budget int) []signal {
	list := []signal{
		{"memory", 85, 70, func(r readings) float64 { return r.Used }},
		{"memory stall", 10, 2, func(r readings) float64 { return r.Reclaim }},
	}
	if budget > 0 {
		list = append(list,
			signal{"cpu", float64(budget), .7 * float64(budget), func(r readings) float64 { return r.Busy }},
			// On a busy host it counts only if the sensor is a part of it.
			signal{"cpu stall", 80, 50, func(r readings) float64 {
				if r.Busy < float64(budget)/10 {
					return 0
				}
				return max(r.Waiting, r.Throttled)
			}},
		)
	}
	return list
}

// policy remembers for how long there has been pressure, or calm.
type policy struct {
	signals []signal
	level   int       // in steps
	since   time.Time // of the pressure or the calm; zero between the two
	calm    bool      // which of them
}

// step takes the readings of a moment, and tells whether the level has changed and why. It
// changes by one at a time.
func (g *policy) step(r readings, now time.Time) (changed bool, why string) {
	var over, above []string
	for _, s := range g.signals {
		switch value := s.read(r); {
		case value >= s.enter:
			over = append(over, fmt.Sprintf("%s is %.0f, at or above %.0f", s.name, value, s.enter))
			fallthrough
		case value >= s.leave:
			above = append(above, s.name)
		}
	}
	pressed, calm := len(over) > 0, len(above) == 0
	if !pressed && !calm {
		g.since = time.Time{}
		return false, ""
	}
	if g.since.IsZero() || g.calm != calm {
		g.since, g.calm = now, calm
		return false, ""
	}
	switch held := now.Sub(g.since); {
	case pressed && held >= shedAfter && g.level < len(steps())-1:
		g.level++
		why = fmt.Sprintf("%s for %s", strings.Join(over, ", "), held.Round(time.Second))
	case calm && held >= restoreAfter && g.level > 0:
		g.level--
		why = fmt.Sprintf("there was no pressure for %s", held.Round(time.Second))
	default:
		return false, ""
	}
	g.since = now
	return true, why
}

// guard watches the readings until ctx ends and gives up, or takes up again, what the policy
// says.
func (a *Agent) guard(ctx context.Context) {
	if !a.cfg.Guard.Enabled {
		return
	}
	p := policy{signals: signals(a.cfg.Guard.CPUPercent)}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	before := a.enricher.ShedSoFar()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		r := a.gauge.read(now)
		was := p.level
		changed, why := p.step(r, now)
		if !changed {
			continue
		}
		i := event.SelfInfo{
			Name: "Load Shed", Severity: 3, Code: "LOAD_SHED", Before: steps()[was].name, After: steps()[p.level].name, Message: "the sensor does less: " + why,
			Attrs: map[string]any{"readings": r, "level": p.level},
		}
		if was > p.level {
			so := a.enricher.ShedSoFar()
			i.Name, i.Severity, i.Code, i.Message = "Load Restored", 1, "LOAD_RESTORED", "the sensor takes up again what it gave up: "+why
			i.Attrs["not_hashed"], i.Attrs["not_looked_up"] = so.Hashes-before.Hashes, so.Lookups-before.Lookups
			if p.level == 0 {
				before = so
			}
		}
		if err := a.apply(steps()[p.level].shed); err != nil {
			i.Failed = true
			i.Message += "; file events stay as they are: " + err.Error()
		}
		a.metrics.shed.Set(float64(p.level))
		a.decide(ctx, i)
	}
}

// apply gives up what s says, and nothing else.
func (a *Agent) apply(s shed) error {
	a.enricher.Shed(s.hashes, s.lookups)
	if s.hashes {
		debug.FreeOSMemory() // what is not needed now is the host's
	}
	a.reloading.Lock()
	defer a.reloading.Unlock()
	f := a.running.Load().Config.Sensor.File
	if a.files == s.files || !f.Enabled {
		return nil
	}
	old := a.files
	a.files = s.files
	if _, err := a.sensor.Filter(a.shedFiles(f)); err != nil {
		a.files = old
		return err
	}
	return nil
}

// unlimited stands for no limit of file events, when they are to be fewer.
const unlimited = 1000

// shedFiles is what file events are left out now. The caller holds reloading.
func (a *Agent) shedFiles(f config.File) sensor.FileOptions {
	o := filesOf(f)
	if a.files == 0 {
		return o
	}
	if o.Rate == 0 {
		o.Rate = unlimited
	}
	o.Rate = max(o.Rate/a.files, 1)
	o.Burst = 2 * o.Rate
	o.Shed = fmt.Sprintf("at most %d a second of each process to spare the host", o.Rate)
	return o
}
