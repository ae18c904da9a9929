// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/enrich"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// memoryWorker is a worker with rings in memory.
func memoryWorker(t *testing.T, sink Sink) (s *Sensor, priority, bulk *memoryRing) {
	t.Helper()
	s = newWorker(prometheus.NewPedanticRegistry(), sink)
	priority, bulk = newMemoryRing(4096), newMemoryRing(4096)
	s.in.priority, s.in.bulk = priority.open(t), bulk.open(t)
	s.o.Enricher = enrich.New(enrich.Options{HashPerSecond: -1})
	t.Cleanup(func() { s.o.Enricher.Close() })
	s.hooks.Store(new([event.Kinds]string))
	return s, priority, bulk
}

// TestEmptyWaitsForARecord that a program was writing when it was detached, and for those
// behind it. What is never written ends the wait, and is not called all.
func TestEmptyWaitsForARecord(t *testing.T) {
	ctx := logging.Into(t.Context(), zap.NewNop())
	for _, tt := range []struct {
		name                   string
		written, detached, all bool
		read                   uint64
	}{
		{"written late", true, true, true, 3},
		{"never written", false, true, false, 0},
		{"never written, and programs go on", false, false, true, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s, ring, _ := memoryWorker(t, &flushSink{})
			busy, _ := ring.put([]byte("in the making"), ringBusy)
			ring.put([]byte("behind it"), 0)
			late, _ := ring.put([]byte("late"), 0)
			end := ring.produced()
			binary.NativeEndian.PutUint64(ring.producer, late) // it is not there yet
			if tt.written {
				time.AfterFunc(20*time.Millisecond, func() { // as the kernel does it
					atomic.StoreUint32((*uint32)(unsafe.Pointer(&ring.data[busy])), uint32(len("in the making")))
					atomic.StoreUint64((*uint64)(unsafe.Pointer(&ring.producer[0])), end)
				})
			}
			all, err := s.empty(ctx, tt.detached)
			if all != tt.all || err != nil || s.Discarded() != tt.read {
				t.Errorf("all %t, %v, %d read; want %t, %d", all, err, s.Discarded(), tt.all, tt.read)
			}
		})
	}
}

