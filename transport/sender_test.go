// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

func TestSenderStoresEntries(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	q.add(3, buffer.Events, false)
	q.add(2, buffer.DecisionsSystem, true)
	q.add(1, buffer.Events, false)
	q.add(2, buffer.DecisionsAgents, false)
	q.add(1, buffer.DecisionsApprovals, false)
	q.add(1, buffer.Streams+3, false) // of a version that has more

	reg := prometheus.NewPedanticRegistry()
	o := fast(srv.Addr())
	o.Registerer = reg
	s := start(t, o, q)
	s.delivered(t, 10)

	want := func(seqs ...uint64) (es []entry) {
		for _, seq := range seqs {
			es = append(es, entry{fmt.Sprintf("uid-%d", seq), "2023-11-14T22:13:20.123456789Z", payload(seq), testAgent, testEpoch, seq})
		}
		return es
	}
	if d := cmp.Diff(want(1, 2, 3, 6), entries(t, c, eventsKey)); d != "" {
		t.Errorf("events (-want +got):\n%s", d)
	}
	for key, seqs := range map[string][]uint64{"decisions:system": {4, 5, 10}, "decisions:agents": {7, 8}, "decisions:approvals": {9}} {
		if d := cmp.Diff(want(seqs...), entries(t, c, key)); d != "" {
			t.Errorf("%s (-want +got):\n%s", key, d)
		}
	}
	cursor := c.HGet(t.Context(), cursorKey, testAgent).Val()
	if want := testEpoch + ":10:" + s.session; cursor != want {
		t.Errorf("cursor %q, want %q", cursor, want)
	}
	st := s.State()
	if st.Phase != Connected || st.Acked != 10 || st.LastReply.IsZero() || st.Error != "" {
		t.Errorf("state %+v", st)
	}
	for name, m := range map[string]struct {
		got  prometheus.Collector
		want float64
	}{
		"events":    {s.m.delivered[buffer.Events], 4},
		"system":    {s.m.delivered[buffer.DecisionsSystem], 3},
		"agents":    {s.m.delivered[buffer.DecisionsAgents], 2},
		"approvals": {s.m.delivered[buffer.DecisionsApprovals], 1},
		"ok":        {s.m.batches[ok], 6},
		"connected": {s.m.connected, 1},
	} {
		if got := testutil.ToFloat64(m.got); got != m.want {
			t.Errorf("%s = %v, want %v", name, got, m.want)
		}
	}
	if n, sum := observed(t, s.m.endToEnd); n != 10 || sum < 10*86400 {
		t.Errorf("end to end: %d observations, %v s in all, of 10 events from 2023", n, sum)
	}
	if n, _ := observed(t, s.m.delivery); n != 0 {
		t.Errorf("%d observations of records whose commit is unknown", n)
	}
	if lint, err := testutil.GatherAndLint(reg); err != nil || len(lint) > 0 {
		t.Errorf("lint: %v %v", lint, err)
	}
}

// settled waits until the server itself has all of q.
func (r *running) settled(t *testing.T, q *memQueue) {
	t.Helper()
	last := q.add(1, buffer.Events, true) // makes a Sender that is behind notice
	r.delivered(t, last)
}

func TestSenderRewindsOverRetainedTail(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	changes := make(chan State, 16)
	reg := prometheus.NewPedanticRegistry()
	o := fast(srv.Addr())
	o.OnChange = func(st State) { changes <- st }
	o.Registerer = reg
	s := start(t, o, q)
	s.delivered(t, q.add(1000, buffer.Events, false))
	before := metricstest.Gather(t, reg)
	if err := c.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	s.delivered(t, q.add(10, buffer.Events, false))
	exactlyOnce(t, c, 1010)
	if got := testutil.ToFloat64(s.m.rewinds); got != 1 {
		t.Errorf("rewinds = %v, want 1", got)
	}
	metricstest.Moved(t, before, metricstest.Gather(t, reg), "transport_rewinds_total")
	if first, second := <-changes, <-changes; first.Rewinds != 0 || second.Rewinds != 1 || second.Behind != (Behind{1, 1000}) || second.Phase != Connected {
		t.Errorf("changes %+v, %+v", first, second)
	}
	if got := q.forfeited(); got != nil {
		t.Errorf("forfeited %v", got)
	}
	if got := testutil.ToFloat64(s.m.delivered[buffer.Events]); got != 1010 {
		t.Errorf("delivered = %v, want each record once", got)
	}
}

