// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// benchSize is the mean size of an event, and benchRound how many are sent
// between two looks at the clock: enough to be steady, few enough for memory.
const (
	benchSize  = 1200
	benchRound = 50_000
)

// loopQueue hands out the same records over and over, under growing seqs, up to
// a limit: delivery is measured, not a queue.
type loopQueue struct {
	data  []byte
	last  uint64
	acked uint64
}

func (q *loopQueue) Epoch() string { return testEpoch }
func (q *loopQueue) Read(ctx context.Context, after uint64, dst []buffer.Record, maxRecords, maxBytes int) ([]buffer.Record, error) {
	for size := 0; after < q.last && len(dst) < maxRecords && size < maxBytes; size += len(q.data) {
		after++
		dst = append(dst, buffer.Record{Seq: after, Data: q.data})
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

// BenchmarkDeliver sends events of 1200 bytes from one Sender to one server. One
// operation is one event. In the same run, in turns, it measures plain XADD
// through go-redis in pipelines of the same size, and redis-benchmark's XADD, the
// most that this server takes; x/plain and x/limit are the ratios of events per
// second, server-µs the server's CPU time per event.
func BenchmarkDeliver(b *testing.B) {
	srv := redistest.Start(b, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	data := fmt.Sprintf(`{"time":1700000000000,"time_dt":"2023-11-14T22:13:20.123456789Z","metadata":{"uid":"01234567-89ab-8cde-8f01-23456789abcd","sequence":123456},"pad":"%s"}`,
		strings.Repeat("x", benchSize-143))
	q := &loopQueue{data: []byte(data)}
	s, err := New(fast(srv.Addr()), q)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	ctx := quiet(b)
	mem := &memQueue{epoch: testEpoch, changed: make(chan struct{})}
	for range benchRound {
		mem.last++
		mem.recs = append(mem.recs, buffer.Record{Seq: mem.last, Data: q.data})
	}
	var ours, plain, limit, oursCPU, plainCPU, events float64
	b.SetBytes(benchSize)
	b.ReportAllocs()
	b.ResetTimer()
	for left := b.N; left > 0; left -= benchRound {
		n := min(left, benchRound)
		cpu := serverCPU(b, srv)
		start := time.Now()
		q.last += uint64(n)
		if err := s.Drain(ctx); err != nil {
			b.Fatal(err)
		}
		ours += time.Since(start).Seconds()
		oursCPU += serverCPU(b, srv) - cpu
		events += float64(n)
		b.StopTimer()
		c.Del(ctx, eventsKey)
		if n == benchRound {
			cpu = serverCPU(b, srv)
			start = time.Now()
			plainProducer(b, c.Options(), mem, s.o.BatchRecords)
			plain += time.Since(start).Seconds()
			plainCPU += serverCPU(b, srv) - cpu
			c.Del(ctx, eventsKey)
			limit += float64(n) / redisBenchmark(b, srv)
			c.Del(ctx, "limit")
		}
		b.StartTimer()
	}
	b.ReportMetric(events/ours, "events/s")
	b.ReportMetric(oursCPU/events*1e6, "server-µs/event")
	if full := float64(b.N / benchRound * benchRound); full > 0 {
		b.ReportMetric(plain/full*events/ours, "x/plain")
		b.ReportMetric(limit/full*events/ours, "x/limit")
		b.ReportMetric((oursCPU/events)/(plainCPU/full), "server-cpu-x/plain")
	}
}

// redisBenchmark returns how many XADD per second redis-benchmark reaches.
func redisBenchmark(b *testing.B, srv *redistest.Server) float64 {
	b.Helper()
	path := strings.TrimPrefix(srv.Addr(), "unix://")
	out, err := exec.Command("redis-benchmark", "-s", path, "--csv", "-n", strconv.Itoa(benchRound), "-P", "500", "-c", "4",
		"XADD", "limit", "*", "d", strings.Repeat("x", benchSize)).Output()
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

func BenchmarkIdentify(b *testing.B) {
	data := []byte(payload(123456))
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		identify(data)
	}
}
