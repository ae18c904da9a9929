// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/sensor/enrich"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf"
)

// shelf is a Sink that keeps nothing, and that can be made to take nothing any more.
type shelf struct {
	seq     uint64
	size    int
	stuck   atomic.Bool
	release func([]byte) // of what was taken
	seen    func([]byte) // each record, if set
	mark    []byte       // of what was taken last
}

func (s *shelf) Next() uint64                          { return s.seq }
func (s *shelf) Begin() []byte                         { return nil }
func (s *shelf) BeginDecision(event.Decisions) []byte  { return nil }
func (s *shelf) Size() int                             { return s.size }
func (s *shelf) Unnamed(dst []event.Loss) []event.Loss { return dst }
func (s *shelf) Dropped() event.Loss                   { return event.Loss{} }
func (s *shelf) End(rec []byte, _ bool, _ []event.Loss) error {
	s.seq, s.size = s.seq+1, s.size+len(rec)
	if s.seen != nil {
		s.seen(rec)
	}
	return nil
}

func (s *shelf) Flush(ctx context.Context, mark []byte) error {
	if s.stuck.Load() {
		<-ctx.Done()
		return ctx.Err()
	}
	s.size, s.mark = 0, slices.Clone(mark)
	if s.release != nil {
		s.release(mark)
	}
	return nil
}

// openSensor opens a sensor with a sink of no disk, attached within the scope. With
// durable set, what the sink takes counts as such.
func openSensor(t *testing.T, o Options, durable bool) (*Sensor, *shelf) {
	t.Helper()
	require(t, "root")
	require(t, "btf")
	host, err := enrich.LoadHost()
	if err != nil {
		t.Fatal(err)
	}
	enricher := enrich.New(enrich.Options{Host: host, HashPerSecond: -1})
	t.Cleanup(enricher.Close)
	sink := &shelf{}
	if o.PriorityBytes == 0 {
		o.PriorityBytes = testRing
	}
	if o.BulkBytes == 0 {
		o.BulkBytes = testRing
	}
	o.Host, o.Enricher, o.Encoder, o.Sink = host, enricher, ocsf.New(host, event.Agent{}), sink
	o.Registerer = prometheus.NewPedanticRegistry()
	if o.ExerciseDir == "" {
		o.ExerciseDir = t.TempDir()
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	if durable {
		sink.release = s.Release
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := s.Attach(); err != nil {
		t.Fatal(err)
	}
	return s, sink
}

// runWorker runs the worker until the returned function, or the test, ends it.
func runWorker(t *testing.T, s *Sensor) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Run(ctx, time.Millisecond); err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("run: %v", err)
		}
	}()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

// await waits until a condition holds.
func await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(time.Millisecond) { //nolint:forbidigo // polls
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
	}
}

// later is when a heartbeat that was sent now is overdue.
func later() time.Time { return time.Now().Add(stuckAfter + time.Second) }

// TestRootHeartbeat sends heartbeats through the kernel under scopes that the sensor is not
// in: they come back through both rings, are no events, and are waited for no longer.
func TestRootHeartbeat(t *testing.T) {
	a := startActor(t)
	for _, scope := range []Scope{
		{Mode: ScopeTree, PID: uint32(a.pid)},
		{Mode: ScopeCgroup, CgroupID: 1 << 40},
	} {
		t.Run(map[ScopeMode]string{ScopeTree: "tree", ScopeCgroup: "cgroup"}[scope.Mode], func(t *testing.T) {
			s, _ := openSensor(t, Options{Scope: scope}, true)
			runWorker(t, s)
			reg := s.o.Registerer.(prometheus.Gatherer)
			metrics := metricstest.Gather(t, reg)
			for want := uint64(1); want <= 3; want++ {
				if err := s.sendBeat(); err != nil {
					t.Fatal(err)
				}
				await(t, "heartbeat in both rings", func() bool {
					return s.pulse.rings[0].serial.Load() == want && s.pulse.rings[1].serial.Load() == want
				})
				await(t, "heartbeat settled", func() bool {
					s.Stuck(time.Now())
					s.pulse.mu.Lock()
					defer s.pulse.mu.Unlock()
					return s.pulse.waiting == 0
				})
			}
			sums, err := s.kernel.counters()
			if err != nil {
				t.Fatal(err)
			}
			if c := sums[event.Heartbeat]; c.Attempts != 6 || c.Lost != 0 {
				t.Errorf("counted %+v", c)
			}
			var left announcement
			if err := s.kernel.maps["announced_threads"].Lookup(announcedHeartbeat, &left); err != nil || left.Tid != 0 {
				t.Errorf("still announced: %+v, %v", left, err)
			}
			if age := s.pulseAge(0); age < 0 || age > patience.Seconds() {
				t.Errorf("age %v s", age)
			}
			metricstest.Moved(t, metrics, metricstest.Gather(t, reg), "sensor_heartbeat_age_seconds")
		})
	}
}

