// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/transport/consumer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// The proofs of exactly-once delivery are numbered, and each has a control in
// which a producer without the protocol fails:
//
//	T1   TestT1LossyProxy
//	T2   TestT2KilledServer
//	T3   TestT3LogCutAtTheEnd, TestT3bLogCutInsideABatch
//	T4   TestClusterFailover
//	T5   TestSentinelFailover
//	T6   TestT6KilledAgent, TestT7KilledAgentAndServer
//	T8   TestT8EmptiedServer
//	T9   TestClone, TestFlappingTwins, TestSenderFencesOlderProcess
//	T10  TestWipedQueue, TestSenderRefusesServerAheadOfQueue; TestWipedQueueControl as control
//	T11  TestWipedQueue, TestSenderNewSessionIsAboveTheStored; TestWipedQueueControl
//	T12  TestSenderHoldsAndRecovers, TestSenderWhileClusterIsDown, TestSenderUnblocked,
//	     TestRefusedByRedis, TestRefusedByProxy; TestRefusedWithoutACopy as its control
//	T13  TestT13FullServer
//	T14  TestT14ScriptAgainstModel, with TestModelFindsDefects as its control
//	T15  TestT15EvictionAlarm; TestT15Eviction as its control
//	T16  TestShards
//
// and all of it at once in TestSoak and TestSoakFailover.

// encodings runs a test for each encoding, side by side.
func encodings(t *testing.T, f func(t *testing.T, e Encoding)) {
	for _, e := range []Encoding{JSON, ZstdBatch} {
		t.Run(string(e), func(t *testing.T) {
			t.Parallel()
			f(t, e)
		})
	}
}

// eventually is delivered for what takes a while on a busy machine.
func (r *running) eventually(t testing.TB, seq uint64) {
	t.Helper()
	awaitLong(t, lazy(func() string { return fmt.Sprintf("seq %d, state %+v", seq, r.State()) }), func() bool { return r.State().Acked >= seq })
}

func TestT1LossyProxy(t *testing.T) {
	t.Parallel()
	encodings(t, func(t *testing.T, e Encoding) {
		const total, batch = 30_000, 100
		srv := redistest.Start(t, redistest.Options{})
		c := srv.Client()
		defer c.Close()
		proxy := redistest.StartProxy(t, srv.Addr(), redistest.Faults{DropReply: 0.10, Reset: 0.05, Stall: 0.01, StallFor: 1200 * time.Millisecond, Seed: 7})
		q := newMemQueue()
		q.add(total, buffer.Events, false)
		o := fast(proxy.Addr())
		o.Timeout = time.Second
		o.BatchRecords = batch
		o.Encoding = e
		s := start(t, o, q)
		s.eventually(t, total)
		exactlyOnce(t, c, total)
		if got := testutil.ToFloat64(s.m.delivered[buffer.Events]); got != total {
			t.Errorf("delivered %v, want %d", got, total)
		}
		if n, _ := observed(t, s.m.endToEnd); n != total {
			t.Errorf("%d latencies observed, want %d: one a record, lost replies or not", n, total)
		}
		t.Logf("faults: %d replies dropped, %d resets, %d stalls", proxy.Dropped.Load(), proxy.Resets.Load(), proxy.Stalls.Load())
		if proxy.Dropped.Load() < 15 || proxy.Resets.Load() < 5 || proxy.Stalls.Load() < 2 {
			t.Error("the proxy did not bite")
		}
		s.stop(t)
		if e != JSON {
			return
		}
		// Control: the same proxy, plain XADD and a client's own retry.
		plain := srv.Client().Options()
		c.Del(t.Context(), eventsKey)
		plain.Network, plain.Addr, plain.ReadTimeout = "tcp", proxy.Addr(), o.Timeout
		plain.Dialer, plain.MaxRetries = nil, -1
		retries := plainProducer(t, plain, q, batch)
		a := auditStream(t, c, total)
		t.Logf("control: plain XADD with %d retries: %+v", retries, a)
		if a.Duplicate <= 1000 {
			t.Errorf("control: %+v: the proxy does not bite", a)
		}
	})
}