// TestRootFilesBeforeAnExec reads the rings when a process has changed a file, become another
// program and ended: the changes are those of the program that it was.
func TestRootFilesBeforeAnExec(t *testing.T) {
	ctx := logging.Into(t.Context(), zap.NewNop())
	a := startActor(t)
	k := watchFiles(t, a, FileOptions{}, "", event.FileCreate, event.FileModify)
	sink := &flushSink{}
	s := newWorker(prometheus.NewPedanticRegistry(), sink)
	o := newObserver(t, k)
	s.in.priority, s.o.Enricher = o.ring, o.enr
	bulk, err := openRing(k.bulk)
	if err != nil {
		t.Fatal(err)
	}
	defer bulk.close()
	s.in.bulk = bulk
	s.hooks.Store(new([event.Kinds]string))

	file := filepath.Join(real(t, t.TempDir()), "f")
	a.must(request{Op: "run", Path: "/bin/sh", Args: []string{"-c", `echo x > "$1"; exec /bin/sleep 0`, "sh", file}})
	for {
		n, err := s.poll(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
	}
	seen := 0
	for _, rec := range sink.batch {
		var d struct {
			File  struct{ Path string }
			Actor struct {
				Process struct {
					Line string `json:"cmd_line"`
					File struct{ Path string }
				}
			}
		}
		if err := json.Unmarshal([]byte(rec), &d); err != nil {
			t.Fatal(err)
		}
		if d.File.Path != file {
			continue
		}
		seen++
		if p := d.Actor.Process; p.File.Path != real(t, "/bin/sh") || !strings.HasPrefix(p.Line, "/bin/sh -c ") {
			t.Errorf("by %s: %s", p.File.Path, rec)
		}
	}
	if seen < 2 {
		t.Errorf("%d records of the file, want its creation and the write", seen)
	}
}

// TestUndecodableWithTheMark: what cannot be decoded is named where the mark passes it, not
// where it was read ahead: who goes on at that mark meets the rest, and names that.
func TestUndecodableWithTheMark(t *testing.T) {
	ctx := logging.Into(t.Context(), zap.NewNop())
	sink := &markedSink{}
	s, ring, _ := memoryWorker(t, sink)
	at := make(map[uint64]uint64) // behind a position, how many were none
	for i, none := range []int{1, 0, 2, 1} {
		for range none {
			ring.put([]byte("what is this?"), 0)
		}
		if i < 3 {
			ring.put(wireExit(), 0)
			at[ring.produced()] = uint64([]int{1, 1, 3}[i])
		}
	}
	at[ring.produced()] = 4
	if n, err := s.poll(ctx); n != 3 || err != nil {
		t.Fatalf("%d events, %v", n, err)
	}
	if err := s.flush(ctx, false); err != nil {
		t.Fatal(err)
	}
	for _, m := range sink.marks {
		if want, known := at[m.pos]; !known || m.named != want {
			t.Errorf("up to %d %d are named as undecodable, want %d", m.pos, m.named, want)
		}
	}
	if len(sink.marks) != 4 {
		t.Errorf("marks: %+v", sink.marks)
	}
}

// markedSink is full after each event, and notes how many were named when a mark came.
type markedSink struct {
	fullSink
	size  int
	named uint64
	marks []struct{ pos, named uint64 }
}

func (s *markedSink) Size() int { return s.size }

func (s *markedSink) End(rec []byte, _ bool, _ []event.Loss) error {
	s.size = flushBytes
	var d struct {
		Code  string `json:"status_code"`
		Count uint64 `json:"count"`
	}
	if err := json.Unmarshal(rec, &d); err != nil {
		return err
	}
	if d.Code == "UNDECODABLE" {
		s.named += d.Count
	}
	return nil
}

func (s *markedSink) Flush(_ context.Context, stored []byte) error {
	s.size = 0
	m, err := parseMark(stored)
	s.marks = append(s.marks, struct{ pos, named uint64 }{m.priority.pos, s.named})
	return err
}

// TestTamperingKnowsTheProcess: its record names the process as the event does that it is
// about, however much later it is written.
func TestTamperingKnowsTheProcess(t *testing.T) {
	ctx := logging.Into(t.Context(), zap.NewNop())
	sink := &flushSink{}
	s := newWorker(prometheus.NewPedanticRegistry(), sink)
	const boot, started, ktime = 1_700_000_000_000_000_000, 5_000_000_000, 9_000_000_000
	p := &event.Process{Key: event.ProcessKey{PID: 7, StartTime: started}}
	s.tampering(ctx, &event.Event{
		Kind: event.Signal, Severity: 5, KTime: ktime, Time: boot + ktime, Actor: p.Key, Creator: p, Tamper: event.TamperInfo{Signal: 9},
	})
	if len(sink.batch) != 1 {
		t.Fatalf("records %q", sink.batch)
	}
	var d struct {
		Actor struct {
			Process struct {
				PID     uint32 `json:"pid"`
				Created int64  `json:"created_time"`
			} `json:"process"`
		} `json:"actor"`
	}
	if err := json.Unmarshal([]byte(sink.batch[0]), &d); err != nil || d.Actor.Process.PID != 7 || d.Actor.Process.Created != (boot+started)/1e6 {
		t.Errorf("%v: %s", err, sink.batch[0])
	}
}

// TestConclude keeps what is decided behind the worker's back, with the mark as Run has left it.
func TestConclude(t *testing.T) {
	ctx := logging.Into(t.Context(), zap.NewNop())
	var recs []string
	sink := &shelf{seen: func(rec []byte) { recs = append(recs, string(rec)) }}
	s, _, _ := memoryWorker(t, sink)
	s.mark.clean = true
	s.wait = &waiter{closed: true} // as after Run
	if err := s.Conclude(ctx); err != nil || sink.mark != nil {
		t.Errorf("without a decision: %v, mark %v", err, sink.mark)
	}
	s.Notify(ctx, event.SelfInfo{Code: "DELIVERY_RESUMED"})
	if err := s.Conclude(ctx); err != nil || len(recs) != 1 || !strings.Contains(recs[0], "DELIVERY_RESUMED") {
		t.Errorf("%q, %v", recs, err)
	}
	if m, err := parseMark(sink.mark); err != nil || !m.clean {
		t.Errorf("mark %+v, %v", m, err)
	}
}
