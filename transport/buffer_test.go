// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/transport/consumer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

func openBuffer(t *testing.T, o buffer.Options) *buffer.Queue {
	t.Helper()
	o.CommitInterval = 2 * time.Millisecond
	q, err := buffer.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The test's own context has ended; the writer must be done before the directory goes.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if err := q.Close(ctx); err != nil && !errors.Is(err, buffer.ErrClosed) {
			t.Error(err)
		}
	})
	return q
}

// fill appends n records and returns the last seq.
func fill(t *testing.T, q *buffer.Queue, n int) uint64 {
	t.Helper()
	for n > 0 {
		b := q.NewBatch()
		first := q.Next()
		for i := uint64(0); i < 100 && n > 0; i, n = i+1, n-1 {
			if err := b.End(append(b.Begin(buffer.Events), payload(first+i)...), false); err != nil {
				t.Fatal(err)
			}
		}
		if err := q.Append(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	return q.Next() - 1
}

// TestSenderWithBuffer runs against the real buffer: delivery over a killed
// server and a restart of the agent, then more than the cap while the server is
// away, then a server that lost what is no longer retained. Every record must be
// in the stream once, or in exactly one loss.
func TestSenderWithBuffer(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{AOF: "everysec"})
	c := srv.Client()
	defer c.Close()
	o := buffer.Options{Dir: t.TempDir(), AllowUnsafe: true, Cap: 6 << 20, CommitBytes: 64 << 10, MaxRecord: 64 << 10}
	q := openBuffer(t, o)
	s := start(t, fast(srv.Addr()), q)
	fill(t, q, 3000)
	srv.Kill9()
	srv.Restart()
	last := fill(t, q, 3000)
	s.delivered(t, last)
	afterTheRule(t, c, last)
	if n, sum := observed(t, s.m.delivery); n != last || sum <= 0 || sum > 3600*float64(last) {
		t.Errorf("%d latencies of %v s in all, want one for each of %d records", n, sum, last)
	}
	s.stop(t)
	if err := q.Close(t.Context()); err != nil {
		t.Fatal(err)
	}

	q = openBuffer(t, o)
	s = start(t, fast(srv.Addr()), q)
	last = fill(t, q, 1000)
	s.delivered(t, last)
	afterTheRule(t, c, last)
	if got := testutil.ToFloat64(s.m.rewinds); got != 0 {
		t.Errorf("%v rewinds after a restart of the agent", got)
	}

	// Truncation: everything retained goes first, then what is undelivered.
	srv.Kill9()
	last = fill(t, q, 30_000)
	if q.Stats().Truncated+q.Stats().InDoubt == 0 {
		t.Fatalf("nothing was truncated: %+v", q.Stats())
	}
	srv.Restart()
	s.delivered(t, last)
	accounted(t, fresh(entries(t, c, eventsKey)), q.Unnamed(nil), last)

	// The server is emptied: what is retained comes again, the rest is lost.
	if err := c.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	last = fill(t, q, 10)
	s.delivered(t, last)
	es := entries(t, c, eventsKey)
	losses := q.Unnamed(nil)
	accounted(t, es, losses, last)
	if !slices.ContainsFunc(losses, func(l buffer.Loss) bool { return l.Cause == CauseServerLoss }) {
		t.Errorf("the stream begins at %d and nothing was forfeited: %+v", es[0].Seq, losses)
	}
}

// TestLossesAreToldAgain has a server lose a loss record that the buffer no longer has,
// alone or with all before it: what the record named must be named by another one.
func TestLossesAreToldAgain(t *testing.T) {
	t.Parallel()
	// To between what was lost and the record that says so.
	before := func(t *testing.T, c *redis.Client, before []string) {
		for i, key := range []string{eventsKey, cursorKey} {
			if err := c.Restore(t.Context(), key, 0, before[i]).Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, tc := range map[string]struct {
		back  func(t *testing.T, c *redis.Client, before []string)
		since uint64 // other losses that were told
	}{
		"emptied":                         {func(*testing.T, *redis.Client, []string) {}, 0},
		"back to before it":               {before, 0},
		"back to before it and many more": {before, 100},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := redistest.Start(t, redistest.Options{AOF: "always"})
			c := srv.Client()
			defer c.Close()
			q := openBuffer(t, buffer.Options{
				Dir: t.TempDir(), AllowUnsafe: true, Cap: 6 << 20, RetainBytes: 1 << 20, CommitBytes: 64 << 10, MaxRecord: 64 << 10,
			})
			s := start(t, fast(srv.Addr()), q)
			s.delivered(t, fill(t, q, 1000))
			srv.Kill9()
			fill(t, q, 30_000)
			srv.Restart()
			s.delivered(t, fill(t, q, 1000))
			var before []string
			for _, key := range []string{eventsKey, cursorKey} {
				v, err := c.Dump(t.Context(), key).Result()
				if err != nil {
					t.Fatal(err)
				}
				before = append(before, v)
			}
			tell := func() uint64 {
				t.Helper()
				if err := new(agentSpec).name(t.Context(), q); err != nil {
					t.Fatal(err)
				}
				return fill(t, q, 1)
			}
			told := tell()
			for i := range tc.since {
				q.Forfeit(2*i+1, 2*i+1, buffer.CauseTruncated)
				if err := q.Flush(t.Context()); err != nil {
					t.Fatal(err)
				}
				told = tell()
				s.delivered(t, told)
			}
			if l := q.Unnamed(nil); l != nil {
				t.Fatalf("not named: %+v", l)
			}
			for s.delivered(t, told); q.Bounds().First <= told; {
				s.delivered(t, fill(t, q, 1000))
			}
			if err := c.FlushAll(t.Context()).Err(); err != nil {
				t.Fatal(err)
			}
			tc.back(t, c, before)
			s.delivered(t, fill(t, q, 10))
			last := tell()
			s.delivered(t, last)

			a := consumer.NewAudit()
			for _, key := range []string{eventsKey, "decisions:system"} {
				for _, e := range entries(t, c, key) {
					a.Add(&consumer.Record{Stream: key, Agent: e.Agent, Epoch: e.Epoch, Seq: e.Seq, Data: []byte(e.Data)})
				}
			}
			fs := a.Findings()
			if len(fs) != 1 || fs[0].Last != last || !fs[0].Clean() || fs[0].NamedLost < 10_000 {
				t.Errorf("%+v", fs)
			}
			t.Logf("%+v", fs)
		})
	}
}

// accounted checks that seqs 1..last are each in the stream or in a loss.
func accounted(t *testing.T, es []entry, losses []buffer.Loss, last uint64) {
	t.Helper()
	type count struct{ Missing, Stored, Lost, Both int }
	stored, lost := make(map[uint64]int), make(map[uint64]int)
	for _, e := range es {
		stored[e.Seq]++
	}
	for _, l := range losses {
		for seq := l.First; seq <= l.Last; seq++ {
			lost[seq]++
		}
	}
	var got count
	for seq := uint64(1); seq <= last; seq++ {
		switch {
		case stored[seq]+lost[seq] == 0:
			got.Missing++
		case stored[seq]+lost[seq] > 1:
			got.Both++
		}
	}
	if d := cmp.Diff(count{}, got); d != "" {
		t.Errorf("of %d, %d stored, %d lost (-want +got):\n%s", last, len(stored), len(lost), d)
	}
	t.Logf("%d records: %d stored, %d in losses", last, len(stored), len(lost))
}
