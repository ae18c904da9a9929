// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// The operations that buffer_errors_total counts.
const (
	opCommit = "commit"
	opReopen = "reopen"
	opRead   = "read"
)

type metrics struct {
	truncations, corrupt, rejected, commits prometheus.Counter
	commitSeconds                           prometheus.Histogram
	errors                                  *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, stats func() Stats) *metrics {
	f := promauto.With(reg)
	gauge := func(name, help string, value func(Stats) float64) {
		f.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return value(stats()) })
	}
	gauge("buffer_records", "Records in the buffer, delivered ones that are kept included.",
		func(s Stats) float64 { return float64(s.Records) })
	gauge("buffer_bytes", "Bytes of the buffer file that hold records.",
		func(s Stats) float64 { return float64(s.Bytes) })
	gauge("buffer_capacity_bytes", "Size of the buffer file, which it never exceeds.",
		func(s Stats) float64 { return float64(s.Cap) })
	gauge("buffer_unsent_records", "Durable records that are not acknowledged by the server yet.",
		func(s Stats) float64 { return float64(s.Unsent) })
	gauge("buffer_oldest_unsent_age_seconds", "Age of the oldest record that is not acknowledged yet, 0 when there is none.",
		func(s Stats) float64 {
			if s.OldestUnsent.IsZero() {
				return 0
			}
			return max(0, time.Since(s.OldestUnsent).Seconds())
		})
	m := &metrics{
		truncations: f.NewCounter(prometheus.CounterOpts{
			Name: "buffer_truncations_total",
			Help: "Records dropped undelivered because the buffer was full, over the life of the buffer file.",
		}),
		corrupt: f.NewCounter(prometheus.CounterOpts{
			Name: "buffer_corrupt_records_total",
			Help: "Records lost to damage on disk, over the life of the buffer file.",
		}),
		rejected: f.NewCounter(prometheus.CounterOpts{
			Name: "buffer_rejected_records_total",
			Help: "Records refused because they are larger than the limit.",
		}),
		commits: f.NewCounter(prometheus.CounterOpts{
			Name: "buffer_commits_total",
			Help: "Durable transactions.",
		}),
		commitSeconds: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "buffer_commit_seconds",
			Help:    "Time from the start of a transaction until it is durable.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}),
		errors: f.NewCounterVec(prometheus.CounterOpts{
			Name: "buffer_errors_total",
			Help: "Errors of the file system or the database, by operation.",
		}, []string{"op"}),
	}
	for _, op := range []string{opCommit, opReopen, opRead} {
		m.errors.WithLabelValues(op)
	}
	return m
}
