// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// examineEvery is how often the hooks are tried: half a millisecond each time.
const examineEvery = time.Minute

// Watch sends heartbeats through the kernel and tries the hooks until ctx ends; that a hook
// was lost, and that it came back, are decisions. It may run together with Run and must
// have returned before Close.
func (s *Sensor) Watch(ctx context.Context) {
	ctx = logging.With(ctx, zap.String(logging.KeyComponent, "sensor"))
	if s.old.Load() != nil {
		// Programs that are about to go would report what is only tried.
		select {
		case <-s.settled:
		case <-ctx.Done():
			return
		}
	}
	deaf := make(chan struct{}, 1) // no program answers: do not wait for the next examination
	var wg sync.WaitGroup
	wg.Go(func() { s.beatUntil(ctx, deaf) })
	wg.Go(func() { s.examineUntil(ctx, deaf) })
	wg.Wait()
}

func (s *Sensor) beatUntil(ctx context.Context, deaf chan<- struct{}) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	stage := ""
	for {
		if err := s.sendBeat(); err != nil && ctx.Err() == nil {
			logging.From(ctx).Error("send heartbeat", zap.Error(err))
		}
		last := stage
		if stage = s.Stuck(time.Now()).Stage; stage == StageProgram && last != stage {
			select {
			case deaf <- struct{}{}:
			default:
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *Sensor) examineUntil(ctx context.Context, deaf <-chan struct{}) {
	tick := time.NewTicker(examineEvery)
	defer tick.Stop()
	said := ""
	for {
		changes, err := s.kernel.mend(s.o.ExerciseDir)
		if ctx.Err() != nil {
			return // what a stop detached is not lost
		}
		if err != nil && err.Error() != said {
			said = err.Error()
			logging.From(ctx).Warn("hooks cannot be tried; the kernel is only asked whether they are attached", zap.Error(err))
		}
		if len(changes) > 0 {
			s.cover(s.kernel.coverage())
			s.kernel.mended = true
			if err := s.kernel.keep(s.o.Host.BootID); err != nil {
				logging.From(ctx).Error("keep mended hooks", zap.Error(err))
			}
		}
		for _, c := range changes {
			s.Notify(ctx, c.decision())
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-deaf:
		}
	}
}

// decision is the record about the change.
func (c hookChange) decision() event.SelfInfo {
	names := make([]string, len(c.kinds))
	for i, kind := range c.kinds {
		names[i] = kind.String()
	}
	events := strings.Join(names, ", ")
	i := event.SelfInfo{
		Name: "Hook Lost", Severity: 4, Failed: true, Code: "HOOK_LOST", Before: or(c.before, "none"), After: or(c.after, "none"),
		Attrs: map[string]any{"events": names},
	}
	switch {
	case c.why == nil:
		i.Name, i.Severity, i.Failed, i.Code = "Hook Back", 1, false, "HOOK_BACK"
		i.Message = fmt.Sprintf("%s works again, so that %s is seen", i.After, events)
		return i
	case c.after == "":
		i.Message = fmt.Sprintf("%s no longer works and nothing can take its place: %s is not seen", i.Before, events)
	case c.after == c.before:
		i.Severity = 3
		i.Message = fmt.Sprintf("%s no longer worked and was attached anew: %s was not seen for up to %s", i.Before, events, examineEvery)
	default:
		i.Severity = 3
		i.Message = fmt.Sprintf("%s no longer works: %s is seen by %s until the next start", i.Before, events, i.After)
	}
	i.Attrs["evidence"] = c.why.Error()
	return i
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// cover makes known what each event is seen by.
func (s *Sensor) cover(coverage []Coverage) {
	var hooks [event.Kinds]string
	for _, c := range coverage {
		hooks[c.Kind] = c.Hook
		s.metrics.covered(c)
	}
	s.hooks.Store(&hooks)
	s.coverage.Store(&coverage)
}
