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
	refused   prometheus.Counter
	renewals  prometheus.Counter
	connected prometheus.Gauge
	risks     map[RiskKind]prometheus.Gauge
	memory    prometheus.Gauge
	unread    [buffer.Streams]prometheus.Gauge
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
		refused: f.NewCounter(prometheus.CounterOpts{
			Name: "transport_refused_records_total",
			Help: "Records over which Redis, or what stands before it, broke the connection each time while it took others: each was copied aside and named as lost. If it grows, RECORD_REFUSED on the decisions stream says which, how large and where the copy is; raise the limit that it meets.",
		}),
		renewals: f.NewCounter(prometheus.CounterOpts{
			Name: "transport_renewals_total",
			Help: "Times delivery went on in a new epoch because somebody else had written as this agent. If it grows, a machine or its buffer was cloned or restored: see the decision IDENTITY_NEW.",
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
		risks: make(map[RiskKind]prometheus.Gauge),
		memory: f.NewGauge(prometheus.GaugeOpts{
			Name: "transport_redis_memory_ratio",
			Help: "Memory that Redis uses, of maxmemory, or of its host's memory when that is not set; 0 when it does not tell. If it nears 1, Redis soon takes no events: let consumers read and trim, or raise maxmemory.",
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
	risks := f.NewGaugeVec(prometheus.GaugeOpts{
		Name: "transport_risk",
		Help: "1 for each kind of state of Redis, as far as it tells, that will lose events or end delivery. If it is 1, /status says what to do: eviction (maxmemory-policy allkeys-* deletes whole streams when full), memory (nearly full), unread (a trimmed stream nears its limit), password (the file's is refused), replica (none confirms).",
	}, []string{"risk"})
	for _, k := range Risks() {
		m.risks[k] = risks.WithLabelValues(string(k))
	}
	unread := f.NewGaugeVec(prometheus.GaugeOpts{
		Name: "transport_unread_entries",
		Help: "Entries that the slowest consumer group has not read or not acknowledged, by stream; 0 without groups, or when Redis does not tell. If it grows, that group is slower than the events.",
	}, []string{"stream"})
	m.unread[buffer.Events] = unread.WithLabelValues("events")
	m.unread[buffer.DecisionsSystem] = unread.WithLabelValues("decisions_system")
	m.unread[buffer.DecisionsAgents] = unread.WithLabelValues("decisions_agents")
	m.unread[buffer.DecisionsApprovals] = unread.WithLabelValues("decisions_approvals")
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
