// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// written returns the bytes that this process has passed to write calls.
func written(b *testing.B) float64 {
	data, err := os.ReadFile("/proc/self/io")
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "wchar: ")
	line, _, _ := strings.Cut(rest, "\n")
	n, err := strconv.ParseFloat(line, 64)
	if err != nil {
		b.Fatal(err)
	}
	return n
}

// rawAppend is the floor: append to a growing file, fdatasync every so many
// bytes.
func rawAppend(b *testing.B, rec []byte, n, every int) time.Duration {
	f, err := os.Create(filepath.Join(b.TempDir(), "raw"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 0, every+len(rec))
	start := time.Now()
	for i := range n {
		if buf = append(buf, rec...); len(buf) >= every || i == n-1 {
			if _, err := f.Write(buf); err != nil {
				b.Fatal(err)
			}
			if err := unix.Fdatasync(int(f.Fd())); err != nil {
				b.Fatal(err)
			}
			buf = buf[:0]
		}
	}
	return time.Since(start)
}

// BenchmarkAppend appends records as fast as they become durable, to a file
// that is full, so that every commit also drops. One operation is one record.
// x/raw is the speed against rawAppend with as many bytes per fdatasync,
// measured right after; written/B is what a payload byte costs in written ones.
func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{300, 1024, 4096} {
		for _, commit := range []string{"adaptive", "256KiB"} {
			b.Run(fmt.Sprintf("%dB/%s", size, commit), func(b *testing.B) { benchmarkAppend(b, size, commit == "adaptive") })
		}
	}
}

