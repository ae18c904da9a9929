// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/aurorasoc/edr-sensor/buffer"
)

// latencies are the buckets of a record's way, from what nobody notices to a day
// without the server.
func latencies() []float64 {
	return []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60, 600, 3600, 86400}
}

// metrics are those of one Sender. All series exist from the start.
type metrics struct {
	delivered [buffer.Streams]prometheus.Counter
	batches   map[verdict]prometheus.Counter
	failed    prometheus.Counter
	errors    map[Class]prometheus.Counter
	rewinds   prometheus.Counter
	connected prometheus.Gauge
	eviction  prometheus.Gauge
	seconds   prometheus.Histogram
	delivery  prometheus.Histogram
	endToEnd  prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	delivered := f.NewCounterVec(prometheus.CounterOpts{
		Name: "transport_delivered_records_total",
		Help: "Records the server confirmed for the first time, by stream. If it stops while buffer_unsent_records grows, see transport_connected.",
	}, []string{"stream"})
	batches := f.NewCounterVec(prometheus.CounterOpts{
		Name: "transport_batches_total",
		Help: "Batches sent, by the server's verdict; error when there was none. If it grows for anything but ok, look at transport_errors_total and at the log of that minute; dup and overlap lose nothing.",
	}, []string{"result"})
	errs := f.NewCounterVec(prometheus.CounterOpts{
		Name: "transport_errors_total",
		Help: "Failed attempts to connect or to deliver, by error class. No record is lost by one. If it grows, docs/operations.md has a paragraph per class, and /status says what to do.",
	}, []string{"class"})
	m := &metrics{
		batches: make(map[verdict]prometheus.Counter),
		failed:  batches.WithLabelValues("error"),
		errors:  make(map[Class]prometheus.Counter),
		rewinds: f.NewCounter(prometheus.CounterOpts{
			Name: "transport_rewinds_total",
			Help: "Times the server had less than it had confirmed, so that records were sent again. If it grows, Redis loses acknowledged writes: check its persistence and its failovers.",
		}),
		connected: f.NewGauge(prometheus.GaugeOpts{
			Name: "transport_connected",
			Help: "1 while records can be delivered, else 0. If it is 0, events wait in the buffer: /status says why and what to do.",
		}),
		seconds: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "transport_batch_seconds",
			Help:    "Time from sending a batch to the server's verdict. If it grows, Redis or the network to it is slow: see its slow log.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2.5, 10),
		}),
		eviction: f.NewGauge(prometheus.GaugeOpts{
			Name: "transport_eviction_risk",
			Help: "1 when Redis deletes whole streams without an error once it is full (maxmemory-policy allkeys-*), 0 when it does not or does not tell. If it is 1, set maxmemory-policy noeviction.",
		}),
		delivery: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "transport_delivery_latency_seconds",
			Help:    "Stage disk to Redis: time from when a record became durable until the server's reply, one observation a record of this run. If it grows, Redis is away or slow: see transport_batch_seconds.",
			Buckets: latencies(),
		}),
		endToEnd: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "transport_end_to_end_latency_seconds",
			Help:    "Time from an event in the kernel until Redis confirmed its record, to a millisecond, one observation a record. If it grows, the stage whose latency grew with it is the cause: sensor_read, buffer_append or transport_delivery.",
			Buckets: latencies(),
		}),
	}
	m.delivered[buffer.Events] = delivered.WithLabelValues("events")
	m.delivered[buffer.DecisionsSystem] = delivered.WithLabelValues("decisions_system")
	m.delivered[buffer.DecisionsAgents] = delivered.WithLabelValues("decisions_agents")
	m.delivered[buffer.DecisionsApprovals] = delivered.WithLabelValues("decisions_approvals")
	for _, v := range []verdict{ok, dup, gap, overlap, fenced} {
		m.batches[v] = batches.WithLabelValues(v.label())
	}
	for _, c := range Classes() {
		m.errors[c] = errs.WithLabelValues(string(c))
	}
	return m
}
