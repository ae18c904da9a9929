// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/transport/consumer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// benchRound is how many events are sent between two looks at the clock: enough to
// be steady, few enough for memory.
const benchRound = 50_000

// corpus returns n different events: those of the encoder's golden files, each with
// the id, the times and the process of its own, as a host has them; without some parts.
func corpus(tb testing.TB, n int, without ...string) [][]byte {
	tb.Helper()
	var golden []map[string]any
	for _, pattern := range []string{"process", "net", "file"} {
		files, err := filepath.Glob("../sensor/ocsf/testdata/" + pattern + ".*.json")
		if err != nil || len(files) == 0 {
			tb.Fatalf("no golden events: %v", err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				tb.Fatal(err)
			}
			var e map[string]any
			d := json.NewDecoder(bytes.NewReader(data))
			d.UseNumber()
			if err := d.Decode(&e); err != nil {
				tb.Fatal(err)
			}
			for _, part := range without {
				delete(e, part)
			}
			golden = append(golden, e)
		}
	}
	out := make([][]byte, n)
	size := 0
	for i := range out {
		e := golden[i%len(golden)]
		random := uint64(i+1) * 0x9e3779b97f4a7c15
		metadata, _ := e["metadata"].(map[string]any)
		metadata["uid"] = fmt.Sprintf("%08x-89ab-8cde-8f01-%012x", random>>32, random&(1<<48-1))
		metadata["sequence"] = 123456 + i
		at := time.Unix(1795446000, int64(i)*200_000+int64(random%100_000))
		e["time"], e["time_dt"] = at.UnixMilli(), at.UTC().Format("2006-01-02T15:04:05.000000000Z")
		if p, found := e["process"].(map[string]any); found {
			p["pid"] = 1000 + random%4_000_000
		}
		data, err := json.Marshal(e)
		if err != nil {
			tb.Fatal(err)
		}
		out[i] = data
		size += len(data)
	}
	tb.Logf("%d events of %d bytes on average", n, size/n)
	return out
}

// loopQueue hands out the same records over and over, under growing seqs, up to
// a limit: delivery is measured, not a queue.
type loopQueue struct {
	data  [][]byte
	last  uint64
	acked uint64
}

