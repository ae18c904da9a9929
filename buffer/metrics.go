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
	opNote   = "note" // of the sidecar
)

type metrics struct {
	truncations, corrupt, commits prometheus.Counter
	corruptChunks, salvaged       prometheus.Counter
	commitSeconds, appendSeconds  prometheus.Histogram
	errors                        *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, stats func() Stats) *metrics {
	f := promauto.With(reg)
	gauge := func(o prometheus.GaugeOpts, value func(Stats) float64) {
		f.NewGaugeFunc(o, func() float64 { return value(stats()) })
	}
	gauge(prometheus.GaugeOpts{
		Name: "buffer_records",
		Help: "Records in the buffer, delivered ones that are kept included. If it only grows, delivery is behind: see buffer_unsent_records.",
	}, func(s Stats) float64 { return float64(s.Records) })
	gauge(prometheus.GaugeOpts{
		Name: "buffer_bytes",
		Help: "Bytes of the buffer file that hold records, delivered ones that are kept included. If it is near buffer_capacity_bytes, nothing is wrong yet: what is delivered makes room first; see buffer_unsent_bytes.",
	}, func(s Stats) float64 { return float64(s.Bytes) })
	gauge(prometheus.GaugeOpts{
		Name: "buffer_unsent_bytes",
		Help: "Bytes of the buffer file that hold records the server has not acknowledged yet. If it grows for minutes, Redis is away or slower than the events: see transport_connected; at about nine tenths of buffer_capacity_bytes the oldest are dropped.",
	}, func(s Stats) float64 { return float64(s.UnsentBytes) })
	gauge(prometheus.GaugeOpts{
		Name: "buffer_capacity_bytes",
		Help: "Size of the buffer file, which it never exceeds. If it is too small for the longest time that Redis may be away, raise buffer.cap.",
	}, func(s Stats) float64 { return float64(s.Cap) })
	gauge(prometheus.GaugeOpts{
		Name: "buffer_unsent_records",
		Help: "Durable records that the server has not acknowledged yet. If it grows for minutes, see transport_connected and transport_errors_total for why.",
	}, func(s Stats) float64 { return float64(s.Unsent) })
	gauge(prometheus.GaugeOpts{
		Name: "buffer_oldest_unsent_age_seconds",
		Help: "Age of the oldest record that is not acknowledged yet, 0 when there is none. If it grows, delivery does not keep up: see transport_connected, then the load of Redis.",
	}, func(s Stats) float64 {
		if s.OldestUnsent.IsZero() {
			return 0
		}
		return max(0, time.Since(s.OldestUnsent).Seconds())
	})
	gauge(prometheus.GaugeOpts{
		Name: "buffer_quarantined_files",
		Help: "Whether this run found the file damaged, salvaged what was intact, and set it aside. If it is not 0, see BUFFER_SET_ASIDE on the decisions stream for what was lost, keep the file that /status names, and check the disk.",
	}, func(s Stats) float64 {
		if s.Recovery == nil {
			return 0
		}
		return 1
	})
	gauge(prometheus.GaugeOpts{
		Name: "buffer_quarantined_bytes",
		Help: "Disk space of what was set aside beside the buffer: damaged files and chunks, and records that Redis does not take. If it is not 0, look at them (edr-sensor buffer info), then remove them: at most two files, 16 chunks and 16 records are kept, and no more than buffer.cap in all.",
	}, func(s Stats) float64 { return float64(s.Quarantined) })
	m := &metrics{
		truncations: f.NewCounter(prometheus.CounterOpts{
			Name: "buffer_truncations_total",
			Help: "Records dropped undelivered because the buffer was full, over the life of the buffer file. If it grows, evidence is lost now: bring Redis back, then raise buffer.cap; RECORDS_LOST on the decisions stream names the records.",
		}),
		corrupt: f.NewCounter(prometheus.CounterOpts{
			Name: "buffer_corrupt_records_total",
			Help: "Records lost to damage on disk, over the life of the buffer file. If it grows, check the disk and its file system: something other than the sensor changed the file.",
		}),
		corruptChunks: f.NewCounter(prometheus.CounterOpts{
			Name: "buffer_corrupt_chunks_total",
			Help: "Chunks of records found damaged, each counted and copied aside; what of it is not intact is skipped. If it grows, check the disk and its file system.",
		}),
		salvaged: f.NewCounter(prometheus.CounterOpts{
			Name: "buffer_salvaged_records_total",
			Help: "Records taken over intact from damaged files, over the life of the buffer. If it grows, the file was damaged: see BUFFER_SET_ASIDE on the decisions stream for what was not intact.",
		}),
		commits: f.NewCounter(prometheus.CounterOpts{
			Name: "buffer_commits_total",
			Help: "Durable transactions. If it stands still while sensor_events_total grows, the disk does not answer: see buffer_errors_total.",
		}),
		commitSeconds: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "buffer_commit_seconds",
			Help:    "Time from the start of a transaction until it is durable. If it grows, the disk is slow to sync: move agent.state_dir to a faster one, or find who loads it.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}),
		appendSeconds: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "buffer_append_latency_seconds",
			Help:    "Stage worker to disk: time from the hand-over of a commit's first record until it is durable, one observation a commit. If it exceeds buffer.commit_interval by much, see buffer_commit_seconds.",
			Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60},
		}),
		errors: f.NewCounterVec(prometheus.CounterOpts{
			Name: "buffer_errors_total",
			Help: "Errors of the file system or the database, by operation. If it grows, free space or repair the disk under agent.state_dir: what is not stored waits in the rings and is lost when they are full.",
		}, []string{"op"}),
	}
	for _, op := range []string{opCommit, opReopen, opRead, opNote} {
		m.errors.WithLabelValues(op)
	}
	return m
}
