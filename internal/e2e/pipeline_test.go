// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestPipeline runs the main job: a workload whose every part is marked, Redis
// killed in the middle, the sensor killed between two halves; then everything
// must stand in the streams exactly once and be right.
func TestPipeline(t *testing.T) {
	requireHost(t)
	const (
		execN = 1000 // in each half
		connN = 250  // each way, in each half
	)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), "")
	h.start()

	// Out of scope: this test's own ends of the connections.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go serveTraffic(l)
	served := w.do(order{Op: "listen"}).Addr

	half := func(n int) {
		done := make(chan error, 1)
		go func() { done <- connects(order{Addr: served, From: n * connN, N: connN}) }()
		w.do(order{Op: "connect", Addr: l.Addr().String(), From: n * connN, N: connN})
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}

	// A connection may be at its end after both have all bytes.
	closed := func(ends int) {
		t.Helper()
		eventually(t, 60*time.Second, fmt.Sprintf("%d ends of connections are delivered", ends), func() bool {
			msgs, err := server.Client().XRange(t.Context(), eventsKey, "-", "+").Result()
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for _, m := range msgs {
				if data, _ := m.Values["data"].(string); strings.Contains(data, `"event_code":"net.close"`) {
					n++
				}
			}
			return n >= ends
		})
	}

	// First half; Redis dies while events flow and comes back.
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		eventually(t, 30*time.Second, "events reach Redis", func() bool {
			return server.Client().XLen(t.Context(), eventsKey).Val() > 300
		})
		server.Kill9()
		server.Restart()
	}()
	w.do(order{Op: "exec", From: 0, N: execN})
	half(0)
	<-killed
	h.delivered(60 * time.Second)
	closed(2 * connN)

	// The sensor dies; nothing happens in scope while it is away.
	h.kill9()
	h.start()
	w.do(order{Op: "exec", From: execN, N: execN})
	half(1)
	cgroup, containerID := makeContainer(t)
	w.do(order{Op: "container", Dir: cgroup, From: 2 * execN})
	h.delivered(60 * time.Second)
	closed(4 * connN)
	stops := h.finish()

	recs := readStreams(t, server.Client())
	if lost := verify(t, recs); lost != 0 {
		t.Errorf("%d seqs are named lost, want none", lost)
	}
	checkExecs(t, recs, w.pid(), 0, 2*execN+1, 2*execN, containerID)
	checkConnections(t, recs, w.pid(), port(t, l.Addr().String()), port(t, served), 2*connN)

	codes := map[string]int{}
	for _, r := range recs {
		if r.stream == decisionsKey {
			codes[r.event.StatusCode]++
		}
	}
	if codes["START"] != 1+stops || codes["STOP"] != stops || codes["BLIND_KILLED"] != 1 {
		t.Errorf("decisions by code %v, want %d START, %d STOP, 1 BLIND_KILLED", codes, 1+stops, stops)
	}
}

// checkExecs looks for every marker exactly once, with its argv, parent, exit
// code and container.
func checkExecs(t *testing.T, recs []record, root, from, n, inContainer int, containerID string) {
	t.Helper()
	seen, pids, exits := map[string]int{}, map[string]string{}, map[string]ocsfEvent{}
	for _, r := range recs {
		if r.event.Metadata.EventCode == "process.exit" {
			exits[r.event.Process.UID] = r.event
		}
		if r.event.Metadata.EventCode != "process.exec" || !strings.HasPrefix(r.event.Process.CmdLine, "/bin/true edr-e2e-") && !strings.HasPrefix(r.event.Process.CmdLine, "/bin/false edr-e2e-") {
			continue
		}
		p := r.event.Process
		m := strings.Fields(p.CmdLine)[1]
		seen[m]++
		pids[m] = p.UID
		if p.Parent == nil || p.Parent.PID != root {
			t.Errorf("%s: parent %+v, want pid %d", m, p.Parent, root)
		}
		if m == marker(0) {
			want := "/bin/true " + m + " " + strings.Repeat("A", bigArg) + " " + strings.Repeat("B", bigArg)
			if p.CmdLine != want {
				t.Errorf("%s: command line of %d bytes is not the one of %d bytes", m, len(p.CmdLine), len(want))
			}
		}
		if m == marker(inContainer) {
			if p.Container.UID != containerID || p.Container.Runtime != "docker" {
				t.Errorf("%s: container %+v, want docker %s", m, p.Container, containerID)
			}
		} else if p.Container.UID != "" {
			t.Errorf("%s: container %+v, want none", m, p.Container)
		}
	}
	wrong := 0
	for i := from; i < from+n; i++ {
		m := marker(i)
		if seen[m] != 1 {
			if wrong++; wrong < 5 {
				t.Errorf("%s is there %d times", m, seen[m])
			}
			continue
		}
		want := 0
		if i%10 == 9 {
			want = 1
		}
		if e, ok := exits[pids[m]]; !ok || e.ExitCode != want {
			if wrong++; wrong < 5 {
				t.Errorf("%s: exit seen %v with code %d, want %d", m, ok, e.ExitCode, want)
			}
		}
	}
	if wrong > 0 || len(seen) != n {
		t.Errorf("%d markers, %d of them wrong, want %d", len(seen), wrong, n)
	}
}