func TestT2KilledServer(t *testing.T) {
	t.Parallel()
	const total, kills = 30_000, 6
	for _, fsync := range []string{"everysec", "always"} {
		t.Run(fsync, func(t *testing.T) {
			encodings(t, func(t *testing.T, e Encoding) {
				srv := redistest.Start(t, redistest.Options{AOF: fsync})
				q := newMemQueue()
				o := fast(srv.Addr())
				o.BatchRecords = 50
				o.Encoding = e
				s := start(t, o, q)
				for range kills {
					last := q.add(total/kills, buffer.Events, false)
					s.eventually(t, last-total/kills/2)
					srv.Kill9()
					srv.Restart()
				}
				s.eventually(t, q.add(1, buffer.Events, true))
				s.settled(t, q)
				c := srv.Client()
				defer c.Close()
				// A kill in the middle of a write(2) cuts the log inside a
				// transaction now and then, see T3b.
				if dropped := afterTheRule(t, c, q.Bounds().Last); dropped > 0 {
					t.Logf("%d records dropped by the consumer's rule", dropped)
				}
				if got := q.forfeited(); got != nil {
					t.Errorf("forfeited %v with everything retained", got)
				}
			})
		})
	}
	t.Run("control", func(t *testing.T) {
		t.Parallel()
		// Batches that take a while, so that a kill meets one.
		srv := redistest.Start(t, redistest.Options{AOF: "always"})
		c := srv.Client()
		defer c.Close()
		q := newMemQueue()
		q.add(400_000, buffer.Events, false)
		o := *c.Options()
		o.MaxRetries = -1
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			plainUntil(ctx, &o, q, 500)
		}()
		defer func() { cancel(); <-done }()
		for range 30 {
			n := c.XLen(t.Context(), eventsKey).Val()
			await(t, text("the producer"), func() bool { return c.XLen(t.Context(), eventsKey).Val() > n+1000 })
			srv.Kill9()
			srv.Restart()
			// What was sent before the newest is all that is judged.
			es := entries(t, c, eventsKey)
			if a := auditStream(t, c, es[len(es)-1].Seq); a.Missing+a.Duplicate > 0 {
				t.Logf("control: plain XADD: %+v", a)
				return
			}
		}
		t.Error("control: plain XADD survived 30 kills: they do not bite")
	})
}

// plainUntil is plainProducer until ctx ends or everything is sent.
func plainUntil(ctx context.Context, o *redis.Options, q *memQueue, batch int) {
	c := redis.NewClient(o)
	defer c.Close()
	for after := uint64(0); after < q.Bounds().Last; {
		recs, err := q.Read(ctx, after, nil, batch, 1<<30)
		if err != nil {
			return
		}
		for plainXADD(ctx, c, recs) != nil {
			sleep(ctx, time.Millisecond)
			if ctx.Err() != nil {
				return
			}
		}
		after = recs[len(recs)-1].Seq
	}
}

// logTail is the file of the append-only log that is written now.
func logTail(t testing.TB, srv *redistest.Server) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(srv.Dir(), "appendonlydir", "*.incr.aof"))
	if old := filepath.Join(srv.Dir(), "appendonly.aof"); len(files) == 0 && err == nil { // one file until 7.0
		_, err = os.Stat(old)
		files = []string{old}
	}
	if err != nil || len(files) == 0 {
		t.Fatalf("append-only files: %v, %v", files, err)
	}
	slices.SortFunc(files, func(a, b string) int { return strings.Compare(fmt.Sprintf("%200s", a), fmt.Sprintf("%200s", b)) })
	return files[len(files)-1]
}

// loseTail kills the server and takes the last bytes of its log, as a loss of power
// does.
func loseTail(t testing.TB, srv *redistest.Server, n int64) {
	t.Helper()
	srv.Kill9()
	path := logTail(t, srv)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, info.Size()-min(n, info.Size()/2)); err != nil {
		t.Fatal(err)
	}
	srv.Restart()
}

