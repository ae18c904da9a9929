// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"runtime"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/aurorasoc/edr-sensor/bpf"
)

// metrics are those of the sensor as a whole. A help text is what the metric
// means, then from "If it" on what to do when it moves; docs/metrics.md is made of
// both.
type metrics struct {
	config *prometheus.GaugeVec
	shed   prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer, version, kernel string) *metrics {
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	f := promauto.With(reg)
	f.NewGauge(prometheus.GaugeOpts{
		Name:        "agent_build_info",
		Help:        "1, with the version of the sensor and of Go, the SHA-256 of the kernel programs, and the kernel they run on. If it differs from host to host, so may what they see: finish the rollout.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version(), "object": bpf.ObjectHash(), "kernel": kernel},
	}).Set(1)
	return &metrics{
		shed: f.NewGauge(prometheus.GaugeOpts{
			Name: "agent_shed_level",
			Help: "How much the sensor gives up to spare the host: 0 nothing, 1 hashes, 2 lookups, 3 file events above a tenth of the limit, 4 above a hundredth. If it stays above 0, the sensor or the host is short of CPU or memory: LOAD_SHED on the decisions stream says of what.",
		}),
		config: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "agent_config_info",
			Help: "1, with the SHA-256 of the configuration in force, as in START on the decisions stream. If it differs within a group of hosts, one of them was missed, or changed by hand.",
		}, []string{"sha256"}),
	}
}

// configured says which configuration is in force.
func (m *metrics) configured(hash string) {
	m.config.Reset()
	m.config.WithLabelValues(hash).Set(1)
}
