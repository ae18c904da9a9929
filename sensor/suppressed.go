// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"fmt"
	"time"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// suppressedEvery is how often what the kernel left out on purpose is reported. Under
// a flood that is all the time, so once a second would be a flood of its own.
const suppressedEvery = 10 * time.Second

// suppressed sums up over a window what the kernel left out, by kind.
type suppressed struct {
	from  time.Time // of the window
	count [event.Kinds]uint64
	sum   uint64
}

func (s *suppressed) add(k event.Kind, n uint64) {
	s.count[k] += n
	s.sum += n
}

// report returns the record about a window that is over, or that has to end now, and
// begins the next. There is none when nothing was left out.
func (s *suppressed) report(now time.Time, end bool) (i event.SelfInfo, ok bool) {
	if !end && now.Sub(s.from) < suppressedEvery {
		return i, false
	}
	last := *s
	*s = suppressed{from: now}
	if last.sum == 0 {
		return i, false
	}
	i = event.SelfInfo{
		Stream: event.DecisionsAgents, Activity: event.ActivitySuppressed, Severity: 1, Code: "SUPPRESSED", Count: last.sum, From: last.from, To: now, ByKind: map[string]uint64{},
		Message: fmt.Sprintf("%d events were left out, as sensor.file says", last.sum),
	}
	for k, n := range last.count {
		if n > 0 {
			i.ByKind[event.Kind(k).String()] = n
		}
	}
	return i, true
}