func TestT3LogCutAtTheEnd(t *testing.T) {
	t.Parallel()
	cuts := []int64{0, 1, 1 << 10, 100 << 10, 700 << 10, 2 << 20}
	const each = 5000
	encodings(t, func(t *testing.T, e Encoding) {
		srv := redistest.Start(t, redistest.Options{AOF: "everysec"})
		q := newMemQueue()
		o := fast(srv.Addr())
		o.Encoding = e
		s := start(t, o, q)
		for i, n := range cuts {
			s.eventually(t, q.add(each, buffer.Events, false)-each/2*uint64(i%2))
			loseTail(t, srv, n)
		}
		s.eventually(t, q.add(1, buffer.Events, true))
		s.settled(t, q)
		c := srv.Client()
		defer c.Close()
		// A cut inside a transaction may show entries twice, see T3b.
		afterTheRule(t, c, q.Bounds().Last)
		if got := q.forfeited(); got != nil {
			t.Errorf("forfeited %v with everything retained", got)
		}
		rewinds := testutil.ToFloat64(s.m.rewinds)
		t.Logf("%v rewinds", rewinds)
		if rewinds < 3 {
			t.Errorf("%v rewinds: the cuts do not bite", rewinds)
		}
	})
	t.Run("control", func(t *testing.T) {
		t.Parallel()
		srv := redistest.Start(t, redistest.Options{AOF: "everysec"})
		c := srv.Client()
		defer c.Close()
		o := *c.Options()
		o.MaxRetries = -1
		q := newMemQueue()
		for range 2 {
			q.drop(1, q.add(0, buffer.Events, false))
			first := q.Bounds().Last
			q.add(each, buffer.Events, false)
			plainFrom(t, &o, q, first, 100)
			loseTail(t, srv, 700<<10)
		}
		a := auditStream(t, c, 2*each)
		t.Logf("control: plain XADD: %+v", a)
		if a.Missing < 500 {
			t.Errorf("control: %+v: the cuts do not bite", a)
		}
	})
}

// plainFrom is plainProducer for what is after a seq.
func plainFrom(t testing.TB, o *redis.Options, q *memQueue, after uint64, batch int) {
	t.Helper()
	c := redis.NewClient(o)
	defer c.Close()
	for after < q.Bounds().Last {
		recs, err := q.Read(t.Context(), after, nil, batch, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		if err := plainXADD(t.Context(), c, recs); err != nil {
			t.Fatal(err)
		}
		after = recs[len(recs)-1].Seq
	}
}

// afterTheRule checks that a consumer which follows the rule has seqs 1..last, each
// once and in order, and returns how many records the rule has dropped.
func afterTheRule(t testing.TB, c *redis.Client, last uint64) (dropped int) {
	t.Helper()
	es := entries(t, c, eventsKey)
	seen := fresh(es)
	next := uint64(1)
	for _, e := range seen {
		if e.Seq != next || e.Data != payload(e.Seq) {
			t.Fatalf("seq %d instead of %d", e.Seq, next)
		}
		next++
	}
	if next != last+1 {
		t.Errorf("the stream ends at %d, want %d", next-1, last)
	}
	return len(es) - len(seen)
}

// fresh returns what a consumer that follows the rule takes of a stream.
func fresh(es []entry) (out []entry) {
	p := consumer.NewPositions(100)
	for _, e := range es {
		if p.Fresh(&consumer.Record{Stream: eventsKey, Agent: e.Agent, Epoch: e.Epoch, Seq: e.Seq}) {
			out = append(out, e)
		}
	}
	return out
}

// TestT3bLogCutInsideABatch cuts the log inside a transaction, twice in a row. The
// server then keeps the transaction open in its file, and applies what stands in it
// at the next start: entries that the Sender has sent again meanwhile. The control
// is the stream itself, which must show them twice.
func TestT3bLogCutInsideABatch(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{AOF: "always"})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	o := fast(srv.Addr())
	o.BatchRecords = 50
	s := start(t, o, q)
	for range 2 {
		s.eventually(t, q.add(200, buffer.Events, false))
		srv.Kill9()
		path := logTail(t, srv)
		file, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		// Behind some of the last transaction's XADDs, in the middle of one.
		multi := bytes.LastIndex(file, []byte("MULTI\r\n"))
		at := multi
		for range 20 {
			n := bytes.Index(file[at+1:], []byte("XADD\r\n"))
			if multi < 0 || n < 0 {
				t.Fatalf("no transaction of 20 XADDs at the end of a log of %d bytes", len(file))
			}
			at += 1 + n
		}
		if err := os.Truncate(path, int64(at+20)); err != nil {
			t.Fatal(err)
		}
		srv.Restart()
		s.settled(t, q)
	}
	srv.Kill9() // shows what the log of the second cut has become
	srv.Restart()
	s.eventually(t, q.add(1, buffer.Events, true))
	s.settled(t, q)
	dropped := afterTheRule(t, c, q.Bounds().Last)
	t.Logf("%d records dropped by the consumer's rule", dropped)
	if dropped == 0 {
		t.Error("control: the stream shows nothing twice, so the rule had nothing to do: is this a server that repairs its log?")
	}
}

