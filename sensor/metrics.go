// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

type metrics struct {
	events, lost [event.Kinds]prometheus.Counter
	suppressed   [event.Kinds]prometheus.Counter
	decodeErrors prometheus.Counter
	rejected     prometheus.Counter
	missed       prometheus.Counter
	takeovers    map[string]prometheus.Counter
	attached     *prometheus.GaugeVec
	tagged       prometheus.Counter
	tampering    prometheus.Counter
	latency      prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	m := &metrics{
		decodeErrors: f.NewCounter(prometheus.CounterOpts{Name: "sensor_decode_errors_total", Help: "Kernel records that could not be decoded; each is an event lost. If it grows, report it: kernel object and binary disagree."}),
		rejected:     f.NewCounter(prometheus.CounterOpts{Name: "sensor_rejected_events_total", Help: "Events that the buffer refused because of their size; each is lost. If it grows, report it with the log line \"record rejected\"."}),
		missed:       f.NewCounter(prometheus.CounterOpts{Name: "sensor_missed_runs_total", Help: "Events that the kernel may have left out because every program that sees them was interrupted on that CPU: an upper bound. If it grows, the host is busy in a way that the programs do not survive: report the kernel release and the load."}),
		latency: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "sensor_read_latency_seconds",
			Help:    "Stage kernel to worker: time from the kernel's time of an event until it was decoded. If it grows, the worker is short of CPU or waits for the disk: see buffer_append_latency_seconds.",
			Buckets: []float64{.001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60},
		}),
		tampering: f.NewCounter(prometheus.CounterOpts{Name: "sensor_tampering_total", Help: "Events about the sensor itself: signals to it, control of its process, changes of its files; those that are in order, as when systemd stops it, included. If it grows while nobody upgrades or restarts the sensor, somebody works on it: TAMPERING on the decisions stream says who."}),
		tagged:    f.NewCounter(prometheus.CounterOpts{Name: "sensor_case_events_total", Help: "Events that carry the ids of an open case. If it stands still while a case is open, the case covers something else than was meant, or nothing that runs: see edr-sensor case list."}),
		attached:  f.NewGaugeVec(prometheus.GaugeOpts{Name: "sensor_hook_attached", Help: "1 when the event is seen by a hook of this kind, 0 when it is not seen. If it is 0, this host is blind for the event: edr-sensor doctor says why."}, []string{"event", "hook"}),
	}
	takeovers := f.NewCounterVec(prometheus.CounterOpts{Name: "sensor_takeovers_total", Help: "1 when this run went on with the kernel programs of the one before, by whether they were adopted as they are or replaced by others, so that nothing was missed in between. If it is 0 for both after a restart by systemd, BLIND_… on the decisions stream says why, and how long nothing was seen."}, []string{"how"})
	m.takeovers = map[string]prometheus.Counter{howAdopted: takeovers.WithLabelValues(howAdopted), howReplaced: takeovers.WithLabelValues(howReplaced)}
	events := f.NewCounterVec(prometheus.CounterOpts{Name: "sensor_events_total", Help: "Events read, by kind. If it stops for process.exec, nothing runs or nothing is seen: see sensor_hook_attached and /readyz."}, []string{"kind"})
	lost := f.NewCounterVec(prometheus.CounterOpts{Name: "sensor_lost_events_total", Help: "Events the kernel had no ring space for, by kind. If it grows, evidence is lost now: find what stalls the disk (buffer_commit_seconds), or raise sensor.priority_ring or sensor.bulk_ring."}, []string{"kind"})
	suppressed := f.NewCounterVec(prometheus.CounterOpts{Name: "sensor_suppressed_events_total", Help: "Events the kernel left out on purpose, by kind: more of one process than sensor.file.per_process, or excluded. They are not among the events, nor lost. If it grows much faster than sensor_events_total, one process floods: SUPPRESSED on the decisions stream says how much of what."}, []string{"kind"})
	for k := event.None + 1; int(k) < event.Kinds; k++ {
		if k == event.Heartbeat {
			continue
		}
		m.suppressed[k] = suppressed.WithLabelValues(k.String())
		m.events[k], m.lost[k] = events.WithLabelValues(k.String()), lost.WithLabelValues(k.String())
	}
	return m
}

func (m *metrics) covered(c Coverage) {
	m.attached.DeletePartialMatch(prometheus.Labels{"event": c.Event}) // one hook may have taken another's place
	kind, _, _ := strings.Cut(c.Hook, "/")
	if kind == "" {
		m.attached.WithLabelValues(c.Event, "none").Set(0)
		return
	}
	m.attached.WithLabelValues(c.Event, kind).Set(1)
}

// exposeRing asks the ring at each scrape: a worker that stands still would not tell.
func exposeRing(reg prometheus.Registerer, name string, r *ring, age func() float64) {
	f, labels := promauto.With(reg), prometheus.Labels{"ring": name}
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "sensor_ring_used_bytes", ConstLabels: labels,
		Help: "Bytes in the ring that are not yet durable. If it nears sensor_ring_size_bytes, the worker or the disk is too slow and events will be lost: see buffer_append_latency_seconds.",
	}, func() float64 { return float64(r.used()) })
	f.NewGauge(prometheus.GaugeOpts{
		Name: "sensor_ring_size_bytes", ConstLabels: labels,
		Help: "Size of the ring. If it is too small for how long the disk stalls, raise sensor.priority_ring or sensor.bulk_ring.",
	}).Set(float64(r.size()))
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "sensor_heartbeat_age_seconds", ConstLabels: labels,
		Help: "Time since a heartbeat came back from the kernel through the ring; one is sent every 5 seconds. If it passes 15, /readyz names the stage that is stuck.",
	}, age)
}
