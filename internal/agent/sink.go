// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/sensor"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf"
)

// sink joins the worker to the buffer, and lets live viewers see what passes.
// It belongs to the worker.
type sink struct {
	queue  *buffer.Queue
	tap    *tap
	batch  *buffer.Batch
	next   uint64
	place  *atomic.Pointer[place]
	bound  *place // what encoder is bound to
	encode *ocsf.Encoder
	losses []buffer.Loss

	decision bool // what was begun last
}

func newSink(q *buffer.Queue, t *tap, e *ocsf.Encoder, p *atomic.Pointer[place]) *sink {
	return &sink{queue: q, tap: t, batch: q.NewBatch(), next: q.Next(), place: p, bound: p.Load(), encode: e}
}

func (s *sink) Next() uint64 { return s.next }

func (s *sink) Begin() []byte { return s.begin(buffer.Events) }

func (s *sink) begin(stream buffer.Stream) []byte {
	s.decision = stream != buffer.Events
	return s.batch.Begin(stream)
}

func (s *sink) BeginDecision(d event.Decisions) []byte {
	switch d {
	case event.DecisionsAgents:
		return s.begin(buffer.DecisionsAgents)
	case event.DecisionsApprovals:
		return s.begin(buffer.DecisionsApprovals)
	default:
		return s.begin(buffer.DecisionsSystem)
	}
}

func (s *sink) End(rec []byte, urgent bool, names []event.Loss) error {
	switch err := s.batch.End(rec, urgent); {
	case errors.Is(err, buffer.ErrBatchFull):
		return sensor.ErrFull
	case err != nil:
		return err
	}
	s.next++
	s.tap.publish(rec, s.decision)
	if len(names) > 0 {
		s.losses = s.losses[:0]
		for _, l := range names {
			s.losses = append(s.losses, buffer.Loss(l))
		}
		s.batch.Name(s.losses)
	}
	return nil
}

func (s *sink) Size() int { return s.batch.Size() }

func (s *sink) Flush(ctx context.Context, mark []byte) error {
	s.batch.SetMark(mark)
	if err := s.queue.Append(ctx, s.batch); err != nil {
		return fmt.Errorf("append to buffer: %w", err)
	}
	s.batch = s.queue.NewBatch()
	if p := s.place.Load(); p != s.bound { // the batches before say the old place, in their payload only
		s.bound, s.next = p, s.queue.Next()
		s.encode.Move(p.agent, p.epoch)
	}
	return nil
}

func (s *sink) Unnamed(dst []event.Loss) []event.Loss {
	s.losses = s.queue.Unnamed(s.losses[:0])
	for _, l := range s.losses {
		dst = append(dst, event.Loss(l))
	}
	return dst
}

func (s *sink) Dropped() event.Loss {
	b := s.queue.Bounds()
	if b.First <= b.Acked+1 {
		return event.Loss{}
	}
	return event.Loss{First: b.Acked + 1, Last: b.First - 1}
}