func TestSenderForfeitsExactlyWhatIsGone(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	s := start(t, fast(srv.Addr()), q)
	seqs := func() (out []uint64) {
		for _, e := range entries(t, c, eventsKey) {
			out = append(out, e.Seq)
		}
		return out
	}
	flush := func() {
		t.Helper()
		if err := c.FlushAll(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
	}

	s.delivered(t, q.add(100, buffer.Events, false))
	q.drop(1, 79) // the tail kept is 80..100
	flush()
	s.delivered(t, q.add(5, buffer.Events, false))
	if d := cmp.Diff([]span{{1, 79}}, q.forfeited(), cmp.AllowUnexported(span{})); d != "" {
		t.Errorf("forfeited (-want +got):\n%s", d)
	}
	if got := seqs(); len(got) != 26 || got[0] != 80 || got[25] != 105 {
		t.Errorf("stream has %v, want 80..105", got)
	}

	// Again, with a shorter tail: the record that named the first may be lost, too.
	q.drop(80, 89)
	flush()
	s.delivered(t, q.add(5, buffer.Events, false))
	if d := cmp.Diff([]span{{1, 79}, {1, 89}}, q.forfeited(), cmp.AllowUnexported(span{})); d != "" {
		t.Errorf("forfeited (-want +got):\n%s", d)
	}

	// A hole that was never delivered is the queue's own affair.
	s.stop(t)
	q.add(20, buffer.Events, false) // 111..130
	q.drop(111, 115)
	q.drop(120, 121)
	s2 := start(t, fast(srv.Addr()), q)
	s2.delivered(t, 130)
	if n := len(q.forfeited()); n != 2 {
		t.Errorf("forfeited %v", q.forfeited()[2:])
	}
	want := []uint64{}
	for seq := uint64(90); seq <= 130; seq++ {
		if (seq < 111 || seq > 115) && seq != 120 && seq != 121 {
			want = append(want, seq)
		}
	}
	if d := cmp.Diff(want, seqs()); d != "" {
		t.Errorf("stream (-want +got):\n%s", d)
	}
}

func TestSenderProbesWhenIdle(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	o := fast(srv.Addr())
	o.ProbeInterval = 20 * time.Millisecond
	s := start(t, o, q)
	s.delivered(t, q.add(10, buffer.Events, false))
	if err := c.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	// Nothing is appended: only a probe can notice.
	await(t, text("the resent records"), func() bool { return c.XLen(t.Context(), eventsKey).Val() == 10 })
	exactlyOnce(t, c, 10)
	s.reaches(t, Connected, ClassNone)
}

func TestSenderFencesOlderProcess(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	// Two machines with a copy of the same queue.
	q1, q2 := newMemQueue(), newMemQueue()
	q1.add(100, buffer.Events, false)
	q2.add(100, buffer.Events, false)
	o := fast(srv.Addr())
	o.ProbeInterval = 10 * time.Millisecond
	old := start(t, o, q1)
	old.delivered(t, 100)
	s2, err := New(o, q2)
	if err != nil {
		t.Fatal(err)
	}
	s2.process = newProcess(old.session)
	twin := startSender(t, s2)
	twin.delivered(t, 100)
	old.reaches(t, Fenced, ClassFenced)
	twin.delivered(t, q2.add(50, buffer.Events, false))
	q1.add(50, buffer.Events, false)
	// The fenced one keeps asking; it must neither deliver nor take over.
	before := testutil.ToFloat64(old.m.errors[ClassFenced])
	await(t, text("more attempts of the fenced sender"), func() bool { return testutil.ToFloat64(old.m.errors[ClassFenced]) > before+2 })
	if st := old.State(); st.Acked != 100 || st.Phase != Fenced || !strings.Contains(st.Hint, "cloned") {
		t.Errorf("fenced sender: %+v", st)
	}
	twin.reaches(t, Connected, ClassNone)
	exactlyOnce(t, c, 150)

	// The fenced process restarts: its hello takes the session.
	old.stop(t)
	q1.drop(101, 150) // as after a new start with the same, shorter queue
	q1.mu.Lock()
	q1.last = 150
	q1.mu.Unlock()
	again := start(t, o, q1)
	twin.reaches(t, Fenced, ClassFenced)
	again.reaches(t, Connected, ClassNone)
}

func TestSenderKeepsSessionWhenServerGoesBack(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	s := start(t, fast(srv.Addr()), q)
	s.delivered(t, q.add(20, buffer.Events, false))
	// A restored backup: an earlier process of this agent is in the cursor.
	err := c.HSet(t.Context(), cursorKey, testAgent, testEpoch+":7:000000000000000000010000").Err()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.XTrimMaxLen(t.Context(), eventsKey, 0).Err(); err != nil {
		t.Fatal(err)
	}
	s.delivered(t, q.add(1, buffer.Events, false))
	var got []uint64
	for _, e := range entries(t, c, eventsKey) {
		got = append(got, e.Seq)
	}
	if len(got) != 14 || got[0] != 8 || got[13] != 21 {
		t.Errorf("resent %v, want 8..21", got)
	}
}

func TestSenderNewSessionIsAboveTheStored(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	const future = "ff00000000000000000a0007" // written before the clock was set back
	if err := c.HSet(t.Context(), cursorKey, testAgent, testEpoch+":0:"+future).Err(); err != nil {
		t.Fatal(err)
	}
	q := newMemQueue()
	s := start(t, fast(srv.Addr()), q)
	s.delivered(t, q.add(1, buffer.Events, false))
	if s.session <= future {
		t.Errorf("session %s is not above %s", s.session, future)
	}
}

func TestSenderRefusesServerAheadOfQueue(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	if err := c.HSet(t.Context(), cursorKey, testAgent, testEpoch+":500:000000000000000000010000").Err(); err != nil {
		t.Fatal(err)
	}
	q := newMemQueue() // restored from a copy: it ends at 10
	q.add(10, buffer.Events, false)
	s := start(t, fast(srv.Addr()), q)
	s.reaches(t, Fenced, ClassFenced)
	if n := c.XLen(t.Context(), eventsKey).Val(); n != 0 {
		t.Errorf("%d entries", n)
	}

	// A newer epoch in the cursor: this queue is the old one.
	newer := "0292f0c0ffee0badf00d"
	if err := c.HSet(t.Context(), cursorKey, testAgent, newer+":1:000000000000000000010000").Err(); err != nil {
		t.Fatal(err)
	}
	s.stop(t)
	s = start(t, fast(srv.Addr()), q)
	if st := s.reaches(t, Fenced, ClassFenced); !strings.Contains(st.Error, newer) {
		t.Errorf("error %q does not name epoch %s", st.Error, newer)
	}
}

func TestSenderDrain(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	o := fast(srv.Addr())
	o.Linger = time.Hour // a drain must not wait for batches to fill
	s, err := New(o, q)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(quiet(t))
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Drain(quiet(t)); err != nil { // of nothing
		t.Fatal(err)
	}
	q.add(700, buffer.Events, false)
	if err := s.Drain(quiet(t)); err != nil {
		t.Fatal(err)
	}
	exactlyOnce(t, c, 700)
	lose := func() {
		s.disconnect()
		if err := c.FlushAll(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
	}
	lose()
	if err := s.Drain(quiet(t)); err != nil { // what the server had confirmed
		t.Fatal(err)
	}
	exactlyOnce(t, c, 700)
	lose()
	q.drop(1, 700)
	if err := s.Drain(quiet(t)); err != nil { // and there is nothing to send again
		t.Fatal(err)
	}

	s.disconnect()
	srv.Kill9()
	if err := s.Drain(quiet(t)); err != nil {
		t.Errorf("drain of nothing, without a server: %v", err)
	}
	srv.Restart()
	if err := s.Drain(quiet(t)); err != nil {
		t.Fatal(err)
	}
	q.add(5, buffer.Events, false)
	srv.Kill9()
	err = s.Drain(quiet(t))
	if err == nil || !strings.Contains(err.Error(), "drain: 5 records not delivered") {
		t.Errorf("drain without a server: %v", err)
	}
	srv.Launch()
	srv.Stall()
	short, cancel := context.WithTimeout(quiet(t), 50*time.Millisecond)
	defer cancel()
	if err := s.Drain(short); err == nil {
		t.Error("drain with a stalled server succeeded")
	}
	srv.Resume()
}

func TestSenderSendsUrgentAtOnce(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	q := newMemQueue()
	o := fast(srv.Addr())
	o.Linger = time.Hour
	s := start(t, o, q)
	q.add(3, buffer.Events, false)
	s.reaches(t, Connected, ClassNone)
	q.add(1, buffer.Events, true)
	s.delivered(t, 4)
	// A full batch does not linger either; what is left of it does.
	q.add(o.BatchRecords+256, buffer.Events, false)
	s.delivered(t, 4+256)
	q.add(1, buffer.DecisionsSystem, true)
	s.delivered(t, q.Bounds().Last)
}

func TestSenderLargeRecordTravelsAlone(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	q.add(2, buffer.Events, false)
	big := `{"metadata":{"uid":"big"},"time_dt":"2023-11-14T22:13:20Z","data":"` + strings.Repeat("x", 4<<20) + `"}`
	q.recs[1].Data = []byte(big)
	q.add(2, buffer.Events, false)
	s := start(t, fast(srv.Addr()), q)
	s.delivered(t, 4)
	es := entries(t, c, eventsKey)
	if len(es) != 4 || es[1].Data != big || es[1].ID != "big" {
		t.Errorf("got %d entries", len(es))
	}
}

func TestSenderStopsWithQueueError(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	broken := errors.New("page 7: checksum mismatch")
	s, err := New(fast(srv.Addr()), brokenQueue{newMemQueue(), broken})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Run(quiet(t)); !errors.Is(err, broken) || !strings.HasPrefix(err.Error(), "read buffer: ") {
		t.Errorf("Run: %v", err)
	}
}

type brokenQueue struct {
	*memQueue
	err error
}

func (q brokenQueue) Read(context.Context, uint64, []buffer.Record, int, int) ([]buffer.Record, error) {
	return nil, q.err
}

func TestT15EvictionAlarm(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{Config: map[string]string{"maxmemory-policy": "allkeys-lru"}})
	q := newMemQueue()
	changes := make(chan State, 64)
	o := fast(srv.Addr())
	o.ProbeInterval = 10 * time.Millisecond
	o.OnChange = func(s State) { changes <- s }
	reg := prometheus.NewPedanticRegistry()
	o.Registerer = reg
	s := start(t, o, q)
	if st := <-changes; st.Phase != Connected || len(st.Risks) != 1 || !strings.Contains(st.Risks[0].Text, "allkeys-lru") {
		t.Errorf("first change %+v", st)
	}
	calm := prometheus.NewPedanticRegistry()
	newMetrics(calm)
	metricstest.Moved(t, metricstest.Gather(t, calm), metricstest.Gather(t, reg), "transport_risk")
	srv.Kill9()
	for st := range changes {
		if st.Phase == Retrying && st.Class == ClassDial && st.Hint != "" {
			break
		}
	}
	srv.Restart()
	for st := range changes {
		if st.Phase == Connected {
			break
		}
	}
	c := srv.Client()
	defer c.Close()
	if err := c.ConfigSet(t.Context(), "maxmemory-policy", "noeviction").Err(); err != nil {
		t.Fatal(err)
	}
	if err := c.ClientKillByFilter(t.Context(), "TYPE", "normal").Err(); err != nil {
		t.Fatal(err)
	}
	await(t, text("a server that was set right is no risk"), func() bool { return testutil.ToFloat64(s.m.risks[RiskEviction]) == 0 })
	s.stop(t)
}

// TestSenderLogs checks that a server that is away for many attempts costs two
// lines, that they carry what the context binds, and that they help.
func TestSenderLogs(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	core, logs := observer.New(zapcore.DebugLevel)
	ctx, cancel := context.WithCancel(logging.With(logging.Into(t.Context(), zap.New(core)), zap.String(logging.KeyCaseID, "case-7")))
	q := newMemQueue()
	s, err := New(fast(srv.Addr()), q)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := &running{Sender: s}
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	r.delivered(t, q.add(1, buffer.Events, true))
	srv.Kill9()
	last := q.add(1, buffer.Events, true)
	await(t, text("many attempts"), func() bool { return testutil.ToFloat64(s.m.errors[ClassDial]) > 10 })
	srv.Restart()
	r.delivered(t, last)
	r.reaches(t, Connected, ClassNone) // which is said last
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	perClass := make(map[string]int)
	for _, e := range logs.All() {
		f := e.ContextMap()
		if f[logging.KeyCaseID] != "case-7" {
			t.Errorf("%q does not carry the case: %v", e.Message, f)
		}
		if class, failed := f[logging.KeyClass].(string); failed {
			perClass[class]++
			if f[logging.KeyRemedy] == "" || f["error"] == "" {
				t.Errorf("%q does not help: %v", e.Message, f)
			}
		}
	}
	for class, n := range perClass {
		if n != 1 {
			t.Errorf("%d lines for class %s", n, class)
		}
	}
	if perClass[string(ClassDial)] != 1 || logs.FilterMessage("delivering").Len() == 0 {
		t.Errorf("lines: %v", logs.All())
	}
}

func TestNewRefusesBadOptions(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		edit       func(*Options)
	}{
		{"no agent", "agent id is empty", func(o *Options) { o.AgentID = "" }},
		{"no port", "want host:port or unix:///path", func(o *Options) { o.Addr = "localhost" }},
		{"relative socket", "must be absolute", func(o *Options) { o.Addr = "unix://redis.sock" }},
		{"braces", "must not contain braces", func(o *Options) { o.Shard = "{s000}" }},
		{"batch", "must be positive", func(o *Options) { o.BatchRecords = -1 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := fast("127.0.0.1:6379")
			tt.edit(&o)
			if _, err := New(o, newMemQueue()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("New: %v, want %q", err, tt.want)
			}
		})
	}
	q := newMemQueue()
	q.epoch = "not-an-epoch"
	if _, err := New(fast("127.0.0.1:6379"), q); err == nil {
		t.Error("bad epoch accepted")
	}
}

func TestPasswordFile(t *testing.T) {
	path := t.TempDir() + "/password"
	if _, err := readPassword(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	for content, want := range map[string]string{"secret\n": "secret", "a b\r\n": "a b", "x": "x", "\n": ""} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readPassword(path)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("password of %q: %q, %v", content, got, err)
		}
	}
}
