// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/aurorasoc/edr-sensor/buffer"
)

// loadEvents reads the encoder's golden events, one of each kind and variant.
func loadEvents(dir string) (events [][]byte, mean int, err error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(files) == 0 {
		return nil, 0, errors.Join(err, fmt.Errorf("no events in %s", dir))
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, 0, err
		}
		var b bytes.Buffer
		if err := json.Compact(&b, data); err != nil {
			return nil, 0, fmt.Errorf("%s: %w", name, err)
		}
		events, mean = append(events, b.Bytes()), mean+b.Len()
	}
	return events, mean / len(events), nil
}

// load is what all sensors of a fleet are given.
type load struct {
	events [][]byte
	every  time.Duration // between the events of a sensor
	commit time.Duration // how long the buffer gathers events before they are durable
	begin  chan struct{} // closed when events come
	begun  time.Time     // set before that
	lost   atomic.Int64  // when the server was killed, Unix nanoseconds; 0: it was not
	seen   latencies
}

// source stands in for a sensor's disk buffer. It holds nothing: which events there are
// follows from the clock, and their text is shared by the fleet. So it forgets nothing
// either, and a server that went back gets all of it again.
type source struct {
	*load
	epoch string
	phase time.Duration // so that the sensors are not in step
	kind  uint64        // of the first event
	acked atomic.Uint64
	back  atomic.Int64 // the first reply after lost
	gone  atomic.Bool  // a record was given up, which must not be
}

func newSource(l *load) *source {
	return &source{
		load: l, epoch: fmt.Sprintf("%012x%08x", time.Now().UnixMilli(), rand.Uint32()),
		phase: rand.N(l.every + l.commit), kind: rand.Uint64N(uint64(len(l.events))),
	}
}

// came is when event seq happened.
func (s *source) came(seq uint64) time.Time {
	return s.begun.Add(s.phase + time.Duration(seq)*s.every)
}

// group is how many events one commit of the buffer makes durable.
func (s *source) group() uint64 { return uint64(s.commit/s.every) + 1 }

// durable is when event seq can be read: a commit waits for others from its first on.
func (s *source) durable(seq uint64) time.Time {
	return s.came(seq - (seq-1)%s.group()).Add(s.commit)
}

// last is the newest event that can be read at t.
func (s *source) last(t time.Time) uint64 {
	select {
	case <-s.begin:
	default:
		return 0
	}
	d := t.Add(-s.commit).Sub(s.came(1))
	if d < 0 {
		return 0
	}
	return (uint64(d/s.every)/s.group() + 1) * s.group()
}

func (s *source) Epoch() string { return s.epoch }

func (s *source) Read(ctx context.Context, after uint64, dst []buffer.Record, maxRecords, maxBytes int) ([]buffer.Record, error) {
	select {
	case <-s.begin:
	case <-ctx.Done():
		return dst, ctx.Err()
	}
	if wait := time.Until(s.durable(after + 1)); wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return dst, ctx.Err()
		}
	}
	last, size := s.last(time.Now()), 0
	for seq := after + 1; seq <= max(last, after+1) && len(dst) < maxRecords; seq++ {
		data := s.events[(s.kind+seq)%uint64(len(s.events))]
		if size += len(data); len(dst) > 0 && size > maxBytes {
			break
		}
		dst = append(dst, buffer.Record{Seq: seq, Data: data, Stored: s.durable(seq).UnixNano()})
	}
	return dst, nil
}

func (s *source) Ack(seq uint64) {
	now := time.Now()
	for i := s.acked.Load() + 1; i <= seq; i++ {
		s.seen.add(now.Sub(s.came(i)))
	}
	s.acked.Store(seq)
	if lost := s.lost.Load(); lost != 0 && now.UnixNano() > lost {
		s.back.CompareAndSwap(0, now.UnixNano())
	}
}

func (s *source) Bounds() buffer.Bounds {
	return buffer.Bounds{First: 1, Acked: s.acked.Load(), Last: max(s.last(time.Now()), s.acked.Load())}
}

func (s *source) Forfeit(uint64, uint64, string) { s.gone.Store(true) }

func (s *source) SetAside(buffer.Record, string) (string, error) {
	s.gone.Store(true)
	return "", nil
}

func (s *source) GivenUp() []uint64 { return nil }

// latencies counts durations in classes of 5 %, for many goroutines at once.
type latencies [512]atomic.Uint64

const latencyStep = 1.05

func (l *latencies) add(d time.Duration) {
	i := int(math.Log(max(1, float64(d.Microseconds()))) / math.Log(latencyStep))
	l[min(i, len(l)-1)].Add(1)
}

func (l *latencies) reset() {
	for i := range l {
		l[i].Store(0)
	}
}

// quantile is NaN when nothing was counted.
func (l *latencies) quantile(q float64) (seconds float64) {
	total := uint64(0)
	for i := range l {
		total += l[i].Load()
	}
	at := uint64(math.Ceil(q * float64(total)))
	for i, n := 0, uint64(0); i < len(l) && total > 0; i++ {
		if n += l[i].Load(); n >= at {
			return math.Pow(latencyStep, float64(i+1)) / 1e6
		}
	}
	return math.NaN()
}
