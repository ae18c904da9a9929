// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// owner is what the agent is to a Sender: it moves the queue when that is fenced, and
// remembers processes.
type owner struct {
	name  string
	q     *buffer.Queue
	naive bool // a control: it trusts its clock

	mu        sync.Mutex
	processes []string
	fencings  []Fencing
}

func (w *owner) apply(o *Options) {
	o.Processes = slices.Clone(w.processes)
	o.Remember = func(p []string) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.processes = p
		return nil
	}
	o.Renew = func(ctx context.Context, f Fencing) (string, error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.fencings = append(w.fencings, f)
		above := f.Epoch
		if w.naive {
			above = ""
		}
		if _, err := w.q.Renew(ctx, above); err != nil {
			return "", err
		}
		if f.Cloned {
			return w.name, nil
		}
		return testAgent, nil
	}
}

func (w *owner) fenced() []Fencing {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.fencings)
}

func (w *owner) known() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.processes)
}

// write appends n records whose ids are name-1 and on, from first.
func write(t *testing.T, q *buffer.Queue, name string, first, n int) {
	t.Helper()
	b := q.NewBatch()
	for i := first; i < first+n; i++ {
		if err := b.End(fmt.Appendf(b.Begin(buffer.Events), `{"time":1700000000000,"metadata":{"uid":"%s-%d"}}`, name, i), false); err != nil {
			t.Fatal(err)
		}
	}
	if err := q.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// once checks that the consumer, who drops what is not above the last (epoch, seq) of
// an agent, sees each record of a writer, from 1 to n.
func once(t *testing.T, c *redis.Client, n map[string]int) (agents map[string]map[string]int) {
	t.Helper()
	type at struct {
		epoch string
		seq   uint64
	}
	last := map[string]at{}
	seen := map[string]int{}
	agents = map[string]map[string]int{}
	for _, e := range entries(t, c, eventsKey) {
		l := last[e.Agent]
		if e.Epoch < l.epoch || e.Epoch == l.epoch && e.Seq <= l.seq {
			continue
		}
		last[e.Agent] = at{e.Epoch, e.Seq}
		seen[e.ID]++
		name, _, _ := strings.Cut(e.ID, "-")
		if agents[name] == nil {
			agents[name] = map[string]int{}
		}
		agents[name][e.Agent]++
	}
	for name, count := range n {
		for i := 1; i <= count; i++ {
			if k := seen[fmt.Sprintf("%s-%d", name, i)]; k == 0 {
				t.Errorf("%s-%d is lost", name, i)
			}
		}
	}
	return agents
}

// twins are two machines with one queue: 50 records that were delivered and 20 that
// were not, and 30 of their own.
func twins(t *testing.T, srv *redistest.Server) (a, b *owner) {
	t.Helper()
	dir := t.TempDir()
	q := openBuffer(t, buffer.Options{Dir: dir, Cap: 16 << 20})
	w := &owner{name: "agent-0", q: q}
	write(t, q, "old", 1, 50)
	o := fast(srv.Addr())
	w.apply(&o)
	s := start(t, o, q)
	s.delivered(t, 50)
	s.stop(t)
	write(t, q, "both", 1, 20)
	if err := q.Close(quiet(t)); err != nil {
		t.Fatal(err)
	}
	open := func(name, dir string) *owner {
		q := openBuffer(t, buffer.Options{Dir: dir, Cap: 16 << 20})
		write(t, q, name, 1, 30)
		return &owner{name: "agent-" + name, q: q, processes: slices.Clone(w.processes)}
	}
	copied := t.TempDir()
	if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return open("a", dir), open("b", copied)
}

// TestClone is T9: two agents that were one. Whoever is fenced goes on as another,
// after at most one batch, and no record of either is lost.
func TestClone(t *testing.T) {
	t.Parallel()
	run := func(t *testing.T, own bool) (lost bool) {
		srv := redistest.Start(t, redistest.Options{})
		c := srv.Client()
		defer c.Close()
		a, b := twins(t, srv)
		oa, ob := fast(srv.Addr()), fast(srv.Addr())
		a.apply(&oa)
		b.apply(&ob)
		if !own { // control: they do not know whose process delivered
			oa.Processes, ob.Processes = nil, nil
		}
		reg := prometheus.NewPedanticRegistry()
		ob.Registerer = reg
		sa := start(t, oa, a.q)
		sa.delivered(t, 100)
		calm := prometheus.NewPedanticRegistry()
		newMetrics(calm)
		sb := start(t, ob, b.q)
		if !own {
			sb.delivered(t, 100)
			n := 0
			for _, e := range entries(t, c, eventsKey) {
				if strings.HasPrefix(e.ID, "b-") {
					n++
				}
			}
			return n < 30
		}
		await(t, lazy(func() string { return fmt.Sprintf("the end of B's queue: %+v", sb.State()) }), func() bool {
			s := b.q.Stats()
			return s.Unsent == 0 && s.Before > 0
		})
		metricstest.Moved(t, metricstest.Gather(t, calm), metricstest.Gather(t, reg), "transport_renewals_total")
		if got := testutil.ToFloat64(sb.m.renewals); got != 1 {
			t.Errorf("%v renewals", got)
		}
		// The first twin goes on as it was.
		write(t, a.q, "a", 31, 10)
		sa.delivered(t, 110)
		write(t, b.q, "b", 31, 10)
		await(t, text("B's newest"), func() bool { return b.q.Stats().Unsent == 0 })
		agents := once(t, c, map[string]int{"old": 50, "both": 20, "a": 40, "b": 40})
		if agents["a"][testAgent] != 40 || agents["b"]["agent-b"] != 40 {
			t.Errorf("delivered as %v", agents)
		}
		if f := a.fenced(); len(f) != 0 {
			t.Errorf("A was fenced: %v", f)
		}
		if f := b.fenced(); len(f) != 1 || !f[0].Cloned {
			t.Errorf("B was fenced: %v", f)
		}
		return false
	}
	t.Run("exact", func(t *testing.T) { run(t, true) })
	t.Run("control", func(t *testing.T) {
		if !run(t, false) {
			t.Error("without knowing the processes nothing was lost: the test does not bite")
		}
	})
}

// TestCloneAlive: both run when the second takes the session. The first is fenced at
// its next batch, with all it has not delivered.
func TestCloneAlive(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	a, b := twins(t, srv)
	oa, ob := fast(srv.Addr()), fast(srv.Addr())
	a.apply(&oa)
	b.apply(&ob)
	sa := start(t, oa, &gate{Queue: a.q, open: make(chan struct{})})
	await(t, text("A's hello"), func() bool { return sa.State().Phase == Connected })
	ob.Processes = append(ob.Processes, a.known()...) // copied while A ran
	sb := start(t, ob, b.q)
	sb.delivered(t, 100)
	close(sa.q.(*gate).open)
	await(t, text("the end of A's queue"), func() bool { return a.q.Stats().Unsent == 0 })
	agents := once(t, c, map[string]int{"old": 50, "both": 20, "a": 30, "b": 30})
	if agents["a"]["agent-a"] != 30 || agents["b"][testAgent] != 30 || agents["both"]["agent-a"] != 20 {
		t.Errorf("delivered as %v", agents)
	}
	if f := a.fenced(); len(f) != 1 || !f[0].Cloned {
		t.Errorf("A was fenced: %v", f)
	}
}

// gate is a queue that shows nothing until it is opened.
type gate struct {
	*buffer.Queue
	open chan struct{}
}

func (g *gate) Read(ctx context.Context, after uint64, dst []buffer.Record, n, size int) ([]buffer.Record, error) {
	select {
	case <-g.open:
		return g.Queue.Read(ctx, after, dst, n, size)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// TestFlappingTwins: twins that cannot get another id, because it is configured, fence
// each other. The second time within ten minutes ends it, with everything kept.
func TestFlappingTwins(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	a, b := twins(t, srv)
	a.name, b.name = testAgent, testAgent
	oa, ob := fast(srv.Addr()), fast(srv.Addr())
	oa.ProbeInterval, ob.ProbeInterval = 20*time.Millisecond, 20*time.Millisecond
	a.apply(&oa)
	b.apply(&ob)
	sa, sb := start(t, oa, a.q), start(t, ob, b.q)
	awaitLong(t, lazy(func() string { return fmt.Sprintf("%+v / %+v", sa.State(), sb.State()) }), func() bool {
		return sa.State().Phase == Fenced || sb.State().Phase == Fenced
	})
	stopped, w := sa, a
	if sb.State().Phase == Fenced {
		stopped, w = sb, b
	}
	write(t, w.q, "kept", 1, 5)
	before := testutil.ToFloat64(stopped.m.errors[ClassFenced])
	await(t, text("further attempts"), func() bool { return testutil.ToFloat64(stopped.m.errors[ClassFenced]) >= before+2 })
	if n := len(w.fenced()); n > 1 {
		t.Errorf("renewed %d times", n)
	}
	if n := w.q.Stats().Unsent; n < 5 {
		t.Errorf("%d records wait", n)
	}
	once(t, c, map[string]int{"old": 50})
}

// TestWipedQueue is T10 and T11: a queue that begins anew is delivered from its first
// record, also when the clock has gone back a year in between. No answer that is about
// the queue before may swallow one.
func TestWipedQueue(t *testing.T) {
	t.Parallel()
	for name, epoch := range map[string]string{"wiped": "", "clock set back": "ff92f0c0ffee0badf00d"} {
		t.Run(name, func(t *testing.T) {
			srv := redistest.Start(t, redistest.Options{})
			c := srv.Client()
			defer c.Close()
			mem := newMemQueue()
			if epoch != "" { // as minted with a clock that was ahead
				mem.epoch = epoch
			}
			s := start(t, fast(srv.Addr()), mem)
			s.delivered(t, mem.add(60, buffer.Events, false))
			s.stop(t)

			q := openBuffer(t, buffer.Options{Dir: t.TempDir(), Cap: 16 << 20})
			w := &owner{name: "other", q: q}
			write(t, q, "new", 1, 40)
			o := fast(srv.Addr())
			w.apply(&o)
			start(t, o, q)
			await(t, text("the new queue's end"), func() bool { return q.Stats().Unsent == 0 })
			agents := once(t, c, map[string]int{"uid": 60, "new": 40})
			if agents["new"][testAgent] != 40 {
				t.Errorf("delivered as %v", agents)
			}
			es := entries(t, c, eventsKey)
			if first := es[60]; first.Seq != 1 || first.Epoch <= mem.epoch {
				t.Errorf("the first of the new queue is seq %d of epoch %s, after %s", first.Seq, first.Epoch, mem.epoch)
			}
			want := 0
			if epoch != "" {
				want = 1
			}
			if f := w.fenced(); len(f) != want || want == 1 && f[0].Cloned {
				t.Errorf("fenced: %v", f)
			}
		})
	}
}

// TestWipedQueueControl is the control of T10 and T11: a queue that goes on in its epoch, as
// one would that names the host and not the life of the queue, and one whose new epoch
// comes from the clock alone.
func TestWipedQueueControl(t *testing.T) {
	t.Parallel()
	t.Run("same epoch", func(t *testing.T) {
		srv := redistest.Start(t, redistest.Options{})
		c := srv.Client()
		defer c.Close()
		s := start(t, fast(srv.Addr()), newMemQueue())
		s.q.(*memQueue).add(60, buffer.Events, false)
		s.delivered(t, 60)
		s.stop(t)
		q := newMemQueue()
		q.add(100, buffer.Events, false)
		for i := range q.recs {
			q.recs[i].Data = fmt.Appendf(nil, `{"time":1700000000000,"metadata":{"uid":"new-%d"}}`, i+1)
		}
		s = start(t, fast(srv.Addr()), q)
		s.delivered(t, 100)
		if n := delivered(t, c, "new"); n != 40 {
			t.Errorf("control: %d of 100 new records arrived, want 40: an epoch that is used again does not swallow", n)
		}
	})
	t.Run("clock alone", func(t *testing.T) {
		srv := redistest.Start(t, redistest.Options{})
		c := srv.Client()
		defer c.Close()
		mem := newMemQueue()
		mem.epoch = "ff92f0c0ffee0badf00d"
		s := start(t, fast(srv.Addr()), mem)
		s.delivered(t, mem.add(60, buffer.Events, false))
		s.stop(t)
		q := openBuffer(t, buffer.Options{Dir: t.TempDir(), Cap: 16 << 20})
		w := &owner{name: "other", q: q, naive: true}
		write(t, q, "new", 1, 40)
		o := fast(srv.Addr())
		w.apply(&o)
		s = start(t, o, q)
		s.reaches(t, Fenced, ClassFenced)
		if n := delivered(t, c, "new"); n != 0 || len(w.fenced()) != 1 {
			t.Errorf("control: %d new records arrived, %d fencings: the clock does not matter", n, len(w.fenced()))
		}
	})
}

// delivered is how many records of a writer are in the stream.
func delivered(t *testing.T, c *redis.Client, name string) (n int) {
	t.Helper()
	for _, e := range entries(t, c, eventsKey) {
		if strings.HasPrefix(e.ID, name+"-") {
			n++
		}
	}
	return n
}

// TestRestoredQueue: a queue that was put back to an earlier time goes on in a new
// epoch, as the same agent.
func TestRestoredQueue(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	a, b := twins(t, srv)
	o := fast(srv.Addr())
	a.apply(&o)
	s := start(t, o, a.q)
	s.delivered(t, 100)
	write(t, a.q, "a", 31, 10)
	s.delivered(t, 110)
	s.stop(t) // and is restored from b, which ends before what was delivered
	o = fast(srv.Addr())
	b.apply(&o)
	o.Remember, o.Processes = nil, nil
	start(t, o, b.q)
	await(t, text("the restored queue's end"), func() bool { s := b.q.Stats(); return s.Unsent == 0 && s.Before > 0 })
	agents := once(t, c, map[string]int{"old": 50, "both": 20, "a": 40, "b": 30})
	if agents["b"][testAgent] != 30 {
		t.Errorf("delivered as %v", agents)
	}
}

// TestRenewalWithoutAnAnswer stops a Sender while its queue, a copy, begins a new epoch: it
// must not take what the twin has delivered in the old one for its own.
func TestRenewalWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{})
	a, b := newMemQueue(), newMemQueue()
	a.add(50, buffer.Events, false)
	b.add(50, buffer.Events, false)
	twin := start(t, fast(srv.Addr()), a)
	twin.delivered(t, 50)
	o := fast(srv.Addr())
	o.Processes, o.Remember = []string{newProcess("")}, func([]string) error { return nil }
	s, err := New(o, b)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b.epoch = "f" + testEpoch[1:]
	if err := s.Drain(quiet(t)); err == nil || !strings.Contains(err.Error(), "it is in epoch "+b.epoch) {
		t.Errorf("drain: %v", err)
	}
	if b.acked != 0 {
		t.Errorf("%d records were taken for delivered", b.acked)
	}
	a.add(10, buffer.Events, false)
	twin.delivered(t, 60)
	if n := testutil.ToFloat64(twin.m.errors[ClassFenced]); n != 0 {
		t.Errorf("the twin was fenced %v times", n)
	}
}