// TestRootStuckStage stops each stage in turn and asks which one it was.
func TestRootStuckStage(t *testing.T) {
	scope := Scope{Mode: ScopeCgroup, CgroupID: 1 << 40}
	beat := func(t *testing.T, s *Sensor) {
		t.Helper()
		if err := s.sendBeat(); err != nil {
			t.Fatal(err)
		}
	}
	check := func(t *testing.T, s *Sensor, stage, says string) {
		t.Helper()
		if got := s.Stuck(later()); got.Stage != stage || !strings.Contains(got.Reason, says) {
			t.Errorf("stuck at %q: %s; want %q and %q", got.Stage, got.Reason, stage, says)
		}
	}
	written := func(t *testing.T, s *Sensor, n uint64) {
		t.Helper()
		await(t, "heartbeats in the kernel", func() bool {
			sums, err := s.kernel.counters()
			if err != nil {
				t.Fatal(err)
			}
			return sums[event.Heartbeat].Attempts >= n
		})
	}
	t.Run("nothing", func(t *testing.T) {
		s, _ := openSensor(t, Options{Scope: scope}, true)
		runWorker(t, s)
		beat(t, s)
		await(t, "all is well", func() bool {
			return s.Stuck(time.Now().Add(stuckAfter/2)) == Stuck{} && s.pulse.rings[1].serial.Load() == 1
		})
		await(t, "settled", func() bool { beat(t, s); s.Stuck(time.Now()); return s.pulse.rings[1].serial.Load() > 1 })
	})
	t.Run("program", func(t *testing.T) {
		s, _ := openSensor(t, Options{Scope: scope}, true)
		exit := s.kernel.find(event.Exit)
		for _, l := range exit.links {
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}
		beat(t, s)
		check(t, s, StageProgram, exit.section+" does not run")
	})
	t.Run("worker", func(t *testing.T) {
		s, _ := openSensor(t, Options{Scope: scope}, true)
		beat(t, s)
		written(t, s, 2)
		check(t, s, StageWorker, "has not come to it")
	})
	t.Run("ring", func(t *testing.T) {
		s, _ := openSensor(t, Options{Scope: scope, BulkBytes: os.Getpagesize()}, true)
		for n := uint64(1); ; n++ { // until they have no room
			beat(t, s)
			written(t, s, 2*n)
			sums, err := s.kernel.counters()
			if err != nil {
				t.Fatal(err)
			}
			if sums[event.Heartbeat].Lost > 0 {
				break
			}
		}
		s.pulse.mu.Lock()
		s.pulse.waiting = s.pulse.serial
		s.pulse.mu.Unlock()
		s.pulse.rings[0].met(s.pulse.serial, 0, 0) // that ring has room
		check(t, s, StageRing, "the bulk ring has had no room")
	})
	t.Run("buffer does not commit", func(t *testing.T) {
		s, _ := openSensor(t, Options{Scope: scope}, false)
		s.Notify(t.Context(), event.SelfInfo{Message: "so that there is something to commit"})
		runWorker(t, s)
		await(t, "handed over", func() bool { return s.Beat() != time.Time{} })
		beat(t, s)
		await(t, "read", func() bool { return s.pulse.rings[0].serial.Load() == 1 && s.pulse.rings[1].serial.Load() == 1 })
		await(t, "stuck at the buffer", func() bool {
			s.beat.Store(int64(time.Hour)) // the worker still turns by then; it may just have ended a turn
			got := s.Stuck(later())
			return got.Stage == StageBuffer && strings.Contains(got.Reason, "is not durable")
		})
	})
	t.Run("buffer takes nothing", func(t *testing.T) {
		s, sink := openSensor(t, Options{Scope: scope}, true)
		sink.stuck.Store(true)
		s.Notify(t.Context(), event.SelfInfo{Message: "so that there is something to take"})
		runWorker(t, s)
		await(t, "handing over", func() bool { return s.pulse.handing.Load() != 0 })
		beat(t, s)
		check(t, s, StageBuffer, "has not taken")
	})
}

