// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// large is a record of about n bytes that does not compress well.
func large(seq uint64, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = ' ' + 1 + byte(rand.N(90))
		if b[i] == '"' || b[i] == '\\' {
			b[i] = 'x'
		}
	}
	return fmt.Appendf(nil, `{"time":1700000000000,"metadata":{"uid":"uid-%d"},"pad":"%s"}`, seq, b)
}

// TestRefusedByRedis sends a record that is larger than a real server takes, in both ways
// that it has to say so: the record is copied aside and named as lost, once, all others
// are delivered, and a rewind passes over it.
func TestRefusedByRedis(t *testing.T) {
	t.Parallel()
	for _, limit := range []string{"proto-max-bulk-len", "client-query-buffer-limit"} {
		t.Run(limit, func(t *testing.T) {
			encodings(t, func(t *testing.T, e Encoding) {
				srv := redistest.Start(t, redistest.Options{TCP: true, Config: map[string]string{limit: "1mb"}})
				c := srv.Client()
				defer c.Close()
				q := openBuffer(t, buffer.Options{Dir: t.TempDir(), Cap: 64 << 20})
				fill(t, q, 50)
				b := q.NewBatch()
				poison := large(51, 3<<20)
				if err := b.End(append(b.Begin(buffer.Events), poison...), false); err != nil {
					t.Fatal(err)
				}
				if err := q.Append(t.Context(), b); err != nil {
					t.Fatal(err)
				}
				last := fill(t, q, 50)

				o := fast(srv.Addr())
				o.Encoding = e
				reg, calm := prometheus.NewPedanticRegistry(), prometheus.NewPedanticRegistry()
				newMetrics(calm)
				o.Registerer = reg
				core, lines := observer.New(zap.ErrorLevel)
				s, err := New(o, q)
				if err != nil {
					t.Fatal(err)
				}
				r := runSender(logging.Into(t.Context(), zap.New(core)), t, s)
				r.eventually(t, last)
				r.reaches(t, Connected, ClassNone)

				losses := q.Unnamed(nil)
				if d := cmp.Diff([]buffer.Loss{{Cause: CauseRefused, First: 51, Last: 51, Count: 1}}, losses); d != "" {
					t.Errorf("losses (-want +got):\n%s", d)
				}
				accounted(t, entries(t, c, eventsKey), losses, last)
				st := r.State()
				if st.Refusals != 1 || st.Refused.Seq != 51 || st.Refused.Bytes != len(poison) {
					t.Errorf("state %+v", st)
				}
				if got, err := os.ReadFile(st.Refused.Path); err != nil || string(got) != string(poison) {
					t.Errorf("copy of %d bytes, %v", len(got), err)
				}
				metricstest.Moved(t, metricstest.Gather(t, calm), metricstest.Gather(t, reg), "transport_refused_records_total")
				if l := lines.FilterMessage("redis does not take a record, set aside and counted as lost").All(); len(l) != 1 ||
					l[0].ContextMap()[logging.KeySeq] != uint64(51) || l[0].ContextMap()["bytes"] != int64(len(poison)) || !strings.Contains(fmt.Sprint(l[0].ContextMap()[logging.KeyRemedy]), "proto-max-bulk-len") {
					t.Errorf("log %+v", l)
				}

				if err := c.FlushAll(t.Context()).Err(); err != nil {
					t.Fatal(err)
				}
				last = fill(t, q, 10)
				r.eventually(t, last)
				accounted(t, entries(t, c, eventsKey), q.Unnamed(nil), last)
				if st := r.State(); st.Refusals != 1 || st.Rewinds != 1 {
					t.Errorf("after a rewind: %+v", st)
				}
			})
		})
	}
}

// TestRefusedForGood: what was set aside is named as lost, so no later run delivers it,
// though the server would take it by then; nor is it named again.
func TestRefusedForGood(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{Config: map[string]string{"proto-max-bulk-len": "1mb"}})
	c := srv.Client()
	defer c.Close()
	o := buffer.Options{Dir: t.TempDir(), AllowUnsafe: true, Cap: 64 << 20}
	q := openBuffer(t, o)
	fill(t, q, 50)
	b := q.NewBatch()
	if err := b.End(append(b.Begin(buffer.Events), large(51, 3<<20)...), false); err != nil {
		t.Fatal(err)
	}
	if err := q.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	s := start(t, fast(srv.Addr()), q)
	await(t, text("the record to be set aside"), func() bool { return s.State().Refusals == 1 })
	s.stop(t)
	if err := q.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.ConfigSet(t.Context(), "proto-max-bulk-len", "64mb").Err(); err != nil {
		t.Fatal(err)
	}
	want := []buffer.Loss{{Cause: CauseRefused, First: 51, Last: 51, Count: 1}}
	for range 2 {
		q = openBuffer(t, o)
		s = start(t, fast(srv.Addr()), q)
		last := fill(t, q, 10)
		s.eventually(t, last)
		if d := cmp.Diff(want, q.Unnamed(nil)); d != "" {
			t.Errorf("losses (-want +got):\n%s", d)
		}
		accounted(t, entries(t, c, eventsKey), q.Unnamed(nil), last)
		s.stop(t)
		if err := q.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		// The next run has to deliver all of it again, from before the record.
		if err := c.FlushAll(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
	}
	// The control: one that knows nothing of it delivers it.
	q = openBuffer(t, o)
	forgetful, err := New(fast(srv.Addr()), q)
	if err != nil {
		t.Fatal(err)
	}
	forgetful.aside, forgetful.holes = nil, nil
	s = startSender(t, forgetful)
	s.eventually(t, fill(t, q, 10))
	if !slices.ContainsFunc(entries(t, c, eventsKey), func(e entry) bool { return e.Seq == 51 }) {
		t.Error("the record cannot be delivered")
	}
}

