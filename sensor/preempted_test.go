// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// crowd lets processes of many threads begin and end at the same time until done says
// that it is enough, which it has to before long, and returns the processes.
func crowd(t *testing.T, root *actor, done func(round int) bool) (pids []int) {
	t.Helper()
	var workers []*actor
	for range 4 {
		workers = append(workers, root.spawn())
	}
	var mu sync.Mutex
	for round := 1; ; round++ {
		var wg sync.WaitGroup
		for _, w := range workers {
			wg.Go(func() {
				for range 5 {
					ran := w.do(request{Op: "run", Path: "/proc/self/exe", Env: []string{threadEnv + "=30"}})
					talk := w.do(request{Op: "converse", Network: "tcp4", Up: 1, Count: 5})
					mu.Lock()
					pids = append(pids, ran.PID)
					mu.Unlock()
					if ran.Err != "" || talk.Err != "" {
						t.Error(ran.Err, talk.Err)
					}
				}
			})
		}
		wg.Wait()
		if done(round) || t.Failed() {
			return pids
		}
	}
}

// leftOut is how many runs of each copy the kernel left out.
func leftOut(t *testing.T, k *kernel) (n [3]uint64) {
	t.Helper()
	for _, a := range k.attached {
		for i, p := range append(slices.Clip(a.programs), a.spares...) {
			s, err := p.Stats()
			if err != nil {
				t.Fatal(err)
			}
			n[i] += s.RecursionMisses
		}
	}
	return n
}

const mostRounds = 15

// What the kernel leaves one copy of a program out for, another copy reports, and none
// reports what another one has. What all were left out for is counted.
func TestRootCopies(t *testing.T) {
	a := startActor(t)
	k := openKernel(t, kernelOptions{Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, Copies: 3})
	priority, bulk := newTap(t, k.priority), newTap(t, k.bulk)
	preempts := copiesFor(release()) > 1
	pids := crowd(t, a, func(round int) bool {
		return !preempts || leftOut(t, k)[0] >= 5 || round == mostRounds
	})
	marker := a.must(request{Op: "run", Path: "/bin/true"}).PID
	records := priority.until("exit", exited(marker))
	forked := map[int]int{}
	for _, r := range records {
		if r.fork != nil {
			forked[int(r.fork.ChildPid)]++
		}
	}
	unseen := 0
	for _, pid := range append(pids, marker) {
		for kind, n := range map[event.Kind]int{event.Exec: count(records, event.Exec, pid), event.Exit: count(records, event.Exit, pid), event.Fork: forked[pid]} {
			switch n {
			case 1:
			case 0:
				unseen++
			default:
				t.Errorf("%d records of %s for process %d", n, kind, pid)
			}
		}
	}
	seen := map[event.Kind]int{}
	for _, r := range bulk.rest() {
		seen[kindOf(r.SensorEventHeader)]++
	}
	talks := len(pids) * 5
	for kind, want := range map[event.Kind]int{event.TCPListen: talks, event.TCPConnect: talks, event.TCPAccept: talks, event.TCPClose: 2 * talks} {
		if seen[kind] > want {
			t.Errorf("%d records of %s, want %d", seen[kind], kind, want)
		}
		unseen += want - seen[kind]
	}
	missed, err := k.missed()
	n := leftOut(t, k)
	t.Logf("%d processes, %d connections: left out %d runs of each copy, %d of all, %d events unseen", len(pids), talks, n, missed, unseen)
	// On a machine that is busy enough all copies may be left out for one event, which is told.
	if err != nil || unseen > int(missed) {
		t.Errorf("%d events are unseen, %d are told to be; %v", unseen, missed, err)
	}
	// Each of the copies that are preempted at the same time has room for its record.
	counters, err := k.counters()
	if err != nil {
		t.Fatal(err)
	}
	for kind, c := range counters {
		if c.Lost > 0 {
			t.Errorf("%s: %d of %d lost", event.Kind(kind), c.Lost, c.Attempts)
		}
	}
	if preempts && n[0] == 0 {
		t.Error("nothing was left out: this shows nothing")
	}
}

// count is how many records of a kind there are about a process.
func count(records []record, kind event.Kind, pid int) (n int) {
	for _, r := range records {
		if kindOf(r.SensorEventHeader) == kind && int(r.Pid) == pid {
			n++
		}
	}
	return n
}

