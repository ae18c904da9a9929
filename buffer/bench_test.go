// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
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