func TestT8EmptiedServer(t *testing.T) {
	t.Parallel()
	encodings(t, func(t *testing.T, e Encoding) {
		for _, retained := range []bool{true, false} {
			t.Run(fmt.Sprintf("retained=%v", retained), func(t *testing.T) {
				srv := redistest.Start(t, redistest.Options{})
				c := srv.Client()
				defer c.Close()
				bo := buffer.Options{Dir: t.TempDir(), Cap: 32 << 20, CommitBytes: 64 << 10, MaxRecord: 64 << 10}
				if !retained {
					bo.RetainBytes = 200 << 10
				}
				q := openBuffer(t, bo)
				o := fast(srv.Addr())
				o.Encoding = e
				s := start(t, o, q)
				s.eventually(t, fill(t, q, 5000))
				if err := c.FlushAll(t.Context()).Err(); err != nil {
					t.Fatal(err)
				}
				last := fill(t, q, 10)
				s.eventually(t, last)
				losses := q.Unnamed(nil)
				accounted(t, entries(t, c, eventsKey), losses, last)
				missing := last - uint64(len(entries(t, c, eventsKey)))
				switch {
				case retained && (losses != nil || missing != 0):
					t.Errorf("%d missing, losses %+v with everything retained", missing, losses)
				case !retained && (len(losses) != 1 || losses[0] != (buffer.Loss{Cause: CauseServerLoss, First: 1, Last: missing, Count: missing}) || missing == 0):
					t.Errorf("%d missing, losses %+v", missing, losses)
				}
			})
		}
	})
	t.Run("control", func(t *testing.T) {
		t.Parallel()
		srv := redistest.Start(t, redistest.Options{})
		c := srv.Client()
		defer c.Close()
		q := newMemQueue()
		q.add(1000, buffer.Events, false)
		plainFrom(t, c.Options(), q, 0, 100)
		c.FlushAll(t.Context())
		q.add(1000, buffer.Events, false)
		plainFrom(t, c.Options(), q, 1000, 100)
		if a := auditStream(t, c, 2000); a.Missing != 1000 {
			t.Errorf("control: %+v", a)
		}
	})
}

// TestT13FullServer makes a server full in the middle of batches: a batch is
// stored as a whole or not at all, and nothing is lost.
func TestT13FullServer(t *testing.T) {
	t.Parallel()
	const total, batch = 20_000, 100
	// Room for a part of it.
	limit := func(t *testing.T, c *redis.Client, extra int64) {
		t.Helper()
		info := c.Info(t.Context(), "memory").Val()
		_, rest, _ := strings.Cut(info, "used_memory:")
		var used int64
		if _, err := fmt.Sscan(rest, &used); err != nil {
			t.Fatal(err)
		}
		if err := c.ConfigSet(t.Context(), "maxmemory", fmt.Sprint(used+extra)).Err(); err != nil {
			t.Fatal(err)
		}
	}
	full := redistest.Options{Config: map[string]string{"maxmemory-policy": "noeviction"}}
	encodings(t, func(t *testing.T, e Encoding) {
		srv := redistest.Start(t, full)
		c := srv.Client()
		defer c.Close()
		q := newMemQueue()
		o := fast(srv.Addr())
		o.BatchRecords = batch
		o.Encoding = e
		s := start(t, o, q)
		s.eventually(t, q.add(batch, buffer.Events, false))
		limit(t, c, map[Encoding]int64{JSON: 300 << 10, ZstdBatch: 50 << 10}[e])
		q.add(total-batch, buffer.Events, false)
		s.reaches(t, Held, ClassOOM)
		// A full server may take one more when it frees a buffer: both as of one moment.
		var n, at uint64
		await(t, text("stream and cursor of one moment"), func() bool {
			before := stored(t, c)
			n = uint64(len(entries(t, c, eventsKey)))
			at = stored(t, c)
			return before == at
		})
		if n%batch != 0 || n == total || at != n {
			t.Errorf("%d entries, cursor at %d", n, at)
		}
		if err := c.ConfigSet(t.Context(), "maxmemory", "0").Err(); err != nil {
			t.Fatal(err)
		}
		s.eventually(t, total)
		exactlyOnce(t, c, total)
	})
	t.Run("control", func(t *testing.T) {
		t.Parallel()
		srv := redistest.Start(t, full)
		c := srv.Client()
		defer c.Close()
		q := newMemQueue()
		q.add(total, buffer.Events, false)
		limit(t, c, 1<<20)
		n := 0
		for after := uint64(0); ; after += 1000 {
			recs, err := q.Read(t.Context(), after, nil, 1000, 1<<30)
			if err != nil {
				t.Fatal(err)
			}
			if err := plainXADD(t.Context(), c, recs); err != nil {
				if !redis.IsOOMError(err) {
					t.Fatal(err)
				}
				break
			}
			n += len(recs)
		}
		got := int(c.XLen(t.Context(), eventsKey).Val())
		t.Logf("control: %d of the %d records of a refused pipeline are stored", got-n, 1000)
		if got == n {
			t.Error("control: plain XADD stored a refused pipeline as a whole or not at all")
		}
	})
}

