// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/aurorasoc/edr-sensor/buffer"
)

// metrics are those of one Sender. All series exist from the start.
type metrics struct {
	delivered [2]prometheus.Counter // by buffer.Stream
	batches   map[verdict]prometheus.Counter
	failed    prometheus.Counter
	errors    map[Class]prometheus.Counter
	rewinds   prometheus.Counter
	connected prometheus.Gauge
	seconds   prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	delivered := f.NewCounterVec(prometheus.CounterOpts{
		Name: "transport_delivered_records_total",
		Help: "Records the server confirmed for the first time, by stream.",
	}, []string{"stream"})
	batches := f.NewCounterVec(prometheus.CounterOpts{
		Name: "transport_batches_total",
		Help: "Batches sent, by the server's verdict; error when there was none.",
	}, []string{"result"})
	errs := f.NewCounterVec(prometheus.CounterOpts{
		Name: "transport_errors_total",
		Help: "Failed attempts to connect or to deliver, by error class. No record is lost by one.",
	}, []string{"class"})
	m := &metrics{
		batches: make(map[verdict]prometheus.Counter),
		failed:  batches.WithLabelValues("error"),
		errors:  make(map[Class]prometheus.Counter),
		rewinds: f.NewCounter(prometheus.CounterOpts{
			Name: "transport_rewinds_total",
			Help: "Times the server had less than it had confirmed, so that records were sent again.",
		}),
		connected: f.NewGauge(prometheus.GaugeOpts{
			Name: "transport_connected",
			Help: "1 while records can be delivered, else 0.",
		}),
		seconds: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "transport_batch_seconds",
			Help:    "Time from sending a batch to the server's verdict.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2.5, 10),
		}),
	}
	m.delivered[buffer.Events] = delivered.WithLabelValues("events")
	m.delivered[buffer.Decisions] = delivered.WithLabelValues("decisions")
	for _, v := range []verdict{ok, dup, gap, overlap, fenced} {
		m.batches[v] = batches.WithLabelValues(v.label())
	}
	for _, c := range Classes() {
		m.errors[c] = errs.WithLabelValues(string(c))
	}
	return m
}
