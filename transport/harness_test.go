// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/redis/go-redis/v9"
	redislog "github.com/redis/go-redis/v9/logging"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/transport/consumer"
)

func TestMain(m *testing.M) {
	if spec := os.Getenv(agentEnv); spec != "" {
		os.Exit(agentMain(spec))
	}
	redislog.Disable() // it tells of every dial that is refused
	goleak.VerifyTestMain(m)
}

const (
	testEpoch = "0192f0c0ffee0badf00d"
	testAgent = "agent-1"
	eventsKey = "edr:{s000}:events"
	cursorKey = "edr:{s000}:cursors"
)

// memQueue is a Queue in memory whose retention the test controls.
type memQueue struct {
	epoch string

	mu       sync.Mutex
	recs     []buffer.Record // ascending, with holes where records were dropped
	last     uint64
	acked    uint64
	forfeits []span
	aside    []uint64
	full     bool          // nothing can be set aside
	changed  chan struct{} // closed and replaced at each add
}

func newMemQueue() *memQueue { return &memQueue{epoch: testEpoch, changed: make(chan struct{})} }

func payload(seq uint64) string {
	return fmt.Sprintf(`{"time":1700000000000,"time_dt":"2023-11-14T22:13:20.123456789Z","metadata":{"product":{"uid":"x"},"uid":"uid-%d","sequence":%d},"pad":"%0*d"}`, seq, seq, 200, seq)
}

// add appends n records of stream s and returns the last seq.
func (q *memQueue) add(n int, s buffer.Stream, urgent bool) uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.append(n, s, urgent)
}

// append is add with the lock held.
func (q *memQueue) append(n int, s buffer.Stream, urgent bool) uint64 {
	for range n {
		q.last++
		q.recs = append(q.recs, buffer.Record{Seq: q.last, Stream: s, Urgent: urgent, Data: []byte(payload(q.last))})
	}
	close(q.changed)
	q.changed = make(chan struct{})
	return q.last
}

// drop forgets the records in [first, last].
func (q *memQueue) drop(first, last uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.recs = slices.DeleteFunc(q.recs, func(r buffer.Record) bool { return r.Seq >= first && r.Seq <= last })
}

func (q *memQueue) Epoch() string { return q.epoch }

func (q *memQueue) Read(ctx context.Context, after uint64, dst []buffer.Record, maxRecords, maxBytes int) ([]buffer.Record, error) {
	for {
		q.mu.Lock()
		i, _ := slices.BinarySearchFunc(q.recs, after+1, func(r buffer.Record, seq uint64) int {
			return cmpUint(r.Seq, seq)
		})
		size := 0
		for ; i < len(q.recs) && len(dst) < maxRecords; i++ {
			size += len(q.recs[i].Data)
			if len(dst) > 0 && size > maxBytes {
				break
			}
			dst = append(dst, q.recs[i])
		}
		wait := q.changed
		q.mu.Unlock()
		if len(dst) > 0 {
			return dst, nil
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return dst, ctx.Err()
		}
	}
}

func cmpUint(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (q *memQueue) Ack(seq uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if seq <= q.acked || seq > q.last {
		panic(fmt.Sprintf("Ack(%d) with acked %d, last %d", seq, q.acked, q.last))
	}
	q.acked = seq
}

func (q *memQueue) Bounds() buffer.Bounds {
	q.mu.Lock()
	defer q.mu.Unlock()
	b := buffer.Bounds{First: q.last + 1, Acked: q.acked, Last: q.last}
	if len(q.recs) > 0 {
		b.First = q.recs[0].Seq
	}
	return b
}

func (q *memQueue) Forfeit(first, last uint64, cause string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if cause != CauseServerLoss {
		panic(cause)
	}
	q.forfeits = append(q.forfeits, span{first, last})
}

func (q *memQueue) SetAside(rec buffer.Record, cause string) (string, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if cause != CauseRefused {
		panic(cause)
	}
	if q.full {
		return "", errors.New("no space left")
	}
	q.aside = append(q.aside, rec.Seq)
	return fmt.Sprintf("aside-%d", rec.Seq), nil
}

func (q *memQueue) GivenUp() []uint64 { return q.setAside() }

func (q *memQueue) setAside() []uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.aside)
}

func (q *memQueue) forfeited() []span {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.forfeits)
}

// fast is Options with short waits, for tests. Timeout is none of them: a late reply costs a
// connection, which is a failure where the server has none.
func fast(addr string) Options {
	return Options{
		Addr: addr, AgentID: testAgent,
		Linger: time.Millisecond, Timeout: 30 * time.Second, ProbeInterval: time.Minute,
		FirstReconnect: time.Millisecond, BackoffBase: 2 * time.Millisecond, BackoffCap: 20 * time.Millisecond,
		HealthyAfter: time.Millisecond,
	}
}

// running is a Sender that runs in the background until stopped.
type running struct {
	*Sender
	cancel context.CancelFunc
	done   chan error
}

// start runs a Sender over q; it is stopped with the test at the latest.
func start(t testing.TB, o Options, q Queue) *running {
	t.Helper()
	s, err := New(o, q)
	if err != nil {
		t.Fatal(err)
	}
	return startSender(t, s)
}

func startSender(t testing.TB, s *Sender) *running { return runSender(quiet(t), t, s) }

// runSender is startSender with a logger in ctx.
func runSender(ctx context.Context, t testing.TB, s *Sender) *running {
	ctx, cancel := context.WithCancel(ctx)
	r := &running{s, cancel, make(chan error, 1)}
	go func() { r.done <- s.Run(ctx) }()
	t.Cleanup(func() { r.stop(t) })
	return r
}