func benchmarkAppend(b *testing.B, size int, adaptive bool) {
	commits := 0
	q := open(b, Options{Dir: b.TempDir(), Cap: 64 * mib, Committed: func([]byte) { commits++ }})
	rec := make([]byte, size)
	perBatch := 64
	if !adaptive { // exactly one chunk, and no other in the meantime
		perBatch = (q.o.chunkBytes() - chunkHeader) / (size + frameHeader)
	}
	flush := func() {
		if err := q.Flush(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
	produce := func(n int) {
		for n > 0 {
			batch := q.NewBatch()
			for range min(n, perBatch) {
				if err := batch.End(append(batch.Begin(Events), rec...), false); err != nil {
					b.Fatal(err)
				}
			}
			n -= batch.Len()
			if err := q.Append(context.Background(), batch); err != nil {
				b.Fatal(err)
			}
			if !adaptive {
				flush()
			}
		}
		flush()
	}
	produce(80 * mib / size)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	before := written(b)
	commits = 0
	b.ResetTimer()
	produce(b.N)
	b.StopTimer()
	payload := float64(b.N * size)
	b.ReportMetric((written(b)-before)/payload, "written/B")
	b.ReportMetric(payload/float64(commits)/kib, "KiB/commit")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
	raw := rawAppend(b, rec, b.N, int(payload)/commits)
	b.ReportMetric(raw.Seconds()/b.Elapsed().Seconds(), "x/raw")
}

// BenchmarkRead reads a backlog in batches as the transport does. One operation
// is one record.
func BenchmarkRead(b *testing.B) {
	const size = 1024
	q := open(b, Options{Dir: b.TempDir(), Cap: 128 * mib})
	rec := make([]byte, size)
	for range 96 * mib / size / 64 {
		batch := q.NewBatch()
		for range 64 {
			if err := batch.End(append(batch.Begin(Events), rec...), false); err != nil {
				b.Fatal(err)
			}
		}
		if err := q.Append(context.Background(), batch); err != nil {
			b.Fatal(err)
		}
	}
	if err := q.Flush(context.Background()); err != nil {
		b.Fatal(err)
	}
	for _, mode := range []string{"warm", "cold"} {
		b.Run(mode, func(b *testing.B) {
			b.SetBytes(size)
			b.ReportAllocs()
			recs := make([]Record, 0, 256)
			bounds := q.Bounds()
			after := bounds.First - 1
			if mode == "cold" {
				if err := dropCache(q.file.Load()); err != nil {
					b.Fatal(err)
				}
			}
			b.ResetTimer()
			for n := 0; n < b.N; n += len(recs) {
				if after == bounds.Last {
					after = bounds.First - 1
					if mode == "cold" {
						b.StopTimer()
						if err := dropCache(q.file.Load()); err != nil {
							b.Fatal(err)
						}
						b.StartTimer()
					}
				}
				var err error
				if recs, err = q.Read(context.Background(), after, recs[:0], 256, 256*kib); err != nil {
					b.Fatal(err)
				}
				after = recs[len(recs)-1].Seq
			}
		})
	}
}

// BenchmarkDrain drains a backlog that is not in the page cache while records are appended
// at 5,000 a second, as after an outage of Redis. One operation is the whole backlog.
// appended/s is what the appender got of its 5,000.
func BenchmarkDrain(b *testing.B) {
	const size, backlog, rate = 1024, 256 * mib, 5000
	rec := make([]byte, size)
	for range b.N {
		b.StopTimer()
		q := open(b, Options{Dir: b.TempDir(), Cap: 512 * mib})
		ctx, cancel := context.WithCancel(context.Background())
		appendBatch := func(n int) {
			batch := q.NewBatch()
			for range n {
				if err := batch.End(append(batch.Begin(Events), rec...), false); err != nil {
					b.Fatal(err)
				}
			}
			if err := q.Append(ctx, batch); err != nil && ctx.Err() == nil {
				b.Error(err)
			}
		}
		for range backlog / size / 64 {
			appendBatch(64)
		}
		if err := q.Flush(ctx); err != nil {
			b.Fatal(err)
		}
		end := q.Bounds().Last
		if err := dropCache(q.file.Load()); err != nil {
			b.Fatal(err)
		}
		appended := make(chan float64)
		go func() {
			start, n := time.Now(), 0
			for ctx.Err() == nil {
				if due := int(time.Since(start).Seconds()*rate) - n; due > 0 {
					due = min(due, 50)
					appendBatch(due)
					n += due
				} else {
					<-time.After(time.Millisecond) // the pace is what is measured
				}
			}
			appended <- float64(n) / time.Since(start).Seconds()
		}()
		var recs []Record
		var err error
		b.StartTimer()
		start := time.Now()
		for seq := uint64(0); seq < end; {
			if recs, err = q.Read(ctx, seq, recs[:0], 512, 512*kib); err != nil {
				b.Fatal(err)
			}
			seq = recs[len(recs)-1].Seq
			q.Ack(seq)
		}
		b.StopTimer()
		b.ReportMetric(float64(end*size)/mib/time.Since(start).Seconds(), "MiB/s")
		cancel()
		b.ReportMetric(<-appended, "appended/s")
		closeQueue(b, q)
	}
}

// BenchmarkOpen opens a full queue whose file is not in the page cache: closed, and as a kill
// leaves it. One operation is one open.
func BenchmarkOpen(b *testing.B) {
	for _, size := range []int64{512 * mib, 5 << 30} {
		b.Run(fmt.Sprintf("%dMiB", size/mib), func(b *testing.B) { benchmarkOpen(b, size) })
	}
}

func benchmarkOpen(b *testing.B, size int64) {
	o := Options{Dir: b.TempDir(), Cap: size}
	q := open(b, o)
	rec := make([]byte, 4096)
	for n := int64(0); n < size; { // it wraps
		batch := q.NewBatch()
		for range 60 {
			if err := batch.End(append(batch.Begin(Events), rec...), false); err != nil {
				b.Fatal(err)
			}
		}
		n += int64(batch.Size())
		if err := errors.Join(q.Append(b.Context(), batch), q.Flush(b.Context())); err != nil {
			b.Fatal(err)
		}
	}
	chunks := len(q.index.live())
	closeQueue(b, q)
	for _, state := range []string{"closed", "killed"} {
		b.Run(state, func(b *testing.B) {
			for range b.N {
				b.StopTimer()
				if state == "killed" {
					kill(b, o)
				}
				f, err := os.Open(filepath.Join(o.Dir, fileName))
				if err == nil {
					err = errors.Join(f.Sync(), dropCache(f), f.Close())
				}
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				q, err := Open(b.Context(), o)
				b.StopTimer()
				if err != nil {
					b.Fatal(err)
				}
				closeQueue(b, q)
			}
			b.ReportMetric(float64(chunks), "chunks")
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/1000, "ms/open")
		})
	}
}

// kill leaves the file as one does that ends the process before it closes the queue: both
// meta pages are as before, and the last transaction has overwritten nothing they lead to.
func kill(b *testing.B, o Options) {
	q := open(b, o)
	add(b, q, "last")
	if err := q.Flush(b.Context()); err != nil {
		b.Fatal(err)
	}
	metas := make([]byte, 2*pageSize)
	f, err := os.OpenFile(q.path, os.O_RDWR, 0)
	if err == nil {
		_, err = f.ReadAt(metas, 0)
	}
	side := read(b, filepath.Join(o.Dir, sidecarName))
	closeQueue(b, q)
	if err == nil {
		_, err = f.WriteAt(metas, 0)
	}
	if err := errors.Join(err, f.Close(), os.WriteFile(filepath.Join(o.Dir, sidecarName), side, 0o600)); err != nil {
		b.Fatal(err)
	}
}
