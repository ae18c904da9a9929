// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// What is given up is counted, what is known is still told, and what is done to the sensor
// itself is looked up all the same.
func TestShed(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	h := newHost(t, func(o *Options) { o.Registerer = reg })
	before := metricstest.Gather(t, reg)
	self, ok := procfs("/proc").stat(uint32(os.Getpid()))
	if !ok {
		t.Fatal("this process is not in /proc")
	}
	h.Enricher.proc = "/proc" // the only process that is surely there is this one
	known := event.ProcessKey{PID: uint32(os.Getpid()), StartTime: self.ticks * tick}

	h.Shed(true, true)
	if ev := h.apply(h.at(event.FileDelete, known)); ev.Subject == nil || ev.Subject.Path != "" {
		t.Errorf("looked up: %+v", ev.Subject)
	}
	exec := h.execEvent(key(77, h.now), key(1, 1), "/bin/x")
	exec.Exec.Exe = event.File{Ino: 7, Size: 9, CTime: 1}
	if p := h.apply(exec).Subject; p.SHA256 != "" || p.HashNote != noteShed {
		t.Errorf("hash %q, note %q", p.SHA256, p.HashNote)
	}
	if diff := cmp.Diff(Shed{Hashes: 1, Lookups: 2}, h.ShedSoFar()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	metricstest.Moved(t, before, metricstest.Gather(t, reg), "enrich_lookups_shed_total", "enrich_hashes_total")

	other := newHost(t, nil)
	other.Enricher.proc = "/proc"
	other.Shed(true, true)
	own := other.at(event.FileDelete, known)
	own.File.Flags = event.FileOfConfig
	if ev := other.apply(own); ev.Subject == nil || ev.Subject.Path == "" {
		t.Errorf("who changes the sensor's files is not looked up: %+v", ev.Subject)
	}
}