// stop ends Run, once, and closes the Sender.
func (r *running) stop(t testing.TB) {
	t.Helper()
	if r.cancel == nil {
		return
	}
	r.cancel()
	r.cancel = nil
	if err := <-r.done; err != nil {
		t.Errorf("Run: %v", err)
	}
	r.Close()
}

// quiet is a context that logs nowhere.
func quiet(t testing.TB) context.Context {
	core := zapcore.NewCore(zapcore.NewJSONEncoder(zapcore.EncoderConfig{}), zapcore.AddSync(io.Discard), zapcore.DebugLevel)
	return logging.Into(t.Context(), zap.New(core))
}

// lazy is text that is made when it is printed.
type lazy func() string

func (l lazy) String() string { return l() }

type text string

func (s text) String() string { return string(s) }

// await waits until cond holds; it fails the test when that takes longer than any machine
// needs for it, however busy and slow its disk.
func await(t testing.TB, what fmt.Stringer, cond func() bool) {
	t.Helper()
	awaitFor(t, 2*time.Minute, what, cond)
}

// awaitLong is await for what takes a while.
func awaitLong(t testing.TB, what fmt.Stringer, cond func() bool) {
	t.Helper()
	awaitFor(t, 5*time.Minute, what, cond)
}

func awaitFor(t testing.TB, d time.Duration, what fmt.Stringer, cond func() bool) {
	t.Helper()
	deadline := time.NewTimer(d)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

// delivered waits until the server has confirmed seq.
func (r *running) delivered(t testing.TB, seq uint64) {
	t.Helper()
	await(t, lazy(func() string { return fmt.Sprintf("seq %d, state %+v", seq, r.State()) }), func() bool { return r.State().Acked >= seq })
}

// reaches returns the state that was waited for: a later one can be of another attempt.
func (r *running) reaches(t testing.TB, p Phase, c Class) (st State) {
	t.Helper()
	await(t, lazy(func() string { return fmt.Sprintf("phase %s class %q, state %+v", p, c, r.State()) }), func() bool { st = r.State(); return st.Phase == p && st.Class == c })
	return st
}

// entry is what a consumer sees.
type entry struct {
	ID, Timestamp, Data, Agent, Epoch string
	Seq                               uint64
}

// entries returns what a stream holds, in either encoding. The records of a packed
// entry have no id and timestamp of their own: those in the data stand for them.
func entries(t testing.TB, c redis.Cmdable, key string) []entry {
	t.Helper()
	decoder, err := consumer.NewDecoder(consumer.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	var out []entry
	from := "-"
	for {
		xs, err := c.XRangeN(t.Context(), key, from, "+", 10_000).Result()
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range xs {
			recs, err := decoder.Decode(key, x, nil)
			if err != nil || len(x.Values) != 6 {
				t.Fatalf("entry %s: %v: %.300v", x.ID, err, x.Values)
			}
			v := func(k string) string { s, _ := x.Values[k].(string); return s }
			for i := range recs {
				id, stamp := v("id"), v("timestamp")
				if v("codec") != "" {
					i, s, _ := identify(recs[i].Data)
					id, stamp = string(i), string(s)
				}
				out = append(out, entry{id, stamp, string(recs[i].Data), recs[i].Agent, recs[i].Epoch, recs[i].Seq})
			}
		}
		if len(xs) < 10_000 {
			return out
		}
		from = following(xs[len(xs)-1].ID)
	}
}

// following is the id after that one. "(" before an id needs Redis 6.2.
func following(id string) string {
	ms, n, _ := strings.Cut(id, "-")
	at, _ := strconv.ParseUint(n, 10, 64) // of an id
	return fmt.Sprintf("%s-%d", ms, at+1)
}

// audit is what a stream shows about seqs 1..last.
type audit struct{ Missing, Duplicate, Disordered, Damaged int }

func auditStream(t testing.TB, c *redis.Client, last uint64) audit {
	t.Helper()
	return auditKey(t, c, eventsKey, last)
}

func auditKey(t testing.TB, c redis.Cmdable, key string, last uint64) audit {
	t.Helper()
	var a audit
	seen := make(map[uint64]int)
	prev := uint64(0)
	for _, e := range entries(t, c, key) {
		seen[e.Seq]++
		if seen[e.Seq] > 1 {
			a.Duplicate++
		}
		if e.Seq < prev {
			a.Disordered++
		}
		prev = e.Seq
		if e.Data != payload(e.Seq) || e.ID != fmt.Sprintf("uid-%d", e.Seq) {
			a.Damaged++
		}
	}
	for seq := uint64(1); seq <= last; seq++ {
		if seen[seq] == 0 {
			a.Missing++
		}
	}
	return a
}

func exactlyOnce(t testing.TB, c *redis.Client, last uint64) {
	t.Helper()
	if d := cmp.Diff(audit{}, auditStream(t, c, last)); d != "" {
		t.Errorf("stream of %d (-want +got):\n%s", last, d)
	}
}

// observed returns how much a histogram has seen.
func observed(t *testing.T, h prometheus.Histogram) (n uint64, sum float64) {
	t.Helper()
	var m dto.Metric
	if err := h.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetHistogram().GetSampleCount(), m.GetHistogram().GetSampleSum()
}

// writePassword writes a password file as a rotation does, and makes one when there
// is none.
func writePassword(t testing.TB, path, password string) string {
	t.Helper()
	if path == "" {
		path = filepath.Join(t.TempDir(), "password")
	}
	if err := os.WriteFile(path+".new", []byte(password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}