func (q *loopQueue) Epoch() string { return testEpoch }
func (q *loopQueue) Read(ctx context.Context, after uint64, dst []buffer.Record, maxRecords, maxBytes int) ([]buffer.Record, error) {
	for size := 0; after < q.last && len(dst) < maxRecords && size < maxBytes; {
		after++
		data := q.data[after%uint64(len(q.data))]
		dst, size = append(dst, buffer.Record{Seq: after, Data: data}), size+len(data)
	}
	if len(dst) == 0 {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return dst, nil
}
func (q *loopQueue) Ack(seq uint64) { q.acked = seq }
func (q *loopQueue) Bounds() buffer.Bounds {
	return buffer.Bounds{First: 1, Acked: q.acked, Last: q.last}
}
func (q *loopQueue) Forfeit(uint64, uint64, string) { panic("forfeit") }

func (q *loopQueue) SetAside(buffer.Record, string) (string, error) { panic("set aside") }

func (q *loopQueue) GivenUp() []uint64 { return nil }

// usage is what a round took, and what it left.
type usage struct{ seconds, server, client, wire, memory float64 }

func (u *usage) add(v usage) {
	u.seconds += v.seconds
	u.server += v.server
	u.client += v.client
	u.wire += v.wire
	u.memory += v.memory
}

// measure runs one round against an empty stream and empties it again.
func measure(b *testing.B, srv *redistest.Server, c *redis.Client, round func()) (u usage) {
	b.Helper()
	memory, wire := serverInfo(b, c, "used_memory:"), serverInfo(b, c, "total_net_input_bytes:")
	server, client, start := serverCPU(b, srv), ownCPU(b), time.Now()
	round()
	u.seconds = time.Since(start).Seconds()
	u.server, u.client = serverCPU(b, srv)-server, ownCPU(b)-client
	u.wire = serverInfo(b, c, "total_net_input_bytes:") - wire
	u.memory = serverInfo(b, c, "used_memory:") - memory
	if err := c.Del(b.Context(), eventsKey, "limit").Err(); err != nil {
		b.Fatal(err)
	}
	return u
}

// BenchmarkDeliver sends the corpus from one Sender, and from four, to one server. One
// operation is one event. In the same run, in turns, it measures plain XADD through
// go-redis in pipelines of the same size, and redis-benchmark's XADD, the most that
// this server takes. x/plain and x/limit are the ratios of events per second,
// server-cpu-x/plain that of the server's CPU time per event; wire and mem are bytes
// per event that the server received and holds. With -benchtime 1000000x, json/1 is
// how one agent drains a backlog of a million. What is short are events without what
// others repeat, for to copy 3 KB four times is most of what a server does for an event.
// What its scripts are given it hashes besides, every byte (Redis 7.0 on, deps/lua/src/lstring.c):
// a fifth of its time for such events, where a pipeline pays nothing. So server-cpu-x/plain
// is 1.4 where memory is slow and 2.2 where it is fast.
func BenchmarkDeliver(b *testing.B) {
	events, short := corpus(b, 5000), corpus(b, 5000, "actor", "device", "unmapped", "class_name", "type_name", "category_name", "activity_name")
	for _, e := range []Encoding{JSON, ZstdBatch} {
		for _, senders := range []int{1, 4} {
			b.Run(fmt.Sprintf("%s/%d", e, senders), func(b *testing.B) { benchDeliver(b, events, e, senders) })
			b.Run(fmt.Sprintf("%s/%d/short", e, senders), func(b *testing.B) { benchDeliver(b, short, e, senders) })
		}
	}
}

func benchDeliver(b *testing.B, events [][]byte, e Encoding, senders int) {
	const batch = 100
	srv := redistest.Start(b, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	ctx := quiet(b)
	type agent struct {
		q *loopQueue
		s *Sender
	}
	var agents []agent
	for i := range senders {
		o := fast(srv.Addr())
		o.AgentID = fmt.Sprint("agent-", i)
		o.Encoding, o.BatchRecords = e, batch
		q := &loopQueue{data: events}
		s, err := New(o, q)
		if err != nil {
			b.Fatal(err)
		}
		defer s.Close()
		agents = append(agents, agent{q, s})
	}
	mem := newMemQueue()
	for range benchRound / senders {
		mem.last++
		mem.recs = append(mem.recs, buffer.Record{Seq: mem.last, Data: events[mem.last%uint64(len(events))]})
	}
	each := func(f func(i int)) {
		var wg sync.WaitGroup
		for i := range senders {
			wg.Go(func() { f(i) })
		}
		wg.Wait()
	}
	var ours, plain usage
	var limit float64
	b.ReportAllocs()
	b.ResetTimer()
	for left := b.N; left > 0; left -= benchRound {
		n := max(min(left, benchRound)/senders, 1)
		ours.add(measure(b, srv, c, func() {
			b.StartTimer()
			each(func(i int) {
				agents[i].q.last += uint64(n)
				if err := agents[i].s.Drain(ctx); err != nil {
					b.Error(err)
				}
			})
			b.StopTimer()
		}))
		if n == benchRound/senders {
			plain.add(measure(b, srv, c, func() { each(func(int) { plainProducer(b, c.Options(), mem, batch) }) }))
			measure(b, srv, c, func() { limit += benchRound / redisBenchmark(b, srv, events) })
		}
		b.StartTimer()
	}
	n := float64(b.N)
	b.ReportMetric(n/ours.seconds, "events/s")
	b.ReportMetric(ours.server/n*1e6, "server-µs/event")
	b.ReportMetric(ours.client/n*1e6, "client-µs/event")
	b.ReportMetric(ours.wire/n, "wire-B/event")
	b.ReportMetric(ours.memory/n, "mem-B/event")
	if full := float64(b.N / benchRound * benchRound); full > 0 {
		b.ReportMetric(plain.seconds/full*n/ours.seconds, "x/plain")
		b.ReportMetric(limit/full*n/ours.seconds, "x/limit")
		b.ReportMetric((ours.server/n)/(plain.server/full), "server-cpu-x/plain")
	}
}

// BenchmarkLatency is the time from the append of an event until a consumer that waits
// for it has it, at a steady rate over ten seconds, with the real buffer and the
// defaults of both: on this machine, over a network with a round trip of 20 ms, and over
// one that resets one request in twenty. Of the latter's wait most is the time over which
// a fleet spreads its reconnects; "small" is what a hundred sensors need of it.
func BenchmarkLatency(b *testing.B) {
	for _, network := range []struct {
		name   string
		faults redistest.Faults
		spread time.Duration
	}{
		{"local", redistest.Faults{}, 0},
		{"20ms", redistest.Faults{Delay: 20 * time.Millisecond}, 0},
		{"resets", redistest.Faults{Reset: 0.05}, 0},
		{"resets/small", redistest.Faults{Reset: 0.05}, 100 * time.Millisecond},
	} {
		for _, e := range []Encoding{JSON, ZstdBatch} {
			for _, rate := range []int{50, 5000} {
				b.Run(fmt.Sprintf("%s/%s/%d", network.name, e, rate), func(b *testing.B) {
					for range b.N {
						benchLatency(b, Options{Encoding: e, FirstReconnect: network.spread}, rate, network.faults)
					}
				})
			}
		}
	}
}

// arrivals notes when events arrive whose data is the time of their append.
type arrivals struct{ took []time.Duration }

func (a *arrivals) Records(_ context.Context, recs []consumer.Record) error {
	now := time.Now().UnixNano()
	for i := range recs {
		var e struct {
			Appended int64 `json:"appended"`
		}
		if err := json.Unmarshal(recs[i].Data, &e); err != nil {
			return err
		}
		a.took = append(a.took, time.Duration(now-e.Appended))
	}
	return nil
}

func (a *arrivals) Malformed(_ context.Context, e *consumer.EntryError) error { return e }
func (a *arrivals) Flush(context.Context) error                               { return nil }

func benchLatency(b *testing.B, o Options, rate int, faults redistest.Faults) {
	srv := redistest.Start(b, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q, err := buffer.Open(b.Context(), buffer.Options{Dir: b.TempDir(), Cap: 256 << 20})
	if err != nil {
		b.Fatal(err)
	}
	defer q.Close(context.WithoutCancel(b.Context()))
	o.Addr, o.AgentID = srv.Addr(), testAgent
	if faults != (redistest.Faults{}) {
		o.Addr = redistest.StartProxy(b, o.Addr, faults).Addr()
	}
	s := start(b, o, q)
	defer s.stop(b)
	g, err := consumer.New(c, consumer.Options{Group: "bench", Name: "one", Streams: []string{eventsKey}})
	if err != nil {
		b.Fatal(err)
	}
	const seconds = 10
	total := rate * seconds
	got := &arrivals{}
	done := make(chan error, 1)
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	go func() {
		var err error
		for len(got.took) < total && err == nil {
			err = g.Read(ctx, got)
		}
		done <- err
	}()
	events := corpus(b, 5000)
	began := time.Now()
	for made := 0; made < total; {
		n := min(total, int(time.Since(began).Seconds()*float64(rate))+1) - made
		if n <= 0 {
			sleep(ctx, time.Millisecond)
			continue
		}
		batch := q.NewBatch()
		for i := range n {
			rec := fmt.Appendf(batch.Begin(buffer.Events), `{"appended":%d,%s`, time.Now().UnixNano(), events[(made+i)%len(events)][1:])
			if err := batch.End(rec, false); err != nil {
				b.Fatal(err)
			}
		}
		if err := q.Append(ctx, batch); err != nil {
			b.Fatal(err)
		}
		made += n
	}
	if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
		b.Fatal(err)
	}
	slices.Sort(got.took)
	at := func(p float64) float64 { return got.took[int(p*float64(len(got.took)-1))].Seconds() * 1e3 }
	b.ReportMetric(at(0.5), "p50-ms")
	b.ReportMetric(at(0.99), "p99-ms")
}

// redisBenchmark returns how many XADD per second redis-benchmark reaches with
// events of the same size.
func redisBenchmark(b *testing.B, srv *redistest.Server, events [][]byte) float64 {
	b.Helper()
	size := 0
	for _, e := range events {
		size += len(e)
	}
	path := strings.TrimPrefix(srv.Addr(), "unix://")
	out, err := exec.Command("redis-benchmark", "-s", path, "--csv", "-n", strconv.Itoa(benchRound), "-P", "500", "-c", "4",
		"XADD", "limit", "*", "d", strings.Repeat("x", size/len(events))).Output()
	if err != nil {
		b.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	fields := strings.Split(lines[len(lines)-1], `","`)
	if len(fields) < 2 {
		b.Fatalf("redis-benchmark: %q", out)
	}
	rps, err := strconv.ParseFloat(strings.Trim(fields[1], `"`), 64)
	if err != nil {
		b.Fatalf("redis-benchmark: %q: %v", out, err)
	}
	return rps
}

// serverInfo reads a number of INFO.
func serverInfo(b *testing.B, c *redis.Client, name string) (v float64) {
	b.Helper()
	info, err := c.Info(b.Context(), "memory", "stats").Result()
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(info, name)
	if _, err := fmt.Sscan(rest, &v); err != nil {
		b.Fatalf("info %s %v", name, err)
	}
	return v
}

// serverCPU is the CPU time that the server has used, in seconds.
func serverCPU(b *testing.B, srv *redistest.Server) float64 {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", srv.PID()))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	f := strings.Fields(rest)
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100 // USER_HZ
}

// ownCPU is the CPU time that this process has used, in seconds.
func ownCPU(b *testing.B) float64 {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

func BenchmarkIdentify(b *testing.B) {
	data := []byte(payload(123456))
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		identify(data)
	}
}
