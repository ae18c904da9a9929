// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	zaptest "go.uber.org/zap/zaptest/observer"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/enrich"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// TestRootDeep has processes do more than their token bucket holds: of those that a case
// wants everything of, and of those they start, nothing is left out; of others it is.
func TestRootDeep(t *testing.T) {
	a := startActor(t)
	inside, outside := a.spawn(), a.spawn()
	k := watchFiles(t, a, FileOptions{Rate: 1, Burst: 10}, "", event.FileMkdir)
	k.deepen(uint32(inside.pid), enrich.DeepSubtree)
	k.deepen(uint32(outside.pid), enrich.DeepProcess)
	child, other := inside.spawn(), outside.spawn()
	k.deepen(uint32(outside.pid), enrich.DeepOff)
	bulk := newTap(t, k.bulk)
	dir := real(t, t.TempDir())
	const n = 50
	next := 0
	flood := func(a *actor) {
		t.Helper()
		for range n {
			next++
			a.must(request{Op: "file", Args: []string{"mkdir", filepath.Join(dir, fmt.Sprint(next))}})
		}
	}
	made := map[int]int{}
	count := func() {
		for _, r := range bulk.rest() {
			made[int(r.Pid)]++
		}
	}
	for _, a := range []*actor{inside, child, outside, other} {
		flood(a)
	}
	count()
	for name, tt := range map[string]struct {
		a    *actor
		deep bool
	}{"in the case": {inside, true}, "its child": {child, true}, "no more": {outside, false}, "child of one process": {other, false}} {
		if got := made[tt.a.pid]; (got == n) != tt.deep || got < 10 {
			t.Errorf("%s: %d of %d records", name, got, n)
		}
	}
	sums, err := k.counters()
	if err != nil {
		t.Fatal(err)
	}
	if c, want := sums[event.FileMkdir], uint64(2*n-made[outside.pid]-made[other.pid]); c.Suppressed != want {
		t.Errorf("counted %+v, want %d left out", c, want)
	}

	// A process that ends is taken out: the next one with its pid is no part of it.
	var mode uint8
	if err := k.maps["deep_pids"].Lookup(uint32(child.pid), &mode); err != nil || enrich.Deep(mode) != enrich.DeepSubtree {
		t.Errorf("the child: %d, %v", mode, err)
	}
	priority := newTap(t, k.priority)
	child.do(request{Op: "end"})
	priority.until("exit of the child", func(r record) bool { return r.exit != nil && int(r.Pid) == child.pid })
	if err := k.maps["deep_pids"].Lookup(uint32(child.pid), &mode); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("after its end: %d, %v", mode, err)
	}
	k.deepen(uint32(inside.pid), enrich.DeepOff)
	clear(made)
	flood(inside)
	count()
	if made[inside.pid] > 10 {
		t.Errorf("%d records after the case ended", made[inside.pid])
	}
}

func TestRootDeepLiftsExclusions(t *testing.T) {
	a := startActor(t)
	inside, outside := a.spawn(), a.spawn()
	dir := real(t, t.TempDir())
	for name, o := range map[string]FileOptions{
		"executable": {ExcludeExecutables: []string{real(t, "/proc/self/exe")}},
		"directory":  {ExcludeDirectories: []string{dir}},
	} {
		t.Run(name, func(t *testing.T) {
			k := watchFiles(t, a, o, "", event.FileCreate, event.FileMkdir)
			degraded := len(k.find(event.FileMkdir).programs) == 0
			if name == "directory" && degraded {
				t.Skip("directories are not excluded where paths come from system calls")
			}
			k.deepen(uint32(inside.pid), enrich.DeepProcess)
			bulk := newTap(t, k.bulk)
			for _, who := range []*actor{inside, outside} {
				who.must(request{Op: "file", Args: []string{"create", filepath.Join(dir, fmt.Sprint(name, who.pid))}})
			}
			made := map[int]int{}
			for _, r := range bulk.rest() {
				made[int(r.Pid)]++
			}
			if made[inside.pid] == 0 || made[outside.pid] != 0 {
				t.Errorf("%d records inside of the case, %d outside, want some and none", made[inside.pid], made[outside.pid])
			}
		})
	}
}

// TestNothingIsTaggedAfterTheAnswer: until the worker answers, it tags for a case that has
// ended, and counts that; afterwards it does not. It answers also while it stops.
func TestNothingIsTaggedAfterTheAnswer(t *testing.T) {
	ctx := logging.Into(t.Context(), zap.NewNop())
	s, ring, _ := memoryWorker(t, &fullSink{})
	s.wait = &waiter{closed: true}
	c := &event.Case{ID: "C", Scope: event.CaseScope{Kind: event.CaseUser, UID: 1}}
	s.SetCases([]*event.Case{c})
	s.applyCases()
	read := func(want uint64) {
		t.Helper()
		ring.put(wireExec(event.Exec, 0, "/bin/true", "", "/bin/true", "/", "/", "true"), 0)
		if n, err := s.poll(ctx); n != 1 || err != nil {
			t.Fatalf("%d events, %v", n, err)
		}
		if n := c.Tagged.Load(); n != want {
			t.Errorf("%d events are tagged, want %d", n, want)
		}
	}
	read(1)
	answer := s.SetCases(nil)
	read(2)
	if len(answer) > 0 {
		t.Error("there is an answer while the worker tags")
	}
	if _, err := s.empty(ctx, false); err != nil || len(answer) == 0 {
		t.Errorf("%d answers at the stop, %v", len(answer), err)
	}
	read(2)
}

// TestLinesAboutAnEventCarryItsCase has the worker refuse events, which is all that it
// ever says of a single one: of a case's event it says so with the oldest case's ids, and
// one case's line never stands for another's, nor for that of an event of none.
func TestLinesAboutAnEventCarryItsCase(t *testing.T) {
	core, lines := zaptest.New(zapcore.InfoLevel)
	ctx := logging.With(logging.Into(t.Context(), zap.New(core)), zap.String(logging.KeyAgentID, "a"), zap.String(logging.KeyCaseID, "of the run"))
	s := newWorker(prometheus.NewPedanticRegistry(), &fullSink{err: errors.New("too large")})
	c1, c2 := &event.Case{ID: "C-1", InvestigationID: "I-1", UserID: "mara"}, &event.Case{ID: "C-2"}
	for _, in := range [][]*event.Case{nil, {c1, c2}, {c2}, {c1}, nil} {
		s.write(ctx, 0, &event.Event{Kind: event.Exit, Cases: in}, false, nil)
	}
	want := []map[string]any{
		{"agent_id": "a", "case_id": "of the run"},
		{"agent_id": "a", "case_id": "C-1", "investigation_id": "I-1", "user_id": "mara"},
		{"agent_id": "a", "case_id": "C-2"},
	}
	var got []map[string]any
	for _, l := range lines.All() {
		ids := l.ContextMap()
		for _, k := range []string{"event", "bytes", "error"} {
			delete(ids, k)
		}
		got = append(got, ids)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("lines (-want +got):\n%s", diff)
	}
}
