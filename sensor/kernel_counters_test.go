// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// storm overruns a ring of one page and returns what arrived and what was counted, by
// kind. With decoy set the programs count into a map that nobody reads.
func storm(t *testing.T, decoy bool) (received [event.Kinds]uint64, counted [event.Kinds]KindCounter) {
	a := startActor(t)
	k := prepare(t, kernelOptions{
		Scope:         Scope{Mode: ScopeTree, PID: uint32(a.pid)},
		PriorityBytes: os.Getpagesize(),
		BulkBytes:     os.Getpagesize(),
	})
	if decoy {
		counters := k.maps["kind_counters"]
		other, err := ebpf.NewMap(k.spec.Maps["kind_counters"])
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		k.maps["kind_counters"] = other
		defer func() { k.maps["kind_counters"] = other }() // so that both are closed
		if err := k.attach(); err != nil {
			t.Fatal(err)
		}
		k.maps["kind_counters"] = counters
		defer counters.Close()
	} else if err := k.attach(); err != nil {
		t.Fatal(err)
	}
	priority, bulk := newTap(t, k.priority), newTap(t, k.bulk)
	count := func() {
		for _, r := range append(priority.rest(), bulk.rest()...) {
			received[kindOf(r.SensorEventHeader)]++
		}
	}
	for range 5 { // full, emptied, full again
		a.must(request{Op: "storm", Path: "/bin/true", Count: 60})
		a.must(request{Op: "converse", Network: "tcp4", Count: 30})
		count()
	}
	if err := k.detach(); err != nil { // the actors' last words
		t.Fatal(err)
	}
	count()
	counted, err := k.counters()
	if err != nil {
		t.Fatal(err)
	}
	return received, counted
}

// balanced reports whether what was to be said either arrived or was counted as lost.
func balanced(received [event.Kinds]uint64, counted [event.Kinds]KindCounter) bool {
	for kind, c := range counted {
		if c.Attempts != received[kind]+c.Lost {
			return false
		}
	}
	return true
}

func TestRootCountersAreExact(t *testing.T) {
	received, counted := storm(t, false)
	for kind, c := range counted {
		t.Logf("%s: %d attempts, %d lost, %d received", event.Kind(kind), c.Attempts, c.Lost, received[kind])
	}
	if !balanced(received, counted) {
		t.Error("attempts are not what was received and lost")
	}
	for kind, atLeast := range map[event.Kind]uint64{
		event.Exec: 300, event.Fork: 300, event.Exit: 300,
		event.TCPConnect: 150, event.TCPAccept: 150, event.TCPListen: 150, event.TCPClose: 300,
	} {
		if c := counted[kind]; c.Attempts < atLeast {
			t.Errorf("%s: %d attempts, want %d", kind, c.Attempts, atLeast)
		}
	}
	for _, kind := range []event.Kind{event.Exec, event.TCPClose} {
		if c := counted[kind]; c.Lost == 0 || received[kind] == 0 {
			t.Errorf("%s: %d lost, %d received; the ring was to overrun, and not only", kind, c.Lost, received[kind])
		}
	}
}

// The check above must notice when the counters are not those of the programs.
func TestRootCountersNegativeControl(t *testing.T) {
	if received, counted := storm(t, true); balanced(received, counted) {
		t.Error("counters that nothing counts into balance")
	}
}

// BenchmarkRootPrograms measures the programs by the kernel's own run statistics, in
// ns per run, with the working process in scope and out of scope. The ring is not read
// meanwhile: the sensor's reader lags its consumer position too, and spares the kernel
// a wakeup for each record.
func BenchmarkRootPrograms(b *testing.B) {
	require(b, "root")
	require(b, "btf")
	works := []struct {
		name string
		r    request
	}{
		{"process", request{Op: "storm", Path: "/bin/true", Count: 200}},
		{"process argv 100 KB", request{Op: "storm", Path: "/bin/true", Args: []string{strings.Repeat("x", 100_000)}, Count: 200}},
		{"tcp", request{Op: "converse", Network: "tcp4", Up: 100, Down: 100, Count: 200}},
	}
	for _, scope := range []string{"in scope", "out of scope"} {
		for _, work := range works {
			b.Run(work.name+" "+scope, func(b *testing.B) {
				worker, root := startActor(b), startActor(b)
				if scope == "in scope" {
					root = worker
				}
				stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
				if err != nil {
					b.Fatal(err)
				}
				defer stats.Close()
				runtime, runs := map[string]time.Duration{}, map[string]uint64{}
				for b.Loop() {
					k := openKernel(b, kernelOptions{Scope: Scope{Mode: ScopeTree, PID: uint32(root.pid)}, PriorityBytes: 64 << 20})
					worker.must(work.r)
					for _, at := range k.attached {
						for _, program := range at.programs {
							s, err := program.Stats()
							if err != nil {
								b.Fatal(err)
							}
							runtime[at.section] += s.Runtime
							runs[at.section] += s.RunCount
						}
					}
					if err := k.close(); err != nil {
						b.Fatal(err)
					}
				}
				for section, n := range runs {
					if n >= uint64(work.r.Count) {
						b.ReportMetric(float64(runtime[section].Nanoseconds())/float64(n), "ns/"+section[len("tp_btf/"):])
					}
				}
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}
