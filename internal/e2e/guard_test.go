// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestGuard has a sensor do more than its budget of CPU: it gives up hashes, says so, and
// misses no program; when it is quiet again it takes up what it gave up, step by step.
func TestGuard(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	c := server.Client()
	defer c.Close()
	// What waits for a CPU on this host counts from a tenth of the budget on, which has to be
	// more than a sensor takes that has nothing to do.
	h := newHost(t, w, server.Addr(), fmt.Sprintf("sensor: {scope: \"tree:%d\"}\nguard: {cpu_percent: 10}\n", w.pid()))
	h.start()
	_, calm := h.get("/metrics")
	shed := func(code string) []selfRecord {
		return decisions(t, readStreams(t, c, decisionsKey), decisionsKey, code)
	}
	first := 1 // 0 has very long arguments
	eventually(t, 3*time.Minute, "it gives up something", func() bool {
		w.do(order{Op: "exec", From: first, N: 300, ArgSize: 16 << 10})
		first += 300
		return len(shed("LOAD_SHED")) > 0
	})
	w.do(order{Op: "shell", Name: "new", Script: fmt.Sprintf("cp /bin/true %[1]s/true; %[1]s/true never-hashed", h.dir)})
	if d := shed("LOAD_SHED")[0].Unmapped.Sensor; d["before"] != "nothing" || d["after"] != "hashes" || d["readings"] == nil {
		t.Errorf("%v", d)
	}
	_, busy := h.get("/metrics")
	metricstest.Moved(t, metricstest.Parse(calm), metricstest.Parse(busy), "agent_shed_level")
	eventually(t, 5*time.Minute, "it takes up something again", func() bool { return len(shed("LOAD_RESTORED")) > 0 })
	if d := shed("LOAD_RESTORED")[0].Unmapped.Sensor; d["not_hashed"] == 0.0 {
		t.Errorf("%v", d)
	}
	h.delivered(30 * time.Second)
	recs := readStreams(t, c)
	seen, unhashed := map[string]int{}, 0
	for _, r := range recs {
		if r.event.Metadata.EventCode != "process.exec" {
			continue
		}
		_, args, _ := strings.Cut(r.event.Process.CmdLine, " ")
		mark, _, _ := strings.Cut(args, " ") // the load has another one, that is long
		seen[mark]++
		if mark == "never-hashed" && bytes.Contains(r.data, []byte(`"hash_note":"shed"`)) {
			unhashed++
		}
	}
	if unhashed != 1 {
		t.Errorf("%d execs say that they were not hashed, want 1", unhashed)
	}
	for i := 1; i < first; i++ {
		if seen[marker(i)] != 1 {
			t.Fatalf("%d execs with %s, want 1", seen[marker(i)], marker(i))
		}
	}
}
