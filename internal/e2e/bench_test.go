// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestFootprint measures what the whole sensor costs: CPU and memory at rest and
// at 5,000 events a second. It asserts nothing and runs in make bench only.
func TestFootprint(t *testing.T) {
	if os.Getenv("EDR_FOOTPRINT") == "" {
		t.Skip("EDR_FOOTPRINT is not set: this is a measurement, see make bench")
	}
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{})
	h := newHost(t, w, server.Addr(), "")
	h.start()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go serveTraffic(l)
	served := w.do(order{Op: "listen"}).Addr
	h.delivered(30 * time.Second)

	measure := func(name string, load func()) {
		before, events, start := cpuTime(t, h.proc.Process.Pid), h.mustStatus().Buffer.Last, time.Now()
		load()
		wall := time.Since(start)
		cpu := cpuTime(t, h.proc.Process.Pid) - before
		n := h.delivered(30*time.Second).Buffer.Last - events
		line := fmt.Sprintf("%-24s %7.0f events/s  CPU %5.2f %% of a core", name, float64(n)/wall.Seconds(), 100*cpu.Seconds()/wall.Seconds())
		if n > 100 {
			line += fmt.Sprintf(" (%.1f us an event)", float64(cpu.Microseconds())/float64(n))
		}
		rss, anon := memory(t, h.proc.Process.Pid)
		t.Logf("%s  RSS %.1f MiB (anonymous %.1f)", line, rss, anon)
	}
	measure("idle", func() { <-time.After(10 * time.Second) })
	const perSec, seconds = 1250, 10
	measure("5,000 events/s (TCP)", func() {
		done := make(chan error, 1)
		go func() { done <- connects(order{Addr: served, N: perSec * seconds, PerSec: perSec}) }()
		w.do(order{Op: "connect", Addr: l.Addr().String(), N: perSec * seconds, PerSec: perSec})
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	measure("exec as fast as it goes", func() { w.do(order{Op: "exec", From: 1, N: 5000}) })
	h.stop()
}

// cpuTime is the user and system time of a process so far.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+2:])
	user, _ := strconv.ParseInt(string(f[11]), 10, 64)
	system, _ := strconv.ParseInt(string(f[12]), 10, 64)
	return time.Duration(user+system) * (time.Second / 100)
}

// memory is the resident set of a process and the anonymous part of it, in MiB.
func memory(t *testing.T, pid int) (rss, anon float64) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		var kib float64
		if n, _ := fmt.Sscanf(string(line), "VmRSS: %f kB", &kib); n == 1 {
			rss = kib / 1024
		}
		if n, _ := fmt.Sscanf(string(line), "RssAnon: %f kB", &kib); n == 1 {
			anon = kib / 1024
		}
	}
	return rss, anon
}