// TestT15Eviction: the alarm is there before the first record for what evicts streams, and
// only for that. The control is what happens without it: plain XADD has no error and
// loses what it added.
func TestT15Eviction(t *testing.T) {
	t.Parallel()
	for policy, evicts := range map[string]bool{"allkeys-lru": true, "allkeys-lfu": true, "allkeys-random": true, "volatile-lru": false, "noeviction": false} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			srv := redistest.Start(t, redistest.Options{Config: map[string]string{"maxmemory-policy": policy}})
			c := srv.Client()
			defer c.Close()
			q := newMemQueue()
			s := start(t, fast(srv.Addr()), q)
			s.reaches(t, Connected, ClassNone)
			alarm := slices.ContainsFunc(s.State().Risks, func(r Risk) bool { return r.Kind == RiskEviction })
			if alarm != evicts || testutil.ToFloat64(s.m.risks[RiskEviction]) != map[bool]float64{true: 1}[evicts] {
				t.Errorf("alarm %v", alarm)
			}
			s.stop(t)

			used := parseInfo(c.Info(t.Context(), "memory").Val()).number("used_memory")
			if err := c.ConfigSet(t.Context(), "maxmemory", fmt.Sprintf("%.0f", used+3<<20)).Err(); err != nil {
				t.Fatal(err)
			}
			keys := make([]string, 20)
			for i := range keys {
				keys[i] = fmt.Sprintf("stream-%d", i)
			}
			added, refused := 0, false
			for i := 0; i < 20_000 && !refused; i++ {
				err := c.XAdd(t.Context(), &redis.XAddArgs{Stream: keys[i%len(keys)], Values: []any{"data", payload(uint64(i))}}).Err()
				if refused = redis.IsOOMError(err); err != nil && !refused {
					t.Fatal(err)
				}
				if err == nil {
					added++
				}
			}
			kept := 0
			for _, k := range keys {
				kept += int(c.XLen(t.Context(), k).Val())
			}
			t.Logf("control: %d of %d added entries are there, refused: %v", kept, added, refused)
			// Valkey evicts all of it in the background, and is full for a moment nevertheless.
			if lost := kept < added; lost != evicts || !evicts && !refused {
				t.Errorf("control: %d of %d added entries are there, refused: %v", kept, added, refused)
			}
		})
	}
}

// plainXADD sends records in one pipeline of XADDs.
func plainXADD(ctx context.Context, c *redis.Client, recs []buffer.Record) error {
	_, err := c.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i := range recs {
			id, stamp, _ := identify(recs[i].Data)
			p.XAdd(ctx, &redis.XAddArgs{Stream: eventsKey, Values: []any{
				"id", id, "timestamp", stamp, "data", recs[i].Data, "agent", testAgent, "epoch", testEpoch, "seq", recs[i].Seq,
			}})
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("pipeline: %w", err)
	}
	return nil
}