// The same for system calls, of which nothing tells one from the next.
func TestRootCopiesOfSystemCalls(t *testing.T) {
	a := startActor(t)
	k := prepare(t, kernelOptions{Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, BulkBytes: 64 << 20, Files: FileOptions{On: true}, Copies: 3})
	for i := range k.attached {
		if h := &k.attached[i].hook; len(h.syscalls) > 0 {
			h.chain = nil
		}
	}
	if err := k.attach(); err != nil {
		t.Fatal(err)
	}
	bulk := newTap(t, k.bulk)
	dir := real(t, t.TempDir())
	const each = 300
	var wg sync.WaitGroup
	workers := []*actor{a.spawn(), a.spawn(), a.spawn(), a.spawn()}
	for i, w := range workers {
		path := filepath.Join(dir, fmt.Sprint(i))
		wg.Go(func() {
			if said := w.do(request{Op: "storm of files", Args: []string{"mkdir", "rmdir"}, Env: []string{path}, Count: each}); said.Err != "" {
				t.Error(said.Err)
			}
		})
	}
	wg.Wait()
	seen := map[event.Kind]int{}
	for _, r := range bulk.rest() {
		seen[kindOf(r.SensorEventHeader)]++
	}
	missed, err := k.missed()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d calls: left out %d runs of each copy, %d of all; %d and %d seen", 2*each*len(workers), leftOut(t, k), missed, seen[event.FileMkdir], seen[event.FileDelete])
	for _, kind := range kinds(event.FileMkdir, event.FileDelete) {
		if want := each * len(workers); seen[kind] > want || seen[kind]+int(missed) < want {
			t.Errorf("%d records of %s, want %d, but for %d at most", seen[kind], kind, want, missed)
		}
	}
}

// A single copy has to be left out by the same work, and what it does not see counted.
func TestRootCopiesNegativeControl(t *testing.T) {
	a := startActor(t)
	if copiesFor(release()) == 1 {
		t.Skipf("Linux %s does not preempt tracepoints", release())
	}
	k := openKernel(t, kernelOptions{Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, Copies: 1})
	priority := newTap(t, k.priority)
	pids := crowd(t, a, func(round int) bool { return leftOut(t, k)[0] > 0 || round == mostRounds })
	marker := a.must(request{Op: "run", Path: "/bin/true"}).PID
	records := priority.until("exit", exited(marker))
	unseen := uint64(0)
	for _, pid := range pids {
		if !slices.ContainsFunc(records, exited(pid)) {
			unseen++
		}
	}
	missed, err := k.missed()
	t.Logf("%d processes: %d runs left out, %d exits unseen", len(pids), missed, unseen)
	if err != nil || missed == 0 || unseen > missed {
		t.Errorf("%d runs left out, %d exits unseen, %v", missed, unseen, err)
	}
	reg := prometheus.NewPedanticRegistry()
	s := newWorker(reg, &fullSink{})
	s.kernel = k
	before := metricstest.Gather(t, reg)
	s.reportMissed(logging.Into(t.Context(), zap.NewNop()), event.SelfInfo{})
	metricstest.Moved(t, before, metricstest.Gather(t, reg), "sensor_missed_runs_total")
}

// Of the forms of programs that see files, the kernel leaves out only those that come
// last where it does that.
func TestRootPreemptedForms(t *testing.T) {
	a := startActor(t)
	if copiesFor(release()) == 1 {
		t.Skipf("Linux %s does not preempt tracepoints", release())
	}
	var workers []*actor
	for range 4 {
		workers = append(workers, a.spawn())
	}
	dir := t.TempDir()
	for _, form := range []string{"lsm", "kprobe", "fentry"} {
		t.Run(form, func(t *testing.T) {
			k := watchFiles(t, a, FileOptions{}, form, event.FileCreate, event.FileModify, event.FileChmod, event.FileDelete)
			left := func() (n uint64) {
				for i := range k.attached {
					if !strings.HasPrefix(k.attached[i].section, form) {
						continue
					}
					missed, err := k.attached[i].missed()
					if err != nil {
						t.Fatal(err)
					}
					n += missed
				}
				return n
			}
			if !strings.HasPrefix(k.find(event.FileCreate).section, form) {
				t.Skipf("this kernel refuses %s for files", form)
			}
			rounds := 3
			if form == "fentry" {
				rounds = mostRounds
			}
			round := 0
			for ; round < rounds && left() == 0; round++ {
				var wg sync.WaitGroup
				for i, w := range workers {
					path := filepath.Join(dir, fmt.Sprint(form, i))
					wg.Go(func() {
						what := []string{"create", "append", "chmod", "unlink"}
						if err := w.do(request{Op: "storm of files", Args: what, Env: []string{path}, Count: 200}).Err; err != "" {
							t.Error(err)
						}
					})
				}
				wg.Wait()
			}
			n := left()
			t.Logf("left out %d runs in %d rounds", n, round)
			if (n > 0) != (form == "fentry") {
				t.Errorf("left out %d runs of %s", n, form)
			}
		})
	}
}

func TestCopiesFor(t *testing.T) {
	for release, want := range map[string]int{
		"5.10.0-32-cloud-amd64": 1, "6.18.44": 1, "7.0.0": 3, "7.2.13+deb-amd64": 3, "10.1": 3, "": 1, "x": 1,
	} {
		if got := copiesFor(release); got != want {
			t.Errorf("%q: %d copies, want %d", release, got, want)
		}
	}
}
