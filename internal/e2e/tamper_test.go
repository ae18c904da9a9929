// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestTampering does to the sensor what an intruder would, partly by a program that is
// excluded: each is an event of high severity and a decision that name who did it.
// What its supervisor does, and others do to other files, is neither.
func TestTampering(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	c := server.Client()
	defer c.Close()
	chmod, err := exec.LookPath("chmod")
	if err != nil {
		t.Fatal(err)
	}
	h := newHost(t, w, server.Addr(), fmt.Sprintf("sensor: {scope: \"tree:%d\", file: {per_process: 1, exclude_executables: [%q]}}\n", w.pid(), chmod))
	h.env = []string{"SOME_API_TOKEN=hunter2", "HARMLESS=value"}
	h.start()
	pid := h.proc.Process.Pid
	_, before := h.get("/metrics")
	run := func(args ...string) {
		t.Helper()
		w.do(order{Op: "shell", Name: "intruder", Script: strings.Join(args, " ")})
	}

	t.Run("hardened", func(t *testing.T) {
		environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(environ), "hunter2") || !strings.Contains(string(environ), "HARMLESS=value") {
			t.Errorf("environment %q", environ)
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(status), "NoNewPrivs:\t1") {
			t.Errorf("%s", status)
		}
		var core unix.Rlimit
		if err := unix.Prlimit(pid, unix.RLIMIT_CORE, nil, &core); err != nil || core.Cur != 0 || core.Max != 0 {
			t.Errorf("core limit %+v, %v", core, err)
		}
	})

	run("/bin/kill", "-STOP", fmt.Sprint(pid))
	run("/bin/kill", "-CONT", fmt.Sprint(pid))
	run(chmod, "600", h.config)
	run(chmod, "700", h.dir) // above it, and its permissions are nobody's business
	tampered := func() (out []selfRecord) { return tamperings(t, c) }
	eventually(t, 30*time.Second, "both are decisions", func() bool { return len(tampered()) >= 2 })
	for i, want := range []struct{ after, path, part string }{{"process.signal SIGSTOP", "kill", ""}, {"file.chmod " + h.config, "chmod", "configuration"}} {
		d := tampered()[i]
		process, _ := d.Unmapped.Sensor["process"].(map[string]any)
		path, _ := process["path"].(string)
		part, _ := d.Unmapped.Sensor["part"].(string)
		if d.Unmapped.Sensor["after"] != want.after || !strings.HasSuffix(path, "/"+want.path) || part != want.part {
			t.Errorf("decision %d is %+v, want %+v", i, d, want)
		}
	}
	if n := len(tampered()); n != 2 {
		t.Errorf("%d decisions", n)
	}
	events := map[string]int{}
	for _, r := range readStreams(t, c, eventsKey) {
		var e struct {
			Severity int `json:"severity_id"`
			Unmapped struct {
				Part string `json:"sensor_part"`
			} `json:"unmapped"`
		}
		if err := json.Unmarshal(r.data, &e); err != nil {
			t.Fatal(err)
		}
		if e.Severity == 4 {
			events[r.event.Metadata.EventCode+" "+e.Unmapped.Part]++
		}
	}
	if len(events) != 2 || events["process.signal "] != 1 || events["file.chmod configuration"] != 1 {
		t.Errorf("events of high severity: %v", events)
	}
	_, after := h.get("/metrics")
	metricstest.Moved(t, metricstest.Parse(before), metricstest.Parse(after), "sensor_tampering_total")
	h.stop() // by who started it
	if n := len(tampered()); n != 2 {
		t.Errorf("%d decisions after a stop", n)
	}
}

func tamperings(t *testing.T, c *redis.Client) []selfRecord {
	t.Helper()
	return decisions(t, readStreams(t, c, decisionsKey), decisionsKey, "TAMPERING")
}