func TestJudgeNamesTheFirstCause(t *testing.T) {
	now := time.Unix(1000, 0)
	before, recently := now.Add(-20*time.Second), now.Add(-time.Second)
	waiting := findings{now: now, turn: recently, sent: recently, since: before, waiting: true, hook: "tp_btf/x", written: 8}
	back := ringFindings{read: true, released: true}
	with := func(change func(*findings)) findings {
		f := waiting
		f.rings = [2]ringFindings{back, back}
		change(&f)
		return f
	}
	for _, tt := range []struct {
		name  string
		f     findings
		stage string
	}{
		{"before the first", findings{now: now}, ""},
		{"all well", findings{now: now, turn: recently, sent: recently, since: recently, waiting: true}, ""},
		{"not sent", findings{now: now, turn: recently, sent: before}, StageHeartbeat},
		{"cannot be sent", findings{now: now, turn: recently, failed: errors.New("x")}, StageHeartbeat},
		{"no record", with(func(f *findings) { f.written = 0 }), StageProgram},
		{"priority ring not read", with(func(f *findings) { f.rings[0] = ringFindings{} }), StageWorker},
		{"bulk ring not read", with(func(f *findings) { f.rings[1] = ringFindings{} }), StageWorker},
		{"no room, not read", with(func(f *findings) { f.lost = 4; f.rings[1] = ringFindings{unread: 100, used: 100} }), StageRing},
		{"no room, not durable", with(func(f *findings) { f.lost = 4; f.rings[1] = ringFindings{unread: 8, used: 100} }), StageBuffer},
		{"not durable", with(func(f *findings) { f.rings[0].released = false }), StageBuffer},
		{"worker stands, so its rings are full", with(func(f *findings) { f.turn, f.lost, f.rings[0] = before, 4, ringFindings{} }), StageWorker},
		{"sink takes nothing, so the worker stands", with(func(f *findings) { f.handing, f.turn = before, before }), StageBuffer},
	} {
		if got := tt.f.judge(); got.Stage != tt.stage || (got.Reason == "") != (tt.stage == "") {
			t.Errorf("%s: %q %q, want %q", tt.name, got.Stage, got.Reason, tt.stage)
		}
	}
}

// TestRootHeartbeatCost logs what the end of an ordinary thread takes in the kernel's own
// run statistics.
func TestRootHeartbeatCost(t *testing.T) {
	a := startActor(t)
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		t.Fatal(err)
	}
	defer stats.Close()
	k := openKernel(t, kernelOptions{Scope: Scope{Mode: ScopeCgroup, CgroupID: 1 << 40}})
	a.must(request{Op: "storm", Path: "/bin/true", Count: 200})
	for _, p := range k.find(event.Exit).programs {
		s, err := p.Stats()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d runs, %d ns each", s.RunCount, s.Runtime.Nanoseconds()/int64(max(s.RunCount, 1)))
	}
}