// checkConnections looks for every connection's open and close, both ways, with
// the exact byte counts relative to the initiator.
func checkConnections(t *testing.T, recs []record, root, outPort, inPort, n int) {
	t.Helper()
	type key struct{ out, in int }
	opened := map[string]int{}
	closed := map[string]map[key]int{"out": {}, "in": {}}
	for _, r := range recs {
		way := ""
		switch r.event.Dst.Port {
		case outPort:
			way = "out"
		case inPort:
			way = "in"
		default:
			continue
		}
		switch r.event.Metadata.EventCode {
		case "net.connect", "net.accept":
			opened[way+" "+r.event.Metadata.EventCode]++
		case "net.close":
			closed[way][key{r.event.Traffic.Out, r.event.Traffic.In}]++
		default:
			continue
		}
		if r.event.Actor.Process.PID != root {
			t.Errorf("%s: actor %d, want %d", r.event.Metadata.EventCode, r.event.Actor.Process.PID, root)
		}
	}
	if opened["out net.connect"] != n || opened["in net.accept"] != n || len(opened) != 2 {
		t.Errorf("opens %v, want %d out net.connect and %d in net.accept", opened, n, n)
	}
	for way, got := range closed {
		wrong := 0
		for i := range n {
			if got[key{clientBytes(i), serverBytes(i)}] != 1 {
				if wrong++; wrong < 5 {
					t.Errorf("%s: connection %d (%d out, %d in) was closed %d times with these counts", way, i, clientBytes(i), serverBytes(i), got[key{clientBytes(i), serverBytes(i)}])
				}
			}
		}
		if wrong > 0 || len(got) != n {
			t.Errorf("%s: %d different byte counts, %d wrong, want %d", way, len(got), wrong, n)
		}
	}
}

func port(t *testing.T, addr string) int {
	t.Helper()
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return a.Port
}

// makeContainer makes a cgroup that is named as docker names them, in the
// hierarchy that the sensor reads.
func makeContainer(t *testing.T) (dir, id string) {
	t.Helper()
	id = strings.Repeat("0123456789abcdef", 4)
	roots := []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup"}
	if own, err := os.ReadFile("/proc/self/cgroup"); err != nil {
		t.Fatal(err)
	} else if !strings.HasSuffix(string(own), "0::/\n") { // in use beside the others
		roots = slices.Insert(roots, 0, "/sys/fs/cgroup/unified")
	}
	for _, root := range roots {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}
		parent := filepath.Join(root, fmt.Sprintf("edr-e2e-%d", os.Getpid()))
		dir = filepath.Join(parent, "docker", id)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			for _, d := range []string{dir, filepath.Dir(dir), parent} {
				if err := os.Remove(d); err != nil {
					t.Error(err)
				}
			}
		})
		return dir, id
	}
	t.Fatal("no cgroup hierarchy under /sys/fs/cgroup")
	return "", ""
}