// TestRefusedWithoutACopy is the control: where nothing can be set aside, delivery is held
// at the record, and goes on with it when the server takes it.
func TestRefusedWithoutACopy(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{Config: map[string]string{"proto-max-bulk-len": "1mb"}})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	q.full = true
	q.add(10, buffer.Events, false)
	big := large(6, 2<<20)
	q.recs[5].Data = big
	s := start(t, fast(srv.Addr()), q)
	s.reaches(t, Held, ClassOversize)
	before := testutil.ToFloat64(s.m.errors[ClassOversize])
	await(t, text("further attempts"), func() bool { return testutil.ToFloat64(s.m.errors[ClassOversize]) > before+5 })
	if st := s.State(); st.Acked != 5 || st.Refusals != 0 || !strings.Contains(st.Error, "no space left") || !strings.Contains(st.Hint, "proto-max-bulk-len") {
		t.Errorf("state %+v", st)
	}
	if err := c.ConfigSet(t.Context(), "proto-max-bulk-len", "8mb").Err(); err != nil {
		t.Fatal(err)
	}
	s.delivered(t, 10)
	s.reaches(t, Connected, ClassNone)
	es := entries(t, c, eventsKey)
	if len(es) != 10 || es[5].Data != string(big) {
		t.Errorf("%d entries", len(es))
	}
}

// TestRefusedByProxy has something before the server that breaks requests for their size
// or for a word, and lets it do so in ways that are, and in ways that are not, about one
// record. What is set aside and what is delivered must be everything.
func TestRefusedByProxy(t *testing.T) {
	t.Parallel()
	const total = 300
	for _, tt := range []struct {
		name   string
		faults redistest.Faults
		spoil  func(*memQueue)
		aside  []uint64
		class  Class // where it stops; none: it does not
	}{
		{name: "batches too large", faults: redistest.Faults{Limit: 12 << 10}},
		{name: "batches and records too large", faults: redistest.Faults{Limit: 12 << 10}, spoil: func(q *memQueue) {
			q.recs[99].Data, q.recs[100].Data, q.recs[250].Data = large(100, 20<<10), large(101, 20<<10), large(251, 20<<10)
		}, aside: []uint64{100, 101, 251}},
		{name: "the last one too large", faults: redistest.Faults{Limit: 12 << 10}, spoil: func(q *memQueue) {
			q.recs[299].Data = large(300, 20<<10)
		}, aside: []uint64{300}},
		{name: "one for its content", faults: redistest.Faults{Word: "X5O!P%@AP"}, spoil: func(q *memQueue) {
			q.recs[149].Data = []byte(strings.Replace(payload(150), `"pad":"`, `"pad":"X5O!P%@AP`, 1))
		}, aside: []uint64{150}},
		// Controls: what is broken is not one record.
		{name: "every request", faults: redistest.Faults{Limit: 1}, class: ClassNetwork},
		{name: "all but hellos", faults: redistest.Faults{Limit: 600}, class: ClassNetwork},
		{name: "every record", faults: redistest.Faults{Word: "metadata"}, aside: []uint64{1, 2, 3, 4, 5, 6, 7, 8}, class: ClassOversize},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			srv := redistest.Start(t, redistest.Options{})
			c := srv.Client()
			defer c.Close()
			proxy := redistest.StartProxy(t, srv.Addr(), redistest.Faults{})
			o := fast(proxy.Addr())
			o.BatchRecords = 100
			q := newMemQueue()
			s := start(t, o, q)
			s.reaches(t, Connected, ClassNone) // the script is loaded
			proxy.SetFaults(tt.faults)
			q.mu.Lock()
			q.append(total, buffer.Events, false)
			if tt.spoil != nil {
				tt.spoil(q)
			}
			q.mu.Unlock()
			if tt.class == ClassNone {
				// The last one counts as acknowledged when something follows it.
				await(t, lazy(func() string { return fmt.Sprintf("the end, state %+v", s.State()) }), func() bool { return len(q.setAside()) == len(tt.aside) })
				s.eventually(t, q.add(1, buffer.Events, false))
			} else {
				awaitLong(t, lazy(func() string { return fmt.Sprintf("many attempts, state %+v", s.State()) }), func() bool {
					return testutil.ToFloat64(s.m.errors[ClassNetwork])+testutil.ToFloat64(s.m.errors[ClassOversize]) > 150 && s.State().Class == tt.class
				})
				if tt.class == ClassOversize {
					s.reaches(t, Held, ClassOversize)
				}
			}
			if d := cmp.Diff(tt.aside, q.setAside()); d != "" {
				t.Errorf("set aside (-want +got):\n%s", d)
			}
			proxy.SetFaults(redistest.Faults{})
			last := q.add(1, buffer.Events, false)
			s.eventually(t, last)
			if proxy.Refused.Load() == 0 {
				t.Error("the proxy did not bite")
			}
			seen := map[uint64]int{}
			for _, e := range entries(t, c, eventsKey) {
				seen[e.Seq]++
			}
			for _, seq := range q.setAside() {
				seen[seq]++
			}
			for seq := uint64(1); seq <= last; seq++ {
				if seen[seq] != 1 {
					t.Errorf("seq %d is there %d times", seq, seen[seq])
				}
			}
			t.Logf("%d requests refused, %d records set aside", proxy.Refused.Load(), len(q.setAside()))
		})
	}
}