// TestLogContext follows the context keys through the whole pipeline: every
// line of a run under a case carries them.
func TestLogContext(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), "")
	h.env = []string{"EDR_SENSOR_CONTEXT__CASE_ID=C-17", "EDR_SENSOR_CONTEXT__INVESTIGATION_ID=I-4", "EDR_SENSOR_CONTEXT__USER_ID=ann"}
	h.start()
	w.do(order{Op: "exec", From: 1, N: 20})
	h.delivered(30 * time.Second)
	server.Kill9()
	w.do(order{Op: "exec", From: 30, N: 20})
	eventually(t, 30*time.Second, "the sensor notices that Redis is away", func() bool { return h.mustStatus().Mode == "buffering" })
	server.Restart()
	h.delivered(60 * time.Second)
	id := h.mustStatus().AgentID
	h.stop()

	all := h.log.all()
	if len(all) < 5 {
		t.Fatalf("%d log lines, want more", len(all))
	}
	checkLog(t, all, map[string]string{"agent_id": id, "case_id": "C-17", "investigation_id": "I-4", "user_id": "ann"})
	for _, r := range readStreams(t, server.Client()) {
		if !bytes.Contains(r.data, []byte("C-17")) || !bytes.Contains(r.data, []byte("I-4")) {
			t.Errorf("%s without its case: %s", r.event.Metadata.EventCode, r.data)
			break
		}
	}
}

// TestMetrics scrapes the running sensor as Prometheus would.
func TestMetrics(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), "")
	h.start()
	w.do(order{Op: "exec", From: 1, N: 20})
	h.delivered(30 * time.Second)
	code, page := h.get("/metrics")
	if code != 200 {
		t.Fatalf("/metrics: %d", code)
	}
	for _, path := range []string{"/healthz", "/readyz", "/status"} {
		if code, body := h.get(path); code != 200 {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	promtool(t, ".", page, "check", "metrics")
	checkMetricsDoc(t, page)
	checkSeries(t, page)
	checkExpressions(t, page)
	checkScrapeCost(t, h)
	checkLatency(t, h)
}

// TestSecondSignal ends a stop that waits for Redis; what was seen is safe.
func TestSecondSignal(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), "")
	h.start()
	w.do(order{Op: "exec", From: 1, N: 20})
	h.delivered(30 * time.Second)
	made := 20
	for try := 1; ; try++ {
		server.Stall()
		w.do(order{Op: "exec", From: made + 1, N: 20})
		made += 20
		eventually(t, 30*time.Second, "the last events are durable", func() bool {
			s := h.mustStatus()
			return s.Buffer.Last > s.Transport.Acked && s.Sensor.Rings["priority"].Used == 0
		})
		from := len(h.log.all())
		if err := h.proc.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		eventually(t, 30*time.Second, "the stop begins", func() bool {
			return slices.ContainsFunc(h.log.all()[from:], func(l []byte) bool { return bytes.Contains(l, []byte(`"stopping"`)) })
		})
		if err := h.proc.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Fatal(err)
		}
		_ = h.proc.Wait()
		server.Resume()
		status := h.proc.ProcessState.Sys().(syscall.WaitStatus)
		if status.Signaled() && status.Signal() == syscall.SIGTERM {
			break
		}
		if try == 3 {
			t.Fatalf("ended with %v, want the second signal to have ended it", h.proc.ProcessState)
		}
		// The stop waits for seconds only, and may have ended before the second signal came.
		h.start()
		h.delivered(60 * time.Second)
	}
	h.start()
	h.delivered(60 * time.Second)
	h.stop()
	recs := readStreams(t, server.Client())
	if lost := verify(t, recs); lost != 0 {
		t.Errorf("%d seqs are named lost", lost)
	}
	checkExecs(t, recs, w.pid(), 1, made, -1, "")
}

// TestStopKeepsItsDecisions has Redis come back while the sensor stops: what the last
// deliveries decide is in the log by then, and is delivered as a record by the next run.
func TestStopKeepsItsDecisions(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), "")
	h.start()
	last := 0
	for try := 1; last == 0; try++ {
		if try > 10 {
			t.Fatal("Redis never came back during a stop: the test does not bite")
		}
		h.delivered(60 * time.Second)
		server.Kill9()
		w.do(order{Op: "exec", From: 1, N: 1})
		h.readyz(200, "ready: buffering")
		from := len(h.log.all())
		server.Restart()
		if code := h.stop(); code != 0 {
			t.Fatalf("exit code %d", code)
		}
		stopping := false
		for _, l := range h.log.all()[from:] {
			stopping = stopping || bytes.Contains(l, []byte(`"code":"STOP"`))
			if stopping && bytes.Contains(l, []byte(`"code":"DELIVERY_RESUMED"`)) {
				last = try
			}
		}
		h.start()
	}
	t.Logf("Redis came back during stop %d", last)
	h.delivered(60 * time.Second)
	h.finish()
	checkTold(t, readStreams(t, server.Client()), h.log.all())
}