// TestRefusedNotAtRandom: a network that resets every other record sent alone, and lets
// hellos pass, breaks off three in a row often. That sets nothing aside.
func TestRefusedNotAtRandom(t *testing.T) {
	t.Parallel()
	const total = 200
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	proxy := redistest.StartProxy(t, srv.Addr(), redistest.Faults{Reset: 0.5, Spare: 400, Seed: rand.Uint64()})
	o := fast(proxy.Addr())
	o.BatchRecords = 1
	o.BackoffCap = 2 * time.Millisecond
	q := newMemQueue()
	q.add(total, buffer.Events, false)
	s := start(t, o, q)
	s.eventually(t, total)
	exactlyOnce(t, c, total)
	if got := q.setAside(); got != nil {
		t.Errorf("set aside %v", got)
	}
	if n := testutil.ToFloat64(s.m.errors[ClassOversize]); n == 0 {
		t.Error("no record was broken off three times in a row: the network does not bite")
	} else {
		t.Logf("%v times a record was broken off at least three times in a row, of %d resets", n, proxy.Resets.Load())
	}
}

// TestSlowLink: over a link that carries a fourth of a batch in the time that a batch has,
// batches get smaller, for which nothing is set aside, and larger again over a faster one.
func TestSlowLink(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	proxy := redistest.StartProxy(t, srv.Addr(), redistest.Faults{})
	o := fast(proxy.Addr())
	o.BatchRecords, o.Timeout = 64, 200*time.Millisecond
	q := newMemQueue()
	s := start(t, o, q)
	s.eventually(t, q.add(1, buffer.Events, false)) // the script is loaded
	proxy.SetFaults(redistest.Faults{Rate: o.BatchRecords * len(payload(1)) / 4 * int(time.Second/o.Timeout)})
	last := q.add(8*o.BatchRecords, buffer.Events, false)
	s.eventually(t, last)
	exactlyOnce(t, c, last)
	if n := testutil.ToFloat64(s.m.errors[ClassTimeout]); n < latesToHalve {
		t.Errorf("%v timeouts: the link is not slow", n)
	}
	if got := q.setAside(); got != nil {
		t.Errorf("set aside %v", got)
	}
	proxy.SetFaults(redistest.Faults{})
	await(t, text("a full batch"), func() bool {
		before := testutil.ToFloat64(s.m.batches[ok])
		last = q.add(o.BatchRecords, buffer.Events, false)
		s.eventually(t, last)
		return testutil.ToFloat64(s.m.batches[ok]) == before+1
	})
	exactlyOnce(t, c, last)
}

// TestDrainPassesWhatWasSetAside: a stop does not wait for the last record when that was
// set aside.
func TestDrainPassesWhatWasSetAside(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{Config: map[string]string{"proto-max-bulk-len": "1mb"}})
	q := newMemQueue()
	q.add(3, buffer.Events, false)
	q.recs[2].Data = large(3, 2<<20)
	s := start(t, fast(srv.Addr()), q)
	await(t, text("the record to be set aside"), func() bool { return len(q.setAside()) == 1 })
	s.cancel()
	s.cancel = nil
	if err := <-s.done; err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithTimeout(quiet(t), time.Minute) // else it waits for ever
	defer cancel()
	if err := s.Drain(ctx); err != nil {
		t.Error(err)
	}
}
